"""`precision="split"`: exact pieces, products as accurate as float32's, and a choice that falls back by itself."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager

import pytest
import torch

import loclin
import tiny
from loclin.common.sums import relative_error
from loclin.errors import BudgetError
from loclin.linearization import linearize
from loclin.maps import linearized
from loclin.models import tiny as families
from loclin.network import split, split_choice
from loclin.network.blocks import Workspace
from loclin.network.explicit_mlp import ExplicitMLP
from loclin.network.split import Split
from loclin.network.split_choice import Shares, given_shares

FLOAT32, BF16 = torch.finfo(torch.float32), torch.finfo(torch.bfloat16)

pytestmark = pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch has no such switch")


@contextmanager
def given(weights=0.5, formed=0.5):
    token = given_shares.set(Shares(weights, formed))
    try:
        yield
    finally:
        given_shares.reset(token)


@pytest.fixture
def alone(monkeypatch):
    """As if no other thread ran; those of pytest multiply nothing."""
    monkeypatch.setattr(split, "is_alone", lambda: True)
    monkeypatch.setattr(split_choice, "is_alone", lambda: True)


@pytest.fixture
def forced(alone):  # noqa: ARG001
    """Products are split whatever this processor does."""
    with given():
        yield


def rounded(hf, dtype=torch.float32):
    """A model whose weights bfloat16 holds."""
    return hf.to(torch.bfloat16).to(dtype)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NUMBERS = {
    "usual": draw(1000) * torch.logspace(-6, 6, 1000),
    "long": torch.tensor([1 + 2**-23, 1 - 2**-24, 3 - 2**-22, -1 - 2**-23, 1 / 3]),
    "zero": torch.tensor([0.0, -0.0]),
    "huge": torch.tensor([FLOAT32.max, -FLOAT32.max, BF16.max, math.nextafter(BF16.max, math.inf), 3.396e38, -3.4e38]),
}


@pytest.mark.parametrize("x", NUMBERS.values(), ids=NUMBERS)
def test_pieces_sum_to_the_number_itself(x):
    three = [piece.clone() for piece in split.pieces(x, Workspace(), "x")]
    assert len(three) == 3
    assert all(torch.equal(piece.bfloat16().float(), piece) for piece in three)
    assert torch.equal(sum(piece.double() for piece in three), x.double())


def test_pieces_of_tiny_numbers_lose_what_bfloat16_does_not_have():
    x = torch.tensor([FLOAT32.tiny, 3 * FLOAT32.smallest_normal / 7, 1e-40, 2.0**-149, 1e-35])
    three = sum(piece.double() for piece in split.pieces(x, Workspace(), "x"))
    assert ((three - x.double()).abs() <= 2.0**-134).all()


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(odd):
    x, weight = draw(3, 4), draw(4, 5).bfloat16().float()
    x[1, 2] = odd
    found = split.multiply(x, weight, Workspace(), torch.empty(3, 5))
    assert not found[1].isfinite().any()
    assert found[[0, 2]].isfinite().all()


def test_which_weights_are_held():
    weight = draw(2000, 3).bfloat16()
    assert split.is_held(weight)
    assert split.is_held(weight.float())
    assert split.is_held(weight.double())
    off = weight.float()
    off[-1, -1] += 2**-20
    assert not split.is_held(off)
    assert not split.is_held(torch.full((2, 2), math.nan))
    assert not split.is_held(torch.full((2, 2), FLOAT32.max))


@pytest.fixture(params=["cpu", "gpu"])
def units(request, monkeypatch, alone):  # noqa: ARG001
    """A processor that multiplies bfloat16 numbers and sums in float32, and fails for any others."""

    def multiply(a, b, out, add):
        assert a.dtype == b.dtype == (torch.float32 if request.param == "cpu" else torch.bfloat16)
        assert all(torch.equal(each.bfloat16().float(), each.float()) for each in (a, b))
        product = a.float() @ b.float()
        out.copy_(out + product if add else product)

    monkeypatch.setattr(split, "_multiply", multiply)
    if request.param == "gpu":
        monkeypatch.setattr(split, "piece_dtype", lambda _device: torch.bfloat16)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_are_as_accurate_as_those_of_float32(batch):
    x, y, scales = draw(*batch, 40, 300), draw(*batch, 300, 50, seed=1), torch.logspace(-8, 8, 40)[:, None]
    both = (x * scales).double() @ y.double()
    found = split.multiply_both(x * scales, y, Workspace(), torch.empty(*batch, 40, 50))
    assert relative_error((found.double() - both) / scales, both / scales) < 4e-7
    if not batch:
        held, out = y.bfloat16(), torch.ones(40, 50)
        exact = x.double() @ held.double()
        factor = held.to(split.piece_dtype(x.device))
        assert relative_error(split.multiply(x, factor, Workspace(), out) - exact, exact) < 4e-7
        assert relative_error(split.multiply(x, factor, Workspace(), out, add=True) - 2 * exact, exact) < 8e-7


def test_a_gpu_is_asked_for_sums_in_float32():
    x, y = torch.empty(2, 3, 4, device="meta"), torch.empty(2, 4, 5, device="meta")
    assert split.multiply_both(x, y, Workspace(), x.new_empty(2, 3, 5)).dtype == torch.float32
    assert split.multiply(x[0], y[0].bfloat16(), Workspace(), x.new_empty(3, 5)).dtype == torch.float32


@pytest.mark.sampled(10)
@pytest.mark.usefixtures("units", "forced")
@pytest.mark.parametrize("formed", [True, False], ids=["formed", "factored"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_sweeps_are_as_accurate_as_those_of_float32(family, gate, stored, formed, monkeypatch):
    monkeypatch.setattr(ExplicitMLP, "forms_matrices", lambda *_: formed)
    model, ids = rounded(families.build(family, dtype=torch.float32), stored), tiny.prompt(6)
    lin = linearize(model, ids, gate=gate, precision="split")
    assert all(lin.trace.explicit)
    assert lin.trace.split.layers == (True,) * lin.trace.n_layers
    single = linearize(model, ids, gate=gate, precision="single")
    J, other, limit = lin.jacobian(), single.jacobian(), tiny.rounding()
    assert (J.provenance().precision, other.provenance().precision) == ("split", "single")
    assert relative_error(J.dense() - other.dense(), other.dense()) < limit
    tangents = draw(3, *J.shape[1:])
    pushed = other.matmat(tangents)
    assert relative_error(J.matmat(tangents) - pushed, pushed) < limit
    if stored == torch.float32:
        exact = linearize(model, ids, gate=gate, precision="double").jacobian().dense()
        assert relative_error(J.dense() - exact, exact) < limit
    assert lin.certify().passed


@pytest.mark.usefixtures("units", "forced")
def test_analyses():
    model = rounded(tiny.llama(dtype=torch.float32, biases=True))
    one, other = (linearize(model, tiny.prompt(5), precision=precision) for precision in ("split", "single"))
    found, expected = (lin.layer_spectra(k=2).S for lin in (one, other))
    assert relative_error(found - expected, expected) < 1e-5
    for by in ("token", "layer"):
        assert abs(one.attribute(by=by).residual) < 1e-4
    assert one.jacobian().svd(2).provenance.split == one.trace.split.note
    assert one.ordinary_jacobian().provenance().precision == "single"
    longer = one.followed_by(4)
    assert longer.jacobian().provenance().precision == longer.precision == "split"


@pytest.mark.usefixtures("alone")
def test_the_choice_by_times():
    model, ids = rounded(tiny.llama(dtype=torch.float32)), tiny.prompt(4)
    with given(0.63, 1.2):
        lin = linearize(model, ids, precision="split")
    note = "3 bf16 products, 0.63 x float32's time; formed matrices in float32"
    assert lin.trace.split == Split((True,) * 3, False, note)
    with given(1.9, 0.5):
        lin = linearize(model, ids, precision="split")
    assert lin.trace.split == Split(note="left off: bf16 products are not faster here (1.9 x float32's time)")
    provenance = lin.jacobian().provenance()
    assert (provenance.precision, provenance.split) == ("single", lin.trace.split.note)
    assert "split" not in provenance.key()
    expected = linearize(model, ids).jacobian()
    assert torch.equal(lin.jacobian().dense(), expected.dense())
    assert expected.provenance().split is None


@pytest.mark.usefixtures("alone")
def test_the_trial_is_timed_and_checked(monkeypatch):
    model, ids = rounded(tiny.llama(dtype=torch.float32)), tiny.prompt(4)
    times = iter([1.0, 2.0, 1.0, 4.0])

    def timed(work, _device):
        work()
        return next(times)

    with monkeypatch.context() as patch:
        patch.setattr(split_choice, "fastest", timed)
        note = linearize(model, ids, precision="split").trace.split.note
    assert note == "3 bf16 products, 0.5 x float32's time; 6 for formed matrices, 0.25 x"
    lin = linearize(model, ids, precision="split")  # whatever this processor does
    used = bool(lin.trace.split.layers)
    assert lin.trace.split.note.startswith("3 bf16" if used else "left off: bf16 products are not faster")

    def narrow(a, b, out, add):
        out.copy_((a @ b).bfloat16() + (out if add else 0))

    monkeypatch.setattr(split, "_multiply", narrow)
    assert "are off by" in linearize(model, ids, precision="split").trace.split.note

    def missing(*_):
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setattr(split, "_multiply", missing)
    assert linearize(model, ids, precision="split").trace.split.note == "left off: bf16 products fail here: no kernel"


@pytest.mark.usefixtures("forced")
def test_weights_that_bfloat16_does_not_hold():
    hf = tiny.llama(dtype=torch.float32)
    lin = linearize(hf, tiny.prompt(4), precision="split")
    assert lin.trace.split.note == "left off: weights are not bf16-exact (float32 checkpoint)"
    rounded(hf)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[0, 0] += 2**-20
    lin = linearize(hf, tiny.prompt(4), precision="split")
    assert lin.trace.split.layers == (True, False, True)
    assert lin.trace.split.note.endswith("; 2 of 3 layers")
    exact = linearize(hf, tiny.prompt(4), precision="double").jacobian().dense()
    assert relative_error(lin.jacobian().dense() - exact, exact) < tiny.rounding()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_layers_without_explicit_products_are_in_float32(family):
    lin = linearize(rounded(families.build(family, dtype=torch.float32)), tiny.prompt(4), precision="split")
    assert lin.trace.split.note.startswith("left off: no layer has explicit products")
    assert lin.certify().passed


@pytest.mark.usefixtures("forced")
def test_a_failed_certificate_turns_it_off(monkeypatch):
    model, ids, wrong = rounded(tiny.llama(dtype=torch.float32)), tiny.prompt(4), split.multiply

    def halved(*arguments, **options):
        return wrong(*arguments, **options).mul_(0.5)

    monkeypatch.setattr(split, "multiply", halved)
    lin = linearize(model, ids, precision="split")
    note = "left off: the certificate at position 3 failed with bf16 products"
    assert lin.trace.split == Split(note=note)
    assert lin.certify().passed
    assert lin.certify().provenance.split == note
    expected = linearize(model, ids)
    assert torch.equal(lin.jacobian().dense(), expected.jacobian().dense())
    monkeypatch.setattr(split, "multiply", wrong)
    lin = linearize(model, ids, precision="split")
    before, passed = lin.jacobian(), linearized.certify
    assert lin.trace.split.layers
    failing = [True]

    def fails_once(J):
        if failing:
            failing.clear()
            monkeypatch.setattr(split, "multiply", halved)
        return passed(J)

    monkeypatch.setattr(linearized, "certify", fails_once)
    assert lin.certify(position=1).passed
    assert lin.jacobian().provenance().precision == "single"
    assert before.provenance().precision == "split", "it is as it was made"


def test_beside_other_threads_it_is_left_off(monkeypatch):
    """The switch of a CPU's products would change theirs."""
    monkeypatch.setattr(split.sys, "_current_frames", lambda: {t.ident: None for t in threading.enumerate()})
    assert split.is_alone()
    done = threading.Event()
    for name, idle in (("worker", False), ("loclin-layers_0", True)):
        done.clear()
        thread = threading.Thread(target=done.wait, name=name)
        thread.start()
        try:
            assert split.is_alone() is idle
            if not idle:
                lin = linearize(rounded(tiny.llama(dtype=torch.float32)), tiny.prompt(4), precision="split")
                assert "other threads run in this process" in lin.trace.split.note
        finally:
            done.set()
            thread.join()


