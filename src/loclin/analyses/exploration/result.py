"""A prompt with the vectors of all its parts: the shares of any word that it has, without the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from loclin.analyses.attribution.groups import Group
from loclin.analyses.attribution.target import Token
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.maps.certificate import Certificate
from loclin.results.provenance import Provenance
from loclin.results.result import AtPrompt
from loclin.results.table import make_columns

Asked = Token | tuple[Token, Token] | None
"""A word's logit, by text or id; the difference of two; None: the predicted word's logit minus the mean of all."""


@dataclass(frozen=True)
class Goal:
    """A logit, or a difference of two, as `direction . final + offset`."""

    words: tuple[str, ...]
    direction: Float[Tensor, " d"]
    offset: float
    value: float

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class Exploration(AtPrompt):
    """The final hidden state at one position as a sum of vectors, and rows of the output head; made by `explore`.

    A share of a logit is the product of a part's vector with the word's row: any word's, of those that it has.

    Attributes
    ----------
    by: what a row stands for: `"token"`, or in long prompts `"word"`, `"sentence"`, `"line"` or `"group"`.
    rows: R tokens, or groups of them, and their positions.
    components: the names of C columns: `embed`, `attn_out.0`, `mlp_out.0`, ..., and `norm` for the biases of the final
        norm. A layer whose attention and MLP cannot be told apart is one `block`.
    cells: `[R + 1, C, d]`, behind the frozen final norm: the effect of each row's tokens along all paths on which a
        component writes last; in the last row, of all biases. They sum to the final hidden state.
    head_names, heads: `[N, d]`: what each query head writes into the final hidden state, directly.
    ids, words: the tokens that can be asked for: those given, predicted ones, the prompt's own, frequent ones.
    directions, offsets, logits: `[n + 1, d]`, `[n + 1]`, `[n + 1]`: the rows of the frozen output head, its biases, and
        the logits at the prompt; the last is of the mean of all logits.
    predictions: the most probable words at the prompt, as (id, text, probability).
    lens_positions, lens_top, lens_ranks, ranks: the logit lens (with the model's own norm, nothing frozen): for each
        layer and position `[L, P, k]` the ids of the best tokens, `[L, P, m]` the ranks of the first m words, 1 for the
        best, and `[L, n]` the ranks of all words at the position of the prediction. Empty if the task has none.
    lens_words: the texts of the tokens in `lens_top`, by id.
    groups: other groups of tokens whose shares can be added up, by name of the unit.
    sinks, special: the positions of attention sinks, and of special tokens.
    certificate: how exact the map is.
    """

    by: str
    rows: list[Group]
    components: list[str]
    cells: Float[Tensor, "R1 C d"]
    head_names: list[str]
    heads: Float[Tensor, "N d"]
    ids: list[int]
    words: list[str]
    directions: Float[Tensor, "n1 d"]
    offsets: Float[Tensor, " n1"]
    logits: Float[Tensor, " n1"]
    predictions: list[tuple[int, str, float]]
    lens_positions: list[int]
    lens_top: Int[Tensor, "L P k"]
    lens_ranks: Int[Tensor, "L P m"]
    ranks: Int[Tensor, "L n"]
    lens_words: dict[str, str]
    groups: dict[str, list[Group]]
    sinks: list[int]
    special: list[int]
    certificate: Certificate
    provenance: Provenance
    warnings: list[str] = field(default_factory=list)

    def index(self, word: Token) -> int:
        """Find a word's place among those that it has, by text or id; OptionError for one that it does not have."""
        found = [i for i, (token, text) in enumerate(zip(self.ids, self.words, strict=True)) if word in (token, text)]
        if not found:
            raise OptionError(f"the word {word!r} is not in this exploration: explore(words=[{word!r}]) adds it")
        return found[0]

    def goal(self, asked: Asked = None) -> Goal:
        """What is shared out, as a direction of the final hidden state; OptionError for a word that it does not have.

        None is the predicted word's logit minus the mean of all (alone, where some logits are infinite).
        """
        if asked is None:
            first = max(range(len(self.words)), key=lambda i: self.logits[i].item())
            places = [first, len(self.words)] if math.isfinite(self.logits[-1]) else [first]
        else:
            places = [self.index(one) for one in (asked if isinstance(asked, tuple) else (asked,))]
        if len(places) > 2:
            raise OptionError(f"a difference has two words, not {len(places)}: give (' yes', ' no')")
        direction, offset, value = (
            part[places[0]] - part[places[1]] if len(places) == 2 else part[places[0]]
            for part in (self.directions.double(), self.offsets.double(), self.logits.double())
        )
        names = tuple(self.words[i] if i < len(self.words) else "mean of all" for i in places)
        return Goal(names, direction, offset.item(), value.item())

    def shares(self, asked: Asked = None) -> Float[Tensor, "R1 C"]:
        """Share out a logit or a difference of two, in float64: by rows of tokens, biases last, and by components.

        With the output head's own bias (`goal(...).offset`) they sum to it. Rows sum to total effects of tokens,
        columns to direct effects of components.
        """
        return self.cells.double() @ self.goal(asked).direction

    def head_shares(self, asked: Asked = None) -> Float[Tensor, " N"]:
        """The direct effect of each query head, in float64."""
        return self.heads.double() @ self.goal(asked).direction

    def residual(self, asked: Asked = None) -> float:
        """The logit minus the sum of its shares: rounding."""
        goal = self.goal(asked)
        return goal.value - goal.offset - self.shares(asked).sum().item()

    def table(self) -> dict[str, list[Any]]:
        """One row per row of tokens: its name, its positions' first and last, its share of `goal()`; biases last."""
        goal, shares = self.goal(), self.shares().sum(1).tolist()
        rows = [(row.name, row.positions[0], row.positions[-1]) for row in self.rows]
        biases = ("biases", None, None, shares[-1] + goal.offset)
        return make_columns(
            "name first last share", [*((*row, share) for row, share in zip(rows, shares[:-1], strict=True)), biases]
        )
