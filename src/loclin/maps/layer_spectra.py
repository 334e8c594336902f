"""Spectra of every layer's maps, taken as the sweep passes, so that memory never holds all maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loclin.common.arguments import real, whole
from loclin.common.brief import brief
from loclin.common.sums import relative
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.layer_maps import check_components, layer_maps, plan_route
from loclin.maps.linear_map import LinearMap
from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.results.result import Provenance, Result
from loclin.results.table import dataframe
from loclin.spectral import SVD, Ritz, ritz, stable_rank
from loclin.spectral.bounds import rounding
from loclin.spectral.result import near_equal

if TYPE_CHECKING:
    from pandas import DataFrame

ROUTE = "ritz"


@dataclass(frozen=True)
class LayerSpectra(Result):
    """The k largest singular triples of C components' maps at L layers (paper, section 3.4 and Figure 6).

    Attributes
    ----------
    mode, normed, route
        What the maps are, whether the final norm is on top, and which sweeps made them (see `loclin.maps.layer_maps`).
    components
        Their C names, in the order of the first axis.
    U, S, Vh, residuals
        Of each token's map: `[C, L, T, d_out, k]`, `[C, L, T, k]`, `[C, L, T, k, d_in]`, `[C, L, T, k]`. Values are
        Ritz values: never above the true ones, and by about residual^2 / S below, `tolerance` of S at most; the
        largest by 1e-6 of it, unless another that is not among these is as large.
    frobenius, stable_rank
        Of each token's map, `[C, L, T]`: the norm summed in float64, and so right to 1e-5.
    joint_U, joint_S, joint_residuals, joint_frobenius, joint_stable_rank
        The same of all tokens' maps side by side, `[C, L, d_out, k]`, `[C, L, k]` twice, `[C, L]` twice; None where
        not asked for.
    reconstruction_error
        |J x + b - y| / |y| of each map, `[C, L]`.
    bias_share
        |b| / |y|, `[C, L]`.
    tolerance
        Of the values.
    columns
        How many columns the sweeps pushed or pulled.
    provenance
        Which prompt and model; its `target` names the components.
    """

    mode: str
    normed: bool
    route: str
    components: list[str]
    U: Tensor
    S: Tensor
    Vh: Tensor
    residuals: Tensor
    frobenius: Tensor
    stable_rank: Tensor
    joint_U: Tensor | None
    joint_S: Tensor | None
    joint_residuals: Tensor | None
    joint_frobenius: Tensor | None
    joint_stable_rank: Tensor | None
    reconstruction_error: Tensor
    bias_share: Tensor
    tolerance: float
    columns: int
    provenance: Provenance | None = None

    __repr__ = brief

    @property
    def n_layers(self) -> int:
        """L."""
        return self.S.shape[1]

    def index(self, component: str) -> int:
        """Where a component is on the first axis.

        Raises
        ------
        OptionError
            When it was not asked for.
        """
        if component not in self.components:
            raise OptionError(f"{component!r} is not among the components {', '.join(self.components)}; ask for it")
        return self.components.index(component)

    def svd(self, component: str, layer: int) -> SVD:
        """Each token's triples at one layer; `upper` is an estimate, and so `failure` is 1.

        Raises
        ------
        OptionError
            For a component or a layer that is not there.
        """
        at = self._at(component, layer)
        S, residuals = self.S[at], self.residuals[at]
        lower, upper = self._bounds(S, residuals, self.Vh.shape[-1])
        return SVD(self.U[at], S, self.Vh[at], residuals, lower, upper, 1.0, self.frobenius[at], ROUTE)

    @in_plain_torch
    def joint_blocks(self, component: str, layer: int) -> list[list[int]]:
        """Indices of the joint singular values at one layer, near-equal ones together, as in `SVD.blocks`.

        Raises
        ------
        OptionError
            For a component or a layer that is not there, or where joint triples were not asked for.
        """
        at = self._at(component, layer)
        if self.joint_S is None or self.joint_residuals is None:
            raise OptionError("there are no joint triples: ask for them with joint=True")
        S = self.joint_S[at]
        columns = self.S.shape[2] * self.Vh.shape[-1]
        return near_equal(S, *self._bounds(S, self.joint_residuals[at], columns))

    def _at(self, component: str, layer: int) -> tuple[int, int]:
        if not -self.n_layers <= layer < self.n_layers:
            raise OptionError(f"layer {layer}: there are layers 0 to {self.n_layers - 1}")
        return self.index(component), layer

    def _bounds(self, S: Tensor, residuals: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Where the true values of maps with so many columns are: rigorous from below, estimated from above."""
        dtype = S.dtype if self.provenance is None else getattr(torch, self.provenance.dtype)  # the maps' own
        slack = rounding(self.U.shape[-2], columns, dtype) * S[..., :1]
        above = torch.where(S > 0, residuals.square() / S, 0.0) + slack
        return (S - slack).clamp(min=0), S + above

    def to_dataframe(self) -> DataFrame:
        """One row per component, layer and token; needs pandas."""
        C, L, T = self.frobenius.shape
        tokens = self.provenance.tokens if self.provenance is not None else [""] * T
        return dataframe(
            {
                "component": [name for name in self.components for _ in range(L * T)],
                "layer": [layer for _ in range(C) for layer in range(L) for _ in range(T)],
                "token": list(range(T)) * (C * L),
                "text": tokens * (C * L),
                "frobenius_norm": self.frobenius.flatten().tolist(),
                "stable_rank": self.stable_rank.flatten().tolist(),
                "reconstruction_error": self.reconstruction_error.unsqueeze(-1).expand(C, L, T).flatten().tolist(),
            }
            | {f"singular_value_{j + 1}": self.S[..., j].flatten().tolist() for j in range(self.S.shape[-1])}
        )


