"""How alike the tokens' exact maps are: the cosine of every two of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from loclin.common.progress import Progress, steps, with_progress
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns


@dataclass(frozen=True)
class Similarity(Result):
    """How alike the maps of T tokens are; made by `similarity`.

    `cosines` are <J_i, J_j> / (|J_i| |J_j|) in the Frobenius inner product, between -1 and 1, `[T, T]`: 1 on the
    diagonal, and 0 in the rows and columns of tokens whose map is zero.
    """

    cosines: Float64[Tensor, "T T"]
    provenance: Provenance
    warnings: list[str]

    def table(self) -> dict[str, list[Any]]:
        """One row per pair of tokens, the earlier one first: both positions and texts, and their cosine."""
        texts = self.provenance.tokens
        first, second = torch.triu_indices(len(texts), len(texts), 1)
        pairs = zip(first.tolist(), second.tolist(), self.cosines[first, second].tolist(), strict=True)
        rows = ((i, texts[i], j, texts[j], cosine) for i, j, cosine in pairs)
        return make_columns("token text other other_text cosine", rows)


@question
@with_progress
def similarity(lin: Linearized, *, position: int = -1, progress: Progress = True) -> Similarity:
    """Compare the exact maps J_i of all tokens with one another, by their cosines.

    A cosine of 1 means that two tokens' embeddings are mapped in the same way but for a positive factor, 0 that the
    maps are orthogonal. It does not depend on the embeddings themselves, or on the sizes of the maps.

    Cost: the dense map, which is not held where it exceeds the budget, and d^2 T^2 multiplications in float64. Memory:
    T^2 numbers, and a float64 copy of as many rows as the budget allows.

    Raises PromptError for a position outside the prompt; OptionError for a `progress` that is neither True, False nor a
    function; BudgetError when the memory budget is too small for one row of the map.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    position: where the maps end. Tokens behind it have no map in a causal model: their cosines are 0.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    tell = steps(progress)
    J = lin.jacobian(position=position)
    tell("the exact map")
    if J.fits_in_budget:
        J.dense()
    products = torch.zeros(J.shape[1], J.shape[1], dtype=torch.float64, device=J.device)
    for _, part in J.rows():
        for rows in part.split(max(1, len(part) // 8)):  # the budget is for the rows, not for a float64 copy of all
            maps = rows.transpose(0, 1).flatten(1).double()
            products += maps @ maps.T
    products = (products + products.T) / 2  # no product of matrices is bound to be symmetric in its last bits
    norms = products.diagonal().sqrt()
    inverse = torch.where(norms == 0, 0.0, 1 / norms)
    cosines = (products * (inverse[:, None] * inverse)).clamp(-1, 1)
    return Similarity(cosines, J.provenance(), lin.warnings)
