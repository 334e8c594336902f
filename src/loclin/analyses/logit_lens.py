"""The logit lens: the prediction if the model ended after a given layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.analyses.attribution.target import Token, find_token
from loclin.analyses.decode import Words
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.surroundings import eager_code, in_plain_torch
from loclin.maps.linearized import Linearized, question
from loclin.models.forward import hidden_output, hooked, keeps_logits, logits_at, with_hidden_output
from loclin.models.replica import exclusive
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.results.table import make_columns


@dataclass(frozen=True)
class LensLayer:
    """One layer's residual stream through the final norm and the output head.

    `words` are the most probable tokens with their probabilities; `probability` and `rank` (1: the most probable) are
    those of the token that is followed.
    """

    words: Words
    probability: float
    rank: int

    __repr__ = brief


@dataclass(frozen=True)
class LogitLens(Result):
    """The predictions if the model ended after each layer; made by `logit_lens`. `lens[layer]` is a `LensLayer`.

    Attributes
    ----------
    token, text: the token that is followed, and its text.
    layers: one for each of L layers. Nothing is frozen here.
    """

    token: int
    text: str
    layers: list[LensLayer]
    provenance: Provenance
    warnings: list[str]

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LensLayer:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LensLayer]:
        return iter(self.layers)

    def table(self) -> dict[str, list[Any]]:
        """One row per layer: the first word and its probability, and the followed token's probability and rank."""
        rows = ((i, *layer.words[0], layer.probability, layer.rank) for i, layer in enumerate(self.layers))
        return make_columns("layer word word_probability probability rank", rows)


@question
def logit_lens(lin: Linearized, token: Token | None = None, *, position: int = -1, k: int = 5) -> LogitLens:
    """Decode every layer's residual stream with the final norm and the output head (nostalgebraist, 2020).

    Cost: two forward passes, and L products with the output head.

    Raises PromptError for a position outside the prompt; OptionError for a text that is not one token, or an id that
    the model does not have.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    token: the token to follow, by text or id: its probability and rank at each layer. None: the predicted token.
    position: the position of the residual stream.
    k: how many words to list for each layer.
    """
    lin.model.refuse_other_tasks("the logit lens", "causal")
    k = whole("k", k, 1)
    token = lin.next_token_ids(1, position=position)[0][0] if token is None else find_token(lin, token)
    probabilities = torch.softmax(compute_layer_logits(lin, position).double(), dim=-1)
    top = probabilities.topk(min(k, probabilities.shape[1]))
    ranks = (probabilities > probabilities[:, token, None]).sum(1) + 1
    found = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    words = [list(zip(lin.model.decode_each(ids), values, strict=True)) for ids, values in found]
    rows = zip(words, probabilities[:, token].tolist(), ranks.tolist(), strict=True)
    layers, (text,) = [LensLayer(*row) for row in rows], lin.model.decode_each([token])
    return LogitLens(token, text, layers, lin.jacobian(position=position).provenance(), lin.warnings)


@in_plain_torch
def compute_layer_logits(lin: Linearized, position: int = -1) -> Float[Tensor, "L V"]:
    """Compute the logits if each layer were the last: with the model's own final norm, head, scales and soft caps.

    Nothing is frozen. The last layer's logits are the model's. Cost: two forward passes over at most the first L
    tokens, and L products with the output head. Memory: L V numbers, or 2 L V if there are fewer tokens than layers.
    """
    trace, hf = lin.trace, lin.trace.model.hf
    trace.check_weights(hf)
    at, end = trace.position(position), trace.end
    streams = [*(call.hidden[0, at] for call in trace.layers[1:]), end.hidden[0, at]]
    # only their number matters: their states are replaced
    ids, model = trace.input_ids[:, : len(streams)].clamp_min(0), replace(trace.model, inputs={})
    options: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if keeps_logits(hf):
        options["logits_to_keep"] = 0  # the logits of all tokens
    with exclusive(hf), eager_code(), torch.no_grad():
        final = end(torch.stack([stream.to(end.hidden) for stream in streams])[None])[0]
        rows = -(-len(final) // ids.shape[1])  # some decoders reshape their output to the length of the prompt
        final = torch.cat([final, final.new_zeros(rows * ids.shape[1] - len(final), final.shape[1])])
        calls = _Calls(final.reshape(rows, ids.shape[1], -1))
        with hooked([trace.sequence.exit.register_forward_hook(calls)]):
            logits_at(model, ids, ids.shape[1] - 1)
            calls.begin()
            return hf(**options).logits.flatten(0, 1)[: len(streams)]


class _Calls:
    """A hook that counts a module's calls, which may be several, and then replaces the output of the last one."""

    def __init__(self, given: Tensor) -> None:
        self.given, self.made, self.last = given, 0, 0

    def begin(self) -> None:
        self.made, self.last = 0, self.made

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self.made += 1
        if self.made != self.last:
            return output
        return with_hidden_output(output, self.given.to(hidden_output(output)))