@in_plain_torch
def layer_spectra(
    chain: Chain,
    position: int,
    *,
    components: Sequence[str] | None = None,
    mode: str = "cumulative",
    k: int = 8,
    normed: bool | None = None,
    joint: bool = True,
    tolerance: float = 1e-3,
    route: str | None = None,
    budget: int | float | str | None = None,
) -> LayerSpectra:
    """Decompose every layer's maps; see `Linearization.layers`."""
    names, k, tolerance = check_components(chain, components), whole("k", k), real("tolerance", tolerance)
    trace = chain.trace
    if normed and mode == "suffix":
        raise OptionError("normed=True: maps to `final` pass the final norm as it is; leave it out")
    on_top = mode != "suffix" and normed is not False
    taken = (route or plan_route(chain, position, names, budget)) if mode == "cumulative" else "backward"
    found: dict[tuple[int, int], Ritz] = {}
    together: dict[tuple[int, int], Ritz] = {}
    errors, shares = torch.zeros(2, len(names), trace.n_layers, dtype=torch.float64)
    columns = 0
    total = len(names) * trace.n_layers
    with tqdm(total=total, desc=f"{mode} maps", unit="map", delay=2, leave=False, disable=None) as bar:

        def passed(count: int) -> None:
            nonlocal columns
            columns += count

        maps = layer_maps(chain, mode, position, names, normed=on_top, route=taken, budget=budget, progress=passed)
        for item in maps:
            at = (names.index(item.component), item.layer)
            found[at] = ritz(item.maps, k, item.value, tolerance=tolerance)
            if joint:
                together[at] = ritz(item.joint[None], k, item.value, tolerance=tolerance)
            errors[at] = item.reconstruction_error
            shares[at] = relative(item.bias, item.value)
            bar.update()

    def stacked(results: dict[tuple[int, int], Ritz], field: str) -> Tensor:
        layers = range(trace.n_layers)
        rows = [torch.stack([getattr(results[c, layer], field) for layer in layers]) for c in range(len(names))]
        return torch.stack(rows)

    own = {field: stacked(found, field) for field in ("U", "S", "Vh", "residuals", "frobenius")}
    fields = ("U", "S", "residuals", "frobenius")
    all_ = {field: stacked(together, field).squeeze(2) if joint else None for field in fields}
    ends = Point("embed"), Point("final")
    described = LinearMap(chain, *ends, position).provenance().to_dict()
    described |= {"target": ", ".join(f"{name}.*" for name in names), "normed": on_top}
    if mode == "suffix":
        described |= {"source": described["target"], "target": "final"}
    elif mode == "layerwise":
        described["source"] = "resid_pre.*"
    return LayerSpectra(
        mode=mode,
        normed=on_top,
        route=taken,
        components=list(names),
        **own,
        stable_rank=stable_rank(own["frobenius"], own["S"][..., 0]),
        joint_U=all_["U"],
        joint_S=all_["S"],
        joint_residuals=all_["residuals"],
        joint_frobenius=all_["frobenius"],
        joint_stable_rank=None
        if all_["S"] is None or all_["frobenius"] is None
        else stable_rank(all_["frobenius"], all_["S"][..., 0]),
        reconstruction_error=errors,
        bias_share=shares,
        tolerance=tolerance,
        columns=columns,
        provenance=Provenance.from_dict(described),
    )
