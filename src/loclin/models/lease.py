"""Weights that stay on disk until their layer is used: `weights_of` binds them to the layer, and unbinds them again."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_HELD = "_loclin_on_disk"


class OnDisk(nn.Parameter):
    """The place of a weight that is not in memory: its shape and dtype, on the meta device."""


@runtime_checkable
class Reader(Protocol):
    """Reads a layer's parameters."""

    @property
    def layer_bytes(self) -> int:
        """The memory that the largest layer takes."""
        ...

    def get(self, layer: int, names: Collection[str]) -> dict[str, Tensor]:
        """At least the named parameters of a layer; nobody writes to them."""
        ...


class LayerOnDisk:
    """One decoder layer whose parameters are on disk; replicas of the layer share it."""

    def __init__(self, reader: Reader, index: int, places: dict[str, OnDisk]) -> None:
        self.reader, self.index, self.places = reader, index, places
        self._lock = threading.Lock()
        self._uses: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()

    def __deepcopy__(self, _memo: Any) -> LayerOnDisk:
        return self  # the files are the same

    def bind(self, layer: nn.Module, names: Iterable[str]) -> None:
        """Give a layer its weights, unless it has them already. Cost: a read, unless it was done ahead."""
        with self._lock:
            uses = self._uses.setdefault(layer, Counter())
            known: list[str] = []
            missing: list[str] = []
            for name in names:
                (known if uses[name] else missing).append(name)
            uses.update(known)
        try:
            tensors = self.reader.get(self.index, missing) if missing else {}
        except BaseException:
            self.unbind(layer, known)
            raise
        with self._lock:
            for name in missing:
                if not uses[name]:
                    _put(layer, name, nn.Parameter(tensors[name], requires_grad=False))
            uses.update(missing)

    def unbind(self, layer: nn.Module, names: Iterable[str]) -> None:
        """Take those weights away that nothing else uses."""
        with self._lock:
            uses = self._uses[layer]
            for name in names:
                uses[name] -= 1
                if not uses[name]:
                    _put(layer, name, self.places[name])

    def empty(self, layer: nn.Module) -> None:
        """Take all weights away from a new copy of the layer, which it was given if the layer was in use."""
        for name, place in self.places.items():
            _put(layer, name, place)


def attach(layer: nn.Module, held: LayerOnDisk) -> None:
    """Let a layer read its weights whenever it runs."""
    setattr(layer, _HELD, held)
    held.empty(layer)
    forward = functools.partial(_run, layer, layer.forward)
    layer.forward = functools.update_wrapper(forward, layer.forward)


def on_disk(module: nn.Module) -> LayerOnDisk | None:
    """What a layer's weights are read with; None for any other module."""
    found: LayerOnDisk | None = vars(module).get(_HELD)
    return found


def layers_on_disk(root: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model whose weights are on disk, by their paths; none for an ordinary model."""
    return {path: module for path, module in root.named_modules() if on_disk(module) is not None}


def largest_layer_bytes(root: nn.Module) -> int:
    """The memory that the largest layer takes whose weights are on disk; 0 for an ordinary model."""
    found = (on_disk(layer) for layer in layers_on_disk(root).values())
    return max((held.reader.layer_bytes for held in found if held is not None), default=0)


def empty_layers(root: nn.Module) -> None:
    """Take the weights away from the layers of a new replica; those of the model that it was made from stay."""
    for layer in layers_on_disk(root).values():
        held = on_disk(layer)
        assert held is not None
        held.empty(layer)


@contextmanager
def weights_of(module: nn.Module, paths: Iterable[str] | None = None) -> Iterator[None]:
    """Have a layer's weights in memory inside a `with`, or only those of the modules at some `paths` from the layer.

    Tensors and graphs that were made inside keep their memory for as long as they live. For a module whose weights are
    not on disk this does nothing. Cost: a read of the weights, unless they were used last or read ahead.
    """
    held = on_disk(module)
    if held is None:
        yield
        return
    wanted = None if paths is None else tuple(f"{path}." for path in paths)
    names = [name for name in held.places if wanted is None or name.startswith(wanted)]
    held.bind(module, names)
    try:
        yield
    finally:
        held.unbind(module, names)


def named_weights(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """`named_parameters`, with the weights of layers on disk read as they come. Cost: one read of those."""
    layers = layers_on_disk(root)
    for name, weight in list(root.named_parameters()):
        path = next((path for path in layers if name.startswith(f"{path}.")), None)
        if path is None:
            yield name, weight
            continue
        with weights_of(layers[path]):
            yield name, layers[path].get_parameter(name[len(path) + 1 :])


@contextmanager
def graph_without_weights(root: nn.Module) -> Iterator[None]:
    """Let graphs that are built inside read the weights of layers on disk again where they need them, and hold none.

    A graph of the whole model would hold all layers otherwise. What was computed from a weight, such as a copy in
    another dtype, is held. For an ordinary model this does nothing.
    """
    layers = layers_on_disk(root).values()
    if not layers:
        yield
        return
    used: dict[LayerOnDisk, set[str]] = {}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        for layer in layers:
            held = on_disk(layer)
            assert held is not None
            for name in held.places:
                weight = layer.get_parameter(name)
                if weight.is_meta:
                    break  # a layer that runs has all of its weights
                again = _view_again(weight, tensor)
                if again is not None:
                    used.setdefault(held, set()).add(name)
                    return functools.partial(_read_again, held, name, used[held], again)
        return tensor

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _read_again(held: LayerOnDisk, name: str, names: Collection[str], again: Callable[[Tensor], Tensor]) -> Tensor:
    """Read a weight again, with all weights of its layer that the graph needs."""
    return again(held.reader.get(held.index, names)[name])


def _view_again(weight: Tensor, tensor: Tensor) -> Callable[[Tensor], Tensor] | None:
    """How to take a view from a weight that is read again; None unless the tensor is a view of the weight."""
    begin, dtype = tensor.storage_offset() - weight.storage_offset(), tensor.dtype
    same = weight.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() and weight.dtype == dtype
    if not same or not 0 <= begin < weight.numel():
        return None
    size, stride = tensor.size(), tensor.stride()
    return lambda again: again.as_strided(size, stride, again.storage_offset() + begin)


def _run(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with weights_of(layer):
        return forward(*args, **kwargs)


def _put(layer: nn.Module, name: str, weight: nn.Parameter) -> None:
    path, _, own = name.rpartition(".")
    layer.get_submodule(path)._parameters[own] = weight
