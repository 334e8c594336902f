"""Small decompositions run one to a thread, and the number of threads is put back."""

from __future__ import annotations

import threading

import pytest
import torch

from loclin.spectral.threads import map_matrices, single_thread


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_is_put_back():
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ZeroDivisionError), single_thread():
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == 2


def test_results_come_in_order_from_single_threads():
    inside = []

    def work(matrix):
        inside.append((torch.get_num_threads(), threading.current_thread() is threading.main_thread()))
        return matrix.sum()

    matrices = torch.arange(24.0).view(6, 2, 2)
    assert torch.equal(torch.stack(map_matrices(work, matrices)), matrices.sum((1, 2)))
    assert set(inside) == {(1, False)}
    assert torch.get_num_threads() == 2


def test_what_fails_says_so():
    with pytest.raises(ZeroDivisionError):
        map_matrices(lambda _matrix: 1 / 0, torch.zeros(3, 2, 2))
    assert torch.get_num_threads() == 2
