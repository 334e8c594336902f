"""Tensors go into a file and come out bit for bit, and a file that is not as it was written is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from loclin.errors import OutputError, ResultError
from loclin.results.tensor_file import load_tensors, save_tensors

shared = torch.randn(4, 3)
TENSORS = {
    "bf16": torch.randn(5).bfloat16(),
    "double": torch.tensor([[1 / 3, -0.0], [float("inf"), float("nan")]], dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(3),
    "transposed": shared.T,
    "view": shared[1:],
}
ABOUT = {"text": "‹ä›\n", "number": 0.1, "nested": {"none": None, "list": [1, 2]}}


@pytest.fixture
def path(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, ABOUT)
    return tmp_path / "a.safetensors"


def test_round_trip_is_bit_for_bit(path):
    tensors, about = load_tensors(path)
    assert about == ABOUT
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (tensors[name].dtype, tensors[name].shape) == (tensor.dtype, tensor.shape)
        as_bytes = [t.contiguous().flatten().view(torch.uint8).tolist() for t in (tensors[name], tensor)]
        assert as_bytes[0] == as_bytes[1]
    beside = json.loads((path.parent / "a.safetensors.json").read_text(encoding="utf-8"))
    assert beside["nested"] == ABOUT["nested"]
    assert beside["tensors"]["transposed"] == {"shape": [3, 4], "dtype": "float32"}
    assert len(list(path.parent.iterdir())) == 2
    assert path.stat().st_mode == (path.parent / "a.safetensors.json").stat().st_mode


def test_truncated_and_altered_files_are_refused(path):
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ResultError, match="cut short"):
            load_tensors(path)
    for place in (whole.index(b"number"), len(whole) - 20):
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(ResultError, match="altered"):
            load_tensors(path)


def test_what_is_not_ours_is_refused(tmp_path):
    with pytest.raises(ResultError, match="no such file"):
        load_tensors(tmp_path / "none.safetensors")
    with pytest.raises(ResultError, match="cannot read"):
        load_tensors(tmp_path)
    other = tmp_path / "other.safetensors"
    save_file({"x": shared}, other)
    with pytest.raises(ResultError, match="loclin did not write it"):
        load_tensors(other)
    save_file({"x": shared}, other, metadata={"loclin": "99"})
    with pytest.raises(ResultError, match="format 99, not 1"):
        load_tensors(other)


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(OutputError, match=r"call it .*a\.npz\.safetensors"):
        save_tensors(tmp_path / "a.npz", TENSORS, {})
    with pytest.raises(OutputError, match="there is no directory"):
        save_tensors(tmp_path / "none" / "a.safetensors", TENSORS, {})
    (tmp_path / "a.safetensors.json").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        save_tensors(tmp_path / "a.safetensors", TENSORS, {})
    assert not (tmp_path / "a.safetensors").exists()


def test_an_interrupted_write_keeps_the_old_files(path, monkeypatch):
    before = {file: file.read_bytes() for file in path.parent.iterdir()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(path, {"x": shared}, {})
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before
