"""The errors of loclin. Every message names what is wrong and what to do."""


class LoclinError(Exception):
    """The base class of all errors that a user can fix. The command line prints one line and exits with code 2.

    `module` is the path of the module at fault, if there is one.
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class OptionError(LoclinError, ValueError):
    """An option has an invalid value; the message names the valid ones."""


class ModelError(LoclinError):
    """The model cannot be found, read or used."""


class PromptError(LoclinError):
    """The prompt is empty, too long, or a position lies outside it."""


class NotExactError(LoclinError):
    """A module is not linear with its coefficients frozen; the message names it."""


class BudgetError(LoclinError):
    """The computation does not fit the memory budget; the message names the smallest budget that works.

    Attributes
    ----------
    least: that budget in bytes, where it is known.
    """

    def __init__(self, message: str, least: int | None = None) -> None:
        super().__init__(message)
        self.least = least


class MissingExtraError(LoclinError, ImportError):
    """An optional package is not installed; the message names the purpose and the pip command."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {package}: pip install "loclin[{extra}]"')


class OutputError(LoclinError):
    """A result cannot be written to the given path."""


class ResultError(LoclinError):
    """A saved result cannot be read: the file is missing, altered, of another kind, or not written by loclin."""


class SteeringError(LoclinError):
    """A steering does not fit the model, or makes its values infinite or NaN."""


def first_line(fault: BaseException) -> str:
    """Shorten a library's error to its first line."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
