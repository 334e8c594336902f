"""A model on another device: what a GPU would refuse, and how often the processor waits for it.

These tests run on `tests/fake_device.py`, or on a real GPU with `--device cuda`. Most of the others can run there too.
"""

from __future__ import annotations

import pytest
import torch

import fake_device
import loclin
import tiny
from loclin.maps.layer_maps import COMPONENTS, layer_maps
from loclin.models import checks, options

ANALYSES = {
    "certify": lambda lin: lin.certify(),
    "joint SVD": lambda lin: lin.jacobian(position=-2).svd(3, joint=True),
    "each token's SVD": lambda lin: lin.jacobian().svd(3),
    "matrix-free SVD": lambda lin: lin.jacobian(position=-3).svd(2, joint=True, method="matrix_free"),
    "norms": lambda lin: lin.jacobian(position=-4).norms(),
    "logits": lambda lin: lin.jacobian(target="logits").dense(),
    "normed": lambda lin: lin.jacobian(target="resid_post.1", normed=True).dense(),
    "each bias": lambda lin: lin.jacobian().bias_by_source(),
    "ordinary": lambda lin: lin.ordinary_reconstruction(),
    "layers": lambda lin: lin.layer_spectra(k=3, joint=True),
    "suffixes": lambda lin: list(layer_maps(lin.chain, "suffix", 3, COMPONENTS, normed=False)),
    "explain": lambda lin: lin.explain(k=3),
    "explain layers": lambda lin: lin.explain_layers(k=3),
    **{
        f"by {level}": lambda lin, level=level: lin.attribute(by=level)
        for level in ("token", "layer", "head", "neuron")
    },
    "by bias": lambda lin: lin.attribute(by="bias"),
    "by token and layer": lambda lin: lin.attribute(by="token×layer"),
    "head": lambda lin: lin.head(1, 1),
    "span": lambda lin: lin.attribute([5, 6, 7]),
    "interventions": lambda lin: lin.intervene(["L1H1", "L1N2", "mlp_out.0", "T1"]),
    "patching": lambda lin: lin.patch(lin, verify=1),
    "path": lambda lin: lin.path(["L0H1", "L2H0"], token=2),
    "lens": lambda lin: lin.logit_lens(),
    "generate": lambda lin: lin.generate(max_new_tokens=2),
    "validity": lambda lin: lin.validity(),
    "similarity": lambda lin: lin.similarity(),
}


