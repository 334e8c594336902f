"""Output while a model loads: one status line on a terminal, and none of the libraries' own messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

gguf_reader: Any = modeling_gguf_pytorch_utils
logger = logging.getLogger("loclin")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log and progress bars inside the block; downloads keep theirs, which are the hub's."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars_off = are_progress_bars_disabled()
    gguf_bar = getattr(gguf_reader, "tqdm", None)  # it has no setting, so it is replaced

    def show_bars(wanted: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the hub's client warns where its environment variable rules
            if wanted:
                transformers_logging.enable_progress_bar()
            else:
                transformers_logging.disable_progress_bar()
            # either has switched the hub's bars too
            (disable_progress_bars if hub_bars_off else enable_progress_bars)()

    transformers_logging.set_verbosity_error()
    show_bars(False)
    if gguf_bar is not None:
        gguf_reader.tqdm = partial(gguf_bar, disable=True)
    try:
        yield
    finally:
        if gguf_bar is not None:
            gguf_reader.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        show_bars(bars)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Show the current stage on stderr, only on a terminal, and log it always; yields what shows the next stage."""
    console = Console(stderr=True)
    logger.info(text)
    if not console.is_terminal:
        yield logger.info
        return
    with console.status(text) as line:

        def say(stage: str) -> None:
            logger.info(stage)
            line.update(stage)

        yield say
