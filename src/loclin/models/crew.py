"""Devices that share the work of each layer: one thread for each, which has a copy of the layer's weights.

The units of work do not depend on how many devices there are, and so neither do the bits of what they give. A layer
lives on one device; the others copy its weights when they first use it, and keep the copy while they have room. So a
model need not fit each device: layers that a device has no room for are copied again in every sweep.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import torch
from torch import nn

from loclin.common.free_memory import available
from loclin.common.surroundings import plain_torch
from loclin.errors import ModelError, first_line
from loclin.models.replica import copy_weights, exclusive, replicate
from loclin.models.snapshot import Snapshot

_RESERVE = 4 * 2**30
"""Bytes that kept copies leave free on a device: the largest default budget of a sweep."""

Made = TypeVar("Made")
Unit = TypeVar("Unit")


class Crew:
    """Some devices; a worker is the place of one among them."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._copies: list[dict[str, tuple[list[nn.Parameter], Snapshot, nn.Module]]] = [{} for _ in self.devices]
        self._streams: dict[tuple[int, torch.device], torch.cuda.Stream] = {}

    def home(self, layer: nn.Module) -> int:
        """The worker on whose device a layer lives; ModelError where the model was moved to another one."""
        device = next((weight.device for weight in layer.parameters()), self.devices[0])
        if device not in self.devices:
            raise ModelError(f"the model was moved to {device}, which is not among its devices; load or wrap it again")
        return self.devices.index(device)

    def layer(self, worker: int, layer: nn.Module, name: str) -> nn.Module:
        """A layer with a copy of its weights on a worker's device. Cost: the copy, unless it was kept."""
        device, weights = self.devices[worker], list(layer.parameters())
        known = self._copies[worker].pop(name, None)
        if known is None or not _same(weights, known[0]) or known[1].changed(layer):
            with exclusive(layer):  # or the copy would have the hooks of another thread that runs the layer
                made = replicate(layer)
            _remove_hooks(made)
            copy_weights(made, device)
            known = (weights, Snapshot(layer), made)
        if available(device) >= _RESERVE:
            self._copies[worker][name] = known
        return known[2]

    def deal(
        self, make: Callable[[int], Made], work: Callable[[Made, Unit], object], units: Sequence[Unit], home: int
    ) -> None:
        """Do the work of each unit, dealt out in turn: `home` begins, and does a single unit in the calling thread.

        A worker needs what `make` gives for it. The units must not depend on each other. Where a worker fails, or the
        call is interrupted, every worker ends with its unit. ModelError, which names the device, where one fails.
        """
        if len(units) < 2:
            made = make(home)
            for unit in units:
                work(made, unit)
            return
        workers = [(home + i) % len(self.devices) for i in range(min(len(self.devices), len(units)))]
        queued, stop = self._current_streams(), threading.Event()

        def run(worker: int, own: Sequence[Unit]) -> None:
            try:
                with plain_torch():
                    self._enter(worker, queued)
                    try:
                        made = make(worker)
                        for unit in own:
                            if stop.is_set():
                                return
                            work(made, unit)
                    finally:
                        self._leave(worker, queued)
            except RuntimeError as fault:
                raise ModelError(
                    f"device {self.devices[worker]} failed: {first_line(fault)}; leave it out of devices=, or give it "
                    "less to do at a time with memory="
                ) from fault

        with ThreadPoolExecutor(len(workers), "loclin") as pool:
            try:
                running = [pool.submit(run, worker, units[i :: len(workers)]) for i, worker in enumerate(workers)]
                for done in as_completed(running):
                    done.result()
            finally:
                stop.set()

    def _current_streams(self) -> dict[torch.device, torch.cuda.Stream]:
        """The queues of the calling thread."""
        return {device: torch.cuda.current_stream(device) for device in self.devices if device.type == "cuda"}

    def _enter(self, worker: int, queued: dict[torch.device, torch.cuda.Stream]) -> None:
        """Give the thread of a worker queues of its own, which begin behind what has been queued.

        In one queue for all workers, each copy between devices would wait for the other worker's products.
        """
        for device, before in queued.items():
            if (worker, device) not in self._streams:
                self._streams[worker, device] = torch.cuda.Stream(device)
            self._streams[worker, device].wait_stream(before)
            torch.cuda.set_stream(self._streams[worker, device])
        if queued:
            torch.cuda.set_device(self.devices[worker])

    def _leave(self, worker: int, queued: dict[torch.device, torch.cuda.Stream]) -> None:
        """Let what is queued later begin behind the worker's products."""
        for device, before in queued.items():
            before.wait_stream(self._streams[worker, device])


def _same(weights: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> bool:
    return len(weights) == len(others) and all(a is b for a, b in zip(weights, others, strict=True))


def _remove_hooks(layer: nn.Module) -> None:
    """Take away what moves a layer's inputs to the device where it lives."""
    if any(hasattr(module, "_hf_hook") for module in layer.modules()):
        hooks: Any = importlib.import_module("accelerate.hooks")
        hooks.remove_hook_from_module(layer, recurse=True)
