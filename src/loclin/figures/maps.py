"""Figure 2: the map of every token for growing prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from loclin.common.arguments import whole
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.figures.canvas import Drawing, canvas, colours, log_axis
from loclin.maps.linearized import Linearized
from loclin.report.text import visible

PIXELS = 96
"""How many pixels an image has on each side; a smaller map has fewer."""
_MOST, _NAME = 6, 14


@dataclass(frozen=True)
class _Row:
    """One prompt's maps."""

    lin: Linearized
    images: Float[Tensor, "T h w"]
    spectra: Float[Tensor, "T r"]


def figure_2(
    lin: Linearized | Sequence[Linearized],
    *,
    steps: int = 3,
    width: float = 6.75,
    height: float | None = None,
    style: str | os.PathLike[str] | None = None,
) -> Drawing:
    """The map of every token for growing prompts, as images, and their spectra (paper, Figure 2; equation 2).

    A row for each prompt: the matrix J_i of each of its tokens, and on the right all singular values of each. The first
    token's map differs from row to row, since coefficients depend on the whole prompt. A pixel is the entry with
    the largest size in its block of J_i, with its sign, so that the few large rows and columns are seen at any size;
    red is positive, blue negative. Each image has its own scale, up to the largest entry, which is written below it.

    `lin`: one prompt, of which the first 1, 2, ... `steps` tokens are frozen as prompts of their own; or several
    prompts. `width`, `height`: inches. `style`: a .mplstyle file, or the name of one of matplotlib's. Raises
    OptionError for more than 6 tokens in a row, and for a size or a style that there is not.

    Cost: for each row the dense map, and an SVD of each token's map.
    """
    lins = list(lin) if isinstance(lin, Sequence) else _grow(lin, whole("steps", steps, 1, _MOST))
    for one in lins:
        if not isinstance(one, Linearized):
            raise OptionError(f"figure 2 is drawn from linearized prompts, not from {type(one).__name__}")
        if len(one.tokens) > _MOST:
            raise OptionError(f"{len(one.tokens)} tokens are too many for a row of images: give at most {_MOST}")
    if not lins:
        raise OptionError("there is nothing to draw: give a linearized prompt, or several")
    rows = [_Row(one, *_look(one)) for one in lins]
    columns = max(len(row.images) for row in rows)
    panel = width / (columns + 1.3)
    with canvas("Figure 2", width, height, len(rows) * (panel + 0.45), style, lins) as figure:
        figure.suptitle(figure.letters(lins[0].model.info.name)[0], x=0.01, ha="left", fontsize=7)
        grid = figure.add_gridspec(len(rows), columns + 1, width_ratios=[*[1.0] * columns, 1.1])
        for i, row in enumerate(rows):
            spectra = figure.add_subplot(grid[i, columns])
            tokens = [visible(text, _NAME) for text in row.lin.tokens]
            for j, (name, colour) in enumerate(zip(tokens, colours(columns), strict=False)):
                axes = figure.add_subplot(grid[i, j])
                largest = row.images[j].abs().max().item()
                axes.imshow(row.images[j].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(True)
                axes.spines[:].set_color(colour)
                axes.set_xlabel(f"J{j}, to ±{largest:.2g}")
                shown, families = figure.letters(name)
                axes.set_title(shown, color=colour, fontfamily=families)
                values = row.spectra[j].tolist()
                spectra.plot(range(1, len(values) + 1), values, color=colour, label=shown)
            word = visible(row.lin.next_tokens(1)[0][0], _NAME)
            shown, families = figure.letters(f"→ {word}")
            spectra.set_title(shown, loc="left", fontfamily=families)
            top = row.spectra.max().item()
            spectra.set_ylim(1e-4 * top, 1.6 * top)
            log_axis(spectra, "x", "y")
            spectra.set(ylabel="singular value", xlabel="rank")
            figure.panel(figure.axes[-len(tokens)], ascii_uppercase[i])
    return figure


def _grow(lin: Linearized, steps: int) -> list[Linearized]:
    """Freeze the first tokens of a prompt, more and more of them."""
    if not isinstance(lin, Linearized):
        raise OptionError(f"figure 2 is drawn from linearized prompts, not from {type(lin).__name__}")
    length = len(lin.tokens)
    return [
        lin
        if size == length
        else type(lin).at(
            lin.model, lin.input_ids[:, :size], gate=lin.gate, precision=lin.precision, memory=lin.memory, strict=False
        )
        for size in range(1, min(steps, length) + 1)
    ]


@in_plain_torch
def _look(lin: Linearized) -> tuple[Float[Tensor, "T h w"], Float[Tensor, "T r"]]:
    """Make the images of all tokens' maps, and their spectra."""
    J = lin.jacobian()
    images = [shrink(maps.transpose(0, 1)) for _, maps in J.by_token()]
    return torch.cat(images), J.singular_values().cpu()


def shrink(maps: Float[Tensor, "T d_out d_in"]) -> Float[Tensor, "T h w"]:
    """Shrink matrices to images: of each block of entries the one with the largest size."""
    size = tuple(min(PIXELS, side) for side in maps.shape[1:])
    highest, lowest = (adaptive_max_pool2d(part.float().cpu(), size) for part in (maps, -maps))
    return torch.where(highest >= lowest, highest, -lowest)
