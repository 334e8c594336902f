"""Small decompositions, each on a thread of its own.

Inside one, a second thread gains little, and has to be waited for at every step: on a machine that does something else
as well, ten times as long. Several maps at a time are as fast and do not mind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

Result = TypeVar("Result")


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch's own operations on the calling thread alone; puts the number of threads back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def each(work: Callable[[Tensor], Result], matrices: Tensor | Sequence[Tensor], name: str = "SVD") -> list[Result]:
    """Do something with each of several matrices, on a CPU as many at a time as torch has threads.

    Parameters
    ----------
    work
        From one matrix to anything; called from several threads.
    matrices
        `[M, n, m]`, or several of any shapes on one device.
    name
        Of the bar that shows progress on a terminal after two seconds.
    """

    def bar(results: Iterator[Result]) -> list[Result]:
        return list(tqdm(results, desc=name, total=len(matrices), delay=2, leave=False, disable=None))

    if matrices[0].device.type != "cpu" or len(matrices) == 1:
        return bar(map(work, matrices))
    workers = torch.get_num_threads()
    with single_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return bar(pool.map(work, matrices))
