"""How long work tells of its steps: bars on a terminal, a function of the caller's, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from tqdm.auto import tqdm

from loclin.errors import OptionError

P = ParamSpec("P")
R = TypeVar("R")
Progress = bool | Callable[[str], None]
"""True: bars for what takes more than two seconds, where standard error is a terminal. False: nothing. A function is
told the name of each step as it begins, beside the bars."""

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def steps(progress: Progress) -> Callable[[str], None]:
    """The function that is told each step.

    Raises
    ------
    OptionError
        When it is neither True, False nor a function.
    """
    if not isinstance(progress, bool) and not callable(progress):
        raise OptionError(f"progress={progress!r}: give True, False, or a function that takes each step's name")
    return _silent if isinstance(progress, bool) else progress


def with_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's `progress` argument decide whether anything inside it draws bars; `steps` checks it."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _without_bars(_quiet.get() or kwargs.get("progress") is False):
            return function(*args, **kwargs)

    return run


@contextmanager
def _without_bars(quiet: bool) -> Iterator[None]:
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


def bar(items: Any = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar that appears after two seconds, on a terminal, unless the caller wants none."""
    hidden = None if shown and not _quiet.get() else True  # None: on a terminal only
    return tqdm(items, delay=2, leave=False, disable=hidden, **options)


def _silent(_step: str) -> None:
    """Tell nobody."""
