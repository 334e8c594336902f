"""What a linearization holds for each layer, while it is made and afterwards; and what a logit lens makes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from least import least
from loclin.analyses.logit_lens import compute_layer_logits
from loclin.linearization import linearize

T, D = 40, 32


def llama(layers: int, dtype: torch.dtype) -> LlamaForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": 4 * D, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes)).to(dtype).eval()


def reachable() -> dict[int, Tensor]:
    """All tensors that Python can reach, by the address of their memory."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, Parameter)]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.device.type == "cpu"}


def held(before: dict[int, Tensor]) -> int:
    """The bytes of all tensors that Python can reach, but could not before."""
    new = [tensor for address, tensor in reachable().items() if address not in before]
    return sum(tensor.untyped_storage().nbytes() for tensor in new)


def held_by_a_linearization(layers: int, dtype: torch.dtype, spare: int) -> tuple[int, int, int]:
    """The bytes at the end of the frozen pass and afterwards, and those of the coefficients."""
    model, during = llama(layers, dtype), [0]
    memory = least(model, torch.arange(T)[None]) + 2 * spare
    before = reachable()  # which keeps them, so that no other test's are freed meanwhile
    handle = model.model.layers[-1].register_forward_hook(lambda *_: during.append(held(before)))
    lin = linearize(model, torch.arange(T)[None], memory=memory)
    handle.remove()
    kept = sum(part.nbytes for part in lin.trace.coefficients if part is not None)
    return max(during), held(before), kept


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "numbers"), [(torch.float32, 2 * 4), (torch.bfloat16, 2 + 2 * 4)])
def test_a_layer_is_remembered_by_two_numbers_for_each_feature(dtype, numbers):
    """Its input, which a narrower model has twice, and what attention adds; nothing that only a sweep needs."""
    few, many = (held_by_a_linearization(layers, dtype, spare=0) for layers in (3, 11))
    assert few[2] == many[2] == 0
    for less, more in zip(few[:2], many[:2], strict=True):
        assert (more - less) / 8 <= 1.1 * numbers * T * D


@pytest.mark.slow
def test_coefficients_are_kept_within_a_quarter_of_the_budget():
    every = held_by_a_linearization(6, torch.float32, spare=10**9)
    some = held_by_a_linearization(6, torch.float32, spare=every[2])
    assert every[2] // 6 <= some[2] <= every[2] // 2
    assert every[1] - some[1] == pytest.approx(every[2] - some[2], rel=0.2)


class Rows(TorchDispatchMode):
    """Notes how many rows of logits are made at most."""

    most = 0

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.vocabulary, self.head = len(head), head.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and out.dim() and out.untyped_storage().data_ptr() != self.head
        if made and out.shape[-1] == self.vocabulary:
            self.most = max(self.most, out.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("length", [2, 3, 30])
def test_a_logit_lens_sends_no_more_rows_through_the_head_than_there_are_layers(length):
    model = tiny.gemma3()
    lin = linearize(model, tiny.prompt(length))
    with Rows(model.lm_head.weight) as seen:
        found = compute_layer_logits(lin, -1)
    assert found.shape == (3, tiny.VOCABULARY)
    assert seen.most <= (4 if length == 2 else 3)
    assert torch.allclose(found[-1], lin.trace.stock_logits, rtol=1e-9)
