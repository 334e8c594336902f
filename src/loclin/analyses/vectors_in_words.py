"""Singular vectors in words: each one alone, or, where singular values are near-equal, the subspace of several.

A singular vector is defined only where its value stands apart from its neighbours. Vectors with near-equal values
can be rotated into one another, so that only their span means anything: they are put into words as one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.decode import Decoder, Words
from loclin.common.brief import brief


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

    def describe(number: int, indices: list[int]) -> SingularBlock:
        triples, key = maps[number], (number, indices[0])
        values, Vh = triples.S[indices].tolist(), triples.Vh
        if len(indices) == 1:
            gain = None if triples.x is None else (right[key] @ triples.x.to(right[key])).item()
            return SingularBlock(indices, values, writes[key], reads.get(key, []), gain)
        read = [] if Vh is None else decoder.reads_subspace(Vh[indices].T, k)
        return SingularBlock(indices, values, decoder.writes_subspace(triples.U[:, indices], k), read, None)

    return [[describe(number, block) for block in blocks] for number, blocks in enumerate(chosen)]
