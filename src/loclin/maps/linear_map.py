"""The exact linear map between two named points, and its spectra: each question is answered by the cheapest method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loclin import spectral
from loclin.common.arguments import real, whole
from loclin.common.sums import square_sums
from loclin.common.surroundings import in_plain_torch
from loclin.errors import MissingExtraError
from loclin.maps.plan import Plan, matrix_free_is_cheaper
from loclin.maps.plan import plan as make_plan
from loclin.maps.products import Products
from loclin.network.cost import reads_layers
from loclin.results import display
from loclin.results.table import dataframe
from loclin.spectral import SVD, Norms, block_krylov_svd, wide_dtype
from loclin.spectral.few_sweeps import few_sweeps_svd

if TYPE_CHECKING:
    from pandas import DataFrame
    from scipy.sparse.linalg import LinearOperator


class LinearMap(Products):
    """The map J of y = sum_i J_i x_i + b, from all tokens at `source` to one position at `target` (paper, equation 2).

    Made by `Linearization.jacobian`. `T` is the number of source tokens, `d_in` and `d_out` the widths of the points.
    J v is one forward sweep, J^T u one backward sweep; both cost columns (see `loclin.network.chain`). The dense map,
    J^T applied to the identity, is made when it is needed, and kept.

    Attributes
    ----------
    source, target: the points, as `Point`.
    position: the target's position, from the front.
    positions: the source positions, all T of them unless this is one token's block.
    certificate: `Certificate.facts()`, once this map has been certified.
    warnings: warnings about the prompt, which every result includes.
    """

    _spectrum: Tensor | None = None
    _largest_values: Tensor | None = None

    def __repr__(self) -> str:
        return f"LinearMap({self.source} -> {self.target}{'.normed' * self.normed} at {self.position}, {self.shape})"

    def _repr_html_(self) -> str:
        return display.fragment(self)

    @in_plain_torch
    def plan(self, k: int = 8, *, joint: bool = False, tolerance: float = 1e-3) -> Plan:
        """The cost of each method of `svd`, and which one it chooses; `print` it. Nothing is run."""
        found = make_plan(self, k, joint=joint, tolerance=tolerance)
        return replace(found, provenance=self.provenance(), warnings=self.warnings)

    @in_plain_torch
    def svd(
        self, k: int = 8, *, joint: bool = False, tolerance: float = 1e-3, method: str = "auto", seed: int = 0
    ) -> SVD:
        """The k largest singular triples of each token's map, or with `joint` of [J_0 ... J_{T-1}].

        Signs are such that left vectors have a non-negative product with the output.

        Parameters
        ----------
        k: how many triples.
        joint: one decomposition of all tokens' maps side by side.
        tolerance: how far a singular value may be from its bounds, as a fraction of it, below 1; the bounds are in the
            result. Vectors are good to about the square root of that.
        method: "lapack": the dense map and LAPACK. "block_krylov": the dense map and a block Krylov method.
            "matrix_free": products with J only. "auto": the one that `plan` expects to be fastest; matrix-free where
            the dense map is beyond the memory budget; block Krylov takes over where matrix-free columns do not reach
            the tolerance.
        seed: of the random vectors; the same seed gives the same result.

        Cost: the dense map and T (or one) dense decompositions, or the columns that `plan` counts. OptionError for a k
        that the map does not have, a tolerance that its dtype does not hold, or an unknown method.
        """
        k, seed, tolerance = whole("k", k), whole("seed", seed), real("tolerance", tolerance)
        spectral.check_tolerance(tolerance, wide_dtype(self.dtype))
        choice = make_plan(self, k, joint=joint, tolerance=tolerance, method=method)
        found = None
        if choice.chosen == "matrix_free":
            found = self._matrix_free_svd(k, joint, tolerance, seed, choice.max_columns if method == "auto" else None)
        if found is None and joint and not self.fits_in_budget:
            found = spectral.gram_svd(self, self._gram(), k, align_to=self.value)
        elif found is None and choice.chosen == "lapack":
            parts = (spectral.lapack_svd(part, k, align_to=self.value, joint=joint) for _, part in self.by_token())
            found = spectral.join(parts)
            if not joint:
                self._spectrum = found.spectrum
        elif found is None:
            options: dict[str, Any] = {"align_to": self.value, "tolerance": tolerance, "joint": joint, "seed": seed}
            found = spectral.join(block_krylov_svd(part, k, **options) for _, part in self.by_token())
        return replace(found, provenance=self.provenance(), warnings=self.warnings)

    def _gram(self) -> Float[Tensor, "d_out d_out"]:
        """J J^T, all tokens together, in float64."""
        d_out = self.shape[0]
        gram = torch.zeros(d_out, d_out, dtype=torch.float64, device=self.device)
        for _, part in self.by_token():
            for i in range(part.shape[1]):
                own = part[:, i].double()
                gram.addmm_(own, own.T)
        return gram

    def _matrix_free_svd(self, k: int, joint: bool, tolerance: float, seed: int, most: int | None) -> SVD | None:
        """The triples, matrix-free; None where the columns that are allowed do not reach the tolerance."""
        allowed = 2 * max(tolerance, spectral.least_tolerance(self.dtype))
        if joint and reads_layers(self.chain):
            found = few_sweeps_svd(self, k, align_to=self.value, tolerance=tolerance, seed=seed)
            if bool((found.relative_error <= allowed).all()):
                return found
            if most is not None and self.fits_in_budget:
                return None  # the dense map is one sweep more
        found = spectral.matrix_free_svd(
            self, k, align_to=self.value, tolerance=tolerance, joint=joint, max_columns=most, seed=seed
        )
        return found if most is None or bool((found.relative_error <= allowed).all()) else None

    @in_plain_torch
    def singular_values(self) -> Float[Tensor, "T r"]:
        """All singular values of each token's map, descending. Cost: the dense map, and T SVDs without vectors."""
        if self._spectrum is None:
            self._spectrum = torch.cat([spectral.singular_values(part) for _, part in self.by_token()])
        return self._spectrum

    @in_plain_torch
    def effective_rank(self) -> Float[Tensor, " T"]:
        """Exp of the entropy of each token's normalised singular values (Roy & Vetterli 2007). Cost: all of them."""
        return spectral.effective_rank(self.singular_values())

    @in_plain_torch
    def norms(self, tolerance: float = 0.02, seed: int = 0) -> Norms:
        """Largest singular value, Frobenius norm and stable rank of each token, to a relative tolerance in (0, 1).

        Cost: the dense map, from which everything is exact; or matrix-free products (see
        `loclin.spectral.stable_rank_and_norm`) where these are expected to be cheaper. The errors are in the result.
        """
        tolerance = spectral.check_fraction(real("tolerance", tolerance))
        if matrix_free_is_cheaper(self):
            found = spectral.stable_rank_and_norm(self, tolerance=tolerance, certify=False, seed=seed)
        else:
            found = self._exact
        return replace(found, provenance=self.provenance(), warnings=self.warnings)

    @property
    def _exact(self) -> Norms:
        """All norms from the dense map."""
        largest, norm = self._largest, self.frobenius_norm()  # in this order: the largest need the maps themselves
        zero = torch.zeros_like(norm)
        return Norms(largest, norm, spectral.stable_rank(norm, largest), zero, zero, 0.0, self.shape[0])

    @property
    def _largest(self) -> Float[Tensor, " T"]:
        """The largest singular value of each token's map, as exactly as its dtype allows. Cost: the dense map."""
        if self._spectrum is not None:
            return self._spectrum[:, 0]
        if self._largest_values is None:
            exact = max(1e-7, spectral.least_tolerance(wide_dtype(self.dtype)))
            options: dict[str, Any] = {"align_to": self.value, "tolerance": exact}
            self._largest_values = torch.cat(
                [block_krylov_svd(part, 1, **options).S[:, 0] for _, part in self.by_token()]
            )
        return self._largest_values

    @in_plain_torch
    def frobenius_norm(self, tolerance: float | None = None) -> Float[Tensor, " T"]:
        """||J_i||_F of each token. Cost: the dense map, not held beyond the budget; or, to a `tolerance`, `norms`."""
        if tolerance is not None:
            return self.norms(tolerance).frobenius
        if self.fits_in_budget:
            self.dense()
        squares = [square_sums(part.transpose(0, 1), 1) for _, part in self.rows()]
        return torch.stack(squares).sum(0).sqrt().to(wide_dtype(self.dtype))

    @in_plain_torch
    def stable_rank(self, tolerance: float | None = None) -> Float[Tensor, " T"]:
        """||J_i||_F^2 / s_1^2 of each token (paper, 3.5). Cost: the dense map; or, to a tolerance, `norms`."""
        if tolerance is not None:
            return self.norms(tolerance).stable_rank
        return self._exact.stable_rank

    @in_plain_torch
    def to_dataframe(self) -> DataFrame:
        """One row per token: index, text, Frobenius norm, stable rank, largest singular value; needs pandas.

        Cost: the dense map, and T SVDs without vectors.
        """
        texts, exact = self.provenance().tokens, self._exact
        return dataframe(
            {
                "token": self.positions,
                "text": [texts[position] for position in self.positions],
                "frobenius_norm": exact.frobenius.tolist(),
                "stable_rank": exact.stable_rank.tolist(),
                "singular_value": exact.largest.tolist(),
            }
        )

    def to_scipy(self) -> LinearOperator:
        """J as a `scipy.sparse.linalg.LinearOperator` of shape (d_out, T d_in), with arrays on the CPU.

        Products cost the same columns. MissingExtraError without SciPy.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise MissingExtraError("to_scipy()", "SciPy", "scipy") from error
        d_out, length, d_in = self.shape
        dtype = wide_dtype(self.dtype)  # NumPy has no bfloat16

        def matmat(columns: np.ndarray) -> np.ndarray:
            block = torch.as_tensor(columns).T.reshape(-1, length, d_in)  # [T d_in, n] -> [n, T, d_in]
            return self.matmat(block).T.to("cpu", dtype).numpy()

        def rmatmat(columns: np.ndarray) -> np.ndarray:
            pulled = self.rmatmat(torch.as_tensor(columns).T.contiguous())
            return pulled.reshape(-1, length * d_in).T.to("cpu", dtype).numpy()  # [n, T, d_in] -> [T d_in, n]

        return LinearOperator(
            shape=(d_out, length * d_in),
            dtype=str(dtype).removeprefix("torch."),
            matvec=lambda x: matmat(x.reshape(-1, 1)).reshape(-1),
            rmatvec=lambda u: rmatmat(u.reshape(-1, 1)).reshape(-1),
            matmat=matmat,
            rmatmat=rmatmat,
        )
