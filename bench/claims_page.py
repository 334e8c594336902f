"""The page of `bench/claims.py`, from its lines alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from claims_rules import CLAIMS, Claim, Lines, Measured, Series, Verdict, join, judge
from claims_steering import STEERING, steer

Rows = dict[str, list[Measured]]
"""By model."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Of the layers that tables by depth show: 0 the first, 1 the last."""

_HEAD = """# What holds at small scale

Each claim of the paper, tested on the packaged models over many prompts by `python bench/claims.py`, which writes
this page and goes on where it was interrupted; `--page` makes the page again from `bench/results/claims-MODEL.jsonl`,
which has a line for each prompt. These models have 135 and 270 million parameters, quantised and loaded in float32;
the paper's have 3 to 70 billion. So this says what holds here, and not what holds there.

Every measurement that decides has a threshold in `bench/claims_rules.py`. Thresholds were set before the run, with the
results of a trial of four prompts known; a few measurements of layers and of the last token were grouped anew after
it. A threshold is *met* if the whole 95 % interval is on the right side, *missed* if the whole interval is on the
wrong side, and else *open*. A claim **holds** if all are met, **does not hold** if one marked • is missed (without it
there is no claim), and else holds **partly**. Intervals are BCa bootstrap intervals over prompts, Wilson intervals for
shares of prompts, and percentile bootstrap intervals where two groups are compared. The number of prompts, of the
smaller group, is in parentheses behind each: from fewer than five nothing is decided. This last rule was added while
the run was under way, with first results seen, and the dense map's error, which is of few prompts, then lost its
threshold.
"""


_RUN = """Prompts are the shortest packaged ones of each of eight kinds, about equally many, with a beginning token in
front. Maps of single layers and of the last token to each layer cost more, and are of fewer prompts where the table
says so; so are the maps of all tokens to every layer, and null models. *Random* weights have the mean and standard
deviation of each trained matrix, and the trained gains in a random order; *fresh* ones are those with which the model's
class begins.
"""


def page(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The whole page, from each model's lines, settings first."""
    parts = {name: Lines.of([dict(line) for line in lines[1:]]) for name, lines in found.items()}
    measured = [(claim, {name: claim.measure(own) for name, own in parts.items()}) for claim in CLAIMS]
    measured.append((STEERING, {name: steer(name) for name in found}))
    texts = [_HEAD, _describe_run(found, parts), "## Verdicts\n", _summary(measured)]
    texts += [_section(number, claim, rows, parts) for number, (claim, rows) in enumerate(measured, 1)]
    return "\n".join(texts)


def _describe_run(found: Mapping[str, Sequence[Mapping[str, Any]]], parts: Mapping[str, Lines]) -> str:
    heads = [
        "",
        "prompts",
        "tokens",
        "single layers",
        "all tokens at every layer",
        "random, fresh weights",
        "stored as",
    ]
    rows = []
    for name, lines in parts.items():
        lengths = [len(line["tokens"]) for line in lines.model]
        stored = found[name][0]["model"]["stored_dtype"]
        nulls = f"{len(lines.random)} and {len(lines.fresh)}"
        span = f"{min(lengths)} to {max(lengths)}"
        rows.append(
            [name, str(len(lines.model)), span, str(len(lines.layers)), str(len(lines.all_tokens)), nulls, stored]
        )
    return "\n".join(
        [
            _RUN,
            table(heads, rows),
            "",
        ]
    )


def _summary(measured: Sequence[tuple[Claim, Rows]]) -> str:
    names = list(measured[0][1])
    rows = []
    for number, (claim, by_model) in enumerate(measured, 1):
        verdicts = [judge(rows) for rows in by_model.values()]
        rows.append([f"{number}. {claim.title}", *verdicts, f"**{join(verdicts)}**"])
    return table(["claim", *names, "both" if len(names) > 1 else "all"], rows) + "\n"


def _section(number: int, claim: Claim, by_model: Rows, parts: Mapping[str, Lines]) -> str:
    verdicts: list[Verdict] = [judge(rows) for rows in by_model.values()]
    texts = [
        f"## {number}. {claim.title}: {join(verdicts)}\n",
        f"*The paper:* {claim.says}\n",
        f"*Here:* {claim.tested}\n",
    ]
    wanted = {one.what: one for rows in by_model.values() for one in rows}
    rows = []
    for what, one in wanted.items():
        own = [next((found for found in of if found.what == what), None) for of in by_model.values()]
        mark = "• " if one.main else ""
        rows.append([mark + what, _needed(one), *("–" if found is None else _number(found) for found in own)])
    texts += [table(["", "needed", *by_model], rows), ""]
    if claim.by_depth is not None:
        texts += [_by_depth(claim.by_depth, parts), ""]
    for name, own in by_model.items():
        short = [f"{one.what} ({one.met})" for one in own if one.met in ("missed", "open")]
        if short:
            texts.append(f"Not met on {name}: {'; '.join(short)}.\n")
    return "\n".join(texts)


def _by_depth(series: Callable[[Lines], Series], parts: Mapping[str, Lines]) -> str:
    """Medians over prompts at some depths."""
    rows = []
    for name, lines in parts.items():
        for what, found in series(lines).items():
            medians = np.median(np.array(found), axis=0)
            at = [round(depth * (len(medians) - 1)) for depth in DEPTHS]
            rows.append([name, what, *(f"{medians[layer]:.3g}" for layer in at)])
    return table(["median at depth", "", *(f"{depth:.0%}" for depth in DEPTHS)], rows)


def _needed(one: Measured) -> str:
    if one.at_least is not None:
        return f"≥ {one.at_least:.2g}"
    return "" if one.at_most is None else f"≤ {one.at_most:.2g}"


def _number(one: Measured) -> str:
    """A number with its interval, the number of prompts, and how it compares with what is needed."""
    of = one.estimate
    met = "" if one.met is None else f", {one.met}"
    return f"{of.value:{one.form}} [{of.low:{one.form}}, {of.high:{one.form}}] ({of.n}){met}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
