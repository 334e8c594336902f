"""What the published code gives where it is wrong, computed as it does: https://github.com/jamesgolden1/llms-are-llms.

Rows of a map are chosen by the norms of its *columns*, and so are not the largest ones. Its lists of nearest tokens are
merged from parts of the vocabulary, and a token that moves down a place in a later part gets the id of the token that
had that place: only the first word is always right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from loclin.common.brief import brief
from loclin.common.progress import bar
from loclin.maps.linearized import Linearized, question
from loclin.models import Model
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.spectral import block_krylov_svd

PART = 1000
"""How many tokens of the vocabulary the published code takes at a time."""
_ROW_WORDS, _VECTOR_WORDS = 4, 8


@dataclass(frozen=True)
class PublishedToken:
    """One token's map as published: the "rows" by their units, and what right singular vectors read, in words."""

    text: str
    units: list[int]
    rows: list[list[str]]
    reads: list[list[str]]

    __repr__ = brief


@dataclass(frozen=True)
class AsPublished(Result):
    """The published code's wrong lists for each token; made by `repeat_mistakes`."""

    tokens: list[PublishedToken]
    provenance: Provenance
    warnings: list[str]

    def table(self) -> dict[str, list[Any]]:
        """One row per token: its text, and the units that are taken for the largest rows."""
        return {"token": [one.text for one in self.tokens], "units": [one.units for one in self.tokens]}


@question
def repeat_mistakes(lin: Linearized, *, k: int = 3) -> AsPublished:
    """Compute rows and right singular vectors as the published code does, k of each for each token.

    Signs are as published: those of the column, or of the left vector, whose product with the output is positive.
    Cost: the dense map, T SVDs of k triples, and 2 T k passes over the embeddings.
    """
    J, tokens = lin.jacobian(), list[PublishedToken]()
    y = J.value
    for where, maps in J.by_token():
        svd = block_krylov_svd(maps, k, align_to=y, tolerance=1e-5)
        columns = maps.norm(dim=0)  # [g, d_in]
        for t, one in enumerate(maps.unbind(1)):
            units = columns[t].topk(min(k, one.shape[1])).indices
            units = units[units < len(one)]
            signs = torch.where(y @ one[:, units] < 0, -1.0, 1.0).to(one)
            tokens.append(
                PublishedToken(
                    text=lin.tokens[range(len(lin.tokens))[where][t]],
                    units=units.tolist(),
                    rows=_list_nearest(lin.model, signs[:, None] * one[units], _ROW_WORDS),
                    reads=_list_nearest(lin.model, svd.Vh[t], _VECTOR_WORDS),
                )
            )
    return AsPublished(tokens, J.provenance(), lin.warnings)


def _list_nearest(model: Model, vectors: Float[Tensor, "n d"], k: int) -> list[list[str]]:
    """The published lists of the tokens nearest to each vector; none where embeddings have another width."""
    table: Any = model.hf.get_input_embeddings().weight
    if table.shape[1] != vectors.shape[1]:
        return [[] for _ in vectors]
    parts = bar(list(table.detach().split(PART)), desc="words as published", unit="part")
    directions = normalize(vectors.float(), dim=1)
    scores = torch.cat([normalize(rows.to(directions), dim=1) @ directions.T for rows in parts])
    return [model.decode_each(merge_wrongly(one, k).tolist()) for one in scores.T]


def merge_wrongly(scores: Float[Tensor, " V"], k: int, part: int = PART) -> Int[Tensor, " k"]:
    """The ids of the k largest scores, as the published code merges them part by part.

    A token that was found in an earlier part takes the id that stood in its *new* place before.
    """
    values, ids = scores.new_full((k,), -torch.inf), torch.zeros(k, dtype=torch.long, device=scores.device)
    for start in range(0, len(scores), part):
        values, places = torch.cat([values, scores[start : start + part]]).topk(k)
        ids = torch.where(places < k, ids, start + places - k)
    return ids