@pytest.fixture(scope="module")
def device():
    if tiny.DEVICE == "cpu":
        pytest.skip("needs --device fake or cuda")
    return tiny.DEVICE


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("gate", ["activation", "up", "half"])
def test_the_map_is_the_cpu_s(device, gate, biases):
    model, ids = tiny.llama(biases=biases), tiny.prompt(8)
    lin = loclin.linearize(model, ids, gate=gate, precision="double")
    expected = loclin.linearize(tiny.llama(biases=biases).cpu(), ids.cpu(), gate=gate, precision="double")
    J = lin.jacobian()
    assert J.dense().device.type == device
    assert all(lin.trace.explicit)
    assert lin.certify().passed
    assert (J.dense().cpu() - expected.jacobian().dense()).norm() < 1e-12 * expected.jacobian().dense().norm()
    assert (J.bias.cpu() - expected.jacobian().bias).norm() <= 1e-12 * expected.jacobian().value.norm()


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis(name):
    model = tiny.llama(dtype=torch.float32, biases=name in ("by bias", "each bias"))
    assert ANALYSES[name](loclin.linearize(model, tiny.prompt(5))) is not None


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("name", ["certify", "each token's SVD", "layers", "by layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    assert ANALYSES[name](loclin.linearize(tiny.gemma3(dtype=dtype), tiny.prompt(5))) is not None


@pytest.mark.usefixtures("device")
def test_memory_budgets_and_files(tmp_path):
    model, ids = tiny.llama(dtype=torch.float32), tiny.prompt(7)
    whole = loclin.linearize(model, ids).jacobian()
    with pytest.raises(loclin.BudgetError) as refused:
        loclin.linearize(model, ids, memory=1000)
    small = loclin.linearize(model, ids, memory=refused.value.least + 60_000).jacobian()
    dense = whole.dense().cpu()
    assert (small.dense(tmp_path / "J.npy") - dense).norm() < tiny.rounding() * dense.norm()
    assert (small.svd(2).S.cpu() - whole.svd(2).S.cpu()).norm() < tiny.rounding() * whole.svd(2).S.cpu().norm()


@pytest.mark.usefixtures("device")
def test_vectors_may_be_on_the_processor():
    J = loclin.linearize(tiny.llama(), tiny.prompt(5).cpu()).jacobian()
    assert torch.equal(J.matvec(J.input.cpu()), J.matvec(J.input))
    assert torch.equal(J.rmatvec(J.value.cpu().numpy()), J.rmatvec(J.value))


@pytest.mark.usefixtures("device")
def test_a_batch():
    for lin in loclin.linearize_batch(tiny.llama(), [tiny.prompt(4), tiny.prompt(6, seed=2)]):
        assert lin.certify().passed


def test_sweeps_do_not_wait_at_each_layer(device):
    if device != fake_device.DEVICE:
        pytest.skip("counts on the fake device")
    sweeps = {
        "dense": lambda lin: lin.jacobian().dense(),
        "push": lambda lin: lin.jacobian().matvec(lin.embeddings),
        "pull": lambda lin: lin.jacobian(position=-2).rmatvec(lin.jacobian(position=-2).value),
    }
    waits = {name: [] for name in sweeps}
    for layers in (3, 9):
        lin = loclin.linearize(tiny.llama(dtype=torch.float32, layers=layers), tiny.prompt(6))
        for name, sweep in sweeps.items():
            with fake_device.counted() as found:
                sweep(lin)
            waits[name].append(sum(found.values()))
    assert all(few == many for few, many in waits.values()), waits


@pytest.mark.usefixtures("device")
def test_weights_that_change_are_seen_in_a_sweep():
    model = tiny.llama(dtype=torch.float32)
    lin = loclin.linearize(model, tiny.prompt(5))
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(loclin.ModelError, match=r"layers\.1\.mlp\.down_proj"):
        lin.jacobian().dense()


def test_mixed_devices_are_refused(device):
    model = tiny.llama()
    model.model.layers[1].cpu()
    with pytest.raises(loclin.ModelError, match=rf"several devices .*lm_head.weight on {device}.*on cpu"):
        loclin.linearize(model, tiny.prompt(5))


def test_a_device_without_float64_is_refused(monkeypatch):
    kind, wrapped = torch.device(tiny.DEVICE).type, loclin.wrap(tiny.llama())
    for module in (checks, options):
        monkeypatch.setattr(module, "WITHOUT_DOUBLE", frozenset({kind}))
    for model in (tiny.llama(), wrapped):  # one that was moved there after it was wrapped, too
        with pytest.raises(loclin.ModelError, match=rf"is on {kind}.* which has no float64"):
            loclin.linearize(model, tiny.prompt(5))
    with pytest.raises(loclin.OptionError, match=r"device='mps'.*choose one of cpu"):
        options.parse_device("mps")


def test_a_full_device_says_what_would_fit(monkeypatch):
    lin = loclin.linearize(tiny.llama(), tiny.prompt(5))
    said = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
        "free. Including non-PyTorch memory, this process has 77.8 GiB memory in use."
    )

    def fail(*_args, **_options):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr("loclin.network.chain.Chain.backward", fail)
    with pytest.raises(
        loclin.BudgetError, match=r"allocate 20.00 GiB.* 1.25 GiB is free\. .*memory=.*bfloat16"
    ) as full:
        lin.jacobian().dense()
    assert "Including" not in str(full.value)
    assert full.value.__context__.__traceback__ is None, "it would hold the tensors that fill the device"
