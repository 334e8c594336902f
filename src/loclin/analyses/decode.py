"""Vectors to tokens: what a vector writes (through the output head) and what it reads (among the input embeddings)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.surroundings import in_plain_torch
from loclin.freeze.quantised import dense_weight
from loclin.models import Model

Words = list[tuple[str, float]]
"""Tokens as text, each with its score, the highest first."""

_BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class Decoder:
    """Decodes blocks of vectors with one model's head and input embeddings. Memory: one block of scores at a time."""

    model: Model

    __repr__ = brief

    @property
    def _head(self) -> Tensor:
        return _table(self.model.hf.get_output_embeddings())

    @property
    def _embeddings(self) -> Tensor:
        return _table(self.model.hf.get_input_embeddings())

    @property
    def vocabulary(self) -> int:
        """V, how many input embeddings there are."""
        return self._embeddings.shape[0]

    @in_plain_torch
    def writes(self, vectors: Float[Tensor, "n d"], k: int = 8) -> list[Words]:
        """The k tokens whose head rows have the largest product with each vector; `vectors` live behind the final norm.

        Logit scales and soft caps are left out: they do not change the order, and a direction has no natural scale.
        Scores are logits. Cost: n V d.
        """
        return self._top(vectors, self._head, k)

    @in_plain_torch
    def reads(self, vectors: Float[Tensor, "n d"], k: int = 8) -> list[Words]:
        """The k tokens whose input embeddings lie nearest to each vector by cosine, over the whole vocabulary.

        Scores are cosines. Cost: n V d. No words where the embeddings have another width than the vectors: they enter
        the network through a projection, or several streams.
        """
        if vectors.shape[-1] != self._embeddings.shape[-1]:
            return [[] for _ in vectors]
        return self._top(torch.nn.functional.normalize(vectors, dim=-1), self._embeddings, k, cosine=True)

    @in_plain_torch
    def neighbours(self, ids: Int[Tensor, " n"], k: int = 8) -> Int[Tensor, "n k"]:
        """The k other tokens whose input embeddings lie nearest to each token's by cosine. Cost: n V d."""
        table = self._embeddings
        _, found = _best(torch.nn.functional.normalize(table[ids].float(), dim=-1), table, k + 1, cosine=True)
        itself = found == ids[:, None]
        itself[:, -1] |= ~itself.any(1)  # another token with the very same embedding may have taken its place
        return found[~itself].reshape(len(ids), k)

    @in_plain_torch
    def writes_subspace(self, basis: Float[Tensor, "d m"], k: int = 8) -> Words:
        """The k tokens whose head rows, scaled to length 1, lie nearest to a subspace with an orthonormal basis.

        For near-equal singular values, whose single vectors are not defined. Scores are cosines with the subspace.
        """
        return self._nearest(basis, self._head, k)

    @in_plain_torch
    def reads_subspace(self, basis: Float[Tensor, "d m"], k: int = 8) -> Words:
        """The k tokens whose input embeddings lie nearest to a subspace; scores are cosines with it. See `reads`."""
        if len(basis) != self._embeddings.shape[-1]:
            return []
        return self._nearest(basis, self._embeddings, k)

    @in_plain_torch
    def ranks(self, vectors: Float[Tensor, "n d"], token: int) -> list[int]:
        """A token's place among all that each vector writes: 1 is the first word of `writes`. Cost: n V d."""
        token = whole("token", token)
        table, before, start = self._head, torch.zeros(len(vectors), dtype=torch.long, device=vectors.device), 0
        own = vectors @ table[token].to(vectors)
        for rows in table.split(_rows_at_once(len(vectors) + table.shape[1])):
            above = vectors @ rows.to(vectors).T > own[:, None]
            if start <= token < start + len(rows):
                above[:, token - start] = False  # a larger product may round the token's own differently
            before += above.sum(1)
            start += len(rows)
        return (before + 1).tolist()

    def _nearest(self, basis: Tensor, table: Tensor, k: int) -> Words:
        scores = []
        for rows in table.split(_rows_at_once(basis.shape[1] + table.shape[1])):
            rows = rows.to(basis)
            scores.append((rows @ basis).norm(dim=1) / _lengths(rows))
        return self._words(torch.cat(scores).topk(k))

    def _top(self, vectors: Tensor, table: Tensor, k: int, cosine: bool = False) -> list[Words]:
        values, ids = _best(vectors, table, k, cosine)
        return [self._words(pair) for pair in zip(values, ids, strict=True)]

    def _words(self, found: tuple[Tensor, Tensor]) -> Words:
        values, ids = found
        return list(zip(self.model.decode_each(ids.tolist()), values.tolist(), strict=True))


def _table(module: nn.Module) -> Tensor:
    """A head's or an embedding's rows."""
    dense = dense_weight(module)
    return cast("Tensor", module.weight).detach() if dense is None else dense


def _best(vectors: Tensor, table: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """The k largest products (or cosines) of each vector with a table's rows, and which rows they are."""
    values, ids, start = [], [], 0
    blocks = table.split(_rows_at_once(len(vectors) + table.shape[1]))
    for rows in tqdm(blocks, desc="words", unit="block", delay=2, leave=False, disable=None):
        rows = rows.to(vectors)
        scores = vectors @ rows.T
        best = (scores / _lengths(rows) if cosine else scores).topk(min(k, len(rows)))
        values.append(best.values)
        ids.append(best.indices + start)
        start += len(rows)
    top = torch.cat(values, dim=1).topk(k)
    return top.values, torch.cat(ids, dim=1).gather(1, top.indices)


def _lengths(rows: Tensor) -> Tensor:
    return rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def _rows_at_once(width: int) -> int:
    """How many rows of a token table to score at a time."""
    return max(1, _BLOCK_BYTES // (4 * width))
