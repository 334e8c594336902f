"""What a few columns have shown of token maps: an output basis, its rows, and what was pushed through the maps.

All tokens share one orthonormal output basis Q, since one column pulled back gives rows of every token's map. The rows
B_i = Q^T J_i are kept whole, so sigma_j(B_i) <= sigma_j(J_i) always; E_i = J_i - Q B_i is what Q misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.brief import brief
from loclin.common.sums import square_sums
from loclin.spectral.bounds import chebyshev_bound, left_svd, outside, rounding
from loclin.spectral.checks import refuse_half
from loclin.spectral.operator import TokenMaps
from loclin.spectral.threads import single_thread


@dataclass(frozen=True)
class Ritz:
    """A basis's view of M maps, in float64: B = W diag(values) V^T, `W [M, m, m]` and `values [M, m]`.

    `missed [M, m, m]` is I - F F^T in the basis V (see `loclin.spectral.bounds`).
    """

    W: Tensor
    values: Tensor
    missed: Tensor

    __repr__ = brief


class Sketch:
    """A growing output basis for M maps: the T tokens' own, or with `joint` the one map of all tokens side by side.

    Cost: `block` columns to begin with. Memory: m (T d_in + d_out) numbers for m basis vectors.

    Attributes
    ----------
    Q, B
        The basis `[d_out, m]`, and its rows of each map `[M, m, n]`, with n = d_in, or T d_in when joint.
    newest
        How many basis vectors, the last ones, the next shared step pushes.
    columns
        What the operator's products have cost so far.
    floor
        The share of a map's largest singular value that rounding may add to any.
    """

    def __init__(self, op: TokenMaps, block: int, *, joint: bool = False, seed: int = 0) -> None:
        refuse_half(op.dtype)
        d_out, length, d_in = op.shape
        self.op, self.joint, self.columns = op, joint, 0
        self.maps, width = (1, length * d_in) if joint else (length, d_in)
        self.floor = rounding(d_out, width, op.dtype)
        self._generator = torch.Generator().manual_seed(seed)
        self.Q = torch.zeros(d_out, 0, dtype=op.dtype, device=op.device)
        self.B = torch.zeros(self.maps, 0, width, dtype=op.dtype, device=op.device)
        self._pushed = [self.Q.new_zeros(0, 0, dtype=torch.float64) for _ in range(self.maps)]
        self._block = block
        self.newest = self.grow(self.random(block))
        squares = square_sums(self.B, 1)
        # Scaled to equal norm, tokens with small maps are not lost in the shared basis; zero maps take no part.
        self._weights = torch.where(squares > 0, 1 / squares.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole output space: E is 0 then."""
        return self.Q.shape[1] == self.op.shape[0]

    def random(self, count: int) -> Float[Tensor, "d_out count"]:
        """Gaussian output vectors. Drawn on the CPU, so that a seed means the same on every device."""
        draw = torch.randn(self.op.shape[0], count, generator=self._generator, dtype=torch.float64)
        return draw.to(self.Q)

    def grow(self, images: Float[Tensor, "d_out c"]) -> int:
        """Take images into the basis and pull them. Cost: a column for each that is new; returns their number."""
        images = self._orthonormal(images)
        if images.shape[1]:
            self.Q, self.B = torch.cat([self.Q, images], dim=1), torch.cat([self.B, self.pull(images)], dim=1)
        return images.shape[1]

    @single_thread()
    def _orthonormal(self, images: Tensor) -> Tensor:
        """An orthonormal basis of what images add to Q."""
        images = images / images.norm(dim=0).clamp(min=torch.finfo(images.dtype).tiny)
        for _ in range(2):
            images = images - self.Q @ (self.Q.T @ images)
            # What the basis has already, or the images have twice, carries rounding only.
            images, sizes, _ = torch.linalg.svd(images, full_matrices=False)
            images = images[:, sizes > 10 * self.floor]
        return images[:, : self.Q.shape[0] - self.Q.shape[1]]

    def power(self) -> None:
        """One shared block Krylov step: push what the newest basis vectors pulled, and take the images in.

        Cost: at most two columns for each vector of the newest block.
        """
        rows = self.B[:, self.B.shape[1] - self.newest :]
        if self.maps == 1:
            self._remember(0, torch.eye(self.B.shape[1], dtype=torch.float64)[:, -self.newest :])
        self._grown(self.push(rows, self._weights))

    def polish(self, wanted: list[Tensor]) -> None:
        """Push each map's own vectors B_i^T `wanted[i]`, `[m, c_i]`, and take the images into the basis.

        Cost: at most two columns for each vector wanted.
        """
        images = []
        for i, coefficients in enumerate(wanted):
            if coefficients.shape[1]:
                self._remember(i, coefficients)
                rows = self.B.new_zeros(self.maps, coefficients.shape[1], self.B.shape[2])
                rows[i] = coefficients.T.to(self.B) @ self.B[i]
                images.append(self._tangents(rows))
        self._grown(self._push(torch.cat(images)))

    def ritz(self) -> Ritz:
        """Every map's Ritz values and vectors, and what was pushed. Cost: no columns, about 10 M m^3 flops."""
        W, values = left_svd(self.B)
        missed = [outside(W[i], values[i], self._padded(i), 10 * self.floor) for i in range(self.maps)]
        return Ritz(W, values, torch.stack(missed))

    def missing(self, probes: Float[Tensor, "d_out s"], images: Float[Tensor, "M s n"]) -> Float[Tensor, "M s"]:
        """|E^T g|^2 of vectors g whose |J^T g| are known. Cost: no columns."""
        return (images - (probes.T @ self.Q) @ self.B).double().square().sum(dim=-1)

    def largest_missing(
        self, scale: Float[Tensor, " M"], level: float, probes: int, degree: int, failure: float
    ) -> float:
        """Bound lambda_1 of A = sum_i E_i E_i^T / scale_i^2, and so every ||E_i||_2^2 / scale_i^2, up to `failure`.

        One certificate for all maps, as pushing one map at a time would cost a column for each. Cost: 2 probes degree
        columns, in 2 degree sweeps.
        """
        weights = torch.where(scale > 0, 1 / scale.square().clamp(min=torch.finfo(torch.float64).tiny), 0.0)

        def shifted(vectors: Tensor) -> Tensor:
            image = self._outside(self.push(self.pull(vectors), weights))
            return image * (2 / level) - vectors

        before = self._outside(self.random(probes))
        vectors = shifted(before)
        for _ in range(degree - 1):
            before, vectors = vectors, 2 * shifted(vectors) - before
        return chebyshev_bound(vectors.double().square().sum().item(), degree, level, probes, failure)

    def pull(self, directions: Float[Tensor, "d_out c"]) -> Float[Tensor, "M c n"]:
        """Rows of every map for output directions. Cost: c columns."""
        self.columns += directions.shape[1]
        rows = self.op.rmatmat(directions.T.contiguous())
        return rows.flatten(1)[None] if self.joint else rows.transpose(0, 1)

    def push(self, rows: Float[Tensor, "M c n"], weights: Float[Tensor, " M"]) -> Float[Tensor, "d_out c"]:
        """Weigh vectors of every map's input space, and sum their images over the maps. Cost: c columns."""
        return self._push(self._tangents((rows.double() * weights[:, None, None]).to(rows)))

    @single_thread()
    def triples(self, ritz: Ritz, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """U `[M, d_out, k]`, S, Vh `[M, k, n]`, and `[M, k]`: by how much each v leaves what was pushed."""
        W = ritz.W[..., :k]
        turn, S, Vh = torch.linalg.svd(W.mT.to(self.B) @ self.B, full_matrices=False)
        inside = (turn * ritz.values[:, :k, None] / S.unsqueeze(-2).clamp(min=torch.finfo(S.dtype).tiny)).double()
        left = torch.einsum("mak,mab,mbk->mk", inside, ritz.missed[:, :k, :k], inside).clamp(min=0).sqrt()
        return self.Q @ (W.to(self.B) @ turn), S, Vh, torch.where(S > 0, left.to(S), 1.0)

    def _grown(self, images: Tensor) -> None:
        """Take a step's images in. A step that brings little pushes a whole block next time all the same."""
        new = self.grow(images) or self.grow(self.random(self._block))
        self.newest = new if self.maps == 1 else max(new, self._block)

    def _push(self, tangents: Tensor) -> Tensor:
        self.columns += len(tangents)
        return self.op.matmat(tangents).T

    def _tangents(self, rows: Tensor) -> Tensor:
        """`[c, T, d_in]` of vectors `[M, c, n]`."""
        return rows[0].unflatten(1, self.op.shape[1:]) if self.joint else rows.transpose(0, 1).contiguous()

    def _outside(self, vectors: Tensor) -> Tensor:
        for _ in range(2):
            vectors = vectors - self.Q @ (self.Q.T @ vectors)
        return vectors

    def _remember(self, i: int, pushed: Tensor) -> None:
        """Keep coefficients `[m, f]`, on the rows there are now, of vectors that are pushed through map i."""
        self._pushed[i] = torch.cat([self._padded(i), pushed.to(self._pushed[i])], dim=1)

    def _padded(self, i: int) -> Tensor:
        return torch.nn.functional.pad(self._pushed[i], (0, 0, 0, self.B.shape[1] - len(self._pushed[i])))
