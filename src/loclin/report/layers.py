"""What the explanation of every layer says: stable ranks, the words of its maps, and the logit lens."""

from __future__ import annotations

from dataclasses import replace

from rich.text import Text

from loclin.analyses.decode import SingularBlock
from loclin.analyses.layers import APPEARS, LayerExplanation
from loclin.report import run
from loclin.report.sheet import PAGE, Chip, Limits, Section, Sheet, describe, sheet_of
from loclin.report.table import COUNTER, Column, Table
from loclin.report.text import COMPONENTS, error, percent, predicted, shortened, token, verdict, words

_SHORT = {"resid_post": "stream", "attn_out": "attn", "mlp_out": "MLP"}


@describe.register
def describe_layers(found: LayerExplanation, _limits: Limits = PAGE) -> Sheet:
    """Say what every layer does."""
    known = run.run_of(found)
    below = (
        "stable rank: of all tokens' maps from the embeddings side by side, and of the layer's own map; "
        f"rank: of {found.target['text']!r} among all words"
    )
    section = Section(
        "Layer by layer",
        f"what the {COMPONENTS[found.main.name]}'s maps write",
        [_table(found), Text(below, "dim"), Text(), *_appearances(found)],
    )
    more = (f"signs {known.options['signs']}", f"{known.options['columns']:,} columns, {known.options['direction']}")
    return sheet_of(
        found,
        "every layer, at this prompt, as an exact linear map",
        [section],
        heading=Text.assemble(shortened(run.prompt(found)), (" → ", "dim"), token(found.target["text"])),
        chips=[Chip(text, marks=["sink"] * (i in found.sinks)) for i, text in enumerate(run.tokens(found))],
        lead=[predicted((found.target["text"], found.target["probability"])), _verdict(found)],
        run=replace(known, more=more),
    )


def _verdict(found: LayerExplanation) -> Text:
    each = ", ".join(f"{_SHORT[c.name]} {error(c.largest_error)}" for c in found.components)
    count = 2 * found.n_layers * len(found.components)
    return verdict(
        found.passed,
        f"largest reconstruction error of {count} maps {error(found.largest_error)}",
        (f" ({each}; at most {error(found.tolerance)})", "dim"),
    )


def _table(found: LayerExplanation) -> Table:
    shown, position = found.main, found.provenance.position
    here = token(run.tokens(found)[position])
    table = Table.of(
        COUNTER,
        *(_SHORT[component.name] for component in found.components),
        "own",
        *(Column("all tokens, σ1", "words"), Column("rank", alone="all: rank")),
        *(Column(Text.assemble(here, ", σ1"), "words"), Column("rank", alone=f"{here}: rank")),
        *(Column("logit lens", "words"), Column("p", alone="lens: p"), Column("rank", alone="lens: rank")),
    )
    for layer, lens in enumerate(found.lens):
        table.add(
            str(layer),
            *(f"{component.joint_stable_rank[layer]:.2f}" for component in found.components),
            f"{shown.joint_own_rank[layer]:.0f}",
            *(_writes(shown.joint_vectors[layer]), _rank(shown.joint_word_rank[layer])),
            *(_writes(shown.token_vectors[layer][position]), _rank(shown.token_word_rank[layer])),
            *(words(lens.words), percent(lens.probability), _rank(lens.rank)),
        )
    return table


def _writes(blocks: list[SingularBlock]) -> Text:
    return words(blocks[0].writes if blocks else [])


def _rank(rank: int | None) -> Text:
    """Write a word's rank, the better the greener."""
    style = "" if rank is None else "bold green" if rank == 1 else "green" if rank <= APPEARS else "dim"
    return Text("–" if rank is None else str(rank), style)


def _appearances(found: LayerExplanation) -> list[Text]:
    """Say where the predicted word first appears, by each way of reading."""
    shown, lines = found.main.name, []
    readers = {"logit lens": "lens", "all tokens, σ1": f"{shown} joint", "own token, σ1": f"{shown} token"}
    for name, key in readers.items():
        appears, leads = found.appears[key], found.leads[key]
        said = f"never among the first {APPEARS}"
        if appears is not None:
            first = "never the first" if leads is None else f"the first at layer {leads}"
            said = f"among the first {APPEARS} at layer {appears}, {first}"
        lines.append(token(found.target["text"], "bold").append(f" by {name}: {said}"))
    return lines
