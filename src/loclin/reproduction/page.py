"""What is said of a reproduction: what agrees, on a terminal; on its page all figures and tables as well."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from loclin.common.brief import brief
from loclin.figures.words import TINTS
from loclin.report import html, sheet
from loclin.report.run import prompt
from loclin.report.sheet import PAGE, Block, Limits, Section, Sheet, describe, sheet_of
from loclin.report.table import Column, Table
from loclin.report.text import error, shortened, verdict
from loclin.reproduction.golden import read_golden
from loclin.reproduction.result import VERDICTS, Compared, Grid, Reproduction, Target
from loclin.results import display

NOT_OF_THE_PAPER = "not comparable: the paper has no figures of this model"
_STYLES = {"agree": "green", "differ": "bold red", "not comparable": "dim"}
_ROWS = 40
_ZOOM = 2.0
"""Pixels of a page for each point of a figure."""


@dataclass
class _Part:
    """Targets that show the same, on a page: their names, images with captions, tables and files."""

    names: list[str]
    about: str
    exact: str
    passed: bool
    images: list[tuple[str, float, str]]
    grids: list[Grid]
    files: list[str]

    __repr__ = brief


@describe.register
def _describe_reproduction(found: Reproduction, limits: Limits = PAGE) -> Sheet:
    passed = all(target.passed for target in found.targets)
    known = found.provenance.certificate
    checked = "" if known is None else f"(std {error(float(known['std_error']))} at the prompt)"
    told = "every certificate passed" if passed else "not every certificate passed: see below"
    lead = [verdict(passed, " ".join(filter(None, (told, checked)))), Text(_say_counts(found), "bold")]
    sections = [Section("What was made", "", [_list_targets(found.targets)])]
    if found.compared:
        note = f"the paper's figures of {found.paper_model}, recognised by {found.recognised}; {_say_trust()}"
        sections.insert(0, Section("Compared with the paper", note, _compare_table(found.compared, limits)))
    golden = read_golden()
    return sheet_of(
        found,
        "the paper's figures and tables, made again",
        sections,
        title=f"{found.provenance.model.name}: {shortened(prompt(found))}",
        lead=lead,
        notes=[f"Published figures: {golden.paper}, and its notebooks, {golden.code}."],
    )


def _say_counts(found: Reproduction) -> str:
    if not found.compared:
        return NOT_OF_THE_PAPER if found.paper_model is None else "nothing was compared"
    counts = found.counts
    return "Published figures: " + ", ".join(f"{counts[one]} {one}" for one in VERDICTS)


def _say_trust() -> str:
    return "; ".join(f"{name}: {meaning}" for name, meaning in read_golden().trust.items())


def _list_targets(targets: Iterable[Target]) -> Table:
    table = Table.of(Column("target", "key"), Column("what", "words"), Column("exact", "words"), "seconds")
    for target in targets:
        exact = Text(f"{'' if target.passed else 'NOT EXACT: '}{target.exact}", "" if target.passed else "bold red")
        table.add(Text(target.name, "bold"), target.about, exact, f"{target.seconds:.1f}")
    return table


def _compare_table(rows: list[Compared], limits: Limits) -> list[Block]:
    """Every comparison; those that differ first on a terminal."""
    words = (Column(name, "words") for name in ("published", "ours", "decided by", "trust"))
    table = Table.of(Column("target", "key"), Column("what", "key"), Column("", "parts"), *words)
    shown = rows if limits is PAGE else sorted(rows, key=lambda row: row.verdict != "differ")[:_ROWS]
    for row in shown:
        told = Text(row.verdict, _STYLES[row.verdict])
        table.add(row.target, row.what, told, row.published, row.ours, row.tolerance, f"{row.trust} ({row.source})")
    return [table, *sheet.left_out(len(rows) - len(shown))]


def page(found: Reproduction) -> str:
    """Write it as one HTML page with all figures and tables in it; without its folder, without the figures."""
    made = describe(found, PAGE)
    return html.write_page("reproduction.html", made, None, parts=_join(found), tints=TINTS)


def _join(found: Reproduction) -> list[_Part]:
    """The parts of a page: targets with the same tables and no figures, such as Tables 1 to 3, are one."""
    parts: list[_Part] = []
    for target in found.targets:
        same = next((part for part in parts if target.grids == part.grids and not target.images), None)
        if same is not None and not same.images:
            same.names.append(target.name)
            same.about = same.about.partition(" (")[0]  # whose the paper's is
            same.files.extend(target.files)
            continue
        images = [(*_embed(found, file), caption) for file, caption in target.images.items()]
        parts.append(
            _Part(
                names=[target.name],
                about=target.about,
                exact=target.exact,
                passed=target.passed,
                images=images,
                grids=target.grids,
                files=list(target.files),
            )
        )
    return parts


def _embed(found: Reproduction, file: str) -> tuple[str, float]:
    """A figure's file as a data URI, and how many pixels wide it is; empty where it is not there."""
    if found.folder is None or not (found.folder / file).is_file():
        return "", 0.0
    data = (found.folder / file).read_bytes()
    wide = re.search(rb'<svg[^>]*? width="([\d.]+)pt"', data)
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}", _ZOOM * float(wide[1]) if wide else 0.0


def _show(found: Reproduction, console: Any = None, **options: Any) -> None:
    sheet.show(found, console, **options)


display.page.register(Reproduction)(page)
display.show.register(Reproduction)(_show)
display.fragment.register(Reproduction, html.fragment)
