"""The products of the exact linear map between two named points: sweeps through the layers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.free_memory import available
from loclin.common.progress import bar
from loclin.common.surroundings import in_plain_torch
from loclin.common.unpicklable import Unpicklable
from loclin.common.vectors import is_block, vectors
from loclin.errors import BudgetError, OptionError
from loclin.models.hashing import weights_hash
from loclin.network import memory
from loclin.network.chain import Chain
from loclin.network.ends import OutputHeadLink
from loclin.network.memory import Allowance
from loclin.network.points import Point, Span
from loclin.results.dense_file import DenseFile
from loclin.results.provenance import Provenance
from loclin.results.spill import SpilledMap
from loclin.results.sweep_file import SweepFile

M = TypeVar("M", bound="Products")

_DECOMPOSED = 10  # one token's map in LAPACK, in two threads, or in the widest dtype


@dataclass(frozen=True)
class Transposed:
    """The transpose of a map: `J.T @ u`."""

    T: Products

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, d_in, d_out)."""
        d_out, length, d_in = self.T.shape
        return length, d_in, d_out

    def __matmul__(self, u: Any) -> Float[Tensor, "*n T d_in"]:
        """`rmatmat` of `[n, d_out]`, `rmatvec` of `[d_out]`."""
        return self.T.rmatmat(u) if is_block(u, 2) else self.T.rmatvec(u)


