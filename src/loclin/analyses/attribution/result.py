"""A target shared out exactly: what each token, layer, head, neuron or bias gives of it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.decode import Words
from loclin.common.brief import brief
from loclin.results.display import Shown
from loclin.results.result import Provenance, Result
from loclin.results.table import dataframe

if TYPE_CHECKING:
    from pandas import DataFrame

By = Literal["token", "layer", "head", "neuron", "bias", "token×layer"]
Kind = Literal["token", "embed", "attn_out", "mlp_out", "block", "head", "neuron", "bias"]
KINDS: tuple[Kind, ...] = ("token", "embed", "attn_out", "mlp_out", "block", "head", "neuron", "bias")
"""Of what a share is; `block` is a whole layer whose attention and MLP cannot be told apart."""
_UNITS: dict[By, Kind] = {"head": "head", "neuron": "neuron"}
NONE = -1
"""No layer, no index, no token."""


@dataclass(frozen=True)
class Share:
    """One share of a target.

    Attributes
    ----------
    name
        A token's text; a point's name (`attn_out.3`); `L3H5` for query head 5 of layer 3, `L3N57` for a neuron; a
        bias's path. In a token × layer attribution: the point's.
    kind
        See `KINDS`.
    layer, index, token
        Its layer, its number within the layer, its position in the prompt; None where it has none.
    share
        The exact part of the target.
    through
        All of the target that passes it, by later layers too; None where that is the share.
    writes
        What it writes into the output, in words; for the largest shares only.
    attends
        For the largest heads: the parts of the share read at each position, T of them; the biases' part is the rest.
    """

    name: str
    kind: Kind
    layer: int | None
    index: int | None
    token: int | None
    share: float
    through: float | None
    writes: Words | None
    attends: list[float] | None

    __repr__ = brief


@dataclass(frozen=True)
class Attribution(Result, Shown):
    """Shares that sum to a target; made by `loclin.attribute`. `n` is how many there are.

    Attributes
    ----------
    by
        What the shares are of.
    target
        What is shared out: its `kind`, `tokens`, `ids`, `value`, `position`, `size` (the summed sizes of what it is
        made of: two logits, for a difference), and the first token's `probability`.
    shares
        `[n]`, float64: values that the frozen network has, each times its exact weight in the target.
    through
        `[n]`, or None: all of the target that passes a part, by later layers too. These overlap, and do not sum up.
    kinds, layers, indices, tokens
        `[n]`: what each share is of, see `Share`; -1 for none. `kinds` counts `KINDS`.
    biases
        The names that the indices of biases count.
    writes, attends
        Of the largest shares, by their number as text: see `Share`.
    sinks
        Positions of attention sinks.
    warnings
        What a reader should know before trusting the shares.
    provenance
        Of which model, prompt, gate and precision.
    """

    by: By
    target: dict[str, Any]
    shares: Tensor
    through: Tensor | None
    kinds: Tensor
    layers: Tensor
    indices: Tensor
    tokens: Tensor
    biases: list[str]
    writes: dict[str, Any]
    attends: dict[str, list[float]]
    sinks: list[int]
    warnings: list[str]
    provenance: Provenance | None = None

    __repr__ = brief

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, i: int) -> Share:
        return self.parts[i]

    @cached_property
    def parts(self) -> list[Share]:
        """Every share with its name."""
        columns = [[None if n == NONE else n for n in f.tolist()] for f in (self.layers, self.indices, self.tokens)]
        through = [None] * len(self) if self.through is None else self.through.tolist()
        numbers = zip(self.kinds.tolist(), *columns, self.shares.tolist(), through, strict=True)
        found = []
        for i, (number, layer, index, token, share, passing) in enumerate(numbers):
            kind, writes = KINDS[number], self.writes.get(str(i))
            words = None if writes is None else [(text, score) for text, score in writes]
            name = self._name(kind, layer, index, token)
            found.append(Share(name, kind, layer, index, token, share, passing, words, self.attends.get(str(i))))
        return found

    def _name(self, kind: Kind, layer: int | None, index: int | None, token: int | None) -> str:
        if kind in ("head", "neuron"):
            return f"L{layer}{kind[0].upper()}{index}"
        if kind == "bias" and index is not None:
            return self.biases[index]
        if kind == "token" and token is not None:
            return self.texts[token]
        return kind if layer is None else f"{kind}.{layer}"

    @property
    def texts(self) -> list[str]:
        """The prompt's tokens."""
        return [] if self.provenance is None else self.provenance.tokens

    @property
    def value(self) -> float:
        """The target's own value in the frozen network."""
        return float(self.target["value"])

    @property
    def unit(self) -> Kind | None:
        """The kind that an attribution by head or neuron is about: all else in it is what they leave. Else None."""
        return _UNITS.get(self.by)

    @cached_property
    def residual(self) -> float:
        """Value minus the sum of the shares: rounding."""
        return self.value - self.shares.sum().item()

    @property
    def relative_residual(self) -> float:
        """|residual| over the sizes of what was added up: the shares, or the logits that the target is made of."""
        return abs(self.residual) / max(self.shares.abs().sum().item(), self.target["size"], sys.float_info.min)

    def top(self, k: int = 10, kind: Kind | None = None) -> list[Share]:
        """The k largest shares by absolute value, of one kind or of all."""
        return [self.parts[i] for i in self.ranking(k, kind)]

    def ranking(self, k: int, kind: Kind | None = None) -> list[int]:
        """The numbers of the k largest shares."""
        chosen = torch.arange(len(self)) if kind is None else (self.kinds == KINDS.index(kind)).nonzero()[:, 0]
        order = self.shares[chosen].abs().argsort(descending=True, stable=True)[:k]
        return chosen[order].tolist()

    def matrix(self) -> tuple[Float[Tensor, "rows columns"], list[str]]:
        """A token × layer attribution as a matrix, and the names of its columns.

        Rows are the T tokens and, last, the biases; columns the embeddings, each layer's parts, and, last, the biases
        of the final norm and the head. A row sums to the token's share, a column to the share of the layer's part.
        """
        columns = list(dict.fromkeys(zip(self.kinds.tolist(), self.layers.tolist(), strict=True)))
        place = {column: i for i, column in enumerate(columns)}
        rows = torch.where(self.tokens == NONE, len(self.texts), self.tokens)
        which = torch.tensor([place[pair] for pair in zip(self.kinds.tolist(), self.layers.tolist(), strict=True)])
        found = self.shares.new_zeros(len(self.texts) + 1, len(columns))
        found.index_put_((rows, which), self.shares, accumulate=True)
        names = [KINDS[kind] if layer == NONE else f"{KINDS[kind]}.{layer}" for kind, layer in columns]
        return found, names

    def to_dataframe(self) -> DataFrame:
        """One row per share: name, kind, layer, index, token, text, share, through, sink; needs pandas."""
        rows, texts = self.parts, self.texts
        return dataframe(
            {
                "name": [row.name for row in rows],
                "kind": [row.kind for row in rows],
                "layer": [row.layer for row in rows],
                "index": [row.index for row in rows],
                "token": [row.token for row in rows],
                "text": [None if row.token is None else texts[row.token] for row in rows],
                "share": [row.share for row in rows],
                "through": [row.through for row in rows],
                "sink": [row.token in self.sinks for row in rows],
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = [{name: value for name, value in vars(part).items() if value is not None} for part in self.parts]
        return {
            "by": self.by,
            "target": self.target,
            "shares": rows,
            "sum": self.shares.sum().item(),
            "residual": self.residual,
            "relative_residual": self.relative_residual,
            "sinks": self.sinks,
            "warnings": self.warnings,
            "provenance": None if self.provenance is None else self.provenance.to_dict(),
        }

    def to_json(self) -> str:
        """Everything, as JSON text; floats that are not finite do not occur."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
