"""The table of families, on a terminal and as a page of the documentation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from loclin.analyses.coverage.describe import NONE
from loclin.analyses.coverage.run import Coverage, FamilyResult, Status
from loclin.report.grid import Column, Grid, show
from loclin.report.text import error

_STYLES: dict[Status, str] = {
    "exact": "bold green",
    "affine": "green",
    "refused": "yellow",
    "not built": "dim",
    "error": "bold red",
}
_CERTIFIED: tuple[Status, ...] = ("exact", "affine")
_PARTS = ("attention", "positions", "norm", "MLP")
_NUMBERS = ("runs", "float64", "float32", "bias", "forward")
_PAGE = """\
# Coverage

Every family that transformers knows as a causal language model, tried on a tiny random model: built with weights far
from where training starts, frozen at a prompt of seven tokens, and certified in float64 (`precision="double"`) and
float32 (as the model comes), with each way to split a gate. Written by:

```
loclin coverage --json coverage.json --markdown docs/coverage.md
```

{versions}.

{counts}

**exact**: with its coefficients held at the prompt, the model is the linear map J x. **affine**: it is J x + b, where b
comes from its biases. **refused**: loclin says what is not linear and gives no map.

*float64* and *float32* are the largest reconstruction errors |J x + b − y| / |y|; *bias* is |b| / |y|; *forward* says
how far holding the coefficients moved the float32 forward pass. The parts are those of the tiny model that the prompt
runs through, named by its classes and its config; the number of experts is the tiny model's.
"""


def render_coverage(coverage: Coverage, console: Console) -> None:
    """Print the families as a table, then why some are not exact, then how many there are of each status."""
    table = Grid.of(
        Column("family", "key"), Column("parts", "words"), *map(Column, _NUMBERS), Column("status", "parts")
    )
    for result in coverage.results:
        parts = Text(" · ".join(part for part in _parts(result) if part != NONE), "dim")
        numbers = (Text(number) for number in _numbers(result))
        table.add(Text(result.family, "bold"), parts, *numbers, Text(result.status, _STYLES[result.status]))
    show(console, table)
    failed = [result for result in coverage.results if result.reason]
    if failed:
        console.print()
    for result in failed:
        line = Text.assemble((result.family, "bold"), " ", (result.status, _STYLES[result.status]), ": ")
        console.print(line.append(_why(result)), soft_wrap=True)
    console.print()
    show(console, Text(_counted(coverage), "bold"), Text(_versions(coverage), "dim"))


def coverage_markdown(coverage: Coverage) -> str:
    """Write the page: a table of the certified families, and one for each way of not being so."""
    found = {status: [r for r in coverage.results if r.status == status] for status in _STYLES}
    certified = [r for r in coverage.results if r.status in _CERTIFIED]
    pieces = [_PAGE.format(versions=_versions(coverage), counts=f"**{_counted(coverage)}.**")]
    if certified:
        heads = ("family", "class", *_PARTS, *_NUMBERS, "status")
        rows = [[r.family, _code(r.class_name), *map(_escaped, _parts(r)), *_numbers(r), r.status] for r in certified]
        pieces.append(_section("Certified", heads, rows))
    for status in ("refused", "error"):
        failures = ("family", "class", *_PARTS, "runs passed", "module", "reason")
        rows = [
            [r.family, _code(r.class_name), *map(_escaped, _parts(r)), _ratio(r), _code(_module(r)), _escaped(r.reason)]
            for r in found[status]
        ]
        if rows:
            pieces.append(_section(status.capitalize(), failures, rows))
    if found["not built"]:
        rows = [[result.family, _escaped(result.reason)] for result in found["not built"]]
        pieces.append(_section("Not built", ("family", "reason"), rows))
    return "\n".join(pieces)


def _parts(result: FamilyResult) -> list[str]:
    parts = result.parts
    return [NONE] * len(_PARTS) if parts is None else [parts.attention, parts.positions, parts.norm, parts.mlp]


def _numbers(result: FamilyResult) -> list[str]:
    double, single, bias = result.worst("float64"), result.worst("float32"), result.bias_share
    moved = result.forward_error("float32")
    written = [NONE if number is None else error(number) for number in (double, single, bias)]
    return [_ratio(result), *written, "bit-identical" if moved == 0 else NONE if moved is None else error(moved)]


def _ratio(result: FamilyResult) -> str:
    return f"{result.passed}/{len(result.runs)}" if result.runs else NONE


def _module(result: FamilyResult) -> str:
    return result.failure.module if result.failure else ""


def _why(result: FamilyResult) -> str:
    module = _module(result)
    return f"{module}: {result.reason}" if module else result.reason


def _counted(coverage: Coverage) -> str:
    counted = ", ".join(f"{n} {status}" for status, n in coverage.counts.items() if n or status == "error")
    return f"{len(coverage.results)} families: {counted}"


def _versions(coverage: Coverage) -> str:
    return ", ".join(f"{name} {version}" for name, version in coverage.versions.items())


def _section(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join([f"## {title}", "", *lines, ""])


def _code(text: str) -> str:
    return f"`{text}`" if text else NONE


def _escaped(text: str) -> str:
    """Leave nothing in a reason that Markdown or a table would take for its own."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", text)
