"""The networks that the benchmarks run on: the packaged models at one prompt, and random ones of any width."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import loclin
from loclin.freeze import frozen
from loclin.linearization import Linearization
from loclin.maps.linear_map import LinearMap

PROMPT = "The bridge out of Marin is the"
BUDGET = 2**30
PARAGRAPH = (
    "The river rises among low hills, where rain that has fallen on the moor gathers in many small streams, and for "
    "the first miles of its course it is shallow and quick. Below the old mill the valley opens, the banks grow "
    "soft, and the water slows between meadows that are flooded every spring. Carters used to cross here by a ford, "
    "and in dry summers the stones of it can still be seen. The town stands a little further on, upon the northern "
    "side, with a market square, a church of grey stone, and a row of warehouses from the time when barges carried "
    "wool and grain down to the harbour. A bridge of five arches was built to replace the ferry; it took eleven "
    "years to finish, and twice the work was carried away by ice. Today most of the trade goes by rail, but the "
    "bridge is kept in good repair, and on fair days the whole town walks across it to the fields. Beyond the last "
    "houses the river bends towards the sea, the tide begins to be felt, and gulls follow the boats as they come "
    "home in the evening. "
)
LINEAR = ("v_proj", "o_proj", "up_proj", "down_proj")

SMOLLM2_SPECTRUM = {
    1: 1.0,
    2: 0.265,
    4: 0.224,
    8: 0.165,
    16: 0.121,
    32: 0.085,
    64: 0.044,
    128: 0.018,
    256: 0.0052,
    384: 0.0018,
    501: 0.0006,
    1024: 1e-4,
    2048: 1e-5,
}
"""j: sigma_j / sigma_1 of SmolLM2's joint map at the prompt; the last two, beyond its width, are made up."""


class CountedMap(LinearMap):
    """A map that counts the columns it has pushed or pulled; `dense()` counts as the columns it takes."""

    columns = 0

    def matmat(self, Xs: Tensor) -> Tensor:
        """Count, and push."""
        self.columns += len(Xs)
        return super().matmat(Xs)

    def rmatmat(self, Us: Tensor) -> Tensor:
        """Count, and pull."""
        self.columns += len(Us)
        return super().rmatmat(Us)


def packaged(name: str) -> Linearization:
    """A packaged model at the prompt, with a beginning token."""
    return loclin.linearize(loclin.load(name), PROMPT, bos=True, memory=BUDGET)


def decaying(d: int, layers: int, length: int, gain: float = 2.0, seed: int = 0) -> Linearization:
    """A random Llama at `length` random tokens, whose spectra decay like SmolLM2's.

    All weights are normal with the standard deviation gain / sqrt(fan_in), the embeddings with 1; the final norm's
    gain is `SMOLLM2_SPECTRUM`, interpolated on logarithms, over the coordinates in a random order.
    """
    heads, vocabulary = d // 64, 1000
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        intermediate_size=64 * round(8 * d / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, gain / math.sqrt(weight.shape[1]), generator=generator)
        model.get_input_embeddings().weight.normal_(generator=generator)
        model.model.norm.weight.copy_(decay(d)[torch.randperm(d, generator=generator)])
    ids = torch.randint(vocabulary, (1, length), generator=generator)
    return loclin.linearize(model, ids, memory=BUDGET)


def decay(d: int) -> Tensor:
    """`SMOLLM2_SPECTRUM` at 1 to d, interpolated linearly between logarithms."""
    at, values = np.log(list(SMOLLM2_SPECTRUM.items())).T
    return torch.from_numpy(np.exp(np.interp(np.log(np.arange(1, d + 1)), at, values)))


def linear_weights(model: nn.Module) -> int:
    """How many weights are on the linear path."""
    return sum(
        part.weight.numel()
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in LINEAR
    )


def whole_graph(lin: Linearization) -> Callable[[Tensor], Tensor]:
    """The frozen network as one function of its embeddings `[T, d]`."""
    hf, stock = lin.model.hf, lin.trace.layers[0].hidden

    def forward(x: Tensor) -> Tensor:
        with frozen(hf, lin.trace.options) as mode:
            hidden = stock.clone()
            mode.enter(hidden, x[None])
            final = mode.live(hf.get_decoder()(inputs_embeds=hidden, use_cache=False).last_hidden_state)
        return final[0, -1]

    return forward


def fresh(lin: Linearization, budget: int | None = BUDGET) -> CountedMap:
    """The map embed -> final with nothing kept from earlier calls."""
    J = lin.jacobian()
    return CountedMap(lin.chain, J.source, J.target, J.position, budget=budget)
