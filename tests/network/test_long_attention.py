"""Attention patterns that are made again in blocks give what whole ones give, in every analysis."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

import tiny
from least import least
from loclin.freeze.pattern import BlockPattern, HeldPattern, Pattern, WholePattern, mix, probabilities
from loclin.linearization import Linearization, linearize
from loclin.models import tiny as families
from loclin.network.autograd import batched_jvp, batched_vjp
from loclin.network.memory import Allowance
from loclin.network.proof import proved_positions
from loclin.network.reader import CoefficientReader

T = 11


def llama(n_kv: int, dtype: torch.dtype) -> LlamaForCausalLM:
    model = tiny.llama(dtype=torch.float32)
    sizes = model.config.to_dict() | {"num_key_value_heads": n_kv, "head_dim": None, "max_position_embeddings": 512}
    return tiny._shaken(LlamaForCausalLM(LlamaConfig(**sizes)), 0, dtype)


def falcon(dtype: torch.dtype) -> FalconForCausalLM:
    """Its mask has numbers: ALiBi, for each head another, with the least number of the dtype for masked keys."""
    sizes = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return tiny._shaken(FalconForCausalLM(FalconConfig(**sizes, alibi=True, attn_implementation="sdpa")), 0, dtype)


MODELS = {
    "all heads": partial(llama, 4),
    "grouped": partial(llama, 2),
    "one value head": partial(llama, 1),
    "sliding window": lambda dtype: tiny.gemma3(dtype=dtype),
    "looks ahead": lambda dtype: tiny.gemma3(dtype=dtype, bidirectional=True),
    "no explicit products": lambda dtype: families.build("granite", dtype=dtype),
    "alibi": falcon,
    "norms of queries": lambda dtype: families.build("qwen3", dtype=dtype),
    "fused": lambda dtype: families.build("phi3", dtype=dtype),
}


def far(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def blocks(monkeypatch):
    """Hold patterns of more than so many bytes as blocks."""

    def lower(most: int) -> None:
        monkeypatch.setattr(Allowance, "pattern", most)

    return lower


def qk(n_kv: int, queries: int = T, keys: int = T) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    sizes = ((4, queries), (n_kv, keys), (n_kv, keys))
    q, k, v = (torch.randn(1, *size, 5, generator=random, dtype=torch.float64) for size in sizes)
    return q, k, v


def masks(kind: str) -> Tensor | None:
    """Masks that fall on blocks in every way; no query 4 may attend to anything."""
    window = torch.ones(T, T, dtype=torch.bool).tril().triu(-2)
    window[4] = False
    per_head = torch.rand(1, 4, T, T, generator=torch.Generator().manual_seed(1)) < 0.4
    added = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(~window, -torch.inf)
    biased = torch.arange(T, dtype=torch.float64).expand(1, 4, T, T) * -0.3
    known = {"none": None, "window": window[None, None], "heads": per_head, "added": added, "biased": biased}
    return known[kind] if kind != "padding" else (torch.arange(T) > 2)[None, None, None]


KINDS = ["causal", "none", "window", "heads", "added", "biased", "padding"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_kv", [4, 2, 1])
@pytest.mark.parametrize("rows", [1, 3, 4, 11])
def test_products_with_blocks(kind, n_kv, rows):
    """P, P V and P^T G for some queries and keys, and through autograd, equal those with a whole P."""
    (query, key, value), causal = qk(n_kv), kind == "causal"
    mask = None if causal else masks(kind)
    whole = WholePattern(probabilities(query, key, mask, is_causal=causal)[0])
    pattern = BlockPattern(query, key, mask, causal, None, torch.float64, rows * 4 * T * 8)
    held = pattern.held(slice(0, T), 2)
    assert pattern.held(slice(0, T), 1) is pattern
    assert isinstance(held, HeldPattern) == (rows * 8 >= T)  # else it is larger than it may be
    assert torch.allclose(held.row(3, 4), whole.probs[3, 4], atol=1e-14)
    if mask is None or mask.dtype == torch.bool:
        stock = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)
        assert torch.allclose(mix(pattern, value), stock.nan_to_num(), atol=1e-12)
    made = torch.zeros(whole.shape, dtype=torch.float64)
    for own, seen, probs in pattern.everything():
        assert own.stop - own.start <= rows
        made[:, own, seen] = probs
    assert torch.allclose(made, whole.probs, atol=1e-14)
    assert torch.allclose(pattern.row(3, 4), whole.probs[3, 4], atol=1e-14)
    for queries, keys in ((slice(0, T), slice(0, T)), (slice(2, 9), slice(1, 6)), (slice(5, 6), slice(0, T))):
        n, some = queries.stop - queries.start, value[0, :, keys]
        given = torch.randn(n_kv, 4 // n_kv, n, 5, dtype=torch.float64)
        for one, name, vectors, shape in (
            ("P V", "mix", some, (n_kv, 4 // n_kv * n, 5)),
            ("P^T G", "mix_back", given, (n_kv, some.shape[1], 5)),
        ):
            found, again, expected = (
                getattr(each, name)(vectors, queries, keys, torch.full(shape, 7.0, dtype=torch.float64))
                for each in (pattern, pattern.held(queries, 2), whole)
            )
            assert torch.allclose(found, expected, atol=1e-12), one
            assert torch.equal(again, found)
    value.requires_grad_()
    by_blocks, by_whole = mix(pattern, value), mix(whole, value)
    block = torch.randn(3, *value.shape, dtype=torch.float64)
    cotangents = torch.randn(3, *by_whole.shape, dtype=torch.float64)
    assert torch.allclose(batched_jvp(by_blocks, value)(block), batched_jvp(by_whole, value)(block), atol=1e-12)
    pulled = (batched_vjp(mixed, value, cotangents) for mixed in (by_blocks, by_whole))
    assert torch.allclose(*pulled, atol=1e-12)


def patterns(lin: Linearization) -> list[Pattern]:
    return [held.pattern for held in lin.trace.coefficients if held is not None]


def answers(lin: Linearization) -> dict[str, Tensor]:
    """What every analysis that reads a pattern finds."""
    J, random = lin.jacobian(position=-2), torch.Generator().manual_seed(0)
    tangents = torch.randn(3, *J.shape[1:], generator=random, dtype=torch.float64).to(J.dtype)
    cotangents = torch.randn(2, J.shape[0], generator=random, dtype=torch.float64).to(J.dtype)
    found = {
        "dense": J.dense(),
        "jvp": J.matmat(tangents),
        "vjp": J.rmatmat(cotangents),
        "bias": J.bias,
        "received": lin.trace.attention_received,
        "logits": lin.trace.stock_logits,
    }
    for by in ("token", "bias", "layer", "head", "neuron", "token×layer"):
        attribution = lin.attribute(by=by, position=-2, progress=False)
        found[by] = attribution.shares
        if attribution.through is not None:
            found[f"{by}, along all paths"] = attribution.through
    head = lin.head(1, 2, position=-2)
    found |= {"pattern": head.pattern, "head, by token": head.attends}
    found["path"] = lin.path(["L0H1", "attn_out.1"], position=-2).shares
    if lin.trace.explicit[0]:
        found["every layer's spectrum"] = lin.layer_spectra(k=2, position=-2).S
    return found


@pytest.mark.parametrize("most", [0, 1000, 2500])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_analysis(build, most, blocks):
    model, ids = build(torch.float64), tiny.prompt(T)
    expected = linearize(model, ids)
    blocks(most)
    lin = linearize(model, ids)
    assert all(isinstance(pattern, BlockPattern) for pattern in patterns(lin))
    assert lin.trace.explicit == expected.trace.explicit
    assert lin.trace.causal == expected.trace.causal
    assert lin.certify().passed
    whole = answers(expected)
    for name, found in answers(lin).items():
        limit = 1e-9 if found.dtype == torch.float64 else 1e-6
        assert (found - whole[name]).norm() <= limit * whole[name].norm(), name


@pytest.mark.parametrize("precision", ["auto", "double"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["sliding window", "grouped"])
def test_every_precision(family, dtype, precision, blocks):
    """Blocks compute scores in the path's dtype, so that a pattern is the same matrix in every product."""
    model, ids = MODELS[family](dtype), tiny.prompt(T)
    whole = linearize(model, ids, precision=precision)
    blocks(900)
    lin = linearize(model, ids, precision=precision)
    assert all(isinstance(pattern, BlockPattern) for pattern in patterns(lin))
    assert all(lin.trace.explicit)
    assert lin.certify().passed
    assert lin.certify().reconstruction_error < (1e-12 if precision == "double" else 3e-6)
    J, expected = lin.jacobian().dense(), whole.jacobian().dense()
    assert (J - expected).norm() <= (0.1 if dtype == torch.bfloat16 else 1e-4) * expected.norm()


