"""The dense map in a file: the same numbers, written once however often it is interrupted, refused when not its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

import loclin
import tiny
from least import within
from loclin.errors import OptionError, OutputError, ResultError
from loclin.linearization import linearize
from loclin.network.chain import Chain
from loclin.results import sweep_file
from loclin.results.dense_file import DenseFile

BUDGET = 30_000
"""Bytes for a handful of rows of the tiny models at a time."""


def jacobian(build=tiny.llama, *, seed=0, gate="activation", memory=BUDGET, **points):
    options = {"gate": gate, "precision": "double"}
    if memory is None:
        return linearize(build(seed=seed), tiny.prompt(5), **options).jacobian(**points)
    return within(build(seed=seed), tiny.prompt(5), memory, **options).jacobian(**points)


@pytest.fixture
def sweeps(monkeypatch):
    """The sizes of all sweeps; at the one numbered `stop` the user presses Ctrl-C."""
    real = Chain.backward
    sizes: list[int] = []
    sizes_stop = {"stop": -1}

    def counted(self, cotangents, *args, **kwargs):
        if len(sizes) == sizes_stop["stop"]:
            raise KeyboardInterrupt
        sizes.append(len(cotangents))
        return real(self, cotangents, *args, **kwargs)

    monkeypatch.setattr(Chain, "backward", counted)
    return sizes, sizes_stop


def test_the_file_holds_the_dense_map(tmp_path, sweeps):
    J = jacobian()
    mapped = J.dense(path=tmp_path / "J.npy")
    assert len(sweeps[0]) > 2
    assert sum(sweeps[0]) == 24
    assert torch.allclose(mapped, jacobian(memory=None).dense(), rtol=0, atol=1e-12)
    assert torch.equal(torch.from_numpy(np.load(tmp_path / "J.npy")), mapped)
    assert not (tmp_path / "J.npy.partial").exists()
    assert json.loads((tmp_path / "J.npy.json").read_text())["rows"] == 24
    done = len(sweeps[0])
    assert J.dense() is mapped
    assert J.stable_rank().shape == (5,)
    assert torch.equal(jacobian().dense(path=str(tmp_path / "J.npy")), mapped)
    assert len(sweeps[0]) == done


def test_writing_to_the_tensor_leaves_the_file(tmp_path):
    mapped = jacobian().dense(path=tmp_path / "J.npy")
    before = (tmp_path / "J.npy").read_bytes()
    mapped.mul_(2)
    assert (tmp_path / "J.npy").read_bytes() == before


@pytest.mark.sampled(3)
@pytest.mark.parametrize("points", [{"target": "logits"}, {"source": "attn_out.0", "target": "mlp_out.2"}, {}])
@pytest.mark.parametrize("token", [None, 2])
def test_every_kind_of_map(tmp_path, points, token):
    tight, free = jacobian(tiny.gemma3, memory=200_000, **points), jacobian(tiny.gemma3, memory=None, **points)
    if token is not None:
        tight, free = tight.block(token), free.block(token)
    assert torch.allclose(tight.dense(path=tmp_path / "J.npy"), free.dense(), rtol=1e-12, atol=1e-12)


def test_a_map_that_is_dense_already_is_only_copied(tmp_path, sweeps):
    J = jacobian()
    dense, done = J.dense(), len(sweeps[0])
    assert torch.equal(J.dense(path=tmp_path / "J.npy"), dense)
    assert len(sweeps[0]) == done


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, sweeps):
    sizes, stop = sweeps
    whole = jacobian().dense(path=tmp_path / "whole.npy")
    chunks = sizes.copy()
    sizes.clear()
    for at in (1, 2):
        stop["stop"] = at
        with pytest.raises(KeyboardInterrupt):
            jacobian().dense(path=tmp_path / "J.npy")
        assert not (tmp_path / "J.npy").exists()
        assert json.loads((tmp_path / "J.npy.json").read_text())["rows"] == sum(sizes)
    stop["stop"] = -1
    with (tmp_path / "J.npy.partial").open("ab") as partial:
        partial.write(b"rows that were never said to be there")
    assert torch.equal(jacobian().dense(path=tmp_path / "J.npy"), whole)
    assert sizes == chunks
    assert (tmp_path / "J.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.slow
def test_lost_rows_are_made_again(tmp_path, sweeps):
    sizes, stop = sweeps
    stop["stop"] = 2
    with pytest.raises(KeyboardInterrupt):
        jacobian().dense(path=tmp_path / "J.npy")
    stop["stop"] = -1
    partial = tmp_path / "J.npy.partial"
    partial.write_bytes(partial.read_bytes()[: 128 + 3 * 5 * 24 * 8 + 7])
    assert torch.allclose(jacobian().dense(path=tmp_path / "J.npy"), jacobian().dense(), rtol=0, atol=1e-12)
    for left in (partial, tmp_path / "J.npy"):
        left.unlink(missing_ok=True)
    jacobian().dense(path=tmp_path / "J.npy")


def test_a_stop_before_the_last_step_costs_nothing(tmp_path, sweeps, monkeypatch):
    real = Path.replace

    def interrupted(self, target):
        if self.name == "J.npy.partial":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jacobian().dense(path=tmp_path / "J.npy")
    done = len(sweeps[0])
    assert jacobian().dense(path=tmp_path / "J.npy").shape == (24, 5, 24)
    assert len(sweeps[0]) == done


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(gate="half"), "gate"),
        (dict(position=2), "position"),
        (dict(seed=1), "weights"),
        (dict(source="resid_post.0"), "source"),
    ],
)
def test_another_map_is_refused(tmp_path, sweeps, other, said):
    jacobian().dense(path=tmp_path / "J.npy")
    done = len(sweeps[0])
    with pytest.raises(ResultError, match=rf"J\.npy is of another map \(different: {said}\): delete it"):
        jacobian(**other).dense(path=tmp_path / "J.npy")
    assert len(sweeps[0]) == done


@pytest.mark.slow
def test_altered_files_are_refused(tmp_path):
    path, beside = tmp_path / "J.npy", tmp_path / "J.npy.json"
    jacobian().dense(path=path)
    whole, record = path.read_bytes(), beside.read_text()
    for data in (whole[:-1], whole + b"x", b"x" + whole[1:]):
        path.write_bytes(data)
        with pytest.raises(ResultError, match=r"not as it was written .*delete it and J\.npy\.json"):
            jacobian().dense(path=path)
    for text in ("", "[]", "{}", record.replace("dense map 1", "dense map 9")):
        beside.write_text(text)
        with pytest.raises(ResultError, match=r"J\.npy\.json (cannot be read|has another format)"):
            jacobian().dense(path=path)
    beside.unlink()
    with pytest.raises(ResultError, match="not by loclin"):
        jacobian().dense(path=path)


def test_where_nothing_can_be_written(tmp_path, sweeps, monkeypatch):
    with pytest.raises(OutputError, match="there is no directory"):
        jacobian().dense(path=tmp_path / "none" / "J.npy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        jacobian().dense(path=tmp_path / "folder")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("loclin.results.dense_file.shutil.disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(OutputError, match=r"2\.3e-05 GB more and 1e-06 GB are free"):
        jacobian().dense(path=tmp_path / "J.npy")
    assert sweeps[0] == []
    assert not (tmp_path / "J.npy").exists()


def test_bfloat16_has_no_file(tmp_path):
    with pytest.raises(OptionError, match="NumPy has no bfloat16"):
        DenseFile(tmp_path / "J.npy", (1, 1, 1), torch.bfloat16, {})


def test_more_than_the_memory_can_be_mapped(tmp_path):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shape = (1, 1, memory // 4)  # of eight bytes each
    file = DenseFile(tmp_path / "J.npy", shape, torch.float64, {})
    with (tmp_path / "J.npy").open("wb") as sparse:
        sparse.write(file._header)
        sparse.truncate(len(file._header) + 8 * shape[2])
    file._note(1)
    mapped = file.obtain(lambda _: iter(()))
    mapped[0, 0, -1] = 1
    assert mapped.shape == shape
    assert mapped[0, 0, -2:].tolist() == [0, 1]


PROCESS = """
import sys, time
import torch
import tiny
from least import within
from loclin.network.chain import Chain
from loclin.linearization import linearize
from loclin.results import sweep_file

