"""Vectors in words: what a vector writes (through the output head), and what it reads (nearest input embeddings).

Singular vectors with near-equal values can be rotated into one another, so that only their span means anything: they
are put into words as one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import bar
from loclin.common.surroundings import in_plain_torch
from loclin.freeze.quantised import dense_weight
from loclin.maps.linearized import Linearized
from loclin.models import Model
from loclin.models.task import NAMES
from loclin.network.ends import OutputHeadLink

Words = list[tuple[str, float]]
"""Tokens as text with their scores, highest first."""

_BLOCK_BYTES = 2**28


@dataclass(frozen=True)
class Decoder:
    """Decodes vectors with a model's output head and input embeddings. Memory: one block of scores at a time."""

    model: Model
    rows: Tensor | None = None  # of the head, where these are not those of its matrix (see `decoder_at`)

    __repr__ = brief

    @property
    def _head(self) -> Tensor:
        return _find_rows(self.model.head) if self.rows is None else self.rows

    @property
    def _embeddings(self) -> Tensor:
        return _find_rows(self.model.hf.get_input_embeddings())

    @property
    def vocabulary(self) -> int:
        """V, the number of input embeddings."""
        return self._embeddings.shape[0]

    @in_plain_torch
    def rows_of(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the rows of the output head's matrix of some tokens."""
        return self._head[ids.to(self._head.device)]

    @in_plain_torch
    def scores(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n V"]:
        """Multiply vectors with all rows of the output head's matrix. Cost: n V d. Memory: n V numbers."""
        return torch.cat([vectors @ rows.to(vectors).T for _, rows in _split(self._head, len(vectors))], dim=1)

    @in_plain_torch
    def writes(self, vectors: Float[Tensor, "n d"], k: int = 8) -> list[Words]:
        """Find the k tokens whose rows of the output head have the largest product with each vector.

        `vectors` are directions after the final norm. Logit scales and soft caps are left out: they do not change the
        order, and a direction has no natural scale. Scores are logits. Cost: n V d.
        """
        return self._find_top(vectors, self._head, k)

    @in_plain_torch
    def reads(self, vectors: Float[Tensor, "n d"], k: int = 8) -> list[Words]:
        """Find the k tokens whose input embeddings are nearest to each vector by cosine, over the whole vocabulary.

        Scores are cosines. Cost: n V d. There are no words if the embeddings have another width than the vectors, as in
        networks with a projection after the embeddings, or with several streams.
        """
        if vectors.shape[-1] != self._embeddings.shape[-1]:
            return [[] for _ in vectors]
        return self._find_top(torch.nn.functional.normalize(vectors, dim=-1), self._embeddings, k, cosine=True)

    @in_plain_torch
    def neighbours(self, ids: Int[Tensor, " n"], k: int = 8) -> Int[Tensor, "n k"]:
        """Find the k other tokens whose input embeddings are nearest to each token's by cosine. Cost: n V d."""
        table = self._embeddings
        _, found = _find_best(torch.nn.functional.normalize(table[ids].float(), dim=-1), table, k + 1, cosine=True)
        itself = found == ids[:, None]
        itself[:, -1] |= ~itself.any(1)  # a token with the same embedding may have taken its place
        return found[~itself].reshape(len(ids), k)

    @in_plain_torch
    def writes_subspace(self, basis: Float[Tensor, "d m"], k: int = 8) -> Words:
        """Find the k tokens whose rows of the output head are nearest to a subspace with an orthonormal basis.

        Scores are cosines. This is for near-equal singular values, whose single vectors are not defined.
        """
        return self._find_nearest(basis, self._head, k, self.model.name_outputs)

    @in_plain_torch
    def reads_subspace(self, basis: Float[Tensor, "d m"], k: int = 8) -> Words:
        """Find the k tokens whose input embeddings are nearest to a subspace; scores are cosines. See `reads`."""
        if len(basis) != self._embeddings.shape[-1]:
            return []
        return self._find_nearest(basis, self._embeddings, k, self.model.decode_each)

    @in_plain_torch
    def ranks(self, vectors: Float[Tensor, "n d"], token: int) -> list[int]:
        """Find a token's rank among the words of each vector: 1 is the first word of `writes`. Cost: n V d."""
        token = whole("token", token)
        table, before = self._head, torch.zeros(len(vectors), dtype=torch.long, device=vectors.device)
        own = vectors @ table[token].to(vectors)
        for start, rows in _split(table, len(vectors)):
            above = vectors @ rows.to(vectors).T > own[:, None]
            if start <= token < start + len(rows):
                above[:, token - start] = False  # another batch may round the token's own product differently
            before += above.sum(1)
        return (before + 1).tolist()

    def _find_nearest(self, basis: Tensor, table: Tensor, k: int, names: Callable[[list[int]], list[str]]) -> Words:
        parts = (rows.to(basis) for _, rows in _split(table, basis.shape[1]))
        scores = torch.cat([(rows @ basis).norm(dim=1) / _measure_rows(rows) for rows in parts])
        top = scores.topk(min(k, len(scores)))
        return list(zip(names(top.indices.tolist()), top.values.tolist(), strict=True))

    def _find_top(self, vectors: Tensor, table: Tensor, k: int, cosine: bool = False) -> list[Words]:
        values, ids = (found.cpu() for found in _find_best(vectors, table, k, cosine))
        names = self.model.decode_each if cosine else self.model.name_outputs
        return [
            list(zip(names(row.tolist()), scores.tolist(), strict=True))
            for scores, row in zip(values, ids, strict=True)
        ]


def decoder_at(lin: Linearized, position: int) -> Decoder:
    """A decoder of vectors at `final` at one position.

    Where more than one matrix lies between `final` and the logits, as in encoders, the head's rows are those of the
    whole head, frozen there: d columns of it.
    """
    if lin.model.task != "classification" and lin.model.hf.config.model_type not in NAMES["masked"]:
        return Decoder(lin.model)
    head, width = OutputHeadLink(lin.trace, position), lin.trace.final.shape[-1]
    return Decoder(lin.model, head.jvp(torch.eye(width, dtype=lin.trace.dtype, device=head.device)).T)


def _find_rows(module: nn.Module) -> Tensor:
    """Return the rows of an output head or an embedding `[V, d]`."""
    dense = dense_weight(module)
    return cast("Tensor", module.weight).detach() if dense is None else dense


def _find_best(vectors: Tensor, table: Tensor, k: int, cosine: bool) -> tuple[Tensor, Tensor]:
    """Find the k largest products (or cosines) of each vector with the rows of a table, and their row numbers."""
    values, ids = [], []
    for start, rows in bar(_split(table, len(vectors)), desc="words", unit="block"):
        rows = rows.to(vectors)
        scores = vectors @ rows.T
        best = (scores / _measure_rows(rows) if cosine else scores).topk(min(k, len(rows)))
        values.append(best.values)
        ids.append(best.indices + start)
    joined = torch.cat(values, dim=1)
    top = joined.topk(min(k, joined.shape[1]))
    return top.values, torch.cat(ids, dim=1).gather(1, top.indices)


def _measure_rows(rows: Tensor) -> Tensor:
    return rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def _split(table: Tensor, vectors: int) -> list[tuple[int, Tensor]]:
    """Split the rows of a token table into blocks to score at a time, with the number of each block's first row."""
    size = max(1, _BLOCK_BYTES // (4 * (vectors + table.shape[1])))
    return list(zip(range(0, len(table), size), table.split(size), strict=True))


@dataclass(frozen=True)
class SingularBlock:
    """Singular triples that belong together: one, or several with near-equal values.

    `gain` is v . x for a single vector: how strongly the prompt's own embedding excites it. None for several. A joint
    map, which has no single token, has neither `gain` nor `reads`.
    """

    indices: list[int]  # which singular values, counted from 0
    values: list[float]
    writes: Words  # of the left vectors, by the output head
    reads: Words  # of the right vectors: the nearest input embeddings
    gain: float | None

    __repr__ = brief


@dataclass(frozen=True)
class Triples:
    """The singular triples of one map, and the blocks of indices to put into words; a joint map has no `Vh` and `x`."""

    U: Float[Tensor, "d_out k"]
    S: Float[Tensor, " k"]
    Vh: Float[Tensor, "k d_in"] | None
    x: Float[Tensor, " d_in"] | None
    blocks: list[list[int]]

    __repr__ = brief


def put_into_words(maps: Sequence[Triples], decoder: Decoder, k: int) -> list[list[SingularBlock]]:
    """Put the singular vectors of several maps into words, k of them for each side; a map that is zero has no blocks.

    All vectors that stand alone are decoded in one product with the output head, and one with the input embeddings.
    Cost: n V d for n single vectors on each side, and m V d for each block of m.
    """
    chosen = [triples.blocks if triples.S[0] > 0 else [] for triples in maps]
    alone = [(number, block[0]) for number, blocks in enumerate(chosen) for block in blocks if len(block) == 1]
    left = {key: maps[key[0]].U[:, key[1]] for key in alone}
    right = {(number, j): Vh[j] for number, j in alone if (Vh := maps[number].Vh) is not None}
    writes = dict(zip(left, decoder.writes(torch.stack(list(left.values())), k) if left else [], strict=True))
    reads = dict(zip(right, decoder.reads(torch.stack(list(right.values())), k) if right else [], strict=True))

    values = [triples.S.tolist() for triples in maps]
    gained = {key: v @ x.to(v) for key, v in right.items() if (x := maps[key[0]].x) is not None}
    gains = dict(zip(gained, torch.stack(list(gained.values())).tolist() if gained else [], strict=True))

    def describe(number: int, indices: list[int]) -> SingularBlock:
        triples, key = maps[number], (number, indices[0])
        own, Vh = [values[number][i] for i in indices], triples.Vh
        if len(indices) == 1:
            return SingularBlock(indices, own, writes[key], reads.get(key, []), gains.get(key))
        read = [] if Vh is None else decoder.reads_subspace(Vh[indices].T, k)
        return SingularBlock(indices, own, decoder.writes_subspace(triples.U[:, indices], k), read, None)

    return [[describe(number, block) for block in blocks] for number, blocks in enumerate(chosen)]
