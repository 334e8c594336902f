"""What people ask of a map's spectrum; how each answer is come by is planned."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.common.arguments import real, whole
from loclin.common.sums import square_sums
from loclin.common.surroundings import in_plain_torch
from loclin.maps.plan import Plan, cheaper_alone
from loclin.maps.plan import plan as make_plan
from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.results.result import Provenance
from loclin.results.table import dataframe
from loclin.spectral import (
    SVD,
    Norms,
    check_tolerance,
    effective_rank,
    full,
    krylov_svd,
    least_tolerance,
    stable_rank,
    stable_rank_and_norm,
    top,
    values,
    wide,
)

if TYPE_CHECKING:
    from pandas import DataFrame


class Spectra(ABC):
    """The spectral side of `loclin.LinearMap`: singular triples, norms and ranks of each token's map."""

    chain: Chain
    source: Point
    target: Point
    tokens: list[int]

    def __init__(self) -> None:
        self._spectrum: Tensor | None = None
        self._tops: Tensor | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(d_out, T, d_in)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of products and of the dense map."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the dense map and the products' results live."""

    @property
    @abstractmethod
    def value(self) -> Float[Tensor, " d_out"]:
        """The network's own value at the target."""

    @property
    @abstractmethod
    def known(self) -> Tensor | None:
        """The dense map, where it has been made already."""

    @property
    @abstractmethod
    def fits(self) -> bool:
        """Whether the dense map is within the budget, or there already."""

    @abstractmethod
    def matmat(self, Xs: Float[Tensor, "n T d_in"]) -> Float[Tensor, "n d_out"]:
        """J applied to n blocks of vectors."""

    @abstractmethod
    def rmatmat(self, Us: Float[Tensor, "n d_out"]) -> Float[Tensor, "n T d_in"]:
        """The transpose of J applied to n output vectors."""

    @abstractmethod
    def dense(self, path: str | os.PathLike[str] | None = None) -> Float[Tensor, "d_out T d_in"]:
        """All of J."""

    @abstractmethod
    def rows(self, chunk: int | None = None, start: int = 0) -> Iterator[tuple[slice, Float[Tensor, "n T d_in"]]]:
        """J in chunks of rows."""

    @abstractmethod
    def provenance(self) -> Provenance:
        """Which map this is."""

    @in_plain_torch
    def plan(self, k: int = 8, joint: bool = False, tolerance: float = 1e-3) -> Plan:
        """What each way to `svd` costs, and which one it takes; `print` it. Nothing is run."""
        return make_plan(self, k, joint=joint, tolerance=tolerance)

    @in_plain_torch
    def svd(
        self, k: int = 8, joint: bool = False, *, tolerance: float = 1e-3, plan: str = "auto", seed: int = 0
    ) -> SVD:
        """The k largest singular triples of each token's map, or with `joint` of [J_0 ... J_{T-1}].

        Signs are aligned to the output.

        Parameters
        ----------
        k
            How many triples.
        joint
            One decomposition of all tokens' maps side by side.
        tolerance
            How far a singular value may be from its bounds, as a share of it; the bounds are in the result. Vectors are
            good to about the root of that.
        plan
            "full": the dense map and LAPACK. "top": the dense map and a block Krylov method. "krylov": products alone;
            where its columns do not reach the tolerance, "top" takes over. "auto": the cheapest by counted time (see
            `plan`); products alone where the dense map is beyond the memory budget.
        seed
            Of random vectors: the same seed gives the same result.

        Raises
        ------
        OptionError
            For a k that the map does not have, a tolerance that its dtype does not hold, or an unknown plan.

        Notes
        -----
        Cost: the dense map and T (or one) dense decompositions, or the columns that `plan` counts.
        """
        k, seed, tolerance = whole("k", k), whole("seed", seed), real("tolerance", tolerance)
        check_tolerance(tolerance, wide(self.dtype))
        choice = make_plan(self, k, joint=joint, tolerance=tolerance, way=plan)
        found = None
        if choice.chosen == "krylov":
            found = self._alone(k, joint, tolerance, seed, choice.max_columns if plan == "auto" else None)
        if found is None and choice.chosen == "full":
            found = full(self.dense(), k, towards=self.value, joint=joint)
            if not joint:
                self._spectrum = found.spectrum
        elif found is None:
            found = top(self.dense(), k, towards=self.value, tolerance=tolerance, joint=joint, seed=seed)
        return replace(found, provenance=self.provenance())

    def _alone(self, k: int, joint: bool, tolerance: float, seed: int, most: int | None) -> SVD | None:
        """The triples from products alone; None where the columns allowed do not reach the tolerance."""
        found = krylov_svd(self, k, towards=self.value, tolerance=tolerance, joint=joint, max_columns=most, seed=seed)
        allowed = 2 * max(tolerance, least_tolerance(self.dtype))
        return found if most is None or bool((found.relative_error <= allowed).all()) else None

    @in_plain_torch
    def singular_values(self) -> Float[Tensor, "T r"]:
        """All singular values of each token's map, descending. Cost: the dense map, and T SVDs without vectors."""
        if self._spectrum is None:
            self._spectrum = values(self.dense())
        return self._spectrum

    @in_plain_torch
    def effective_rank(self) -> Float[Tensor, " T"]:
        """Exp of the entropy of each token's normalised singular values (Roy & Vetterli 2007). Cost: all of them."""
        return effective_rank(self.singular_values())

    @in_plain_torch
    def norms(self, tolerance: float = 0.02, seed: int = 0) -> Norms:
        """Largest singular value, Frobenius norm and stable rank of each token, to a relative tolerance.

        Cost: products alone (see `loclin.spectral.stable_rank_and_norm`) where they are expected to be cheaper than the
        dense map, from which everything is exact. The errors are in the result.
        """
        if cheaper_alone(self):
            return stable_rank_and_norm(self, tolerance=tolerance, certify=False, seed=seed)
        return self._exact

    @property
    def _exact(self) -> Norms:
        """All norms from the dense map."""
        largest, norm = self._largest, self.frobenius_norm()  # in this order: the dense map first
        zero = torch.zeros_like(norm)
        return Norms(largest, norm, stable_rank(norm, largest), zero, zero, 0.0, self.shape[0])

    @property
    def _largest(self) -> Float[Tensor, " T"]:
        """The largest singular value of each token's map, as exactly as the dtype allows. Cost: the dense map."""
        if self._spectrum is not None:
            return self._spectrum[:, 0]
        if self._tops is None:
            exact = max(1e-7, least_tolerance(wide(self.dtype)))
            self._tops = top(self.dense(), 1, towards=self.value, tolerance=exact).S[:, 0]
        return self._tops

    @in_plain_torch
    def frobenius_norm(self, tolerance: float | None = None) -> Float[Tensor, " T"]:
        """||J_i||_F of each token.

        Cost: the dense map, which is not held where it exceeds the budget; with a relative `tolerance`, see `norms`.
        """
        if tolerance is not None:
            return self.norms(tolerance).frobenius
        if self.fits:
            self.dense()
        squares = [square_sums(part.transpose(0, 1), 1) for _, part in self.rows()]
        return torch.stack(squares).sum(0).sqrt().to(wide(self.dtype))

    @in_plain_torch
    def stable_rank(self, tolerance: float | None = None) -> Float[Tensor, " T"]:
        """||J_i||_F^2 / s_1^2 of each token (paper, section 3.5).

        Cost: the dense map and its largest singular values; with a relative `tolerance`, see `norms`.
        """
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
                "token": self.tokens,
                "text": [texts[token] for token in self.tokens],
                "frobenius_norm": exact.frobenius.tolist(),
                "stable_rank": exact.stable_rank.tolist(),
                "singular_value": exact.largest.tolist(),
            }
        )
