"""A sketch of token maps: an output basis, its rows of every map, and what was pushed through the maps.

All tokens share one orthonormal output basis Q, since one column pulled back gives a row of every token's map. The rows
B_i = Q^T J_i are kept in full, so sigma_j(B_i) <= sigma_j(J_i); E_i = J_i - Q B_i is what Q misses. Directions F_i =
B_i^T c that were pushed through the maps, with their images in Q, have E_i F_i = 0; `loclin.spectral.bounds` makes
upper bounds of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.sums import square_sums
from loclin.spectral.bounds import bound_outside, chebyshev_bound, left_svd, orthonormal_part, outside, rounding
from loclin.spectral.checks import refuse_half
from loclin.spectral.threads import single_thread


@runtime_checkable
class TokenMaps(Protocol):
    """J = [J_0 ... J_{T-1}]: a column is a vector through all tokens at once. `loclin.LinearMap` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of products."""
        ...

    def matmat(self, Xs: Float[Tensor, "n T d_in"]) -> Float[Tensor, "n d_out"]:
        """sum_i J_i x_i of n blocks of vectors. Cost: n columns."""
        ...

    def rmatmat(self, Us: Float[Tensor, "n d_out"]) -> Float[Tensor, "n T d_in"]:
        """Every J_i^T u of n vectors. Cost: n columns."""
        ...


@dataclass(frozen=True)
class BasisSVD:
    """The SVD of the rows that a basis has of M maps, in float64: B = W diag(values) V^T."""

    W: Tensor  # [M, m, m]
    values: Tensor  # [M, m]
    missed: Tensor  # [M, m, m]: I - F F^T in the basis V (see `loclin.spectral.bounds`)

    __repr__ = brief


class Sketch:
    """A growing output basis for M maps: those of the T tokens, or with `joint` the one map of all tokens side by side.

    `Q` is the basis `[d_out, m]`, `B` its rows of each map `[M, m, n]`, with n = d_in, or T d_in when joint; the next
    shared step pushes the `newest` of its vectors. `columns` were taken by products so far; `probed` `[M, s, n]` are
    E_i^T g of the last step's probes, which are `probes` Gaussian vectors to begin with, on which the basis does not
    depend. One map's first step adds so many Gaussian `tests` to the basis, of what the first block's powers miss.
    Rounding may add `floor` to any singular value, relative to the map's largest.

    Cost: `block + probes` columns to begin with. Memory: m (T d_in + d_out) numbers for m basis vectors.
    """

    def __init__(
        self, op: TokenMaps, block: int, *, joint: bool = False, seed: int = 0, probes: int = 0, tests: int = 0
    ) -> None:
        refuse_half(op.dtype)
        d_out, length, d_in = op.shape
        self.op, self.joint, self.columns = op, joint, 0
        self.maps, width = (1, length * d_in) if joint else (length, d_in)
        self.floor = rounding(d_out, width, op.dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self.Q = torch.zeros(d_out, 0, dtype=op.dtype, device=op.device)
        self.B = torch.zeros(self.maps, 0, width, dtype=op.dtype, device=op.device)
        self._pushed = [self.Q.new_zeros(0, 0, dtype=torch.float64) for _ in range(self.maps)]
        self._block, self._steps, self._lost = block, 0, 0.0
        self._start, self._tests = self.random(block), self.random(tests if self.maps == 1 else 0)
        self._probes, self.probed = self.Q, self.B
        self.newest = self.grow(self._start, self.random(probes if block < d_out else 0))
        squares = square_sums(self.B, 1)
        # Scaled to equal norm, so that tokens with small maps are not lost in the shared basis; zero maps have weight
        # 0.
        self._weights = torch.where(squares > 0, 1 / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole output space, so that E = 0."""
        return self.Q.shape[1] == self.op.shape[0]

    def random(self, count: int) -> Float[Tensor, "d_out count"]:
        """Gaussian output vectors, drawn on the CPU so that a seed means the same on every device."""
        draw = torch.randn(self.op.shape[0], count, generator=self._generator, dtype=torch.float64)
        return draw.to(self.Q)

    def grow(self, images: Float[Tensor, "d_out c"], probes: Float[Tensor, "d_out s"] | None = None) -> int:
        """Extend the basis by images, and pull the new vectors. Cost: a column for each; returns their number.

        In the same sweep `probes` are pulled through E = J - Q B with the extended basis Q: see `probed`.
        """
        new = orthonormal_part(images, self.Q, 10 * self.floor)[:, : self.Q.shape[0] - self.Q.shape[1]]
        if new.shape[1]:
            self.Q = torch.cat([self.Q, new], dim=1)
            if probes is not None:
                self._probes = self.project_out(probes)
            rows = self.pull(new if probes is None else torch.cat([new, self._probes], dim=1))
            self.B = torch.cat([self.B, rows[:, : new.shape[1]]], dim=1)
            self.probed = self.probed if probes is None else rows[:, new.shape[1] :]
        return new.shape[1]

    @property
    def step_columns(self) -> int:
        """The columns that a Krylov step takes at most: two for each of the newest vectors, and the tests' first."""
        return 2 * self.newest + (self._tests.shape[1] if self._steps == 0 else 0)

    def krylov_step(self, probes: Float[Tensor, "d_out s"] | None = None) -> None:
        """Q += sum_i w_i J_i J_i^T q, for the newest basis vectors q. Cost: `step_columns`.

        `probes` are those of `grow`.
        """
        rows = self.B[:, self.B.shape[1] - self.newest :]  # J_i^T q, pulled already
        if self.maps == 1:
            self._remember(0, torch.eye(self.B.shape[1], dtype=torch.float64)[:, -self.newest :])
        weighs = self.maps > 1  # one map's weight changes no span
        images = self.push(rows, self._weights) if weighs else self._push(self._as_tangents(rows))
        self._extend(torch.cat([images, self._tests], dim=1) if self._steps == 0 else images, probes)
        self._steps += 1

    def push_chosen(self, wanted: list[Tensor]) -> None:
        """Extend the basis by vectors of each map's own, B_i^T `wanted[i]`. Cost: at most two columns for each."""
        images = []
        for i, coefficients in enumerate(wanted):
            if coefficients.shape[1]:
                self._remember(i, coefficients)
                # zero at all other tokens: [M, c_i, n]
                rows = self.B.new_zeros(self.maps, coefficients.shape[1], self.B.shape[2])
                rows[i] = coefficients.T.to(self.B) @ self.B[i]
                images.append(self._as_tangents(rows))
        self._extend(self._push(torch.cat(images)))

    def svd(self) -> BasisSVD:
        """The SVD of every map's rows, and what was pushed. Cost: no columns, about 10 M m^3 flops."""
        W, values = left_svd(self.B)
        missed = [outside(W[i], values[i], self._padded(i), 10 * self.floor) for i in range(self.maps)]
        return BasisSVD(W, values, torch.stack(missed))

    def add_probes(self, count: int) -> None:
        """Pull so many more probes. Cost: a column for each."""
        probes = self.project_out(self.random(count))
        self.probed = torch.cat([self.probed, self.pull(probes)], dim=1)
        self._probes = torch.cat([self._probes, probes], dim=1)

    @property
    def missing(self) -> Float[Tensor, "M s"]:
        """|E_i^T g|^2 for the probes g. Cost: no columns."""
        return (self.probed - (self._probes.T @ self.Q) @ self.B).double().square().sum(dim=-1)

    def bound_tested(self, basis: BasisSVD, failure: float) -> float:
        """Bound ||E||_2^2 of the one map there is, by the tests (see `bound_outside`). Needs a step.

        Wrong with probability `failure`. Cost: no columns.
        """
        T = basis.W[0] * basis.values[0].square() @ basis.W[0].T  # B B^T
        start, tests = ((self.Q.T @ part).double() for part in (self._start, self._tests))
        # What steps have lost to rounding hides as much.
        return max(bound_outside(T, start, tests, self._steps, failure, 10 * self.floor), 10 * self._lost)

    def bound_missing(
        self, scale: Float[Tensor, " M"], level: float, probes: int, degree: int, failure: float
    ) -> float:
        """Bound lambda_1 of A = sum_i E_i E_i^T / scale_i^2, and so every ||E_i||_2^2 / scale_i^2.

        Wrong with probability `failure`. One bound for all maps: to push one map at a time would cost a column for
        each. Cost: 2 probes degree columns, in 2 degree sweeps.
        """
        weights = torch.where(scale > 0, 1 / scale.square().clamp(min=torch.finfo(torch.float64).tiny), 0.0)

        def shifted(vectors: Tensor) -> Tensor:
            """(2 A / level - I) x."""
            image = self.project_out(self.push(self.pull(vectors), weights))
            return image * (2 / level) - vectors

        # C_0 = I, C_1 = S, C_(j+1) = 2 S C_j - C_(j-1), with S = 2 A / level - I
        before = self.project_out(self.random(probes))
        vectors = shifted(before)
        for _ in range(degree - 1):
            before, vectors = vectors, 2 * shifted(vectors) - before
        return chebyshev_bound(vectors.double().square().sum().item(), degree, level, probes, failure)

    def pull(self, directions: Float[Tensor, "d_out c"]) -> Float[Tensor, "M c n"]:
        """J_i^T q of every map for output directions q. Cost: c columns."""
        self.columns += directions.shape[1]
        rows = self.op.rmatmat(directions.T.contiguous())  # [c, T, d_in]
        return rows.flatten(1)[None] if self.joint else rows.transpose(0, 1)

    def push(self, rows: Float[Tensor, "M c n"], weights: Float[Tensor, " M"]) -> Float[Tensor, "d_out c"]:
        """sum_i w_i J_i x_i for vectors x_i of every map's input space. Cost: c columns."""
        return self._push(self._as_tangents((rows.double() * weights[:, None, None]).to(rows)))

    @single_thread()
    def triples(self, basis: BasisSVD, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U `[M, d_out, k]`, S, Vh `[M, k, n]`, and `[M, k]`: the sines between each v and what was pushed."""
        W = basis.W[..., :k]
        # B = W diag(values) V^T in float64; again in the maps' dtype, so that U S V^T = Q B to its rounding
        turn, S, Vh = torch.linalg.svd(W.mT.to(self.B) @ self.B, full_matrices=False)
        # each v in the basis V: [M, k, k]
        inside = (turn * basis.values[:, :k, None] / S.unsqueeze(-2).clamp(min=torch.finfo(S.dtype).tiny)).double()
        sines = torch.einsum("mak,mab,mbk->mk", inside, basis.missed[:, :k, :k], inside).clamp(min=0).sqrt()
        return self.Q @ (W.to(self.B) @ turn), S, Vh, torch.where(S > 0, sines.to(S), 1.0)

    def _extend(self, images: Tensor, probes: Tensor | None = None) -> None:
        """Extend the basis by a step's images; by random vectors if they bring nothing new."""
        new = self.grow(images, probes)
        if new < images.shape[1]:
            self._lost = max(self._lost, self.project_out(images).norm().item())
        new = new or self.grow(self.random(self._block), probes)
        # Where several maps share the basis, the next step pushes a whole block even if this one brought less.
        self.newest = new if self.maps == 1 else max(new, self._block)

    def _push(self, tangents: Tensor) -> Tensor:
        self.columns += len(tangents)
        return self.op.matmat(tangents).T

    def _as_tangents(self, rows: Tensor) -> Tensor:
        """Vectors `[M, c, n]` as `[c, T, d_in]`."""
        return rows[0].unflatten(1, self.op.shape[1:]) if self.joint else rows.transpose(0, 1).contiguous()

    def project_out(self, vectors: Tensor) -> Tensor:
        """(I - Q Q^T) x, twice against rounding."""
        for _ in range(2):
            vectors = vectors - self.Q @ (self.Q.T @ vectors)
        return vectors

    def _remember(self, i: int, pushed: Tensor) -> None:
        """Keep the coefficients `[m, f]`, on the present rows of map i, of vectors that are pushed through it."""
        self._pushed[i] = torch.cat([self._padded(i), pushed.to(self._pushed[i])], dim=1)

    def _padded(self, i: int) -> Tensor:
        """The coefficients of map i, with zeros for rows that came later."""
        return torch.nn.functional.pad(self._pushed[i], (0, 0, 0, self.B.shape[1] - len(self._pushed[i])))
