"""Devices that share the work give the bits of one; here they share the processor, each with weights of its own."""

from __future__ import annotations

import signal
import threading
import time
from functools import partial

import pytest
import torch

import tiny
from loclin.errors import ModelError, OptionError
from loclin.freeze.pattern import BlockPattern
from loclin.linearization import linearize
from loclin.maps.layer_maps import check_components, layer_maps
from loclin.maps.linear_map import LinearMap
from loclin.models import load, wrap
from loclin.models import tiny as families
from loclin.models.crew import Crew
from loclin.models.options import parse_devices
from loclin.models.replica import replicate
from loclin.network import chain as chains
from loclin.network import explicit_mlp
from loclin.network.chain import Chain
from loclin.network.explicit_mlp import ExplicitMLP

IDS = tiny.prompt(8)
TWO = ["cpu", "cpu"]
MODELS = {
    "explicit": tiny.llama,
    "sliding window": tiny.gemma3,
    "stored in half": partial(tiny.llama, dtype=torch.bfloat16, biases=True),
    "no explicit products": partial(families.build, "granite", dtype=torch.float64),
    "parallel": partial(families.build, "gpt_neox", dtype=torch.float64),
}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """A tiny model's sweep is one unit of work; make it many, on one device as on two."""
    monkeypatch.setattr(chains, "_CHUNK_ROWS", 3 * IDS.shape[1])
    monkeypatch.setattr(explicit_mlp, "_ROWS", 50)
    monkeypatch.setattr(explicit_mlp, "_FORMED_NUMBERS", 4000)


@pytest.fixture
def dealt(monkeypatch):
    """How many units each call has dealt out to threads."""
    counts: list[int] = []
    deal = Crew.deal

    def counted(self, make, work, units, home):
        counts.append(len(units))
        deal(self, make, work, units, home)

    monkeypatch.setattr(Crew, "deal", counted)
    return counts


def both(build, **options):
    """The same weights linearized on one device, and on two."""
    hf = build()
    return [linearize(wrap(hf, devices=devices), IDS, **options) for devices in (None, TWO)]


def same(found) -> bool:
    one, two = (list(values) for values in found)
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


def products(lin):
    J = lin.jacobian()
    random = torch.Generator().manual_seed(0)
    yield J.matmat(torch.randn(9, *J.shape[1:], generator=random, dtype=J.dtype))
    yield J.rmatmat(torch.randn(9, J.shape[0], generator=random, dtype=J.dtype))
    yield from (rows for _, rows in J.rows(chunk=7))
    yield lin.jacobian("resid_mid.0", "mlp_out.2", normed=True).dense()
    yield J.bias
    yield J.dense()
    yield lin.ordinary_jacobian().dense()


def spectra(lin):
    J = lin.jacobian()
    for options in ({}, {"joint": True}, {"method": "block_krylov"}):
        svd = J.svd(3, **options)
        yield from (svd.U, svd.S, svd.Vh)
    yield J.frobenius_norm()
    yield J.stable_rank()


def layers(lin, explicit=True):
    chain = Chain(lin.trace, explicit=explicit)
    for mode, direction in (
        ("cumulative", "forward"),
        ("cumulative", "backward"),
        ("layerwise", None),
        ("suffix", None),
    ):
        for found in layer_maps(chain, mode, 7, check_components(chain, None), direction=direction):
            yield from (found.maps.clone(), found.bias)


def generic(lin):
    J = LinearMap(Chain(lin.trace, explicit=False), *(getattr(lin.jacobian(), n) for n in ("source", "target")), 5)
    yield J.dense()
    yield from layers(lin, explicit=False)