class Products(Unpicklable):
    """A `loclin.LinearMap` without its spectra: products, rows, the dense form and the bias."""

    instead = "save what you compute from it (J.svd().save(path), J.dense(path)), or linearize the prompt again there"

    def __init__(
        self,
        chain: Chain,
        source: Point,
        target: Point,
        position: int,
        *,
        normed: bool = False,
        budget: Allowance | memory.Budget = None,
        parent: Products | None = None,
        token: int | None = None,
    ) -> None:
        chain.check(source, target)
        if normed and target.kind in ("final", "logits"):
            raise OptionError(f"normed=True adds the final norm, which {target} includes already: leave it out")
        self.chain, self._parent = chain, parent
        self._budget = memory.as_allowance(budget, chain.trace.layers[0].hidden.device)
        self.source, self.target, self.position, self.normed = self._span = Span(source, target, position, normed)
        self.positions = list(range(chain.trace.length)) if token is None else [token]
        self._dense: Tensor | None = None
        self._spilled: SpilledMap | None = None
        self._dense_bytes = self.shape[0] * chain.trace.length * self.shape[2] * self.dtype.itemsize
        self.certificate: dict[str, Any] | None = None
        self.warnings: list[str] = [] if parent is None else parent.warnings

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        return self.chain.width(self.target, self.normed), len(self.positions), self.chain.trace.width

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products and of the dense map."""
        return self.chain.trace.dtype

    @property
    def device(self) -> torch.device:
        """Where the dense map and the products' results live."""
        return self.chain.trace.layers[0].hidden.device

    @property
    @in_plain_torch
    def input(self) -> Float[Tensor, "T d_in"]:
        """x, the source's value at the prompt, on which J acts."""
        return self.chain.trace.value(self.source).to(self.device)[self.positions]

    @property
    @in_plain_torch
    def value(self) -> Float[Tensor, " d_out"]:
        """y, the frozen network's own value at the target; J x + b equals it."""
        trace = self.chain.trace
        if self.target.kind == "logits":
            return trace.logits(self.position).to(self.device)
        if self.normed:
            return self.chain.norm(self.target, self.position).value().to(self.device)
        return trace.value(self.target)[self.position].to(self.device)

    @in_plain_torch
    def matvec(self, X: Any) -> Float[Tensor, " d_out"]:
        """J applied to one vector per token, a tensor or an array. Cost: one column."""
        _, length, d_in = self.shape
        return self._push(vectors("X", X, T=length, d_in=d_in).unsqueeze(0))[0]

    @in_plain_torch
    def rmatvec(self, u: Any) -> Float[Tensor, "T d_in"]:
        """The transpose of J applied to an output vector, a tensor or an array. Cost: one column."""
        return self._pull(vectors("u", u, d_out=self.shape[0]).unsqueeze(0))[0]

    @in_plain_torch
    def matmat(self, Xs: Any) -> Float[Tensor, "n d_out"]:
        """J applied to n blocks of vectors `[n, T, d_in]`. Cost: n columns."""
        _, length, d_in = self.shape
        return self._push(vectors("X", Xs, n=None, T=length, d_in=d_in))

    @in_plain_torch
    def rmatmat(self, Us: Any) -> Float[Tensor, "n T d_in"]:
        """The transpose of J applied to n output vectors `[n, d_out]`. Cost: n columns."""
        return self._pull(vectors("u", Us, n=None, d_out=self.shape[0]))

    def __matmul__(self, X: Any) -> Float[Tensor, "*n d_out"]:
        """J @ X: `matmat` of `[n, T, d_in]`, `matvec` of `[T, d_in]`."""
        return self.matmat(X) if is_block(X, 3) else self.matvec(X)

    @property
    def T(self) -> Transposed:
        """The transpose, for `J.T @ u`."""
        return Transposed(self)

    @in_plain_torch
    def dense(self, path: str | os.PathLike[str] | None = None) -> Float[Tensor, "d_out T d_in"]:
        """All of J, kept for later calls.

        Cost: d columns backward (for the logits: those of `final`, then one product with the head). Memory: J, and
        the budget; BudgetError where J is larger than the free memory.

        With a `path`, a `.npy` file holds J instead of the memory, which then needs the budget only; BudgetError where
        that is too small for one row. The file is written in chunks of rows (see `rows`). Rows that are in it already
        are not computed again: an interrupted run is resumed, and a finished file is only opened. A sweep that takes
        minutes keeps its state in a hidden file beside it, and goes on from there. `PATH.json` says
        which map it is. The returned tensor is on the CPU and reads the file; writing to it does not change the file.
        Cost, also to open: one read of the model's weights, by which the file identifies its map. OutputError where
        the file cannot be written, or the disk has no room; ResultError where it is of another map, or was altered.
        """
        if path is not None:
            key = self.provenance().key() | {"weights": weights_hash(self.chain.trace.model.hf)}
            file = DenseFile(path, self.shape, self.dtype, key)
            in_file = file.obtain(lambda start: self._rows(None, start, file.sweep))
            if self._parent is None and self.device.type == "cpu":
                self._dense = in_file
            return in_file
        if self._parent is not None:
            return self._parent.dense()[:, self.positions]
        if self._dense is None:
            d_out, length, d_in = self.shape
            if self._dense_bytes > available(self.device):
                raise BudgetError(
                    f"the dense map {self.source} -> {self.target} takes {self._dense_bytes / 1e9:.1f} GB, more than "
                    "is free; use dense(path=...), or rows()"
                )
            if self.target.kind == "logits":
                columns = OutputHeadLink(self.chain.trace, self.position).jvp(self._to_final().dense().flatten(1).T)
                self._dense = columns.T.reshape(d_out, length, d_in).to(self.device)
            else:
                self._dense = self.rmatmat(torch.eye(d_out, dtype=self.dtype, device=self.device))
        return self._dense

    def rows(self, chunk: int | None = None, start: int = 0) -> Iterator[tuple[slice, Float[Tensor, "n T d_in"]]]:
        """J in chunks of rows, from row `start` on, for sums over J that need not hold it: (which rows, these rows).

        A `chunk` is as many rows as the budget allows by default. OptionError for a `chunk` below 1.

        Cost: d columns in all, and one sweep's fixed cost for each chunk. Memory: two chunks and a sweep, within the
        budget. Free once J is dense.
        """
        return self._rows(chunk, start)

    @in_plain_torch
    def _rows(
        self, chunk: int | None, start: int, keep: Callable[[slice], SweepFile] | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """`rows`, whose sweeps keep their state where `keep` says."""
        if chunk is not None and chunk < 1:
            raise OptionError(f"chunk={chunk}: give at least one row, or None for what the budget allows")
        most, sweep = self._chunking()
        chunk = chunk or most
        rows = self._row_source(sweep, keep)
        for first in range(start, self.shape[0], chunk):
            where = slice(first, min(first + chunk, self.shape[0]))
            yield where, rows(where)

    @in_plain_torch
    def _row_source(self, budget: int, keep: Callable[[slice], SweepFile] | None = None) -> Callable[[slice], Tensor]:
        """A function that makes rows: from the dense map, from the head times that of `final`, or by a sweep."""
        d_out, length, d_in = self.shape
        dense = self.cached_dense
        if dense is not None:
            return lambda where: dense[where]
        if self.target.kind == "logits" and self._to_final().fits_in_budget:
            final = self._to_final().dense()[:, self.positions].flatten(1)
            basis = torch.eye(len(final), dtype=self.dtype, device=self.device)
            head = OutputHeadLink(self.chain.trace, self.position).jvp(basis).T.to(self.device)

            @in_plain_torch
            def multiply(where: slice) -> Tensor:
                return (head[where] @ final).reshape(-1, length, d_in)

            return multiply

        def sweep_rows(where: slice) -> Tensor:
            unit = torch.zeros(where.stop - where.start, d_out, dtype=self.dtype, device=self.device)
            unit[:, where].fill_diagonal_(1)
            return self._pull(unit, budget, progress=False, kept=None if keep is None else keep(where))

        return sweep_rows

    @in_plain_torch
    def by_token(self) -> Iterator[tuple[slice, Float[Tensor, "d_out g d_in"]]]:
        """The dense map in groups of tokens, for what is done with each token's map: (which tokens, their maps).

        All at once, and kept, where J fits the budget; else as many tokens as do, from a temporary file. Cost: d
        columns once. BudgetError where one token's map does not fit; OutputError where the disk has no room.
        """
        if self.fits_in_budget:
            yield slice(0, len(self.positions)), self.dense()
            return
        d_out, length, d_in = self.shape
        one, spare = d_out * d_in * self.dtype.itemsize, self._budget.spare
        least = min((_DECOMPOSED + 2) * one, self._decomposed_bytes)
        self._budget.require(f"the map {self.source} -> {self.target} of each token", least)
        if self._spilled is None:
            self._spilled = SpilledMap(self.shape, self.dtype, (rows for _, rows in self.rows()))
        size = (spare - _DECOMPOSED * one) // (2 * one)
        for start in range(0, length, size):
            tokens = slice(start, min(start + size, length))
            yield tokens, self._spilled.read(tokens).to(self.device)

    def _chunking(self) -> tuple[int, int]:
        """(rows at a time, bytes for the sweep inside), so that two chunks and the sweep fit `total`; one at least."""
        total, per_column = self._budget.spare, self.chain.column_bytes(self.target)
        per_row = 2 * (self.chain.trace.length * self.shape[2] + self.shape[0]) * self.dtype.itemsize
        if self.cached_dense is not None:
            return max(total // per_row, 1), 0
        sweep = min(self.chain.chunk(self.shape[0], self.shape[0]) * per_column, total // 2)
        return max(1, (total - sweep) // per_row), sweep

    def _to_final(self) -> Products:
        """The map from all tokens to `final`; the head times it is the map to the logits."""
        return Products(self.chain, self.source, Point("final"), self.position, budget=self._budget)

    @in_plain_torch
    def reconstruct(self) -> Float[Tensor, " d_out"]:
        """J x + b at the prompt's own x, which equals `value`. Cost: one column; free once the map is dense."""
        if self._dense is None:
            return self.matvec(self.input) + self.bias
        return torch.einsum("oti,ti->o", self._dense, self.input) + self.bias

    def block(self: M, i: int) -> M:
        """Token i's map J_i, a `LinearMap` with T = 1 whose `bias` has the other tokens; PromptError without one."""
        ends = (self.chain, self.source, self.target, self.position)
        parent, token = self._parent or self, self.chain.trace.position(i)
        return type(self)(*ends, normed=self.normed, budget=self._budget, parent=parent, token=token)

    @cached_property
    @in_plain_torch
    def bias(self) -> Float[Tensor, " d_out"]:
        """b, computed from what does not come from the source's tokens and never as y - J x. Cost: one column.

        Biases behind the source; for `attn_out` and `mlp_out` also the rest of the residual stream; for one token's
        block also the other tokens.
        """
        if self._parent is None:
            return self.chain.constants(self._span)["sum"].to(self.device)
        others = self._parent.input.clone()
        others[self.positions] = 0
        return self._parent.bias + self._parent.matvec(others)

    @in_plain_torch
    def bias_by_source(self) -> dict[str, Float[Tensor, " d_out"]]:
        """What each bias or constant adds to `bias`, by its path. Cost: one column each."""
        return self.chain.constants(self._span, by_source=True)

    @property
    def cached_dense(self) -> Tensor | None:
        """The dense map, if it has been made already."""
        if self._parent is not None:
            return None if self._parent.cached_dense is None else self._parent.cached_dense[:, self.positions]
        return self._dense

    @property
    def fits_in_budget(self) -> bool:
        """Whether the dense map and what is made of it are within the budget, or it has been made already."""
        return self.cached_dense is not None or self._decomposed_bytes <= self._budget.spare

    @property
    def _decomposed_bytes(self) -> int:
        """The dense map, and what a decomposition of it makes."""
        d_out, _, d_in = self.shape
        return self._dense_bytes * 3 // 2 + _DECOMPOSED * d_out * d_in * self.dtype.itemsize

    def fits(self, nbytes: float) -> bool:
        """Whether so many bytes are within the budget, beside a sweep."""
        return nbytes <= self._budget.spare

    def provenance(self) -> Provenance:
        """Which map this is, for what is computed from it."""
        trace, options = self.chain.trace, self.chain.options
        return Provenance.of(
            trace.model,
            trace.input_ids[0].tolist(),
            gate="ordinary" if options.ordinary else options.gate,
            precision=self.chain.precision,
            dtype=trace.dtype,
            source=str(self.source),
            target=str(self.target),
            position=self.position,
            normed=self.normed,
            positions=self.positions,
            certificate=(self._parent or self).certificate,
            split=trace.split.note,
        )

    def _push(self, Xs: Tensor) -> Tensor:
        Xs = Xs.to(self.device, self.dtype)
        if self._parent is not None:
            all_tokens = Xs.new_zeros((len(Xs), self.chain.trace.length, Xs.shape[-1]))
            all_tokens[:, self.positions] = Xs
            Xs = all_tokens
        return self._sweep(self.chain.forward, Xs)

    def _pull(
        self, Us: Tensor, budget: int | None = None, progress: bool = True, kept: SweepFile | None = None
    ) -> Tensor:
        sweep = partial(self.chain.backward, kept=kept)
        pulled = self._sweep(sweep, Us.to(self.device, self.dtype), budget, progress)
        return pulled if self._parent is None else pulled[:, self.positions]

    @in_plain_torch
    def _sweep(
        self, sweep: Callable[..., Iterator[Tensor]], block: Tensor, budget: int | None = None, progress: bool = True
    ) -> Tensor:
        """Push or pull a block of columns in chunks that fit the budget (the map's own by default)."""
        per_column = self.chain.column_bytes(self.target)
        room = (self._budget.spare if budget is None else budget) // per_column
        chunk = self.chain.chunk(len(block), max(1, room))
        total = len(block) * (1 + len(self.chain.steps(self.source, self.target)))
        with bar(total=total, desc="exact map", unit="col", unit_scale=True, shown=progress) as progress_bar:
            for swept in sweep(block, self._span, chunk):
                progress_bar.update(len(block))
                last = swept
        return last.to(self.device)
