"""Whether the products of a trace are split into bfloat16 ones: where that is exact, and faster on this device."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loclin.common.sums import relative_error
from loclin.freeze.quantised import dense_weight
from loclin.models.lease import weights_of
from loclin.network.anatomy import Weights
from loclin.network.blocks import Workspace
from loclin.network.cost import fastest
from loclin.network.matrix import Matrix
from loclin.network.split import Split, is_alone, is_held, multiply_both
from loclin.network.trace import Trace

_ROWS, _ROWS_ACCELERATOR = 1600, 4096
_FLOPS = 4e9  # of a product on a CPU that is timed
_WORTH = 0.9
_AGREEMENT = 2e-6


class Shares(NamedTuple):
    """The time of split products, relative to that of float32 ones."""

    weights: float
    formed: float


given_shares: ContextVar[Shares | None] = ContextVar("given_shares", default=None)
"""What is taken for the times of this device: products are then split whatever it does, and whatever else runs."""


def choose(trace: Trace) -> Split:
    """Decide for a trace whose precision is `"split"`; the note says what was decided, and why.

    Cost: a pass over each weight that is not stored in bfloat16; and products of one weight and of one formed matrix,
    each way, three times: a few hundredths of a second. Memory: one layer's weights, and a sweep's workspace.
    """
    shares, device = given_shares.get(), trace.layers[0].hidden.device
    weights = trace.anatomy.weights
    if weights is None or not any(trace.explicit):
        return _left_off("no layer has explicit products (see docs/howto/precision.md)")
    modules = [call.block.module for call in trace.layers]
    layers = tuple(exact and _is_held(modules[i], weights) for i, exact in enumerate(trace.explicit))
    if not any(layers):
        return _left_off("weights are not bf16-exact (float32 checkpoint)")
    if shares is None:
        if device.type not in ("cpu", "cuda"):
            return _left_off(f"torch has no bf16 products with float32 sums on {device.type}")
        if device.type == "cpu" and not is_alone():
            return _left_off("other threads run in this process, and torch's switch for a CPU's products is theirs too")
        found = _measure(modules[layers.index(True)], weights)
        if isinstance(found, str):
            return _left_off(found)
        shares = found
    if shares.weights > _WORTH:
        return _left_off(f"bf16 products are not faster here ({shares.weights:.2g} x float32's time)")
    formed = shares.formed <= _WORTH
    note = f"3 bf16 products, {shares.weights:.2g} x float32's time"
    note += f"; 6 for formed matrices, {shares.formed:.2g} x" if formed else "; formed matrices in float32"
    if not all(layers):
        note += f"; {sum(layers)} of {len(layers)} layers"
    return Split(layers, formed, note)


def _left_off(why: str) -> Split:
    return Split(note=f"left off: {why}")


def _is_held(layer: nn.Module, weights: Weights) -> bool:
    """Whether bfloat16 holds every matrix of a layer."""
    stored = [layer.get_submodule(path).weight for path in weights.matrices]
    if all(isinstance(weight, Tensor) and weight.dtype == torch.bfloat16 for weight in stored):
        return True
    with weights_of(layer, weights.matrices):
        found = [dense_weight(layer.get_submodule(path)) for path in weights.matrices]
        return all(weight is not None and is_held(weight) for weight in found)


def _measure(layer: nn.Module, weights: Weights) -> Shares | str:
    """How long split products of a layer's largest matrix take here; or why they cannot be used."""
    with weights_of(layer, [weights.down]):
        weight = dense_weight(layer.get_submodule(weights.down))
        assert weight is not None
        d, f = weight.shape
        on_cpu = weight.device.type == "cpu"
        rows = int(max(257, min(_ROWS, _FLOPS / (2 * d * f)))) if on_cpu else _ROWS_ACCELERATOR
        random = torch.Generator().manual_seed(0)
        x, formed = (torch.randn(n, d, generator=random).to(weight.device) for n in (rows, d))
        workspace = Workspace()
        plain, split = (Matrix(f"timed {on}", weight, None, torch.float32, workspace, on) for on in (False, True))
        a, b = x.new_empty(rows, f), x.new_empty(rows, f)
        one, other = x.new_empty(rows, d), x.new_empty(rows, d)
        try:
            shares = Shares(
                fastest(lambda: split.pull(x, b), x.device) / fastest(lambda: plain.pull(x, a), x.device),
                fastest(lambda: multiply_both(x, formed, workspace, other), x.device)
                / fastest(lambda: torch.mm(x, formed, out=one), x.device),
            )
        except (NotImplementedError, RuntimeError, TypeError) as fault:  # a GPU or a torch without such products
            return f"bf16 products fail here: {str(fault).partition(chr(10))[0]}"
    error = max(relative_error(b - a, a), relative_error(other - one, one))
    return shares if error <= _AGREEMENT else f"bf16 products are off by {error:.1e} here"
