"""The operator people hold: the exact linear map between two named points. Dense only when asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loclin.common.surroundings import in_plain_torch
from loclin.common.vectors import is_block, vectors
from loclin.errors import BudgetError, MissingExtraError, OptionError
from loclin.maps.spectra import Spectra
from loclin.models.hashing import weights_hash
from loclin.network import memory
from loclin.network.chain import Chain
from loclin.network.link import HeadLink
from loclin.network.points import Point
from loclin.results.dense_file import DenseFile
from loclin.results.result import Provenance, versions
from loclin.spectral import wide

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Transposed:
    """The transpose of a map: `J.T @ u`."""

    T: LinearMap

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, d_in, d_out)."""
        d_out, length, d_in = self.T.shape
        return length, d_in, d_out

    def __matmul__(self, u: Any) -> Float[Tensor, "*n T d_in"]:
        """`rmatmat` of `[n, d_out]`, `rmatvec` of `[d_out]`."""
        return self.T.rmatmat(u) if is_block(u, 2) else self.T.rmatvec(u)


class LinearMap(Spectra):
    """The map J of y = sum_i J_i x_i + b, from all tokens at `source` to one position at `target` (paper, equation 2).

    Made by `Linearization.jacobian`. `T` is the number of source tokens, `d_in` and `d_out` the widths of the points.
    Products cost columns (see `loclin.network.chain`); the dense map is kept once it has been made.

    Attributes
    ----------
    source, target
        The points, as `Point`.
    position
        The target's position, from the front.
    tokens
        The source positions, all T of them unless this is one token's block.
    certificate
        `Certificate.to_dict()`, once this very map has been certified.
    """

    def __init__(
        self,
        chain: Chain,
        source: Point,
        target: Point,
        position: int,
        *,
        normed: bool = False,
        budget: int | float | str | None = None,
        whole: LinearMap | None = None,
        token: int | None = None,
    ) -> None:
        super().__init__()
        chain.check(source, target)
        if normed and target.kind in ("final", "logits"):
            raise OptionError(f"normed=True puts the final norm on top of a point before it, and {target} is behind it")
        self.chain = chain
        self.source, self.target, self.position, self.normed = source, target, position, normed
        self.tokens = list(range(chain.trace.length)) if token is None else [token]
        self._budget = budget
        self._whole = whole
        self._dense: Tensor | None = None
        self.certificate: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Name the points and the shape."""
        return f"LinearMap({self.source} -> {self.target}{'.normed' * self.normed} at {self.position}, {self.shape})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        return self.chain.width(self.target, self.normed), len(self.tokens), self.chain.trace.width

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
        return self.chain.trace.value(self.source).to(self.device)[self.tokens]

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
        """All of J.

        Cost: d columns backward (for the logits: those of `final`, then one product with the head). Memory: J, and
        the budget. Kept for later calls.

        Parameters
        ----------
        path
            A `.npy` file to hold J instead of the memory, which then needs the budget only. It is written in chunks of
            rows (see `rows`); what is there already is not computed again, so that an interrupted run goes on, and a
            finished file is just opened. `PATH.json` says which map it is. The tensor given back is on the CPU and
            reads the file; writing to it changes nothing there. Cost, also to open: one read of the model's weights,
            by which the file knows its map.

        Raises
        ------
        BudgetError
            When J itself is larger than the free memory; with a path, when the budget is too small for one row.
        OutputError
            When the file cannot be written, or the disk has no room for it.
        ResultError
            When the file is of another map, or was altered.
        """
        if path is not None:
            return self._dense_file(path)
        if self._whole is not None:
            return self._whole.dense()[:, self.tokens]
        if self._dense is None:
            d_out, length, d_in = self.shape
            if self._dense_bytes > memory.available(self.device):
                raise BudgetError(
                    f"the dense map {self.source} -> {self.target} takes {self._dense_bytes / 1e9:.1f} GB, more than "
                    "is free; use dense(path=...), or rows()"
                )
            if self.target.kind == "logits":
                head = HeadLink(self.chain.trace, self.position)
                columns = self._to_final().dense().flatten(1).T
                self._dense = head.jvp(columns).T.reshape(d_out, length, d_in).to(self.device)
            else:
                self._dense = self.rmatmat(torch.eye(d_out, dtype=self.dtype, device=self.device))
        return self._dense

    def _dense_file(self, path: str | os.PathLike[str]) -> Tensor:
        """J in a file; kept for later calls where the products' results are on the CPU too."""
        key = self.provenance().key() | {"weights": weights_hash(self.chain.trace.model.hf)}
        mapped = DenseFile(path, self.shape, self.dtype, key).obtain(lambda start: self.rows(start=start))
        if self._whole is None and self.device.type == "cpu":
            self._dense = mapped
        return mapped

    @in_plain_torch
    def rows(self, chunk: int | None = None, start: int = 0) -> Iterator[tuple[slice, Float[Tensor, "n T d_in"]]]:
        """J in chunks of rows, in order: for what can be summed up without holding J.

        Cost: d columns in all, and one sweep's fixed cost for each chunk. Memory: two chunks and a sweep, within the
        budget; for the logits also the dense map to `final` and the head's matrix. Costs nothing once J is dense.

        Parameters
        ----------
        chunk
            How many rows at a time; as many as the budget allows by default.
        start
            The first row.

        Yields
        ------
        tuple[slice, Tensor]
            Which rows, and these rows of J.

        Raises
        ------
        BudgetError
            When the budget is too small for one row.
        OptionError
            When `chunk` is below 1.
        """
        if chunk is not None and chunk < 1:
            raise OptionError(f"chunk={chunk}: give at least one row, or None for what the budget allows")
        most, sweep = self._chunking()
        chunk = chunk or most
        rows = self._row_source(sweep)
        for first in range(start, self.shape[0], chunk):
            where = slice(first, min(first + chunk, self.shape[0]))
            yield where, rows(where)

    @in_plain_torch
    def _row_source(self, budget: int) -> Callable[[slice], Tensor]:
        """How some rows are made: cut out of the dense map, from that of `final` and the head, or by a sweep."""
        d_out, length, d_in = self.shape
        known = self.known
        if known is not None:
            return lambda where: known[where]
        if self.target.kind == "logits":
            final = self._to_final().dense()[:, self.tokens].flatten(1)
            basis = torch.eye(len(final), dtype=self.dtype, device=self.device)
            head = HeadLink(self.chain.trace, self.position).jvp(basis).T.to(self.device)

            @in_plain_torch
            def multiplied(where: slice) -> Tensor:
                return (head[where] @ final).reshape(-1, length, d_in)

            return multiplied

        def swept(where: slice) -> Tensor:
            unit = torch.zeros(where.stop - where.start, d_out, dtype=self.dtype, device=self.device)
            unit[:, where].fill_diagonal_(1)
            return self._pull(unit, budget, progress=False)

        return swept

    def _chunking(self) -> tuple[int, int]:
        """(rows at a time, bytes for the sweep inside): two chunks, the one in use and the next, and the sweep."""
        total = memory.budget(self._budget, self.device)
        per_column = self.chain.column_bytes(self.target)
        per_row = 2 * (self.chain.trace.length * self.shape[2] + self.shape[0]) * self.dtype.itemsize
        if self.known is not None:
            return max(total // per_row, 1), 0
        sweep = min(self.chain.chunk(self.shape[0], self.shape[0]) * per_column, total // 2)
        if min(sweep // per_column, (total - sweep) // per_row) < 1:
            least = 2 * max(per_column, per_row)
            raise BudgetError(f"the memory budget is too small: the least that works is {least:,} bytes")
        return (total - sweep) // per_row, sweep

    def _to_final(self) -> LinearMap:
        """The map from all tokens to `final`, of which that to the logits is made."""
        return LinearMap(self.chain, self.source, Point("final"), self.position, budget=self._budget)

    @property
    def _dense_bytes(self) -> int:
        return self.shape[0] * self.chain.trace.length * self.shape[2] * self.dtype.itemsize

    @in_plain_torch
    def reconstruct(self) -> Float[Tensor, " d_out"]:
        """J x + b at the prompt's own x, which equals `value`. Cost: one column, or none once the map is dense."""
        if self._dense is None:
            return self.matvec(self.input) + self.bias
        return torch.einsum("oti,ti->o", self._dense, self.input) + self.bias

    def block(self, i: int) -> LinearMap:
        """One token's map J_i, as a `LinearMap` with T = 1; the other tokens then belong to its `bias`.

        Raises
        ------
        PromptError
            When there is no token i.
        """
        i = self.chain.trace.position(i)
        return type(self)(
            self.chain,
            self.source,
            self.target,
            self.position,
            normed=self.normed,
            budget=self._budget,
            whole=self._whole or self,
            token=i,
        )

    @cached_property
    @in_plain_torch
    def bias(self) -> Float[Tensor, " d_out"]:
        """b: everything that does not come from the source's tokens, computed from its sources and never as y - J x.

        Biases behind the source; for `attn_out` and `mlp_out` the residual stream that passes them by; for one
        token's block the other tokens. Cost: one column.
        """
        if self._whole is None:
            constants = self.chain.constants(self.source, self.target, self.position, self.normed)
            return constants["sum"].to(self.device)
        others = self._whole.input.clone()
        others[self.tokens] = 0
        return self._whole.bias + self._whole.matvec(others)

    @in_plain_torch
    def bias_by_source(self) -> dict[str, Float[Tensor, " d_out"]]:
        """The share of `bias` that each bias or constant gives, by its path. Cost: one column each."""
        return self.chain.constants(self.source, self.target, self.position, self.normed, by_source=True)

    def to_scipy(self) -> LinearOperator:
        """J as a `scipy.sparse.linalg.LinearOperator` of shape (d_out, T d_in); needs SciPy.

        Products cost columns as ever; SciPy's arrays live on the CPU.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise MissingExtraError("to_scipy()", "SciPy", "scipy") from error
        d_out, length, d_in = self.shape
        kept = wide(self.dtype)  # NumPy has no bfloat16

        def matmat(columns: np.ndarray) -> np.ndarray:
            block = torch.as_tensor(columns).T.reshape(-1, length, d_in)
            return self.matmat(block).T.to("cpu", kept).numpy()

        def rmatmat(columns: np.ndarray) -> np.ndarray:
            pulled = self.rmatmat(torch.as_tensor(columns).T.contiguous())
            return pulled.reshape(-1, length * d_in).T.to("cpu", kept).numpy()

        return LinearOperator(
            shape=(d_out, length * d_in),
            dtype=str(kept).removeprefix("torch."),
            matvec=lambda x: matmat(x.reshape(-1, 1)).reshape(-1),
            rmatvec=lambda u: rmatmat(u.reshape(-1, 1)).reshape(-1),
            matmat=matmat,
            rmatmat=rmatmat,
        )

    @property
    def known(self) -> Tensor | None:
        """The dense map, where it has been made already."""
        if self._whole is not None:
            return None if self._whole.known is None else self._whole.known[:, self.tokens]
        return self._dense

    @property
    def fits(self) -> bool:
        """Whether the dense map is within the budget, or there already."""
        return self.known is not None or self._dense_bytes <= memory.budget(self._budget, self.device)

    def provenance(self) -> Provenance:
        """Which map this is, for what is computed from it."""
        trace, hold = self.chain.trace, self.chain.hold
        ids = trace.input_ids[0].tolist()
        return Provenance(
            model=trace.model.info,
            token_ids=ids,
            tokens=trace.model.decode_each(ids),
            text=trace.model.decode(ids),
            gate="ordinary" if hold.ordinary else hold.gate,
            precision=trace.hold.resolved(trace.route.dtype),
            dtype=str(self.dtype).removeprefix("torch."),
            source=str(self.source),
            target=str(self.target),
            position=self.position,
            normed=self.normed,
            positions=self.tokens,
            versions=versions(),
            certificate=(self._whole or self).certificate,
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def _push(self, Xs: Tensor) -> Tensor:
        Xs = Xs.to(self.device, self.dtype)
        if self._whole is not None:
            spread = Xs.new_zeros((len(Xs), self.chain.trace.length, Xs.shape[-1]))
            spread[:, self.tokens] = Xs
            Xs = spread
        return self._sweep(self.chain.forward, Xs)

    def _pull(self, Us: Tensor, budget: int | None = None, progress: bool = True) -> Tensor:
        pulled = self._sweep(self.chain.backward, Us.to(self.device, self.dtype), budget, progress)
        return pulled if self._whole is None else pulled[:, self.tokens]

    @in_plain_torch
    def _sweep(
        self,
        sweep: Callable[..., Iterator[Tensor]],
        block: Tensor,
        budget: int | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Push or pull a block of columns in chunks that fit the budget (the map's own by default)."""
        per_column = self.chain.column_bytes(self.target)
        room = memory.budget(self._budget if budget is None else budget, self.device) // per_column
        if room < 1:
            raise BudgetError(f"the memory budget is too small: the least that works is {per_column:,} bytes")
        chunk = self.chain.chunk(len(block), room)
        total = len(block) * (1 + len(self.chain.steps(self.source, self.target)))
        silent = None if progress else True  # None: on a terminal only
        with tqdm(
            total=total, desc="exact map", unit="col", unit_scale=True, delay=2, leave=False, disable=silent
        ) as bar:
            for swept in sweep(block, self.source, self.target, self.position, self.normed, chunk):
                bar.update(len(block))
                last = swept
        return last.to(self.device)
