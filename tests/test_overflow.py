"""A model whose own values are not finite is refused for that, and not as one that is not linear."""

from __future__ import annotations

import pytest
import torch

import loclin
import tiny
from loclin.errors import ModelError
from loclin.models import tiny as families


def overflowing(dtype: torch.dtype, layer: int = 1, scale: float = 1e6):
    """A model whose hidden state leaves float16 in one layer."""
    hf = tiny.llama(dtype=torch.float32)
    with torch.no_grad():
        hf.model.layers[layer].mlp.down_proj.weight.mul_(scale).clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return hf.to(dtype)


@pytest.mark.parametrize("strict", [True, False])
def test_overflow_is_named_with_its_layer_and_dtype(strict):
    hf = overflowing(torch.float16, scale=6e4)
    with pytest.raises(ModelError, match=r"overflows float16 in layer 1 .*use dtype bfloat16 or float32") as raised:
        loclin.linearize(hf, tiny.prompt(), strict=strict)
    assert raised.value.module == "model.layers.1"
    assert loclin.linearize(hf.float(), tiny.prompt()).certify().passed


def test_overflow_in_a_batch_is_named():
    hf = overflowing(torch.float16, scale=6e4)
    with pytest.raises(ModelError, match="overflows float16 in layer 1"):
        loclin.linearize_batch(hf, [tiny.prompt(3), tiny.prompt(5)])


def test_overflow_is_named_in_wider_dtypes_too():
    with pytest.raises(ModelError, match=r"is not finite in float32, first in layer 2, .*use a wider dtype"):
        loclin.linearize(overflowing(torch.float32, 2, 1e38), tiny.prompt())


def test_an_overflow_in_front_of_the_layers_or_behind_them_is_named():
    model = loclin.wrap(tiny.llama())
    model.hf.model.embed_tokens.weight.data[:] = torch.inf
    with pytest.raises(ModelError, match=r"first in the embeddings"):
        loclin.linearize(model, tiny.prompt())
    hf = tiny.llama(dtype=torch.float32)
    hf.lm_head.weight.data.mul_(3e38).clamp_(-3e38, 3e38)
    with pytest.raises(ModelError, match=r"in float32, first behind the last layer"):
        loclin.linearize(hf, tiny.prompt())


def test_an_overflow_is_named_where_blocks_are_no_chain():
    model = loclin.wrap(families.build("xlnet"))
    next(m for m in model.hf.modules() if isinstance(m, torch.nn.LayerNorm)).weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="is not finite in float64, first in"):
        loclin.linearize(model, families.prompt(model.hf))


def test_tokens_ruled_out_by_minus_infinity_are_no_overflow():
    hf = tiny.llama()
    hf.lm_head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor([5]), -torch.inf))
    assert loclin.linearize(hf, tiny.prompt()).certify().passed
