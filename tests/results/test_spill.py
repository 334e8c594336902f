"""Maps that memory has no room for: what is written by rows is read back by tokens, and a full disk is named."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple

import pytest
import torch

from loclin.errors import OutputError
from loclin.results.spill import SpilledMap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_in_are_tokens_out(dtype):
    J = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    spilled = SpilledMap((7, 5, 3), dtype, (J[:4], J[4:5], J[5:]))
    for tokens in (slice(0, 5), slice(0, 1), slice(2, 4), slice(4, 5)):
        assert torch.equal(spilled.read(tokens), J[:, tokens])


def test_a_full_disk_is_named_before_anything_is_made(monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage(10, 10, 0))

    def rows():
        raise AssertionError("a row was made")
        yield

    with pytest.raises(OutputError, match="TMPDIR"):
        SpilledMap((7, 5, 3), torch.float32, rows())


def test_a_disk_that_fills_up_is_named(monkeypatch):
    class Full:
        def write(self, _data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr("loclin.results.spill.tempfile.TemporaryFile", lambda **_options: Full())
    with pytest.raises(OutputError, match="No space left on device"):
        SpilledMap((1, 1, 1), torch.float32, [torch.zeros(1, 1, 1)])


def test_a_file_that_was_cut_short_is_not_read():
    spilled = SpilledMap((2, 2, 2), torch.float32, [torch.zeros(2, 2, 2)])
    os.ftruncate(spilled._file.fileno(), 5)
    with pytest.raises(OutputError, match="cut short"):
        spilled.read(slice(0, 2))
