"""Every operation's twin has the operation's value, and is affine: x and the constants, pulled back, give it again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loclin.freeze import FreezeOptions, frozen, table
from loclin.models import tiny

N = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
"""A constant of x's own shape."""
W = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
FLAT = torch.tensor([0, 2, 1, 3])
TIES = torch.tensor([0, 0, 1, 3])
GROUPS = torch.tensor([0, 0, 1, 1]).view(1, 4, 1).expand(3, 4, 6)


def _written(x):
    base = N.clone()
    base[:, 1:3] = x[:, :2]
    base[..., 0] += x[..., 1]
    return base


def _in_place(x):
    y = x.clone()
    y.mul_(2.0)
    y += N
    y[0, 0] = 3.0
    y[..., :2] *= 0.5
    return y


AFFINE = {
    "add a number": lambda x: 1 + x + 2.5,
    "subtract": lambda x: (1 - x) - N,
    "scaled sum": lambda x: torch.add(x, N, alpha=3),
    "negate, divide": lambda x: -x / 3 / N.abs().add(1),
    "matrices": lambda x: (x @ W) @ W.T + torch.matmul(W[:4, :4], x),
    "products": lambda x: torch.bmm(x, W.expand(3, 6, 6)) + torch.einsum("btd,de->bte", x, W),
    "mm, mv": lambda x: torch.mm(x[0], W) + torch.mv(x[0], W[0])[:, None],
    "addmm, baddbmm": lambda x: torch.addmm(N[0], x[0], W) + torch.baddbmm(N, x, W.expand(3, 6, 6)),
    "linear with a bias": lambda x: F.linear(x, W, W[0]),
    "convolutions": lambda x: (
        F.conv1d(x, W[:4, :4, None].contiguous(), W[0, :4])
        + F.conv1d(F.pad(x, (2, 0)), W[:4, :3].reshape(4, 1, 3), groups=4)
    ),
    "pooling": lambda x: F.avg_pool2d(x[:, None], (2, 1)).squeeze(1),
    "sums": lambda x: x.sum(-1) + x.mean(1).sum() + x.cumsum(1).sum(-1),
    "cat, stack": lambda x: torch.cat([x, N], 1).sum(1) + torch.stack([N, x]).sum((0, 2)),
    "where, masked_fill": lambda x: torch.where(N > 0, x, N) + x.masked_fill(N > 0, 2.0) + x.masked_fill(N < 0, 0),
    "index": lambda x: (
        x[:, FLAT][..., ::2].index_select(1, FLAT) + torch.gather(x, 1, FLAT.view(1, 4, 1).expand(3, 4, 3))
    ),
    "index_add": lambda x: torch.zeros(4, 6, dtype=x.dtype).index_add(0, FLAT, x[0]) + N[0].index_copy(0, FLAT, x[1]),
    "scatter": lambda x: (
        N.scatter(2, FLAT.view(1, 1, 4).expand(3, 4, 4), x[..., :4])
        + N.scatter_add(1, FLAT.view(1, 4, 1).expand(3, 4, 6), x)
    ),
    "largest and smallest by groups": lambda x: (
        torch.zeros(3, 2, 6, dtype=x.dtype).scatter_reduce(1, GROUPS, x[:, TIES], "amax", include_self=False)
        + torch.zeros(3, 3, 6, dtype=x.dtype).scatter_reduce(1, GROUPS, x, "amin", include_self=False)[:, :2]
    ),
    "written into": _written,
    "in place": _in_place,
    "views": lambda x: x.view(12, 6).T.reshape(4, 3, 6).permute(1, 0, 2).flatten(1).unflatten(1, (4, 6)).roll(1, 1),
    "parts": lambda x: torch.cat([*x.chunk(2, -1)[::-1], x.split(2, -1)[1], torch.stack(x.unbind(-1), -1)], -1),
    "padding": lambda x: F.pad(x, (1, 0, 0, 2), value=-1.5)[:, 2:, 1:] + F.pad(x[:, 1:], (0, 0, 0, 1), value=2.0),
    "overlapping windows": lambda x: (
        x.as_strided((3, 3, 2, 6), (24, 6, 6, 1)).sum((1, 2), keepdim=True)[:, 0]
        + torch.as_strided(x.transpose(1, 2).contiguous().mT[1:], (2, 4, 6), (24, 1, 4), 24).sum(0)
    ),
    "repeats": lambda x: x.repeat(1, 2, 1)[:, :4] + x.repeat_interleave(2, 1)[:, ::2] + x[:, :1].expand_as(N),
    "triangles": lambda x: x.tril() + x.triu(1) + x.flip(1) + torch.diag_embed(x[..., 0]).sum(-1, keepdim=True),
    "casts": lambda x: x.float().double().type_as(N).to(N) + x.contiguous().clone().detach(),
    "lone activations": lambda x: F.silu(x) + F.gelu(x, approximate="tanh") + F.relu(x).square() + F.leaky_relu(x),
    "an activation that is not 0 at 0": lambda x: F.relu(x - 1) + F.elu(x),
    "activation modules": lambda x: nn.GELU()(x) + nn.Mish()(x) + nn.ReLU()(x),
    "activations in place": lambda x: nn.ReLU(inplace=True)(x @ W) + F.silu(x @ W, inplace=True) + torch.relu_(x + 1),
    "clamps": lambda x: x.clamp(-1, 1) + x.clamp(max=0.5) + torch.minimum(x, N.abs()),
    "powers": lambda x: x**2 + x.pow(3),
    "gates": lambda x: F.silu(x @ W) * x + torch.sigmoid(x) * (x @ W) + F.glu(x).repeat(1, 1, 2),
    "swish by hand": lambda x: (x @ W) * ((x * torch.sigmoid(1.7 * x)) + 0),
    "gelu by hand": lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.0447 * x**3))),
    "einsum of a list": lambda x: torch.einsum("bts,bsd->btd", (torch.softmax(x @ x.mT, -1), x)),
    "softmax mixes": lambda x: torch.softmax(x @ x.mT, -1) @ x,
    "softmax mixes constants": lambda x: x + torch.softmax(x @ x.mT, -1) @ N,
    "fused attention to constants": lambda x: (
        x + F.scaled_dot_product_attention(x[:, None], N[:, None], N[:, None])[:, 0]
    ),
    "fused attention": lambda x: (
        F.scaled_dot_product_attention(*(x[:, None],) * 3, is_causal=True)
        + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None] @ W, attn_mask=N[0, :, :4])
    ),
    "norms": lambda x: F.layer_norm(x, (6,), W[0], W[1]) + F.rms_norm(x, (6,), W[2]) + F.normalize(x, dim=-1),
    "group norm": lambda x: F.group_norm(x, 2, W[0, :4], W[1, :4]),
    "a norm by hand": lambda x: W[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    "standardised": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt(),
    "routing": lambda x: (x.softmax(-1).topk(2).values.sum(-1, keepdim=True) * x)[torch.arange(3)],
    "one live product": lambda x: (x @ W) * x,
}


