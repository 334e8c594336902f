"""Layers that stay on disk: the same bits as in memory, memory that comes back, and one line for every fault."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import loclin
import tiny
from least import least, within
from loclin.analyses.attribution.attribute import LEVELS
from loclin.common import free_memory
from loclin.errors import BudgetError, ModelError, OptionError
from loclin.models import tiny as families
from loclin.models.lease import OnDisk, layers_on_disk, on_disk, weights_of
from loclin.models.streaming import build, checkpoint, page_cache
from loclin.network.chain import Chain
from loclin.steering import Operator
from loclin.steering.match import fingerprint

from .helpers import tiny_gguf

IDS = tiny.prompt()


def gpt2(**_):
    sizes = {"n_embd": 24, "n_head": 4, "n_layer": 3, "vocab_size": tiny.VOCABULARY, "n_positions": 64}
    return tiny._shaken(GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2)), 0, torch.float32)


def qwen2(**_):
    sizes = {**tiny._SIZES, "num_hidden_layers": 4}
    return tiny._shaken(Qwen2ForCausalLM(Qwen2Config(**sizes)), 0, torch.float32)


def moe(family, **more):
    """A mixture of experts whose checkpoint stores each expert's matrices by themselves."""
    sizes = {**tiny._SIZES, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, **more}
    config = AutoConfig.for_model(family, num_experts_per_tok=2, **sizes)
    return tiny._shaken(AutoModelForCausalLM.from_config(config), 0, torch.float32)


MODELS = {
    "llama": lambda: tiny.llama(dtype=torch.float32),
    "tied": lambda: tiny.llama(dtype=torch.float32, tied=True, biases=True),
    "half": lambda: tiny.llama(dtype=torch.bfloat16),
    "gemma3": lambda: tiny.gemma3(dtype=torch.float32),
    "qwen2": qwen2,
    "gpt2": gpt2,
    "mixtral": lambda: moe("mixtral"),
    "qwen2_moe": lambda: moe("qwen2_moe", shared_expert_intermediate_size=24),
    "qwen3_moe": lambda: moe("qwen3_moe", mlp_only_layers=[0]),
    "olmoe": lambda: moe("olmoe"),
}


def saved(path, kind="llama", shards=False):
    MODELS[kind]().save_pretrained(path, max_shard_size="8KB" if shards else "1GB")
    return path


def reader(model):
    return on_disk(next(iter(layers_on_disk(model.hf).values()))).reader


def file_of(model, layer=1, name="mlp.up_proj.weight"):
    return reader(model).layers[layer][name].pieces[0].stored


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path)


def text(result):
    """A result in words, without when it was made."""
    return "\n".join(line for line in result.to_json().splitlines() if '"date"' not in line)


def results(model, folder):
    """What every analysis gives, as text or tensors."""
    lin = loclin.linearize(model, IDS)
    J = lin.jacobian()
    yield "values", [lin.trace.final, lin.trace.stock_logits, lin.embeddings, J.bias]
    certificate = lin.certify()
    assert certificate.passed
    yield "certify", text(certificate)
    yield "dense", J.dense()
    yield "logits", lin.jacobian(target="logits").dense()
    for joint in (False, True):
        svd = J.svd(4, joint=joint)
        yield f"svd {joint}", [svd.U, svd.S, svd.Vh]
    yield "layers", text(lin.explain_layers(progress=False))
    for level in LEVELS:
        try:
            yield level, text(lin.attribute(by=level, progress=False))
        except OptionError as refusal:  # a mixture of experts has no neurons
            yield level, str(refusal)
    yield "lens", text(lin.logit_lens())
    yield "validity", text(lin.validity(draws=1, swaps=1, progress=False))
    yield "generate", text(lin.generate(2, progress=False))
    yield "ordinary", lin.ordinary_jacobian().dense()
    yield "up", loclin.linearize(model, IDS, gate="up").jacobian().dense()
    yield "weights", fingerprint(model.hf)
    yield "file", J.dense(folder / "map.npy").clone()
    operator = Operator.make(lin, 1)
    with operator.apply(model, 2.0), torch.no_grad():
        steered = model.hf.generate(IDS, max_new_tokens=3, do_sample=False)
    yield "steered", steered  # outside: another generator runs before this one goes on


