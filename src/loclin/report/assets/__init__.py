"""The pages' style sheets, scripts and templates."""

from importlib.resources import files


def asset(*names: str) -> str:
    """Read some of them, one behind the other."""
    here = files("loclin.report.assets")
    return "".join(here.joinpath(name).read_text("utf-8") for name in names)
