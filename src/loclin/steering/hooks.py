"""Steering while a model runs: hooks on the first layer, which reads embeddings, and on the steered layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from loclin.errors import SteeringError
from loclin.models import Model
from loclin.models.forward import hidden_input, hidden_output, hooked, with_hidden_input, with_hidden_output
from loclin.network.anatomy import find_anatomy
from loclin.network.points import Point
from loclin.steering.form import Form, move_towards

_REORDERED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""The methods with which generation reorders the rows (sequences) of a cache."""
_Push = Callable[[Tensor, Tensor], Tensor]
"""From embeddings [n, d] and their positions [n] to what they add [n, d]."""


class RunningSums:
    """S_p at every column p of a batch `[B, t]`, and how many tokens of each sequence are up to p: B t d numbers."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []

    @property
    def _columns(self) -> int:
        return sum(part.shape[1] for part in self._counts)

    def fits(self, batch: int, past: int) -> bool:
        """Tell whether it holds the first `past` columns of `batch` sequences."""
        return past == 0 or (self._columns >= past and len(self._sums[0]) == batch)

    def add(
        self, x: Float[Tensor, "B n d"], real: Bool[Tensor, "B n"], push: _Push, past: int
    ) -> Float[Tensor, "B n d"]:
        """Add n new tokens after the first `past` columns, and return S at each of them."""
        if self._columns > past:  # generation has cropped the cache
            self._sums = [torch.cat(self._sums, 1)[:, :past]]
            self._counts = [torch.cat(self._counts, 1)[:, :past]]
        counts = real.long().cumsum(1)
        if past:
            counts = counts + self._counts[-1][:, -1:]
        added = push(x[real], counts[real] - 1)
        sums = added.new_zeros((*real.shape, added.shape[-1]))
        sums[real] = added
        if past:
            sums[:, 0] += self._sums[-1][:, -1]
        sums = sums.cumsum(1)
        self._sums.append(sums)
        self._counts.append(counts)
        return sums

    def move(self, rows: Tensor | int) -> None:
        """Select these rows, in this order; an int repeats every row that often."""
        for parts in (self._sums, self._counts):
            whole = torch.cat(parts, 1)
            if isinstance(rows, int):
                parts[:] = [whole.repeat_interleave(rows, dim=0)]
            else:
                parts[:] = [whole.index_select(0, rows.to(whole.device))]


@runtime_checkable
class _Pusher(Protocol):
    """The part of a steering that hooks use; see `loclin.steering.base.Steering`."""

    spare_first: bool
    accumulates: ClassVar[bool]

    def push(self, x: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d"]: ...


@dataclass
class _ForwardCall:
    """One forward pass of the model: its cache, the length of that cache, and the attention mask."""

    cache: Cache | None
    past: int
    mask: Tensor | None
    moved: Tensor | None = None
    S: Tensor | None = None
    running: RunningSums | None = None


class Hooks:
    """The hooks of one `with steering.apply(...)`.

    The sums over earlier tokens are stored with those tokens' key-value cache. So several caches, cropped caches and
    caches with reordered rows all have the right sums.
    """

    why_not_linearized = "is being steered; linearize it outside the 'with steering.apply(...)'"

    def __init__(self, steering: _Pusher, model: Model, strengths: Sequence[float], form: Form) -> None:
        self._steering = steering
        self._hf, self._parts = model.hf, find_anatomy(model.hf)
        self._strengths, self._form = list(strengths), form
        self._signature = inspect.signature(model.hf.forward)
        self._call: _ForwardCall | None = None
        self._kept: WeakKeyDictionary[Cache, RunningSums] = WeakKeyDictionary()

    @contextmanager
    def installed(self, where: Point) -> Iterator[None]:
        """Register the hooks, and remove them at the end."""
        assert where.layer is not None
        layer = self._parts.layers[where.layer]
        handles = [
            self._hf.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._parts.layers[0].register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            layer.register_forward_pre_hook(self._change_input, with_kwargs=True)
            if where.kind == "resid_pre"
            else layer.register_forward_hook(self._change_output),
            self._hf.register_forward_hook(self._end),
        ]
        with hooked(handles):
            try:
                yield
            finally:
                self._release()

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise SteeringError(
                "steering needs an attention mask of the shape [B, T], to tell padding from tokens; a static cache has "
                "another: generate with the default cache"
            )
        self._call = _ForwardCall(cache, 0 if cache is None else int(cache.get_seq_length()), mask)

    def _current_call(self) -> _ForwardCall:
        if self._call is None:
            raise SteeringError("steering needs the whole forward pass; call the model itself, not a part of it")
        return self._call

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the contributions of the new tokens' embeddings to the sums."""
        call = self._current_call()
        x = hidden_input(args, kwargs)
        real, first_ones = _find_tokens(call.mask, call.past, x)
        call.moved = real & ~first_ones if self._steering.spare_first else real
        if not self._steering.accumulates:
            flat = x.flatten(0, 1)
            index = torch.zeros(len(flat), dtype=torch.long, device=x.device)
            call.S = self._steering.push(flat, index).unflatten(0, x.shape[:2])
            return
        running = RunningSums() if call.past == 0 else self._kept.get(call.cache) if call.cache is not None else None
        if running is None or not running.fits(len(x), call.past):
            raise SteeringError(
                "the cache holds tokens that were not read inside this 'with'; begin with an empty cache inside it"
            )
        call.S = running.add(x, real, self._steering.push, call.past)
        call.running = running

    def _change_input(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return with_hidden_input(args, kwargs, self._move(hidden_input(args, kwargs)))

    def _change_output(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return with_hidden_output(output, self._move(hidden_output(output)))

    def _move(self, h: Tensor) -> Tensor:
        call = self._current_call()
        assert call.S is not None
        assert call.moved is not None
        moved = call.moved.to(h.device).unsqueeze(-1)
        S = call.S.to(h.device)
        new = torch.where(moved, move_towards(h, S, self._shape_strength(S), self._form), h)
        if not torch.isfinite(new).all() and not torch.isfinite(new.masked_fill(~moved, 0)).all():
            raise self._overflow()
        return new

    def _shape_strength(self, S: Float[Tensor, "B n d"]) -> float | Float[Tensor, "B 1 1"]:
        """Return the strength, or that of each sequence; beams and samples of one text are adjacent rows."""
        if len(self._strengths) == 1:
            return self._strengths[0]
        each, left = divmod(len(S), len(self._strengths))
        if left:
            raise SteeringError(
                f"{len(self._strengths)} strengths for a batch of {len(S)}: give one for all, or one for each text"
            )
        return S.new_tensor(self._strengths).view(-1, 1, 1).repeat_interleave(each, dim=0)

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        values = tuple(output.values()) if hasattr(output, "values") else output
        logits = getattr(output, "logits", None)
        call, self._call = self._call, None
        if logits is not None and logits[:, -1].isnan().any():
            raise self._overflow()
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is not None and call is not None and call.running is not None:
            self._keep(cache, call.running)

    def _overflow(self) -> SteeringError:
        strength = ", ".join(f"{strength:g}" for strength in self._strengths)
        return SteeringError(
            f"strength {strength} ({self._form}) makes the model's values infinite or NaN in its dtype; use a smaller "
            "strength. The model is unchanged"
        )

    def _keep(self, cache: Cache, running: RunningSums) -> None:
        """Store the sums of a cache, and reorder them with its rows; the methods are bound to it, and not to a copy."""
        if cache not in self._kept:
            for name in _REORDERED:
                setattr(cache, name, MethodType(_track_rows(name, self._kept), cache))
        self._kept[cache] = running

    def _release(self) -> None:
        for cache in list(self._kept):
            for name in _REORDERED:
                cache.__dict__.pop(name, None)
        self._kept.clear()


def _track_rows(name: str, kept: WeakKeyDictionary[Cache, RunningSums]) -> Any:
    """Wrap a cache's method that reorders its rows, so that it reorders the sums, too."""

    def move(cache: Cache, rows: Any) -> None:
        getattr(type(cache), name)(cache, rows)
        if cache in kept:
            kept[cache].move(rows)

    return move


def _find_tokens(
    mask: Tensor | None, past: int, x: Float[Tensor, "B n d"]
) -> tuple[Bool[Tensor, "B n"], Bool[Tensor, "B n"]]:
    """Find which of the new tokens are not padding, and which are the first of their texts."""
    batch, n = x.shape[:2]
    if mask is None:
        mask = torch.ones(batch, past + n, device=x.device)
    real = mask.to(x.device).bool()
    return real[:, -n:], (real & (real.cumsum(1) == 1))[:, -n:]