def same(one, other):
    if isinstance(one, str):
        return one == other
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.long_for("qwen")
@pytest.mark.long_for("half")
@pytest.mark.parametrize("kind", sorted(MODELS.keys() - {"qwen2_moe", "olmoe"}))
def test_every_analysis_gives_the_same_bits_as_in_memory(kind, tmp_path):
    folder = saved(tmp_path / "model", kind)
    ours = results(loclin.load(folder, stream=True), tmp_path)
    theirs = results(loclin.load(folder), tmp_path)  # the second opens the file that the first wrote: one hash
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        assert same(one, other), name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("shards", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("kind", MODELS)
def test_maps_are_the_same_bits_as_in_memory_and_no_weight_stays(kind, shards, tmp_path):
    folder = saved(tmp_path / "model", kind, shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    streamed = loclin.load(folder, stream=True)
    ours, theirs = (loclin.linearize(model, IDS) for model in (streamed, loclin.load(folder)))
    assert ours.trace.explicit == theirs.trace.explicit
    assert torch.equal(ours.jacobian().dense(), theirs.jacobian().dense())
    assert torch.equal(ours.jacobian().bias, theirs.jacobian().bias)
    assert text(ours.certify()) == text(theirs.certify())
    for root in (streamed.hf, ours.trace.model.hf):
        assert all(isinstance(p, OnDisk) for layer in layers_on_disk(root).values() for p in layer.parameters())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16", "auto"])
def test_weights_are_converted_to_the_dtype_that_was_asked_for(dtype, tmp_path):
    folder = saved(tmp_path, "half")
    ours, theirs = (loclin.linearize(loclin.load(folder, dtype=dtype, stream=on), IDS) for on in (True, False))
    assert ours.trace.sequence.dtype == theirs.trace.sequence.dtype
    assert torch.equal(ours.jacobian().dense(), theirs.jacobian().dense())
    assert text(ours.certify()) == text(theirs.certify())
    assert ours.model.info == theirs.model.info


def test_memory_holds_two_layers_and_comes_back(folder):
    model = loclin.load(folder, stream=True)
    lin = loclin.linearize(model, IDS)
    source = reader(model)
    seen = []
    take = source._blocks.take

    def counted():
        seen.append(len(source._blocks._free))
        return take()

    source._blocks.take = counted
    for _ in range(3):
        lin.jacobian().rmatmat(torch.randn(5, 24))
        lin.jacobian().matmat(torch.randn(5, 7, 24))
    assert len(seen) >= 12
    assert sum(not free for free in seen) <= 2  # blocks come back: hardly any is new
    for root in (model.hf, lin.trace.model.hf):
        assert all(p.is_meta for layer in layers_on_disk(root).values() for p in layer.parameters())


def test_a_tensor_keeps_its_memory_for_as_long_as_it_lives(folder):
    model = loclin.load(folder, stream=True)
    layers = list(layers_on_disk(model.hf).values())
    with weights_of(layers[0], ["mlp.up_proj"]):
        weight = layers[0].mlp.up_proj.weight
        assert layers[0].mlp.down_proj.weight.is_meta
        with weights_of(layers[0]):
            assert layers[0].mlp.up_proj.weight is weight
            assert not layers[0].mlp.down_proj.weight.is_meta
        assert not layers[0].mlp.up_proj.weight.is_meta
    kept = weight.clone()
    assert layers[0].mlp.up_proj.weight.is_meta
    for _ in range(3):
        model.hf(IDS)
    assert torch.equal(weight, kept)


def test_a_sweep_reads_what_explicit_products_need_once(folder):
    model = loclin.load(folder, stream=True)
    lin = loclin.linearize(model, IDS)
    J, source = lin.jacobian(), reader(model)
    J.bias  # noqa: B018 (computed once)
    names = ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    needed = sum(plan.stored_bytes for layer in source.layers for name, plan in layer.items() if name.startswith(names))
    source.forget()
    before = source.bytes_read
    J.dense()
    assert source.bytes_read - before == needed


def test_joint_triples_take_seven_sweeps_over_what_explicit_products_need(folder):
    model = loclin.load(folder, stream=True)
    lin = loclin.linearize(model, IDS)
    J, source = lin.jacobian(), reader(model)
    J.bias, J.value  # noqa: B018 (computed once)
    source.forget()
    before = source.bytes_read
    J.rmatmat(torch.randn(3, 24))
    sweep = source.bytes_read - before
    found = J.svd(2, joint=True, method="matrix_free")
    assert source.bytes_read - before <= 8 * sweep
    assert J.cached_dense is None
    exact = loclin.linearize(loclin.load(folder), IDS).jacobian().svd(2, joint=True, method="lapack")
    assert ((found.lower <= exact.S * (1 + 1e-6)) & (found.upper * (1 + 1e-6) >= exact.S)).all()


def test_weights_that_do_not_fit_stay_on_disk_and_every_result_says_so(folder, monkeypatch):
    expected = loclin.linearize(loclin.load(folder), IDS).jacobian().dense()
    monkeypatch.setattr(free_memory, "available", lambda _: 50_000)
    model = loclin.load(folder)
    assert layers_on_disk(model.hf)
    assert "read layer by layer" in repr(model)
    monkeypatch.undo()
    lin = loclin.linearize(model, IDS)
    said = r"read from disk layer by layer: its weights take .* GB, and 5e-05 GB of memory are free"
    for result in (lin.certify(), lin.jacobian().svd(2), lin.attribute(by="token", progress=False)):
        assert any(re.search(said, warning) for warning in result.warnings)
    assert torch.equal(lin.jacobian().dense(), expected)
    monkeypatch.setattr(free_memory, "available", lambda _: 50_000)
    for chosen in ({"stream": False}, {"device_map": "cpu"}):
        assert not layers_on_disk(loclin.load(folder, **chosen).hf)


def test_weights_that_neither_fit_nor_stream_are_refused(tmp_path, monkeypatch):
    families.build("hrm_text", dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(free_memory, "available", lambda _: 50_000)
    with pytest.raises(ModelError, match=r"its weights take .*cannot stay on disk either .*stream=False tries"):
        loclin.load(tmp_path)
    assert loclin.load(tmp_path, stream=False).info.family == "hrm_text"


def read_layers(monkeypatch):
    """The layers that are read from now on, in this order."""
    layers, read = [], checkpoint.Checkpoint.read

    def noted(self, wanted):
        layers.extend({int(n) for tensor, _ in wanted for n in re.findall(r"layers\.(\d+)\.", tensor.name)})
        read(self, wanted)

    monkeypatch.setattr(checkpoint.Checkpoint, "read", noted)
    return layers


def test_every_sweep_turns_where_the_last_one_ended(tmp_path, monkeypatch):
    model = loclin.load(saved(tmp_path, "qwen2"), stream=True)
    J = loclin.linearize(model, IDS).jacobian()
    J.bias, J.value  # noqa: B018 (computed once)
    layers = read_layers(monkeypatch)
    for _ in range(3):  # as the products of an SVD
        J.rmatmat(torch.randn(3, 24))
        J.matmat(torch.randn(3, 7, 24))
    assert layers == [2, 1, 0, 1, 2, 3] * 3  # layer 3 was used last before, and layer 0 is in use at the turn


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes advice")
@pytest.mark.parametrize("free", [10**9, 40_000, 0])
def test_the_page_cache_keeps_what_fits(free, tmp_path, monkeypatch):
    folder = saved(tmp_path, shards=True)
    sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    monkeypatch.setattr(free_memory, "available", lambda _: free)
    monkeypatch.setattr(page_cache, "available", lambda _: free)
    advice = []

    def advise(file, start, size, kind):
        advice.append((Path(f"/proc/self/fd/{file}").readlink(), start, size, kind))

    monkeypatch.setattr(page_cache.os, "posix_fadvise", advise)
    loclin.load(folder, stream=True)
    wanted, dropped = (
        {(path, at) for path, start, size, kind in advice if kind == of for at in range(start, start + size)}
        for of in (os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED)
    )
    before = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    kept = free if sum(sizes.values()) <= free else free // 2
    assert dropped == {(path, at) for path, at in wanted if before[path] + at >= kept}
    assert wanted


def test_files_that_take_no_advice_are_read_without(folder, monkeypatch):
    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(page_cache.os, "posix_fadvise", refuse, raising=False)
    assert loclin.linearize(loclin.load(folder, stream=True), IDS).certify().passed


KILLED = """
import os, signal, sys
import loclin, tiny
from least import within
from loclin.network.chain import Chain
from loclin.results import sweep_file

sweep_file.SECONDS = 0
pull, layers = Chain.pull, []

def killed(self, *args):
    layers.append(1)
    if len(layers) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return pull(self, *args)

Chain.pull = killed
within(loclin.load(sys.argv[1], stream=True), tiny.prompt(20), 50_000).jacobian().dense(sys.argv[2])
"""


def test_a_run_that_was_killed_in_a_sweep_reads_the_other_layers_only(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "qwen2")
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "J.npy")]
    rooms = [str(Path(loclin.__file__).parents[1]), str(Path(tiny.__file__).parent)]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(rooms)}, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    model = loclin.load(folder, stream=True)
    passed, layers = [], read_layers(monkeypatch)
    pull = Chain.pull
    monkeypatch.setattr(Chain, "pull", lambda self, block, i, *args: passed.append(i) or pull(self, block, i, *args))
    lin = within(model, tiny.prompt(20), 50_000)
    rows = lin.jacobian()._chunking()[0]
    reader(model).forget()
    layers.clear()
    found = lin.jacobian().dense(tmp_path / "J.npy")
    sweeps = -(-24 // rows)
    assert passed == [1, 0] + [3, 2, 1, 0] * (sweeps - 2)  # one sweep was complete, and two layers of the next
    assert layers.count(3) == 1 + sweeps - 2  # the weights' hash reads it, too
    assert sweeps > 2
    whole = within(loclin.load(folder), tiny.prompt(20), 50_000).jacobian().dense(tmp_path / "whole.npy")
    assert torch.equal(found, whole)
    assert (tmp_path / "J.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_two_threads_get_what_one_gets(folder):
    model = loclin.load(folder, stream=True)
    expected = loclin.linearize(model, IDS).jacobian().dense()
    with torch.no_grad():
        logits = model.hf(IDS).logits
    found, plain = [], []

    def work():
        with torch.no_grad():
            plain.append(model.hf(IDS).logits)
        found.append(loclin.linearize(model, IDS).jacobian().dense())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
    assert all(torch.equal(one, logits) for one in plain)
    assert all(p.is_meta for layer in layers_on_disk(model.hf).values() for p in layer.parameters())


def test_a_graph_of_the_whole_model_holds_no_layer(folder):
    model = loclin.load(folder, stream=True)
    lin = loclin.linearize(model, IDS)
    from loclin.network.graph import network_graph

    graph = network_graph(lin.trace, lin.trace.options)
    source = reader(model)
    source.forget()
    gc.collect()
    free = len(source._blocks._free)
    assert free == 2  # what is kept of all that came back
    (pulled,) = torch.autograd.grad(graph.points["resid_post"][0, -1, 0], graph.points["resid_pre"])
    assert torch.equal(pulled[0], _pulled_in_memory(folder))


def _pulled_in_memory(folder):
    from loclin.network.graph import network_graph

    lin = loclin.linearize(loclin.load(folder), IDS)
    graph = network_graph(lin.trace, lin.trace.options)
    return torch.autograd.grad(graph.points["resid_post"][0, -1, 0], graph.points["resid_pre"])[0][0]


def test_reads_that_end_early_go_on(folder, monkeypatch):
    whole = os.preadv

    def piecemeal(file, views, offset):
        return whole(file, [views[0][: max(1, len(views[0]) // 3)]], offset)

    expected = loclin.linearize(loclin.load(folder), IDS).jacobian().dense()
    monkeypatch.setattr(checkpoint.os, "preadv", piecemeal)
    assert torch.equal(loclin.linearize(loclin.load(folder, stream=True), IDS).jacobian().dense(), expected)


def test_after_an_interrupt_or_a_fault_the_model_still_works(folder, monkeypatch):
    model = loclin.load(folder, stream=True)
    lin = loclin.linearize(model, IDS)
    expected = lin.jacobian().dense()
    for fault in (KeyboardInterrupt, RuntimeError):
        layer = layers_on_disk(model.hf)["model.layers.1"]
        with monkeypatch.context() as patch:
            patch.setattr(layer.mlp, "forward", lambda *_, fault=fault: (_ for _ in ()).throw(fault()))
            with pytest.raises(fault):
                model.hf(IDS)
        assert all(p.is_meta for p in layer.parameters())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        reader(model).forget()
        with pytest.raises(ModelError, match=r"cannot read model\.layers\.\d.* Input/output error"):
            loclin.linearize(model, IDS)
    assert torch.equal(loclin.linearize(model, IDS).jacobian().dense(), expected)


@pytest.mark.slow
def test_the_copy_of_a_gguf_file_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCLIN_CACHE", str(tmp_path / "cache"))
    path = tiny_gguf(tmp_path / "tiny.gguf")
    streamed, whole = (loclin.load(path, stream=on) for on in (True, False))
    assert layers_on_disk(streamed.hf)
    assert streamed.info == whole.info
    ours, theirs = (loclin.linearize(model, "the cat") for model in (streamed, whole))
    assert torch.equal(ours.jacobian().dense(), theirs.jacobian().dense())
    assert ours.certify().passed


@pytest.mark.real
@pytest.mark.long_for("gemma-3-270m")
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_packaged_models_are_streamed(name):
    ours, theirs = (loclin.linearize(loclin.load(name, stream=on), "The Golden Gate") for on in (True, False))
    assert torch.equal(ours.jacobian().dense(), theirs.jacobian().dense())
    assert text(ours.certify()) == text(theirs.certify())


def test_a_copy_of_the_model_reads_the_same_files(folder):
    model = loclin.load(folder, stream=True)
    again = copy.deepcopy(model.hf)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.hf(IDS).logits)


@pytest.mark.parametrize("how", ["altered", "replaced", "gone", "cut"])
def test_files_that_change_are_refused(how, tmp_path):
    model = loclin.load(saved(tmp_path), stream=True)
    lin = loclin.linearize(model, IDS)
    path = file_of(model).path
    if how == "altered":
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(struct.pack("<f", 3.0))
        os.utime(path, ns=(1, 1))
    elif how == "replaced":
        state = path.stat()
        content = path.read_bytes()
        path.rename(tmp_path / "old")
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    elif how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 8)
    reader(model).forget()
    with pytest.raises(ModelError, match=r"model\.safetensors") as refusal:
        lin.jacobian().dense()
    assert "model.layers." in str(refusal.value)
    assert "\n" not in str(refusal.value)


def _rewrite(path, change):
    """Change the header of a file in place, and leave its numbers."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _name(old, new):
    return lambda header: header.update({new: header.pop(old)})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_name(UP, "model.layers.1.mlp.other.weight"), rf"lacks weights .*{UP}"),
        (lambda h: h[UP].update(shape=[24, 40]), rf"{UP} has the shape \[24, 40\].*\[40, 24\]"),
        (lambda h: h[UP].update(dtype="I32"), rf"stores {UP} as I32"),
        (lambda h: h[UP].update(shape=[40, 12]), "damaged"),
        (lambda h: h.update(extra={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}), r"damaged"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, folder):
    _rewrite(folder / "model.safetensors", change)
    with pytest.raises(ModelError, match=message):
        loclin.load(folder, stream=True)


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x08" + b"\0" * 7 + b"nonsense"])
def test_damaged_files_are_refused(content, folder):
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        loclin.load(folder, stream=True)


def test_the_tensor_is_named_where_a_file_is_cut_off(folder):
    path = folder / "model.safetensors"
    last = max(build.Checkpoint(folder).tensors.values(), key=lambda tensor: tensor.start)
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ModelError, match=rf"ends before {last.name} does"):
        loclin.load(folder, stream=True)


def test_a_missing_shard_is_named(tmp_path):
    folder = saved(tmp_path, shards=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelError, match=rf"lacks {shard.name}, which holds"):
        loclin.load(folder, stream=True)


def test_a_damaged_index_or_none_is_named(tmp_path):
    folder = saved(tmp_path, shards=True)
    index = folder / "model.safetensors.index.json"
    for content, message in (
        ("{", "is damaged"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "outside its directory"),
        (None, r"neither model\.safetensors nor"),
    ):
        index.unlink() if content is None else index.write_text(content)
        with pytest.raises(ModelError, match=message):
            loclin.load(folder, stream=True)


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = MODELS["llama"]()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"NaN or infinite: {UP}"):
        loclin.load(tmp_path, stream=True)


EXPERT = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("fault", ["NaN", "lacks", "shape", "altered", "shard", "cut"])
def test_a_fault_in_one_expert_is_named(fault, tmp_path):
    model = MODELS["qwen3_moe"]()
    if fault == "NaN":
        with torch.no_grad():
            model.model.layers[1].mlp.experts.gate_up_proj[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path, max_shard_size="8KB" if fault == "shard" else "1GB")
    path, own = tmp_path / "model.safetensors", f"{EXPERT}.2.up_proj.weight"
    if fault == "NaN":
        said = rf"NaN or infinite: {EXPERT}.gate_up_proj"
    elif fault == "lacks":
        _rewrite(path, _name(own, f"{own}.other"))
        said = rf"{EXPERT}.gate_up_proj"
    elif fault == "shape":
        _rewrite(path, lambda h: h[own].update(shape=[24, 16]))
        said = rf"{EXPERT}.gate_up_proj"
    elif fault == "shard":
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
        (tmp_path / index[own]).unlink()
        said = rf"lacks {index[own]}, which holds"
    elif fault == "cut":
        os.truncate(path, path.stat().st_size - 4)
        said = "ends before "
    else:
        lin = loclin.linearize(loclin.load(tmp_path, stream=True), IDS)
        os.utime(path, ns=(1, 1))
        with pytest.raises(ModelError, match=r"was altered or replaced .*model\.layers\.\d"):
            lin.jacobian().dense()
        return
    with pytest.raises(ModelError, match=said) as refusal:
        loclin.load(tmp_path, stream=True)
    assert "\n" not in str(refusal.value)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_are_converted_to_the_dtype_that_was_asked_for(dtype, tmp_path):
    folder = saved(tmp_path, "mixtral")
    ours, theirs = (loclin.linearize(loclin.load(folder, dtype=dtype, stream=on), IDS) for on in (True, False))
    assert torch.equal(ours.jacobian().dense(), theirs.jacobian().dense())
    assert torch.equal(ours.jacobian().bias, theirs.jacobian().bias)


def test_tied_weights_that_differ_are_refused(tmp_path):
    folder = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        loclin.load(folder, stream=True)


def test_families_that_are_converted_are_refused(tmp_path):
    families.build("hrm_text").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gqkv_proj.* cannot convert it \(Chunk: "):
        loclin.load(tmp_path, stream=True)


def test_a_tensor_that_nothing_gives_values_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    model[0].table = torch.empty(3, device="meta")
    with pytest.raises(ModelError, match=r"x: 0\.table has no values"):
        build._refuse_empty(model, "x")


def test_options_that_streaming_excludes_are_refused(folder):
    for options in ({"quantization_config": {}}, {"max_memory": {}}, {"device": "meta"}):
        with pytest.raises((OptionError, ModelError)):
            loclin.load(folder, stream=True, **options)


def test_a_budget_without_room_for_two_layers_names_the_least(folder):
    model = loclin.load(folder, stream=True)
    layers = 2 * reader(model).layer_bytes
    needed = least(model, IDS)
    assert needed > layers
    with pytest.raises(BudgetError, match=f"give memory={needed}"):
        loclin.linearize(model, IDS, memory=needed - 1)
    assert loclin.linearize(model, IDS, memory=needed).certify().passed