def test_a_padded_prompt(blocks):
    model, ids = MODELS["grouped"](torch.float64), tiny.prompt(T)
    padded = torch.cat([ids.new_zeros(1, 3), ids], 1)
    mask = torch.cat([ids.new_zeros(1, 3), torch.ones_like(ids)], 1)
    expected = linearize(model, ids).jacobian().dense()
    blocks(700)
    found = linearize(model, padded, attention_mask=mask).jacobian().dense()
    assert (found - expected).norm() <= 1e-9 * expected.norm()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, Tensor):
                self.most = max(self.most, made.untyped_storage().nbytes())
        return out


def test_no_whole_pattern_is_made(blocks):
    """Neither by the trace nor by sweeps; all else is smaller in a prompt of this length."""
    length = 200
    model, ids = MODELS["grouped"](torch.float32), tiny.prompt(length)
    pattern = 4 * length * length * 4
    largest = {}
    for most in (pattern // 8, pattern):
        blocks(most)
        with Largest() as made:
            lin = linearize(model, ids)
            lin.attribute(by="token", progress=False)
            lin.attribute(by="layer", progress=False, in_words=0)
        largest[most] = made.most
    assert largest[pattern // 8] < pattern <= largest[pattern]


def test_coefficients_without_whole_patterns_are_linear_in_the_prompt(blocks):
    model = MODELS["grouped"](torch.float32)
    blocks(0)
    short, long = (sum(held.nbytes for held in linearize(model, tiny.prompt(n)).trace.coefficients) for n in (20, 60))
    assert long == 3 * short


def test_small_budgets_hold_blocks():
    memory = least(MODELS["grouped"](torch.float64), tiny.prompt(T))
    lin = linearize(MODELS["grouped"](torch.float64), tiny.prompt(T), memory=memory)
    whole = linearize(MODELS["grouped"](torch.float64), tiny.prompt(T))
    assert all(isinstance(pattern, BlockPattern) for pattern in patterns(lin))
    assert all(isinstance(pattern, WholePattern) for pattern in patterns(whole))
    found, expected = lin.jacobian().dense(), whole.jacobian().dense()
    assert (found - expected).norm() <= 1e-9 * expected.norm()


@pytest.fixture
def stretches(monkeypatch):
    """Prompts of more than 16 tokens are long."""
    monkeypatch.setattr("loclin.network.proof._STRETCH", 2)


def spread(length: int) -> Tensor:
    """The queries at which a layer of a long prompt is proved."""
    return torch.cat([torch.arange(length)[some] for some in proved_positions(length)])


@pytest.mark.parametrize("length", [1, 7, 1024, 1025, 1027, 4096, 100_000])
def test_where_a_layer_is_proved(length):
    at = spread(length)
    assert at[0] == 0
    assert at[-1] == length - 1
    assert (at.diff() > 0).all()
    assert len(at) == (length if length <= 1024 else 512)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("most", [0, 4000, None])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_long_prompts_are_proved_in_stretches(build, most, blocks):
    """The map is the same, and what tokens receive is the mean of the queries at which it is proved."""
    length = 29
    model, ids = build(torch.float64), tiny.prompt(length)
    blocks(10**9)
    expected = linearize(model, ids)
    blocks(10**9 if most is None else most)
    lin = linearize(model, ids)
    assert lin.trace.explicit == expected.trace.explicit
    assert lin.trace.causal == expected.trace.causal
    found, dense = lin.jacobian().dense(), expected.jacobian().dense()
    assert (found - dense).norm() <= 1e-9 * dense.norm()
    assert lin.certify().passed
    held = patterns(lin)
    if not held or not isinstance(held[0], BlockPattern):
        return
    queries = spread(length)
    received = torch.zeros(len(held), length, dtype=torch.float64)
    for layer, pattern in enumerate(held):
        whole = torch.zeros(pattern.shape, dtype=torch.float64)
        for rows, keys, probs in pattern.everything():
            whole[:, rows, keys] = probs
        later = whole[:, queries].mean(0) * (queries[:, None] > torch.arange(length))
        received[layer] = later.sum(0) / (queries[:, None] > torch.arange(length)).sum(0).clamp_min(1)
    assert torch.allclose(lin.trace.attention_received.double(), received.mean(0), atol=1e-6)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("at", [0, 4, 9, 28])
def test_wrong_coefficients_at_one_position_are_found(at, blocks, monkeypatch):
    """Coefficients that do not rebuild the layer are not used, and the map is right without them."""
    model, ids, read = MODELS["grouped"](torch.float64), tiny.prompt(29), CoefficientReader.coefficients
    expected = linearize(model, ids).jacobian().dense()

    def read_wrongly(self, pattern):
        found = read(self, pattern)
        found.up[at] *= 1.01
        return found

    blocks(0)
    monkeypatch.setattr(CoefficientReader, "coefficients", read_wrongly)
    lin = linearize(model, ids)
    assert not any(lin.trace.explicit)
    found = lin.jacobian().dense()
    assert (found - expected).norm() <= 1e-9 * expected.norm()


def bend(values: Tensor, axis: int = 1) -> Tensor:
    """What a broken module makes of values: position 4, which is in no stretch, is one percent larger."""
    factors = torch.ones([values.shape[axis], *[1] * (values.dim() - axis - 1)], dtype=values.dtype)
    factors[4] = 1.01
    return values * factors


def faulty_mlp(kind: str, self: LlamaMLP, x: Tensor) -> Tensor:
    down = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(bend(x) if kind == "given" else x))
    if kind == "added":
        down[:, 4] += 0.1  # in place
    return down


def faulty_attention(kind: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    mixed, weights = sdpa_attention_forward(
        module, query, key, bend(value, 2) if kind == "v" else value, *args, **kwargs
    )
    if kind == "mixed in place":
        mixed[:, 4] *= 1.01
    return bend(mixed) if kind == "mixed" else mixed, weights


def faulty_linear(self: nn.Linear, x: Tensor) -> Tensor:
    out = F.linear(x, self.weight)
    return bend(out) if x.shape[1] > 4 else out


FAULTS = {
    **{f"mlp: {kind}": (LlamaMLP, partial(faulty_mlp, kind)) for kind in ("given", "added")},
    **{f"attention: {kind}": (None, partial(faulty_attention, kind)) for kind in ("v", "mixed", "mixed in place")},
    "W x": (nn.Linear, faulty_linear),
}


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_one_position_is_found(fault, dtype, blocks, monkeypatch):
    """A layer that misbehaves at one position, between the stretches, has no explicit products; the map is right."""
    model, ids, (owner, forward) = MODELS["grouped"](dtype), tiny.prompt(29), FAULTS[fault]
    blocks(0)
    right = linearize(model, ids)
    assert all(right.trace.explicit)
    if owner is None:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", forward)
    else:
        monkeypatch.setattr(owner, "forward", lambda self, *args: forward(self, *args))
    lin = linearize(model, ids)
    assert not any(lin.trace.explicit)
    assert lin.certify().passed
    wrong, dense = right.jacobian(position=4).dense(), lin.jacobian(position=4).dense()
    assert (dense - wrong).norm() > 1e-4 * dense.norm()


@pytest.mark.usefixtures("stretches")
def test_a_query_that_looks_ahead_between_stretches(blocks):
    """Positions are skipped only where no query at all attends to a later token."""
    ids = tiny.prompt(29)
    mask = torch.ones(29, 29, dtype=torch.bool).tril()
    mask[4, 6] = True
    model = MODELS["grouped"](torch.float64)
    forward = LlamaAttention.forward

    def ahead(self, *args, **kwargs):
        return forward(self, *args, **kwargs | {"attention_mask": mask[None, None]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", ahead)
        whole = linearize(model, ids)
        blocks(0)
        lin = linearize(model, ids)
        assert not lin.trace.causal
        assert not whole.trace.causal
        found, expected = (each.jacobian(position=5).dense() for each in (lin, whole))
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    assert found[:, 6].norm() > 0


def added_in_place(self: LlamaDecoderLayer, hidden_states: Tensor, **kwargs) -> Tensor:
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    attended += hidden_states
    return attended + self.mlp(self.post_attention_layernorm(attended))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("most", [0, 10**9])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_coefficients_that_are_read_again(build, most, in_place, blocks, monkeypatch):
    """They are those of the trace; the attention of a float32 layer is not computed for them."""
    model, ids = build(torch.float32), tiny.prompt(T)
    if in_place:
        monkeypatch.setattr(LlamaDecoderLayer, "forward", added_in_place)
    blocks(most)
    monkeypatch.setattr(Allowance, "coefficients", 10**9)
    kept, called = linearize(model, ids), []
    monkeypatch.setattr(Allowance, "coefficients", 0)
    lin = linearize(model, ids)
    assert lin.trace.explicit == kept.trace.explicit

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.extend([func] if "scaled_dot_product" in str(func) else [])
            return func(*args, **(kwargs or {}))

    u = torch.randn(2, kept.jacobian().shape[0], generator=torch.Generator().manual_seed(0))
    with Watch():
        found = lin.jacobian().rmatmat(u)
    expected = kept.jacobian().rmatmat(u)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    if all(lin.trace.explicit) and lin.trace.anatomy.weights.attn_post is None:
        assert not called
