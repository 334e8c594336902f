"""The shares of an attribution target by token, layer, head, neuron or bias."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.groups import Group
from loclin.analyses.decode import Words
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns

By = Literal[
    "token", "layer", "head", "neuron", "bias", "token×layer", "adapter", "word", "sentence", "line", "turn", "example",
    "group",
]  # fmt: skip
Kind = Literal["token", "embed", "attn_out", "mlp_out", "block", "head", "neuron", "bias", "group", "adapter"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a share belongs to; `block` is a whole layer whose attention and MLP cannot be told apart."""
NONE = -1
"""Stands for "no layer", "no index" or "no token" in tensors."""


@dataclass(frozen=True)
class Share:
    """One share of a target.

    Attributes
    ----------
    name: the text of a token or of a group of tokens; the name of a point (`attn_out.3`); `L3H5` for query head 5 of
        layer 3, `L3N57` for a neuron; the path of a bias; `L3.mlp.up_proj` for an adapter. In a token × layer
        attribution: the name of the point.
    kind: see `KINDS`.
    layer, index, token: the layer, the number within it, and the position in the prompt; None where it has none.
    share: the exact part of the target: a total effect by token and bias, a direct effect by layer, head and neuron.
    through: the total effect through the component: its direct effect, and its effect along all paths through later
        layers. None by token, bias and token × layer.
    writes: what the component writes into the output, in words; for the largest shares only.
    attends: for the largest heads `[T]`: the part of the share that is read at each position; biases are the rest.
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
class Attribution(Result):
    """n shares that sum to a target; made by `loclin.attribute`.

    Attributes
    ----------
    by: the level: what the shares belong to.
    target: its `kind`, `tokens`, `ids`, `value` and `position`; its `size`, the sum of the absolute values of its terms
        (for a difference, of both logits); and the `probability` of its first token. Of a difference of two spans these
        are the first's, but for the kind, the value and the size, and `against` has the second's: its `value`, and its
        own input tokens, `inputs`, which come behind the prompt's `shared` ones and the first's own.
    shares: values of the frozen network, each times its exact weight in the target, `[n]` in float64.
    through: the total effect through each component `[n]`, or None. They overlap, and do not sum to the target.
    kinds, layers, indices, positions: what each share belongs to `[n]`, see `Share`; -1 for none. `kinds` are indices
        into `KINDS`.
    biases: the names of biases and of adapters; the index of one is its place in this list.
    writes, attends: for the largest shares, see `Share`; keys are the shares' indices, as text.
    sinks: positions of attention sinks.
    groups: for shares of groups of tokens, the groups; the index of a share is its place in this list.
    skipped: positions whose shares are counted in the sum, and left out of rankings.
    shared: where attention is shared, its weights (see `loclin.SharedAttention`): the shares are then not exact.
    """

    by: By
    target: dict[str, Any]
    shares: Tensor
    through: Tensor | None
    kinds: Tensor
    layers: Tensor
    indices: Tensor
    positions: Tensor
    biases: list[str]
    writes: dict[str, Any]
    attends: dict[str, list[float]]
    sinks: list[int]
    warnings: list[str]
    provenance: Provenance | None = None
    groups: list[Group] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    shared: dict[str, float] | None = None

    derived = ("parts", "sum", "residual", "relative_residual")

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, i: int) -> Share:
        return self.parts[i]

    @cached_property
    def parts(self) -> list[Share]:
        """Every share, with its name."""
        columns = [[None if n == NONE else n for n in f.tolist()] for f in (self.layers, self.indices, self.positions)]
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
        if kind in ("bias", "adapter") and index is not None:
            return self.biases[index]
        if kind == "group" and index is not None:
            return self.groups[index].name
        if kind == "token" and token is not None:
            return self.texts[token]
        return kind if layer is None else f"{kind}.{layer}"

    @property
    def texts(self) -> list[str]:
        """The prompt's tokens; of a difference of two spans, with the input tokens of both behind it."""
        known = [] if self.provenance is None else self.provenance.tokens
        return [*known, *self.target.get("against", {}).get("inputs", [])]

    def side(self, token: int | None) -> str | None:
        """Of a difference of two spans: which of them alone a token belongs to, `first` or `second`; else None."""
        against = self.target.get("against")
        if against is None or token is None or token < against["shared"]:
            return None
        return "first" if token < len(self.texts) - len(against["inputs"]) else "second"

    @property
    def value(self) -> float:
        """The target's own value in the frozen network."""
        return float(self.target["value"])

    @property
    def unit(self) -> Kind | None:
        """The kind of share that is split by head or neuron; None for other levels."""
        return self.by if self.by in ("head", "neuron") else None

    @property
    def sum(self) -> float:
        """The sum of the shares."""
        return self.shares.sum().item()

    @cached_property
    def residual(self) -> float:
        """The target's value minus the sum of the shares: rounding."""
        return self.value - self.sum

    def by_token(self) -> tuple[list[float], float]:
        """Return the shares of the T tokens, and the sum of the shares of biases, of an attribution by token.

        Raises OptionError for one by groups of tokens, or by parts of the model.
        """
        if self.by not in ("token", "token×layer"):
            raise OptionError(f"shares by {self.by} have none of single tokens: attribute by='token'")
        tokens, biases = [0.0] * len(self.texts), 0.0
        for part in self.parts:
            if part.kind == "token" and part.token is not None:
                tokens[part.token] += part.share
            else:
                biases += part.share
        return tokens, biases

    @property
    def relative_residual(self) -> float:
        """|residual| over the sum of absolute values that were added: of the shares, or of the logits in the target."""
        return abs(self.residual) / max(self.shares.abs().sum().item(), self.target["size"], sys.float_info.min)

    def top(self, k: int = 10, kind: Kind | None = None) -> list[Share]:
        """Return the k largest shares by absolute value, of one kind or of all."""
        return [self.parts[i] for i in self.ranking(k, kind)]

    def ranking(self, k: int, kind: Kind | None = None) -> list[int]:
        """Return the indices of the k largest shares by absolute value, without skipped tokens."""
        wanted = torch.ones(len(self), dtype=torch.bool) if kind is None else self.kinds == KINDS.index(kind)
        wanted = wanted & torch.tensor([not self._is_skipped(part) for part in self.parts], dtype=torch.bool)
        chosen = wanted.nonzero()[:, 0]
        order = self.shares[chosen].abs().argsort(descending=True, stable=True)[:k]
        return chosen[order].tolist()

    def _is_skipped(self, part: Share) -> bool:
        if part.kind == "group" and part.index is not None:
            return set(self.groups[part.index].positions) <= set(self.skipped)
        return part.kind == "token" and part.token in self.skipped

    def matrix(self) -> tuple[Float[Tensor, "rows columns"], list[str]]:
        """Return a token × layer attribution as a matrix, and the names of its columns.

        Rows are the T tokens, then one row for all biases. Columns are the embeddings, the components of each layer,
        and last the biases of the final norm and the output head. A row sums to the token's share, a column to the
        share of the component.
        """
        pairs = list(zip(self.kinds.tolist(), self.layers.tolist(), strict=True))
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        rows = torch.where(self.positions == NONE, len(self.texts), self.positions)
        found = self.shares.new_zeros(len(self.texts) + 1, len(place))
        found.index_put_((rows, torch.tensor([place[pair] for pair in pairs])), self.shares, accumulate=True)
        return found, [KINDS[kind] if layer == NONE else f"{KINDS[kind]}.{layer}" for kind, layer in place]

    def table(self) -> dict[str, list[Any]]:
        """One row per share: name, kind, layer, index, token, text, share, through, sink; of two spans, the side."""
        texts = self.texts
        rows = (
            (s.name, s.kind, s.layer, s.index, s.token, None if s.token is None else texts[s.token], s.share, s.through)
            for s in self.parts
        )
        found = make_columns("name kind layer index token text share through", rows)
        found["sink"] = [share.token in self.sinks for share in self.parts]
        return found | ({"side": [self.side(s.token) for s in self.parts]} if "against" in self.target else {})
