"""What is said of the families of language models, and the page of the documentation."""

from __future__ import annotations

from rich.text import Text

from loclin.analyses.coverage.describe import NONE
from loclin.analyses.coverage.result import GATES, Coverage, FamilyResult, Status
from loclin.models.task import Task
from loclin.report.run import run_of
from loclin.report.sheet import PAGE, Block, Limits, Section, Sheet, describe
from loclin.report.table import Cell, Column, Table
from loclin.report.text import error, plain

_STYLES: dict[Status, str] = {
    "exact": "bold green",
    "affine": "green",
    "refused": "yellow",
    "not built": "dim",
    "error": "bold red",
}
_PARTS = ("attention", "positions", "norm", "MLP")
_NUMBERS = ("runs", "float64", "float32", "bias", "forward")
_FAMILIES: dict[Task, str] = {
    "causal": "Every family that transformers knows as a causal language model",
    "masked": "Every family that transformers knows as a masked language model",
    "classification": "Every family that transformers knows as a sequence classifier",
    "seq2seq": "Every family that transformers builds with `AutoModelForSeq2SeqLM`",
}
_ABOUT: dict[Task, str] = {
    "causal": "",
    "masked": "\nThe map is that from all input embeddings to the final hidden state of the last token.\n",
    "classification": """
The map is that from all input embeddings to the final hidden state that the classes read, of the first or the last
token. Classes that read several tokens are refused. Encoder-decoders have two embeddings for each token of the prompt.
""",
    "seq2seq": """
The map is that from the embeddings of the encoder's seven tokens and the decoder's three to the final hidden state of
the last. Families of sound and text that are no encoder-decoders read seven tokens of text.
""",
}
_PAGE = """\
# Coverage{title}

{families}, tested with a tiny random model: built with weights far
from those at which training starts, frozen at a prompt of seven tokens, and certified in float64
(`precision="double"`) and float32 (the model's own dtype), with {gates}. This page is written by:

```sh
loclin coverage {option}--json {name}.json --markdown docs/{name}.md
```
{about}
{versions}.

{counts}

**exact**: with its coefficients frozen at the prompt, the model is the linear map J x. **affine**: it is J x + b, where
b comes from its biases. **refused**: loclin names what is not linear, and gives no map.

*float64* and *float32* are the largest reconstruction errors |J x + b − y| / |y|; *bias* is |b| / |y|; *forward* says
how far freezing the coefficients changes the float32 forward pass. The parts are those of the tiny model that the
prompt runs through, named by its classes and its config; the number of experts is that of the tiny model.
"""


@describe.register
def _describe_coverage(coverage: Coverage, _limits: Limits = PAGE) -> Sheet:
    table = Table.of(Column("family", "key"), Column("parts", "words"), *_NUMBERS, Column("status", "parts"))
    for result in coverage.results:
        parts = Text(" · ".join(part for part in _parts(result) if part != NONE), "dim")
        table.add(Text(plain(result.family), "bold"), parts, *_numbers(result), _status(result))
    failed = []
    for result in coverage.results:
        if result.reason:
            why = f"{_module(result)}: {result.reason}" if _module(result) else result.reason
            failed.append(Text.assemble((plain(result.family), "bold"), " ", _status(result), f": {plain(why)}"))
    blocks: list[Block] = [table, *[Text()] * bool(failed), *failed, Text(), Text(_counted(coverage), "bold")]
    about = f"which families of {coverage.task} models are exact"
    return Sheet("coverage", about, [Section("", "", blocks)], run=run_of(coverage))


def _status(result: FamilyResult) -> Text:
    return Text(result.status, _STYLES[result.status])


def coverage_markdown(coverage: Coverage) -> str:
    """Write the page of the documentation: the certified families, and those of each other status."""
    sections = {"Certified": Table.of("family", "class", *_PARTS, *_NUMBERS, "status")}
    for title in ("Refused", "Error"):
        sections[title] = Table.of("family", "class", *_PARTS, "runs passed", "module", "reason")
    sections["Not built"] = Table.of("family", "reason")
    for r in coverage.results:
        about: list[Cell] = [r.family, _code(r.class_name), *_parts(r)]
        if r.status in ("exact", "affine"):
            sections["Certified"].add(*about, *_numbers(r), r.status)
        elif r.status == "not built":
            sections["Not built"].add(r.family, r.reason)
        else:
            sections[r.status.capitalize()].add(*about, _ratio(r), _code(_module(r)), r.reason)
    versions = ", ".join(f"{name} {version}" for name, version in coverage.versions.items())
    task, run = coverage.task, {run.gate for result in coverage.results for run in result.runs}
    gates = [] if run >= {*GATES} else sorted(run)
    page = _PAGE.format(
        versions=versions,
        counts=f"**{_counted(coverage)}.**",
        title="" if task == "causal" else f": {task}",
        families=_FAMILIES[task],
        option=("" if task == "causal" else f"--task {task} ") + "".join(f"--gate {gate} " for gate in gates),
        name="coverage" if task == "causal" else f"coverage-{task}",
        gates=f"`gate=` {', '.join(gates)}" if gates else "every gate split",
        about=_ABOUT[task],
    )
    return "\n".join(
        [page, *(f"## {title}\n\n{table.markdown()}\n" for title, table in sections.items() if table.rows)]
    )


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


def _counted(coverage: Coverage) -> str:
    counted = ", ".join(f"{n} {status}" for status, n in coverage.counts.items() if n or status == "error")
    return f"{len(coverage.results)} families: {counted}"


def _code(text: str) -> Text:
    return Text(text, "code") if text else Text(NONE)
