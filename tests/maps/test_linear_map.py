"""The operator agrees with brute force, with itself, and with the network's own values."""

from __future__ import annotations

import copy
import itertools
import pickle  # noqa: TID251 (to see that it is refused)

import pytest
import torch

import oracle
import tiny
from loclin.errors import BudgetError, OptionError, OutputError, PromptError
from loclin.linearization import linearize
from loclin.models import tiny as families

BUILDS = {"llama": tiny.llama, "gemma3": tiny.gemma3}
with_biases = pytest.param(lambda **kwargs: tiny.llama(biases=True, **kwargs), id="llama-biases")
EVERY = [*(pytest.param(build, id=name) for name, build in BUILDS.items()), with_biases]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("position", [-1, 3])
def test_dense_agrees_with_brute_force_in_double(build, gate, position):
    model, ids = build(attn="eager"), tiny.prompt(8)
    lin = linearize(model, ids, gate=gate, precision="double")
    J = lin.jacobian(position=position)
    expected, x, y = oracle.jacobian(model, ids, position, gate)
    assert relative_error(J.dense(), expected) < 1e-12
    assert relative_error(lin.embeddings, x) < 1e-15
    assert relative_error(J.value, y) < 1e-12
    assert relative_error(torch.einsum("oti,ti->o", expected, x) + J.bias, y) < 1e-12


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", EVERY)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_dense_agrees_with_brute_force_in_single(build, gate):
    model, ids = build(attn="sdpa", dtype=torch.float32), tiny.prompt(8)
    J = linearize(model, ids, gate=gate).jacobian()
    expected, _, _ = oracle.jacobian(build(attn="eager", dtype=torch.float32), ids, -1, gate)
    assert relative_error(J.dense(), expected) < tiny.rounding()


def test_causal_maps_are_zero_behind_the_position():
    J = linearize(tiny.llama(), tiny.prompt(8)).jacobian(position=3)
    assert (J.dense()[:, 4:] == 0).all()
    assert (J.dense()[:, :4].abs().amax(dim=(0, 2)) > 0).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("build", EVERY)
def test_products_agree_with_the_dense_map(build):
    lin = linearize(build(), tiny.prompt(5), precision="double")
    J = lin.jacobian()
    dense = J.dense()
    Xs, Us = torch.randn(6, *J.shape[1:]).to(dense), torch.randn(6, J.shape[0]).to(dense)
    assert relative_error(J.matmat(Xs), torch.einsum("oti,nti->no", dense, Xs)) < 1e-13
    assert relative_error(J.rmatmat(Us), torch.einsum("oti,no->nti", dense, Us)) < 1e-13
    assert relative_error(J.matvec(Xs[0]), torch.einsum("oti,ti->o", dense, Xs[0])) < 1e-13
    assert relative_error(J.rmatvec(Us[0]), torch.einsum("oti,o->ti", dense, Us[0])) < 1e-13
    assert J.matmat(Xs[:0]).shape == (0, J.shape[0])
    assert J.rmatmat(Us[:0]).shape == (0, *J.shape[1:])


POINTS = [
    "embed", "resid_pre.0", "attn_out.0", "resid_mid.0", "mlp_out.0", "resid_post.0", "attn_out.1", "resid_mid.1",
    "mlp_out.1", "resid_post.1", "attn_out.2", "resid_mid.2", "mlp_out.2", "resid_post.2", "final", "logits",
]  # fmt: skip


PAIRED = [name for name in POINTS if name[-1] != "2" and name != "resid_pre.0"]


@pytest.fixture(scope="module", params=EVERY)
def lin(request):
    return linearize(request.param(), tiny.prompt(6), gate="half", precision="double")


@pytest.mark.sampled(17)
@pytest.mark.parametrize(("source", "target"), list(itertools.combinations_with_replacement(PAIRED, 2)))
def test_every_pair_of_points_reconstructs(lin, source, target):
    """J x + b is the network's own value for every source and every target behind it; the rest is refused."""
    order = [POINTS.index(name) for name in (source, target)]
    beside = source == "resid_mid" and target.startswith("attn_out")
    if source in ("final", "logits") or beside or order[0] > order[1]:
        with pytest.raises(OptionError):
            lin.jacobian(source, target)
        return
    J = lin.jacobian(source, target, position=4)
    assert relative_error(J.matvec(lin.value(source)) + J.bias, lin.value(target)[4]) < 1e-12
    by_source = J.bias_by_source()
    assert all(torch.isfinite(part).all() for part in by_source.values())
    assert relative_error(sum(by_source.values(), start=torch.zeros_like(J.bias)) + 1, J.bias + 1) < 1e-12


@pytest.mark.parametrize(
    ("source", "target"), [("embed", "attn_out.1"), ("embed", "logits"), ("attn_out.0", "mlp_out.2")]
)
def test_dense_of_other_points_agrees_with_products(source, target):
    J = linearize(tiny.gemma3(), tiny.prompt(5), precision="double").jacobian(source, target)
    Xs = torch.eye(J.shape[1] * J.shape[2], dtype=J.dtype).reshape(-1, *J.shape[1:])
    assert relative_error(J.dense().flatten(1), J.matmat(Xs).T) < 1e-12
    assert relative_error(J.rmatmat(torch.eye(J.shape[0], dtype=J.dtype)), J.dense()) < 1e-12


