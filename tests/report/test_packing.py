"""Arrays for a page: what is rounded adds up, and what is packed comes back."""

from __future__ import annotations

import base64
import gzip

import numpy as np
import pytest

from loclin.report.packing import find_step, pack, round_sums, round_to

RANDOM = np.random.default_rng(0)


def test_sums_over_rectangles_are_two_steps_off_at_most():
    values = RANDOM.normal(size=(40, 30, 70)) * RANDOM.lognormal(0, 3, size=(40, 30, 1))
    rounded = round_sums(values, 0.25) * 0.25
    for a, b, c, d in ((0, 40, 0, 30), (3, 4, 0, 30), (0, 40, 7, 8), (5, 29, 11, 20), (9, 10, 9, 10)):
        off = np.abs((rounded - values)[a:b, c:d].sum((0, 1)))
        assert off.max() <= 2 * 0.25 + 1e-9
    plain = np.abs((round_to(values, 0.25) * 0.25 - values).sum((0, 1))).max()
    assert plain > 1, "rounded one by one, errors add up"


@pytest.mark.parametrize("size", [5, 300, 2**20])
def test_packed_arrays_come_back(size):
    arrays = {"one": RANDOM.integers(-size, size, (3, 4, 5)), "none": np.zeros((0, 2), dtype=np.int64)}
    about, text = pack(arrays)
    planes = np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype=np.uint8)
    for name, values in arrays.items():
        at, width, count = about[name]["at"], about[name]["size"], values.size
        given = (planes[at : at + count * width].reshape(width, count).T.astype(int) << 8 * np.arange(width)).sum(1)
        given = np.where(given % 2, -(given + 1) // 2, given // 2)
        assert given.reshape(about[name]["shape"]).tolist() == values.tolist()
    assert about["one"]["size"] == {5: 1, 300: 2, 2**20: 3}[size]


def test_the_step_is_as_large_as_its_miss_allows():
    step = find_step(100.0, lambda step: 10 * step)
    assert 0.05 < step <= 0.1
    assert find_step(1.0, lambda _: 0.0) == 1 / 127
