"""Budgets are read as written, and nonsense is refused."""

from __future__ import annotations

import pytest
import torch

from loclin.errors import OptionError
from loclin.network.memory import available, budget, parse_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [("2GB", 2_000_000_000), ("512 MiB", 512 * 2**20), ("1.5k", 1500), ("77", 77), (77, 77), ("0.5GiB", 2**29)],
)
def test_sizes(written, bytes_):
    assert parse_memory(written) == bytes_
    assert budget(written, CPU) == bytes_


def test_fractions_are_of_what_is_free():
    assert budget(0.5, CPU) == pytest.approx(available(CPU) / 2, rel=0.2)
    assert 0 < budget(None, CPU) <= 4 * 2**30


@pytest.mark.parametrize("written", ["lots", "2 bananas", "-1", 0, -5, 1.5, "0", ""])
def test_nonsense_is_refused(written):
    with pytest.raises(OptionError, match="memory="):
        parse_memory(written)