def test_the_switch_is_on_during_a_product_alone(monkeypatch):
    matmul, seen, multiply = torch.backends.mkldnn.matmul, [], split._multiply
    before = matmul.fp32_precision
    is_alone = [True]

    def watch(*arguments):
        seen.append(matmul.fp32_precision)
        multiply(*arguments)

    monkeypatch.setattr(split, "is_alone", lambda: is_alone[0])
    monkeypatch.setattr(split, "_multiply", watch)
    x, out = draw(3, 4), torch.empty(3, 4)
    split.multiply(x, torch.eye(4), Workspace(), out)
    assert torch.equal(out, x)
    assert seen == ["bf16"] * 3
    assert matmul.fp32_precision == before
    is_alone[0] = False
    split.multiply_both(x, torch.eye(4), Workspace(), out)
    assert seen[3:] == [before], "one float32 product"
    is_alone[0] = True

    def fails(*_):
        assert matmul.fp32_precision == "bf16"
        raise KeyError

    monkeypatch.setattr(split, "_multiply", fails)
    with pytest.raises(KeyError):
        split.multiply(x, torch.eye(4), Workspace(), out)
    assert matmul.fp32_precision == before


@pytest.mark.usefixtures("units", "forced")
def test_layers_on_disk(tmp_path):
    tiny.llama(dtype=torch.bfloat16).save_pretrained(tmp_path)
    ids = tiny.prompt(5)
    in_memory, on_disk = (
        linearize(loclin.load(str(tmp_path), dtype="bfloat16", stream=stream), ids, precision="split")
        for stream in (False, True)
    )
    assert on_disk.trace.split == in_memory.trace.split
    assert on_disk.trace.split.layers
    assert torch.equal(on_disk.jacobian().dense(), in_memory.jacobian().dense())


