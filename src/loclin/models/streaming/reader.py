"""Reads the layers of a checkpoint into memory that is used again, one layer ahead of the one in use."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from loclin.errors import BudgetError
from loclin.models.streaming.checkpoint import Bytes, Checkpoint
from loclin.models.streaming.plan import Plan, read, size_together

_SPARE = 2


class Blocks:
    """Equal blocks of memory. One is used again only when no tensor refers to it any more, not even in a graph."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: deque[Bytes] = deque()

    def take(self) -> Bytes:
        """A block that nothing else uses."""
        try:
            block = self._free.pop()
        except IndexError:
            block = torch.empty(self.size, dtype=torch.uint8, device="cpu").numpy()
        view = block[:]  # lives as long as any tensor over it
        weakref.finalize(view, _give_back, weakref.ref(self), block).atexit = False
        return view

    def give_back(self, block: Bytes) -> None:
        """Keep a block for the next to come, unless enough are kept. Takes no lock: it may run at any moment."""
        if len(self._free) < _SPARE:
            self._free.append(block)


def _give_back(blocks: weakref.ref[Blocks], block: Bytes) -> None:
    found = blocks()
    if found is not None:
        found.give_back(block)


@dataclass(frozen=True)
class _Read:
    """Some parameters of a layer, in memory or on their way."""

    layer: int
    names: frozenset[str]
    tensors: Future[dict[str, Tensor]]

    def holds(self, layer: int, names: Collection[str]) -> bool:
        return layer == self.layer and self.names.issuperset(names)


class LayerReader:
    """Gives the layers' parameters, and reads ahead the next layer in the direction of travel.

    Memory: two layers, and those that somebody still uses. `bytes_read` counts what was read from the files.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[Mapping[str, Plan]]) -> None:
        self.layers = layers
        self.bytes_read = 0
        self._checkpoint = checkpoint
        self._blocks = Blocks(max((size_together(layer.values()) for layer in layers), default=0))
        self._staging: Bytes | None = None
        self._lock = threading.Lock()
        self._reads: list[_Read] = []  # the one in use, and the one ahead
        self._last, self._step = 0, 1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loclin-layers")

    @property
    def layer_bytes(self) -> int:
        """The memory that the largest layer takes."""
        return self._blocks.size

    def get(self, layer: int, names: Collection[str]) -> dict[str, Tensor]:
        """A layer's parameters, at least those named. Cost: nothing if they were read ahead, else one read.

        They must not be written to. ModelError as for `Checkpoint.read`; BudgetError where memory has no room.
        """
        with self._lock:
            read = self._find(layer, names) or self._begin(layer, names)
            self._reads = [read, *(other for other in self._reads if other is not read and other.layer != layer)]
            try:
                found = read.tensors.result()
            except BaseException:
                self._reads = []  # an interrupted wait, or a fault: the next to come reads again
                raise
            ahead = self._next(layer)
            wanted = frozenset() if ahead is None else read.names & self.layers[ahead].keys()
            known = None if ahead is None else self._find(ahead, wanted)
            self._reads = [read] if known is None else [read, known]
            if ahead is not None and known is None:
                self._reads.append(self._begin(ahead, wanted))
            return found

    def forget(self) -> None:
        """Let go of the layers that were read last."""
        with self._lock:
            self._reads = []

    def _find(self, layer: int, names: Collection[str]) -> _Read | None:
        return next((read for read in self._reads if read.holds(layer, names)), None)

    def _begin(self, layer: int, names: Collection[str]) -> _Read:
        return _Read(layer, frozenset(names), self._thread.submit(self._read, layer, frozenset(names)))

    def _next(self, layer: int) -> int | None:
        """The layer to read ahead: at either end it is not known where the next sweep begins."""
        step, self._last = layer - self._last, layer
        if abs(step) == 1:
            self._step = step
        elif step:
            self._step = 1 if layer < len(self.layers) / 2 else -1
        ahead = layer + self._step
        return ahead if 0 <= ahead < len(self.layers) else None

    def _read(self, layer: int, names: frozenset[str]) -> dict[str, Tensor]:
        plans = {name: plan for name, plan in self.layers[layer].items() if name in names}
        try:
            return self._fill(plans)
        except (MemoryError, RuntimeError) as fault:
            if isinstance(fault, RuntimeError) and "memory" not in str(fault):
                raise
            raise BudgetError(
                f"there is no memory for a layer: streaming needs at least {2 * self.layer_bytes / 1e9:.2g} GB for two "
                "layers, beside the embeddings and the sweep; free some"
            ) from fault

    def _fill(self, plans: Mapping[str, Plan]) -> dict[str, Tensor]:
        whole, found, end = torch.from_numpy(self._blocks.take()), dict[str, Tensor](), 0
        for name, plan in plans.items():
            start = plan.place(end)
            end = start + plan.nbytes
            found[name] = whole[start:end].view(plan.dtype).view(plan.shape)
        read(self._checkpoint, [(plan, found[name]) for name, plan in plans.items()], self._stage)
        self.bytes_read += sum(plan.stored_bytes for plan in plans.values())
        return found

    def _stage(self, size: int) -> Bytes:
        """Memory for what is not stored as it is used; only the reading thread uses it."""
        if self._staging is None:
            most = max(sum(plan.staged_bytes for plan in layer.values()) for layer in self.layers)
            self._staging = torch.empty(most, dtype=torch.uint8, device="cpu").numpy()
        return self._staging[:size]
