"""Every layer of a prompt on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from loclin.analyses.decode import Words
from loclin.analyses.explain import SingularBlock
from loclin.analyses.layers import APPEARS, ComponentLayers, LayerExplanation
from loclin.report.explanation.tables import token_text, words_text
from loclin.report.grid import Column, Grid, show
from loclin.report.text import COMPONENTS, error, percent

_SHORT = {"resid_post": "stream", "attn_out": "attn", "mlp_out": "MLP"}


def render_layers(found: LayerExplanation, console: Console) -> None:
    """Print every layer in a row: stable ranks, the words of its maps, and the logit lens."""
    shown = found.main
    parts: list[Any] = [
        Text(" ").join(token_text(text, "bold", i in found.sinks) for i, text in enumerate(found.tokens)),
        _prediction(found),
        _verdict(found),
        Text(),
        Rule(
            Text.assemble(("Layer by layer", "bold"), (f"  what the {COMPONENTS[shown.name]}'s maps write", "dim")),
            align="left",
            style="dim",
        ),
        _table(found, shown),
        Text(
            "stable rank: of all tokens' maps from the embeddings side by side, and of the layer's own map; "
            f"rank: of {found.target['text']!r} among all words",
            "dim",
        ),
        Text(),
        *_appearances(found, shown),
        *(Panel(Text(text), title="warning", title_align="left", border_style="yellow") for text in found.warnings),
        _settings(found),
    ]
    show(console, *parts)


def _prediction(found: LayerExplanation) -> Text:
    line = Text("→ ", "bold green")
    line.append_text(token_text(found.target["text"], "bold green"))
    return line.append(f" {percent(found.target['probability'])}", "green")


def _verdict(found: LayerExplanation) -> Text:
    name, style = ("EXACT", "bold green") if found.passed else ("NOT EXACT", "bold red")
    each = ", ".join(f"{_SHORT[c.name]} {error(c.largest_error)}" for c in found.components)
    count = 2 * found.n_layers * len(found.components)
    return Text.assemble(
        (name, style),
        f" largest reconstruction error of {count} maps {error(found.largest_error)}",
        (f" ({each}; at most {error(found.tolerance)})", "dim"),
    )


def _table(found: LayerExplanation, shown: ComponentLayers) -> Grid:
    position = found.settings["position"]
    here = token_text(found.tokens[position], "")
    table = Grid.of(
        Column("", "key"),
        *(Column(_SHORT[component.name]) for component in found.components),
        Column("own"),
        Column("all tokens, σ1", "words"),
        Column("rank", alone="all: rank"),
        Column(Text.assemble(here, ", σ1"), "words"),
        Column("rank", alone=f"{here}: rank"),
        Column("logit lens", "words"),
        Column("p", alone="lens: p"),
        Column("rank", alone="lens: rank"),
    )
    for layer, lens in enumerate(found.lens):
        table.add(
            str(layer),
            *(f"{component.joint_stable_rank[layer]:.2f}" for component in found.components),
            f"{shown.joint_own_rank[layer]:.0f}",
            words_text(_writes(shown.joint_vectors[layer])),
            _rank(shown.joint_word_rank[layer]),
            words_text(_writes(shown.token_vectors[layer][position])),
            _rank(shown.token_word_rank[layer]),
            words_text(lens.words),
            percent(lens.probability),
            _rank(lens.rank),
        )
    return table


def _writes(blocks: list[SingularBlock]) -> Words:
    return blocks[0].writes if blocks else []


def _rank(rank: int | None) -> Text:
    style = "" if rank is None else "bold green" if rank == 1 else "green" if rank <= APPEARS else "dim"
    return Text("–" if rank is None else str(rank), style)


def _appearances(found: LayerExplanation, shown: ComponentLayers) -> list[Text]:
    """Say where the predicted word first appears, by each way of reading."""
    readers = {"logit lens": "lens", "all tokens, σ1": f"{shown.name} joint"}
    readers["own token, σ1"] = f"{shown.name} token"
    lines = []
    for name, key in readers.items():
        line = token_text(found.target["text"], "bold")
        appears, leads = found.appears[key], found.leads[key]
        line.append(f" by {name}: ", "not bold")
        line.append(
            f"never among the first {APPEARS}"
            if appears is None
            else f"among the first {APPEARS} at layer {appears}"
            + (", never the first" if leads is None else f", the first at layer {leads}"),
            "not bold",
        )
        lines.append(line)
    return lines


def _settings(found: LayerExplanation) -> Text:
    settings, versions = found.settings, found.settings["versions"]
    facts = [
        str(found.model.get("name", "")),
        str(found.model.get("dtype", "")),
        f"gate {settings['gate']}",
        f"precision {settings['precision']}",
        f"position {settings['position']}",
        f"signs {settings['signs']}",
        f"{settings['columns']:,} columns, {settings['route']}",
        " ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return Text(" · ".join(fact for fact in facts if fact), "dim")