@pytest.mark.usefixtures("forced")
def test_a_memory_budget():
    model, ids = rounded(tiny.llama(dtype=torch.float32)), tiny.prompt(5)
    with pytest.raises(BudgetError):
        linearize(model, ids, precision="split", memory=1)
    roomy, close = (linearize(model, ids, precision="split", memory=memory) for memory in ("1GB", "2MB"))
    assert roomy.chain.column_bytes(roomy.jacobian().target) > linearize(model, ids).chain.column_bytes(
        roomy.jacobian().target
    )
    assert relative_error(close.jacobian().dense() - roomy.jacobian().dense(), roomy.jacobian().dense()) < 1e-6


@pytest.mark.usefixtures("units", "forced")
def test_half_precision_models(tmp_path):
    lin = linearize(tiny.llama(dtype=torch.bfloat16), tiny.prompt(4), precision="split")
    assert lin.trace.split.layers
    saved = lin.jacobian().svd(2)
    saved.save(tmp_path / "svd.safetensors")
    assert loclin.SVD.load(tmp_path / "svd.safetensors").provenance.split == lin.trace.split.note
    lin = linearize(tiny.llama(dtype=torch.float16), tiny.prompt(4), precision="split")
    assert "not bf16-exact" in lin.trace.split.note
    assert lin.certify().passed