def attributed(lin):
    found = lin.attribute()
    yield from (value for value in vars(found).values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("ask", [products, layers, attributed])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_two_devices_give_the_bits_of_one(build, ask, dealt):
    one, two = both(build)
    assert same((ask(one), ask(two)))
    if ask is not attributed:  # whose few columns are one unit
        assert max(dealt) > 1


@pytest.mark.parametrize("formed", [True, False], ids=["formed", "factored"])
@pytest.mark.parametrize("ask", [spectra, generic, layers])
def test_every_sweep_is_shared(ask, formed, dealt, monkeypatch):
    monkeypatch.setattr(ExplicitMLP, "forms_matrices", lambda _self, _columns: formed)
    one, two = both(tiny.llama)
    assert same((ask(one), ask(two)))
    assert max(dealt) > 1


def test_patterns_in_blocks_and_a_small_budget(dealt):
    least = linearize(tiny.llama(), IDS).allowance.least(2000)
    one, two = both(tiny.llama, memory=least)
    assert two.allowance == one.allowance
    assert same((products(one), products(two)))
    assert max(dealt) > 1


def test_patterns_move_to_a_device():
    query, key = torch.randn(2, 1, 4, 8, 6).unbind()
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    moved = BlockPattern(query, key, mask, False, None, torch.float32, 100).on(torch.device("meta"))
    assert all(part.is_meta for part in (moved.query, moved.key, moved.mask))


def test_three_devices():
    hf = tiny.gemma3()
    one, three = (linearize(wrap(hf, devices=d), IDS).jacobian().dense() for d in ("cpu", ["cpu", "cpu", "cpu"]))
    assert torch.equal(one, three)


def test_weights_are_copied_once_and_again_when_they_change(monkeypatch):
    hf, made = tiny.llama(), []
    monkeypatch.setattr("loclin.models.crew._RESERVE", 0)
    monkeypatch.setattr("loclin.models.crew.replicate", lambda layer: made.append(layer) or replicate(layer))
    model = wrap(hf, devices=TWO)
    for _ in range(2):
        linearize(model, IDS).jacobian().dense()
    assert len(made) == len(hf.model.layers)
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        hf.model.layers[2].self_attn.o_proj.weight = torch.nn.Parameter(hf.model.layers[2].self_attn.o_proj.weight * 2)
    assert torch.equal(linearize(model, IDS).jacobian().dense(), linearize(hf, IDS).jacobian().dense())
    assert len(made) == len(hf.model.layers) + 2


def test_without_room_for_copies(monkeypatch):
    monkeypatch.setattr("loclin.models.crew.available", lambda _device: 0)
    one, two = both(tiny.llama)
    assert same((products(one), products(two)))
    assert not any(two.trace.model.crew._copies)


def no_threads() -> bool:
    """Whether no worker of a device is left; the readers of streamed models live as long as these."""
    left = [thread for thread in threading.enumerate() if thread.name.startswith("loclin_")]
    for thread in left:
        thread.join(60)
    return not any(thread.is_alive() for thread in left)


def test_a_device_that_fails_is_named(monkeypatch):
    lin = linearize(wrap(tiny.llama(), devices=TWO), IDS)

    def fail(*_):
        raise torch.AcceleratorError("CUDA error: device-side assert\nmore")

    monkeypatch.setattr(Crew, "layer", fail)
    with pytest.raises(ModelError, match="device cpu failed: CUDA error: device-side assert; leave it out"):
        lin.jacobian().dense()
    assert no_threads()


def test_interrupted_in_a_sweep():
    crew, done = Crew(parse_devices("cpu,cpu")), []

    def work(_worker: int, unit: int) -> None:
        if unit == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as a terminal does
        time.sleep(0.001)
        done.append(unit)

    with pytest.raises(KeyboardInterrupt):
        crew.deal(lambda worker: worker, work, range(20_000), 0)
    assert no_threads()
    assert len(done) < 20_000


def test_errors_of_our_own_pass_as_they_are():
    def refuse(_worker: int, _unit: int) -> None:
        raise OptionError("choose another")

    with pytest.raises(OptionError, match="^choose another$"):
        Crew(parse_devices(TWO)).deal(lambda worker: worker, refuse, [1, 2], 0)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "name at least one"),
        ("cuda:99", "device='cuda:99': choose one of"),
        ("cpu,nothing", "device='nothing': choose one of"),
        ("mps", "float64"),
    ],
)
def test_bad_devices_are_refused(devices, message):
    with pytest.raises(OptionError, match=message):
        wrap(tiny.llama(), devices=devices)


def test_devices_of_two_kinds_or_named_twice(monkeypatch):
    monkeypatch.setattr("loclin.models.options.available_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert parse_devices("all") == parse_devices("cuda, cuda:1") == (torch.device("cuda:0"), torch.device("cuda:1"))
    with pytest.raises(OptionError, match="name one kind"):
        parse_devices("cpu,cuda:0")
    with pytest.raises(OptionError, match="each device once"):
        parse_devices(["cuda", "cuda:0"])
    with pytest.raises(OptionError, match="is on cpu, which is not among devices"):
        wrap(tiny.llama(), devices="cuda:0,cuda:1")


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu"}, {"stream": True}, {"quantization_config": object()}],
    ids=lambda other: next(iter(other)),
)
def test_devices_exclude_other_places(other):
    with pytest.raises(OptionError, match=f"devices and {next(iter(other))}=.* both given"):
        load("smollm2-135m", devices=TWO, **other)


def test_a_loaded_model(tmp_path):
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path)
    one, two = (load(tmp_path, devices=devices) for devices in ("cpu", "cpu,cpu"))
    assert (one.devices, two.devices) == ((), (torch.device("cpu"),) * 2)
    assert torch.equal(linearize(one, IDS).jacobian().dense(), linearize(two, IDS).jacobian().dense())


def test_all_devices_of_a_machine_with_mps_are_the_processor(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert parse_devices("all") == (torch.device("cpu"),)


def test_layers_go_to_all_devices_where_the_model_does_not_fit_one(monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    from loclin.models import spread

    hf, devices = tiny.llama(), [torch.device("cuda", index) for index in range(2)]
    size, placed = sum(weight.nbytes for weight in hf.parameters()), {}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda _hf, places: placed.update(places))
    monkeypatch.setattr(spread, "available", lambda _device: size)
    spread.put(hf, devices, "tiny")
    assert set(placed.values()) == {0, 1}
    monkeypatch.setattr(spread, "available", lambda _device: size // 2)
    with pytest.raises(ModelError, match="have room for"):
        spread.put(hf, devices, "tiny")