@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("name", AFFINE)
def test_value_and_parts(name, gate):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 4, 6, generator=random, dtype=torch.float64)
    hidden[0, 0, 0] = 0.0
    expected = AFFINE[name](hidden.clone())
    with frozen(nn.Identity(), FreezeOptions(gate), torch.float64, collect=True) as mode, torch.no_grad():
        x = mode.enter(hidden)
        out = AFFINE[name](hidden)
        linear = mode.live(out)
    assert torch.equal(out, expected)
    assert not mode.nonlinear_uses
    assert (linear - out).norm() <= 1e-6 * out.norm()  # a cast to float32 and back is part of one
    cotangent = torch.randn(linear.shape, generator=random, dtype=torch.float64)
    leaves = [x, *(leaf for _, leaf in mode.constants)]
    pulled = torch.autograd.grad(linear, leaves, cotangent, allow_unused=True)
    parts = sum((leaf * g).sum() for leaf, g in zip(leaves, pulled, strict=True) if g is not None)
    scale = (linear * cotangent).norm()
    assert abs(parts - (linear * cotangent).sum()) <= 1e-12 * scale


@pytest.mark.parametrize(
    "break_it",
    [
        lambda x: x + torch.tanh(x),
        lambda x: torch.sigmoid(x) + x,
        lambda x: x.softmax(-1) + x,
        lambda x: x + x.amax(-1, keepdim=True),
        lambda x: torch.exp(x) @ W,
        lambda x: torch.sort(x).values,
        lambda x: x.cumprod(1),
        lambda x: N.scatter_reduce(1, GROUPS, x, "amax"),
        lambda x: N.scatter_reduce(1, GROUPS, x, "amax", include_self=False),
        lambda x: torch.zeros_like(N).scatter_reduce(1, GROUPS, x, "prod", include_self=False),
        lambda x: F.linear(x, W, x[0, 0].tanh()),
        lambda x: x + x[:, ::2].as_strided((4, 6), (6, 1)),
        lambda x: x + F.pad(x[:, 1:], (0, 0, 1, 0), value=-torch.inf).clamp_min(0),
    ],
)
def test_coefficients_are_not_taken_for_live(break_it):
    hidden = N.clone()
    with frozen(nn.Identity(), FreezeOptions(), torch.float64) as mode, torch.no_grad():
        mode.enter(hidden)
        mode.live(break_it(hidden))
    assert len(mode.nonlinear_uses) == 1