real, rows = Chain.backward, []

def slow(self, cotangents, *args, **kwargs):
    rows.append(len(cotangents))
    time.sleep(0.5)
    return real(self, cotangents, *args, **kwargs)

Chain.backward = slow
sweep_file.SECONDS = 0
J = within(tiny.llama(), tiny.prompt(5), 30_000, precision="double").jacobian()
print("ready", flush=True)
sys.stdin.readline()
print(sum(rows), J.dense(path=sys.argv[1]).sum().item(), sum(rows))
"""


def test_two_processes_write_once_and_agree(tmp_path):
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "J.npy")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rooms = [str(Path(loclin.__file__).parents[1]), str(Path(__file__).parents[1])]
    pipes["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(rooms)}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    shown = [process.communicate(timeout=120)[0].split() for process in both]
    assert sorted(int(words[2]) for words in shown) == [0, 24]
    assert shown[0][1] == shown[1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".J.npy.lock", "J.npy", "J.npy.json"]


@pytest.fixture
def pulls(monkeypatch):
    """The layers that are passed; after `stop` of them the user presses Ctrl-C. Every step keeps its state."""
    real, layers, stop = Chain.pull, [], {"stop": -1}

    def counted(self, block, index, *args):
        if len(layers) == stop["stop"]:
            raise KeyboardInterrupt
        layers.append(index)
        return real(self, block, index, *args)

    monkeypatch.setattr(Chain, "pull", counted)
    monkeypatch.setattr(sweep_file, "SECONDS", 0)
    return layers, stop


def stopped_in_a_sweep(path, pulls):
    """A run that ends after one chunk of rows and two of three layers; returns the layers of the whole run."""
    layers, stop = pulls
    jacobian().dense(path=path.with_name("whole.npy"))
    whole = layers.copy()
    assert whole[:6] == [2, 1, 0] * 2
    layers.clear()
    stop["stop"] = 5
    with pytest.raises(KeyboardInterrupt):
        jacobian().dense(path=path)
    stop["stop"] = -1
    assert path.with_name(f".{path.name}.sweep").stat().st_size < 30_000
    return whole


def test_a_sweep_goes_on_where_it_was(tmp_path, pulls):
    whole = stopped_in_a_sweep(tmp_path / "J.npy", pulls)
    jacobian().dense(path=tmp_path / "J.npy")
    assert pulls[0] == whole
    assert (tmp_path / "J.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not list(tmp_path.glob(".*.sweep*"))


@pytest.mark.parametrize("fault", ["bits", "cut", "longer", "empty", "other rows", "versions"])
def test_a_state_that_is_not_this_sweep_s_counts_as_none(fault, tmp_path, pulls, monkeypatch):
    whole = stopped_in_a_sweep(tmp_path / "J.npy", pulls)
    path = tmp_path / ".J.npy.sweep"
    content = bytearray(path.read_bytes())
    memory = BUDGET
    if fault == "bits":
        content[-3] ^= 1
    elif fault == "cut":
        content = content[:-1]
    elif fault == "longer":
        content += b"x"
    elif fault == "empty":
        content = b""
    elif fault == "other rows":
        memory = 2 * BUDGET
    else:
        monkeypatch.setattr(sweep_file, "versions", lambda: {"loclin": "0"})
    path.write_bytes(content)
    found = jacobian(memory=memory).dense(path=tmp_path / "J.npy")
    assert pulls[0][5:8] == [2, 1, 0]  # from the last layer on
    assert len(pulls[0]) == 5 + len(whole) - 3 or memory != BUDGET
    assert torch.allclose(found, jacobian(memory=None).dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("full", ["no room", "write"])
def test_a_state_that_cannot_be_kept_costs_a_warning(full, tmp_path, pulls, monkeypatch):
    if full == "no room":
        usage = namedtuple("usage", "total used free")
        needed = 24 * 5 * 24 * 8
        monkeypatch.setattr(sweep_file.shutil, "disk_usage", lambda _: usage(10**6, 10**6, needed + 100))
    else:
        real = Path.replace

        def refuse(self, target):
            if ".sweep" in self.name:
                raise OSError(28, "No space left on device")
            return real(self, target)

        monkeypatch.setattr(Path, "replace", refuse)
    with pytest.warns(UserWarning, match=r"not kept in .*\.J\.npy\.sweep .*No space left.*computed again") as said:
        found = jacobian().dense(path=tmp_path / "J.npy")
    assert len(said) <= len(pulls[0]) / 3  # one for each sweep
    assert torch.allclose(found, jacobian(memory=None).dense(), rtol=0, atol=1e-12)
    assert not list(tmp_path.glob(".*.sweep*"))


def test_rows_are_the_dense_map_s(sweeps):
    J, expected = jacobian(), jacobian(memory=None).dense()
    for chunk, start in ((None, 0), (7, 0), (5, 3), (100, 23), (None, 24)):
        parts = list(J.rows(chunk, start=start))
        assert [i for where, _ in parts for i in range(24)[where]] == list(range(start, 24))
        for where, part in parts:
            assert torch.allclose(part, expected[where], rtol=0, atol=1e-12)
    J.dense()
    done = len(sweeps[0])
    for where, part in J.rows(7):
        assert torch.equal(part, J.dense()[where])
    assert [len(part) for _, part in J.block(1).rows(20)] == [20, 4]
    assert len(sweeps[0]) == done


def test_rows_that_cannot_be(tmp_path):
    with pytest.raises(OptionError, match="chunk=0"):
        next(jacobian().rows(0))
    assert jacobian(memory=0).dense(path=tmp_path / "J.npy").shape == (24, 5, 24)


@pytest.mark.parametrize("token", [None, 1])
def test_norms_without_the_dense_map(sweeps, token, monkeypatch):
    monkeypatch.setattr(Chain, "column_bytes", lambda *_: 1000)  # a real column of a tiny model is as large as its map
    J, free = jacobian(memory=20_000), jacobian(memory=None)
    if token is not None:
        J, free = J.block(token), free.block(token)
    expected = free.frobenius_norm()
    sweeps[0].clear()
    assert torch.allclose(J.frobenius_norm(), expected, rtol=1e-13)
    assert len(sweeps[0]) > 1
    sweeps[0].clear()
    assert sum(len(rows) for _, rows in J.rows()) == J.shape[0]
    assert sweeps[0], "the dense map has been kept"