def test_maps_add_up_along_the_stream():
    """resid_mid = resid_pre + attention, resid_post = resid_mid + MLP, as maps; and maps compose."""
    lin = linearize(tiny.gemma3(), tiny.prompt(5), precision="double")
    maps = {name: lin.jacobian("embed", name).dense() for name in POINTS if name != "logits"}
    for layer in range(3):
        attn, mid, mlp, post = (maps[f"{kind}.{layer}"] for kind in ("attn_out", "resid_mid", "mlp_out", "resid_post"))
        pre = maps["embed"] if layer == 0 else maps[f"resid_post.{layer - 1}"]
        assert relative_error(pre + attn, mid) < 1e-13
        assert relative_error(mid + mlp, post) < 1e-13


def test_normed_puts_the_final_norm_on_top():
    lin = linearize(tiny.llama(), tiny.prompt(5), precision="double")
    J, plain = lin.jacobian(target="resid_post.1", normed=True), lin.jacobian(target="resid_post.1")
    value = lin.value("resid_post.1")[-1]
    norm = lin.model.hf.model.norm
    scale = torch.rsqrt(value.square().mean() + norm.variance_epsilon) * norm.weight.detach()
    assert relative_error(J.dense(), plain.dense() * scale[:, None, None]) < 1e-13
    assert relative_error(J.value, value * scale) < 1e-13
    assert relative_error(J.reconstruct(), J.value) < 1e-13
    last = lin.jacobian(target="resid_post.2", normed=True)
    assert relative_error(last.dense(), lin.jacobian().dense()) < 1e-13
    with pytest.raises(OptionError, match="includes already"):
        lin.jacobian(target="final", normed=True)


@pytest.mark.parametrize("build", EVERY)
def test_blocks_are_the_tokens_maps(build):
    lin = linearize(build(), tiny.prompt(5), precision="double")
    J = lin.jacobian()
    for i in (0, 2, -1):
        block = J.block(i)
        assert block.shape == (J.shape[0], 1, J.shape[2])
        assert torch.equal(block.dense()[:, 0], J.dense()[:, i])
        assert relative_error(block.reconstruct(), J.value) < 1e-12
        u = torch.randn(J.shape[0], dtype=J.dtype)
        assert relative_error(block.rmatvec(u), J.rmatvec(u)[[i]]) < 1e-13
    with pytest.raises(PromptError, match="position 5 is outside the prompt, which has 5 tokens"):
        J.block(5)


def test_scipy_operator():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    J = linearize(tiny.llama(), tiny.prompt(4), precision="double").jacobian()
    operator = J.to_scipy()
    matrix = J.dense().flatten(1).cpu()
    assert operator.shape == tuple(matrix.shape)
    assert relative_error(torch.as_tensor(operator @ matrix.T.numpy()), matrix @ matrix.T) < 1e-12
    _, values, _ = linalg.svds(operator, k=3)
    assert (
        relative_error(torch.as_tensor(values.copy()).sort(descending=True).values, torch.linalg.svdvals(matrix)[:3])
        < 1e-10
    )


@pytest.mark.parametrize("budget", [80_000, 200_000, "1MB"])
def test_a_budget_changes_nothing_but_the_chunks(budget):
    model, ids = tiny.llama(), tiny.prompt(5)
    free = linearize(model, ids, precision="double").jacobian()
    tight = linearize(model, ids, precision="double", memory=budget).jacobian()
    assert relative_error(tight.dense(), free.dense()) < 1e-13


def test_budgets_that_cannot_work_are_refused():
    with pytest.raises(BudgetError, match="memory=10 is too small"):
        linearize(tiny.llama(), tiny.prompt(5), memory=10)
    with pytest.raises(OptionError, match="2GB"):
        linearize(tiny.llama(), tiny.prompt(5), memory="lots").jacobian().dense()


def test_what_holds_the_model_is_not_pickled():
    lin = linearize(tiny.llama(), tiny.prompt(4))
    J = lin.jacobian()
    for found, advice in ((J, "save what you compute from it"), (J.T, "save what you"), (lin, "save the results")):
        for copied in (lambda found=found: pickle.dumps(found), lambda found=found: copy.deepcopy(found)):
            with pytest.raises(OutputError, match=f"cannot be pickled.*{advice}"):
                copied()
    assert torch.equal(copy.copy(J).dense(), J.dense())
    assert copy.copy(lin).chain is lin.chain


@pytest.mark.parametrize("name", ["nowhere", "resid_post", "resid_post.x", "resid_post.3", "attn_out.-4", "final.1"])
def test_unknown_points_are_refused(name):
    with pytest.raises(OptionError, match="point"):
        linearize(tiny.llama(), tiny.prompt(4)).jacobian(target=name)


def test_the_ordinary_jacobian_is_the_models_own():
    model, ids = tiny.gemma3(attn="eager"), tiny.prompt(6)
    x = model.get_input_embeddings()(ids).detach()

    def f(x):
        return model.get_decoder()(inputs_embeds=x, use_cache=False).last_hidden_state[0, -1]

    expected = torch.einsum("onti,nti->o", torch.autograd.functional.jacobian(f, x), x)
    assert relative_error(linearize(model, ids).ordinary_reconstruction(), expected) < 1e-5


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["gptj", "gpt_neox", "llama"])
@pytest.mark.parametrize("source", ["attn_out.1", "resid_mid.1", "mlp_out.1"])
def test_what_passes_a_source_by_is_in_the_bias(family, source):
    """In a parallel block the MLP passes the attention by."""
    lin = linearize(families.build(family, dtype=torch.float64), tiny.prompt(), precision="double")
    J = lin.jacobian(source, "final")
    assert (J.matvec(J.input) + J.bias - J.value).norm() < 1e-13 * J.value.norm()
