"""How long work tells of its steps: bars on a terminal, a function of the caller's, or nothing."""

from __future__ import annotations

from collections.abc import Callable
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
    """The function that is told each step; OptionError when it is neither True, False nor a function."""
    if isinstance(progress, bool):
        return lambda _step: None
    if not callable(progress):
        raise OptionError(f"progress={progress!r}: give True, False, or a function that takes each step's name")
    return progress


def with_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function's `progress` argument decide whether anything inside it draws bars; `steps` checks it."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        token = _quiet.set(_quiet.get() or kwargs.get("progress") is False)
        try:
            return function(*args, **kwargs)
        finally:
            _quiet.reset(token)

    return run


def bar(items: Any = None, *, shown: bool = True, **options: Any) -> tqdm:
    """A tqdm bar that appears after two seconds, on a terminal, unless the caller wants none."""
    hidden = None if shown and not _quiet.get() else True  # None: on a terminal only
    return tqdm(items, delay=2, leave=False, disable=hidden, **options)
