"""The logit lens: what the model would predict if it ended after a layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loclin.analyses.decode import Words
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.surroundings import eager_code, in_plain_torch
from loclin.maps.linearized import Linearized
from loclin.models.replica import exclusive
from loclin.network.route import first, logits_at


@dataclass(frozen=True)
class LensLayer:
    """One layer's residual stream through the final norm and the head.

    `words` are the most probable tokens with their probabilities; `probability` and `rank` (1: the first) are those of
    the token asked for.
    """

    words: Words
    probability: float
    rank: int

    __repr__ = brief


@in_plain_torch
def logit_lens(lin: Linearized, token: int, position: int = -1, k: int = 5) -> list[LensLayer]:
    """Read every layer's residual stream as the model reads its last (nostalgebraist, 2020).

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    token
        Whose probability and rank to give at each layer.
    position
        Of the residual stream.
    k
        How many words.

    Raises
    ------
    PromptError
        For a position outside the prompt.
    OptionError
        For a token that the model does not have.

    Notes
    -----
    Cost: two forward passes, and L products with the head.
    """
    k = whole("k", k, 1)
    probabilities = torch.softmax(layer_logits(lin, position).double(), dim=-1)
    token = whole("token", token, 0, probabilities.shape[1] - 1)
    top = probabilities.topk(min(k, probabilities.shape[1]))
    ranks = (probabilities > probabilities[:, token, None]).sum(1) + 1
    return [
        LensLayer(
            words=list(zip(lin.model.decode_each(ids.tolist()), values.tolist(), strict=True)),
            probability=own,
            rank=rank,
        )
        for ids, values, own, rank in zip(
            top.indices, top.values, probabilities[:, token].tolist(), ranks.tolist(), strict=True
        )
    ]


@in_plain_torch
def layer_logits(lin: Linearized, position: int = -1) -> Float[Tensor, "L V"]:
    """The model's logits, were each layer the last: its own final norm, head, scales and soft caps, nothing frozen.

    The last layer's are the model's. Cost: two forward passes over the first L tokens at most, and L products with the
    head. Memory: L V numbers, or 2 L V where there are fewer tokens than layers.
    """
    trace, hf = lin.trace, lin.trace.model.hf
    trace.check_weights(hf)
    at, end = trace.position(position), trace.end
    streams = [*(call.hidden[0, at] for call in trace.layers[1:]), end.hidden[0, at]]
    ids = trace.input_ids[:, : len(streams)]  # what is in them is replaced; more of them would be rows for the head
    options: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "logits_to_keep" in inspect.signature(hf.forward).parameters:
        options["logits_to_keep"] = 0  # all of them
    with exclusive(hf), eager_code(), torch.no_grad():
        final = end(torch.stack([stream.to(end.hidden) for stream in streams])[None])[0]
        rows = -(-len(final) // ids.shape[1])  # some decoders give their output the prompt's length again
        final = torch.cat([final, final.new_zeros(rows * ids.shape[1] - len(final), final.shape[1])])
        calls = _Calls(final.reshape(rows, ids.shape[1], -1))
        handle = trace.route.exit.register_forward_hook(calls)
        try:
            logits_at(trace.model, ids, ids.shape[1] - 1)
            calls.begin()
            return hf(**options).logits.flatten(0, 1)[: len(streams)]
        finally:
            handle.remove()


class _Calls:
    """Counts a module's calls in one pass; in the next, the last one gives what it is told to.

    Some models use the final norm elsewhere too.
    """

    def __init__(self, given: Tensor) -> None:
        self.given, self.made, self.last = given, 0, 0

    def begin(self) -> None:
        self.made, self.last = 0, self.made

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        self.made += 1
        if self.made != self.last:
            return output
        given = self.given.to(first(output))
        return given if isinstance(output, Tensor) else (given, *output[1:])
