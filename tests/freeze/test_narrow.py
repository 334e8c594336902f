"""Products with weights in a narrower dtype: equal to those with a widened copy, which is never made."""

from __future__ import annotations

import pytest
import torch

import tiny
from loclin.common.sums import relative_error
from loclin.freeze import narrow
from loclin.linearization import linearize
from loclin.network.autograd import batched_jvp, batched_vjp

NARROW = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]


@pytest.mark.parametrize(("stored", "dtype"), NARROW, ids=str)
@pytest.mark.parametrize("numbers", [1, 7 * 11, 2**19], ids=["a row", "seven rows", "all rows"])
def test_products_and_their_derivatives_equal_those_with_a_widened_copy(monkeypatch, stored, dtype, numbers):
    monkeypatch.setattr(narrow, "_NUMBERS", numbers)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 11, generator=random).to(stored)
    wide, limit = weight.double(), tiny.rounding(dtype)
    x = torch.randn(2, 5, 11, generator=random, dtype=dtype).requires_grad_()
    u, v = (torch.randn(3, 2, 5, n, generator=random, dtype=dtype) for n in (23, 11))
    y = narrow.linear(x, weight)
    assert y.dtype == dtype
    assert relative_error(y.double() - x.double() @ wide.T, y.double()) < limit
    for found, right in (
        (batched_vjp(y, x, u), u.double() @ wide),
        (torch.autograd.grad(y, x, u[0], retain_graph=True)[0], u[0].double() @ wide),
        (batched_jvp(y, x)(v), v.double() @ wide.T),
    ):
        assert found.dtype == dtype
        assert relative_error(found.double() - right, right) < limit


@pytest.mark.parametrize("biases", [False, True])
def test_the_graph_of_a_layer_holds_no_widened_weight(biases):
    lin = linearize(tiny.llama(dtype=torch.bfloat16, biases=biases), tiny.prompt())
    shapes = {tuple(weight.shape) for weight in lin.model.hf.parameters() if weight.dim() == 2}
    held: list[torch.Tensor] = []

    def hold(tensor):
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        lin.chain.layers[1].graph(collect=True)
    matrices = [tensor for tensor in held if {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes]
    assert matrices
    assert {tensor.dtype for tensor in matrices} == {torch.bfloat16}


def test_only_plain_matrices_are_widened_by_rows():
    assert narrow.is_narrow(torch.zeros(2, 3, dtype=torch.bfloat16), torch.float32)
    for weight in (
        torch.zeros(2, 3),
        torch.zeros(2, 3, 4, dtype=torch.bfloat16),
        torch.zeros(0, 3, dtype=torch.bfloat16),
        torch.zeros(2, 3, dtype=torch.int8),
        torch.zeros(2, 3, dtype=torch.bfloat16, device="meta"),
        None,
    ):
        assert not narrow.is_narrow(weight, torch.float32)
