"""`loclin figure`: one of the paper's figures or tables, as a file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from loclin.cli import options
from loclin.cli.console import importing, note, stderr, stdout, step
from loclin.errors import OptionError
from loclin.figures.names import HIGHLIGHTS, SIDES, Named, check_suffix, find, listing
from loclin.results.files import check_writable


def _known(_context: Any, _param: Any, value: str | None) -> str | None:
    """Check a figure's name."""
    if value is not None:
        find(value)
    return value


@options.spread
def figure(
    name: Annotated[
        str | None, typer.Argument(help="Such as 6, 4b, a1 or table1; see --list.", callback=_known)
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="The text; '-' reads it from standard input.", callback=options.plain)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file: .pdf, .svg, .png; of a table .tex, .md, .html.", callback=options.place
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        options.path("As in other commands; for figures 3 and 5 again for more. Default: gemma-3-270m."),
    ] = None,
    saved: Annotated[
        list[Path] | None,
        options.path("Draw this JSON file of 'loclin explain' or 'loclin layers' instead of a prompt; again for more."),
    ] = None,
    lines: Annotated[
        int | None, typer.Option(help="Lines for each token in 4a, 4b, 5 and a1. Default: 2 or 3.", min=1)
    ] = None,
    layers: Annotated[str | None, options.text("The layers of a table, such as 18-20.")] = None,
    highlight: Annotated[
        list[str] | None, options.text("A word to highlight in a table; again for more. Default: the most frequent.")
    ] = None,
    width: Annotated[
        float | None, options.finite("Inches. Default: 6.75, or half of it for one panel.", above=0.0)
    ] = None,
    height: Annotated[float | None, options.finite("Inches. Default: what its content takes.", above=0.0)] = None,
    style: Annotated[str | None, options.text("A .mplstyle file, or the name of one of matplotlib's styles.")] = None,
    show_list: Annotated[bool, typer.Option("--list", help="List all names, and stop.")] = False,
    *,
    freezing: options.Freezing,
) -> None:
    """Draw one of the paper's figures or tables to a file.

    loclin figure 6 "The bridge out of Marin is the" --model smollm2-135m -o fig6.pdf
    """
    if show_list:
        for line in listing():
            stdout.print(line, soft_wrap=True, highlight=False, markup=False)
        return
    if name is None:
        raise OptionError("give the name of a figure: loclin figure --list names them")
    wanted = find(name)
    about: dict[str, Any] = {
        "lines": lines, "layers": layers, "highlight": highlight, "width": width, "height": height, "style": style
    }  # fmt: skip
    chosen = {option: value for option, value in about.items() if value}
    models = model or [options.DEFAULT_MODEL]
    _check(wanted, name, prompt, output, models, saved or [], chosen)
    if layers:
        chosen["layers"] = _read_layers(layers)
    with importing():
        from loclin import figures

        draw = getattr(figures, wanted.function)
        if not wanted.is_table:
            figures.Drawing  # noqa: B018 (is matplotlib there?)
            from loclin.figures.canvas import read_style

            read_style(style)
    if saved:
        results = [_load(wanted, path) for path in saved]
    else:
        assert prompt is not None
        text = options.read(prompt)
        results = [_analyse(wanted, replace(freezing, model=one).linearize(text), lines) for one in models]
    step("drawing")
    made = draw(results if wanted.several else results[0], **chosen)
    assert output is not None
    made.save(output)
    for warning in made.warnings:
        note(warning)
    stderr.print(f"wrote {output}", markup=False, soft_wrap=True, highlight=False)
    if not all(_is_exact(one) for one in results):
        raise typer.Exit(1)


def _check(
    wanted: Named,
    name: str,
    prompt: str | None,
    output: Path | None,
    models: list[str],
    saved: list[Path],
    chosen: dict[str, Any],
) -> None:
    """Refuse what does not fit together before anything is loaded."""
    if output is None:
        raise OptionError("name the file: -o FILE")
    check_suffix(output, wanted.suffixes)
    check_writable(output)
    if saved and (prompt is not None or wanted.source == "maps"):
        raise OptionError(
            "--saved is drawn instead of a prompt: leave one of them out"
            if prompt is not None
            else f"figure {name} needs the maps themselves, which no result holds: give a prompt"
        )
    if prompt is None and not saved:
        raise OptionError(f"give the prompt of figure {name}, or a result with --saved")
    if not wanted.several and max(len(models), len(saved)) > 1:
        raise OptionError(f"figure {name} is of one model; several are for 3 and 5")
    for option in ("layers", "highlight") if not wanted.is_table else ("lines", "width", "height", "style"):
        if option in chosen:
            raise OptionError(f"--{option} is for {'figures' if wanted.is_table else 'tables'}; {name} has none")
    if "lines" in chosen and (wanted.source != "explain" or wanted.function == "figure_3"):
        raise OptionError(f"--lines is for 4a, 4b, 5 and a1; {name} has none")
    if len(chosen.get("highlight", ())) > HIGHLIGHTS:
        raise OptionError(f"--highlight: give at most {HIGHLIGHTS} words")
    for side in ("width", "height"):
        if side in chosen and not SIDES[0] <= chosen[side] <= SIDES[1]:
            raise OptionError(f"--{side} {chosen[side]:g}: give inches from {SIDES[0]:g} to {SIDES[1]:g}")


def _read_layers(text: str) -> range:
    """Read `18` or `18-20`."""
    found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", text.strip())
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise OptionError(f"--layers {text}: give one layer, or the first and the last, such as 18-20")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def _analyse(wanted: Named, lin: Any, lines: int | None) -> Any:
    """Make the result that a figure is drawn from, so that a model need not be kept."""
    if wanted.source == "maps":
        return lin
    if wanted.source == "explain":
        return lin.explain(k=max(lines or 0, 3), progress=step)
    return lin.explain_layers(components=["resid_post"] if wanted.is_table else None, progress=step)


def _load(wanted: Named, path: Path) -> Any:
    from loclin.analyses.explain import Explanation
    from loclin.analyses.layers import LayerExplanation

    return (Explanation if wanted.source == "explain" else LayerExplanation).load(path)


def _is_exact(result: Any) -> bool:
    if hasattr(result, "certify"):
        return bool(result.certify().passed)
    return bool(result.passed if hasattr(result, "passed") else result.certificate.passed)
