"""What goes wrong, said once and clearly: every message names the fault and the fix."""


class LoclinError(Exception):
    """A fault the user can mend. The command line prints its one line and exits with code 2.

    `module` is the path of the module that is to blame, where one is.
    """

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message)
        self.module = module


class OptionError(LoclinError, ValueError):
    """An option's value is not one of those there are; the message lists them."""


class ModelError(LoclinError):
    """The model cannot be found, read or used."""


class PromptError(LoclinError):
    """The prompt is empty, too long, or a position lies outside it."""


class NotExactError(LoclinError):
    """A module does not become linear when its coefficients are held; the message names it."""


class BudgetError(LoclinError):
    """The work asked for does not fit the memory budget; the message says the least that works."""


class MissingExtraError(LoclinError, ImportError):
    """An optional package is not installed; the message says what needs it, and the pip command."""

    def __init__(self, purpose: str, package: str, extra: str) -> None:
        super().__init__(f'{purpose} needs {package}: pip install "loclin[{extra}]"')


class OutputError(LoclinError):
    """A result cannot be written where it was asked for."""


class ResultError(LoclinError):
    """A saved result cannot be read: it is missing, not loclin's, another one's, or not as it was written."""


class SteeringError(LoclinError):
    """Steering does not fit the model, or has driven its values out of the numbers; the message says which."""


def first_line(fault: BaseException) -> str:
    """Shorten a library's error to its first line."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__
