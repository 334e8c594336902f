"""Standard input, output and error, whatever their encoding, and whoever reads them."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from loclin.errors import PromptError

ERRORS = "loclin.stand_in"
BROKEN_PIPE = 141
"""What a shell gives for a program that SIGPIPE ended: whoever read its output has seen enough."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EINVAL, errno.ENXIO}
_LOOKALIKES = {
    ">": "▶▸►→⇒⟩", "<": "◀◂◄←⟨", "=": "▐▌", "#": "█▇▆▅▄▃▂▁", "-": "─━═╌╍┄┅┈┉╴╶╸╺–—−", "|": "│┃║╎╏┆┇┊┋╵╷╹╻‖",
    '"': "“”", "'": "‘’′", "~": "…≈", "_": "·␣", "\\n": "↵", "\\t": "⇥", "s": "σ", "l": "λ", "x": "×", "*": "•",
    "inf": "∞", "<=": "≤", ">=": "≥", "+-": "±",
}  # fmt: skip
_STAND_INS = {character: plain for plain, characters in _LOOKALIKES.items() for character in characters}
used: dict[str, str] = {}
"""The characters that had to be replaced so far, and by what."""


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """Write characters that an encoding lacks: a look-alike where there is one, else a Python escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_replaced, error.object[error.start : error.end])), error.end


def _replaced(character: str) -> str:
    plain = _STAND_INS.get(character)
    if plain is None:
        box = unicodedata.name(character, "").startswith("BOX DRAWINGS")
        plain = "+" if box else character.encode("ascii", "backslashreplace").decode("ascii")
    used[character] = plain
    return plain


def prepare() -> None:
    """Replace what the encodings of the process's own streams lack, so that nothing that is printed ends it."""
    used.clear()
    codecs.register_error(ERRORS, _stand_in)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def replaced(most: int = 8) -> str | None:
    """Say which characters were replaced, in a line; None where none were."""
    if not used:
        return None
    shown = ", ".join(f"{plain} for U+{ord(c):04X}" for c, plain in list(used.items())[:most])
    more = f" and {len(used) - most} more" if len(used) > most else ""
    encoding = getattr(sys.stdout, "encoding", None) or "its encoding"
    return f"printed in {encoding} with stand-ins: {shown}{more}; PYTHONIOENCODING=utf-8, --json and --html have all"


def read_prompt() -> str:
    """Read standard input as text, decided on its bytes: UTF-8, or else what the locale says; no control characters."""
    if sys.stdin is None:
        raise PromptError("there is no standard input to read a prompt from")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise PromptError(f"cannot read standard input: {error.strerror or error}") from error
    if b"\0" in data:
        raise PromptError("standard input is not text: it has NUL bytes; give UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refusal = f"standard input is not text: byte {error.start + 1} of {len(data)} is not UTF-8; give UTF-8"
    try:
        text = data.decode(sys.stdin.encoding or "utf-8")
    except UnicodeDecodeError:
        raise PromptError(refusal) from None
    if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
        raise PromptError(refusal)
    return text


@contextmanager
def lost_output() -> Iterator[None]:
    """End quietly where whoever read the output has gone: that is no fault."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as stopped:  # rich and typer end with 1, which here means "not exact"
        if not any(isinstance(error, BrokenPipeError) for error in (stopped, stopped.__context__)):
            raise
        discard()
        raise SystemExit(BROKEN_PIPE) from None


def is_full(error: OSError) -> bool:
    """Whether a write to standard output, which has no file name, has failed."""
    return error.filename is None and error.errno in _FULL


def discard() -> None:
    """Send what is still in the streams' buffers nowhere, or Python would fail on it when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
