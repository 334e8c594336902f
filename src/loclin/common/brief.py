"""Short reprs of results: one line, whatever they contain."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

_LINE, _TEXT, _FEW = 200, 40, 3


def brief(self: Any) -> str:
    """The repr of a large dataclass: tensors by their shapes, collections by their lengths.

    Written `__repr__ = brief` in its body. Fields beyond about 200 characters are left out.
    """
    line = f"{type(self).__name__}("
    shown = [field for field in fields(self) if field.repr]
    for number, field in enumerate(shown):
        part = f"{', ' if number else ''}{field.name}={_short(getattr(self, field.name))}"
        if len(line) + len(part) > _LINE:
            return f"{line}{', ' if number else ''}…)"
        line += part
    return f"{line})"


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, bool | int):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _TEXT else value[: _TEXT - 1] + "…")
    if isinstance(value, list | tuple | dict | set | frozenset):
        plain = not isinstance(value, dict) and len(value) <= _FEW
        if plain and all(item is None or isinstance(item, bool | int | float | str) for item in value):
            return f"[{', '.join(_short(item) for item in value)}]"
        return f"<{type(value).__name__} of {len(value)}>"
    return f"{type(value).__name__}(…)" if is_dataclass(value) else f"<{type(value).__name__}>"
