"""Small decompositions in parallel, each on one thread: a second one gains little, and every step waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from loclin.common.progress import bar

Result = TypeVar("Result")


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's operations on the calling thread only; restores the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_matrices(work: Callable[[Tensor], Result], matrices: Tensor | Sequence[Tensor]) -> list[Result]:
    """Apply a function to each of several matrices on one device; on a CPU in as many threads as torch has."""

    def collect(results: Iterator[Result]) -> list[Result]:
        return list(bar(results, desc="SVD", total=len(matrices)))

    if matrices[0].device.type != "cpu" or len(matrices) == 1 or torch.get_num_threads() == 1:
        return collect(map(work, matrices))
    workers = torch.get_num_threads()
    with single_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return collect(pool.map(work, matrices))