class _Softcap(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_a_module_that_caps_is_live_and_no_gate(gate):
    """silu(gate) * cap(up): what is frozen is what the option says, and not what the cap suggests."""
    hidden, cap = N[:1], _Softcap()
    with frozen(cap, FreezeOptions(gate), torch.float64) as mode, torch.no_grad():
        x = mode.enter(hidden)
        linear = mode.live(F.silu(hidden @ W) * cap(hidden))
    held, moved = F.silu(hidden @ W), cap(hidden)
    by_gate, by_up = (held / (hidden @ W) * moved) @ W.T, held * moved / hidden
    expected = {"activation": by_up, "up": by_gate, "half": (by_up + by_gate) / 2}[gate]
    assert not mode.nonlinear_uses
    torch.testing.assert_close(torch.autograd.grad(linear.sum(), x)[0], expected)


NEEDED = {
    "linear": "llama",
    "mul": "llama",
    "add": "llama",
    "getitem": "llama",
    "transpose": "llama",
    "view": "llama",
    "reshape": "llama",
    "contiguous": "llama",
    "to": "llama",
    "scaled_dot_product_attention": "llama",
    "addmm": "gpt2",
    "layer_norm": "gpt2",
    "split": "gpt2",
    "dropout": "gpt2",
    "permute": "bloom",
    "bmm": "bloom",
    "chunk": "mixtral",
    "index_add": "mixtral",
    "expand": "mixtral",
    "matmul": "gpt_neo",
    "tanh": "gemma2",
    "silu": "mamba",
    "float": "mamba",
    "clamp": "gpt_oss",
    "sum": "llama4_text",
    "setitem": "rwkv",
    "div": "rwkv",
    "relu": "rwkv",
    "square": "rwkv",
    "pad": "rwkv",
    "type_as": "qwen3_next",
    "cat": "xlm",
    "stack": "gemma3n_text",
    "mean": "gemma3n_text",
    "sub": "gemma3n_text",
    "scatter_reduce": "blt",
    "einsum": "prophetnet",
}
"""Operations, and a family that is not exact without them."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", NEEDED)
def test_without_a_rule_a_family_that_needs_it_is_refused(name, monkeypatch):
    from loclin import linearize, wrap
    from loclin.errors import LoclinError

    model = wrap(tiny.build(NEEDED[name], dtype=torch.float32), None, name="tiny")
    fewer = {key: handler for key, handler in table.HANDLERS.items() if key != name}
    monkeypatch.setattr("loclin.freeze.mode.HANDLERS", fewer)
    with pytest.raises(LoclinError, match=f"not exact|{name}"):
        linearize(model, tiny.prompt(model.hf))
