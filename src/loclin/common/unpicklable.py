"""Objects that run a model: they cannot be pickled, and say what can be saved instead."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, TypeVar

from loclin.errors import OutputError

U = TypeVar("U", bound="Unpicklable")


class Unpicklable:
    """A class whose objects hold a model with hooks and locks. A shallow copy shares the model."""

    instead: ClassVar[str]
    """What to do instead of pickling."""

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Refuse to be pickled or copied deeply; the OutputError says what can be saved instead."""
        name = type(self).__name__
        raise OutputError(f"a {name} holds the model and cannot be pickled or copied deeply: {self.instead}")

    def __copy__(self: U) -> U:
        """A shallow copy."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied
