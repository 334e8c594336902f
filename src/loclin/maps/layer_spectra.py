"""Spectra of every layer's maps, each taken while its map is in memory, so that memory never holds all maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from loclin.common.arguments import real, whole
from loclin.common.progress import bar
from loclin.common.sums import relative_error
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.layer_maps import check_components, layer_bytes, layer_maps, plan_direction
from loclin.maps.linear_map import LinearMap
from loclin.maps.linearized import Linearized, question
from loclin.network.chain import Chain
from loclin.network.points import Point
from loclin.results.provenance import Provenance
from loclin.results.result import Result
from loclin.spectral import SVD, RitzTriples, ritz_svd
from loclin.spectral.bounds import rounding
from loclin.spectral.result import near_equal


@dataclass(frozen=True)
class LayerSpectra(Result):
    """The k largest singular triples of C components' maps at L layers (paper, section 3.4 and Figure 6).

    Values are Ritz values: never above the true ones, and below them by about residual^2 / S, which is at most
    `tolerance` S; for the largest value 1e-6 S, unless another that is not among these is as large.

    Attributes
    ----------
    mode, normed, direction: which maps they are, whether the final norm is on top, and the sweeps' direction
        ("forward" or "backward"; see `loclin.maps.layer_maps`).
    components: their C names, in the order of the first axis.
    U, S, Vh, residuals: of each token's map, `[C, L, T, d_out, k]`, `[C, L, T, k]`, `[C, L, T, k, d_in]`,
        `[C, L, T, k]`.
    frobenius, stable_rank: of each token's map, `[C, L, T]`; right to 1e-5.
    joint_U, joint_S, joint_residuals, joint_frobenius, joint_stable_rank: of all tokens' maps side by side,
        `[C, L, d_out, k]`, `[C, L, k]` twice, `[C, L]` twice; None without `joint=True`.
    reconstruction_error, bias_share: |J x + b - y| / |y| and |b| / |y| of each map, `[C, L]`.
    tolerance: the relative tolerance of the values.
    columns: how many columns the sweeps pushed or pulled.
    provenance, warnings: the prompt and the model, with the components as `target`; warnings about the prompt.
    """

    mode: str
    normed: bool
    direction: str
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
    warnings: list[str] = field(default_factory=list)

    @property
    def n_layers(self) -> int:
        """L."""
        return self.S.shape[1]

    def index(self, component: str) -> int:
        """A component's index on the first axis; OptionError if the result does not have it."""
        if component not in self.components:
            raise OptionError(f"component {component!r} is not in this result: choose {', '.join(self.components)}")
        return self.components.index(component)

    def svd(self, component: str, layer: int) -> SVD:
        """Each token's triples at a layer, `upper` estimated (so `failure` is 1); OptionError if there are none."""
        at = self._at(component, layer)
        S, residuals = self.S[at], self.residuals[at]
        lower, upper = self._bounds(S, residuals, self.Vh.shape[-1])
        return SVD(self.U[at], S, self.Vh[at], residuals, lower, upper, 1.0, self.frobenius[at], "ritz")

    @in_plain_torch
    def joint_blocks(self, component: str, layer: int) -> list[list[int]]:
        """Indices of the joint singular values at one layer, near-equal ones together, as in `SVD.blocks`.

        OptionError for a component or a layer that the result does not have, or without joint triples.
        """
        at = self._at(component, layer)
        if self.joint_S is None or self.joint_residuals is None:
            raise OptionError("this result has no joint triples: make it with joint=True")
        S = self.joint_S[at]
        columns = self.S.shape[2] * self.Vh.shape[-1]
        return near_equal(S, *self._bounds(S, self.joint_residuals[at], columns))

    def _at(self, component: str, layer: int) -> tuple[int, int]:
        if not -self.n_layers <= layer < self.n_layers:
            raise OptionError(f"layer {layer}: choose a layer from 0 to {self.n_layers - 1}")
        return self.index(component), layer

    def _bounds(self, S: Tensor, residuals: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds on the true values of maps with so many columns: rigorous, and estimated."""
        dtype = S.dtype if self.provenance is None else getattr(torch, self.provenance.dtype)  # the maps' own
        slack = rounding(self.U.shape[-2], columns, dtype) * S[..., :1]
        above = torch.where(S > 0, residuals.square() / S, 0.0) + slack
        return (S - slack).clamp(min=0), S + above

    def table(self) -> dict[str, list[Any]]:
        """One row per component, layer and token."""
        C, L, T = self.frobenius.shape
        tokens = self.provenance.tokens if self.provenance is not None else [""] * T
        errors = self.reconstruction_error.unsqueeze(-1).expand(C, L, T)
        columns: dict[str, list[Any]] = {
            "component": [name for name in self.components for _ in range(L * T)],
            "layer": [layer for _ in range(C) for layer in range(L) for _ in range(T)],
            "token": list(range(T)) * (C * L),
            "text": tokens * (C * L),
            "frobenius_norm": self.frobenius.flatten().tolist(),
            "stable_rank": self.stable_rank.flatten().tolist(),
            "reconstruction_error": errors.flatten().tolist(),
        }
        return columns | {f"singular_value_{j + 1}": self.S[..., j].flatten().tolist() for j in range(self.S.shape[-1])}


@question
def layer_spectra(
    lin: Linearized,
    *,
    components: Sequence[str] | None = None,
    mode: str = "cumulative",
    k: int = 8,
    position: int = -1,
    normed: bool | None = None,
    joint: bool = True,
    tolerance: float = 1e-3,
    direction: str | None = None,
) -> LayerSpectra:
    """Spectra of every layer's exact maps to one position, from one sweep (paper, section 3.4 and Figure 6).

    Parameters
    ----------
    components: some of `"resid_post"`, `"attn_out"` and `"mlp_out"`; by default all that every layer has. In a
        parallel block, attention and MLP both read the layer's input.
    mode: `"cumulative"`: from the embeddings to each layer; `"layerwise"`: from the layer's own input; `"suffix"`:
        from each layer to `final`, where attention's and the MLP's output reach it through the residual stream.
    k, tolerance: how many singular triples of each map; the largest relative error of their values, below 1.
    position: where the maps end.
    normed: put the final norm, frozen at the point's own value, on top of maps that end at a layer, so that the
        output head can read what vectors write. The default, except for `"suffix"`.
    joint: also decompose all tokens' maps side by side.
    direction: for `"cumulative"`: `"forward"` (one sweep) or `"backward"` (one for each layer and component); by
        default the cheaper one.

    Raises
    ------
    OptionError: for a component, mode or k that does not exist; names a layer without the component.
    PromptError: for a position outside the prompt.

    Notes
    -----
    Cost: about two and a half dense maps for `"cumulative"` with explicit products and a short prompt (see
    `loclin.network.cost.prefix_sweep_cost`), one at most for each component of `"layerwise"`, one for `"suffix"`;
    and the triples. Memory: T^2 d^2 / 2 numbers for the forward sweep, if that is within the budget; one layer's
    maps; and the triples of all of them.
    """
    chain, trace, at, budget = lin.chain, lin.trace, lin.trace.target_position(position), lin.allowance
    names, k, tolerance = check_components(chain, components), whole("k", k), real("tolerance", tolerance)
    if normed and mode == "suffix":
        raise OptionError("normed=True: maps to `final` include the final norm already; leave it out")
    on_top = mode != "suffix" and normed is not False
    taken = (direction or plan_direction(chain, at, names, budget)) if mode == "cumulative" else "backward"
    budget.require("the maps of every layer", layer_bytes(chain, at, names, taken))
    found: dict[tuple[int, int], RitzTriples] = {}
    together: dict[tuple[int, int], RitzTriples] = {}
    errors, shares = torch.zeros(2, len(names), trace.n_layers, dtype=torch.float64)
    columns: list[int] = []
    options: dict[str, Any] = {"normed": on_top, "direction": taken, "budget": budget, "progress": columns.append}
    with bar(total=len(names) * trace.n_layers, desc=f"{mode} maps", unit="map") as progress_bar:
        for item in layer_maps(chain, mode, at, names, **options):
            place = (names.index(item.component), item.layer)
            found[place] = ritz_svd(item.maps, k, item.value, tolerance=tolerance)
            if joint:
                together[place] = ritz_svd(item.joint[None], k, item.value, tolerance=tolerance)
            errors[place] = item.reconstruction_error
            shares[place] = relative_error(item.bias, item.value)
            progress_bar.update()

    sides = ("U", "S", "residuals", "frobenius", "stable_rank")
    own: dict[str, Any] = {field: _stack(found, field) for field in (*sides, "Vh")}
    side_by_side: dict[str, Any] = {
        f"joint_{field}": _stack(together, field).squeeze(2) if joint else None for field in sides
    }
    return LayerSpectra(
        mode=mode,
        normed=on_top,
        direction=taken,
        components=list(names),
        **own,
        **side_by_side,
        reconstruction_error=errors,
        bias_share=shares,
        tolerance=tolerance,
        columns=sum(columns),
        provenance=_describe(chain, at, names, mode, on_top),
        warnings=lin.warnings,
    )


def _stack(results: dict[tuple[int, int], RitzTriples], field: str) -> Tensor:
    """One field of the results of all components and layers: `[C, L, ...]`."""
    n_components, n_layers = (1 + max(ends) for ends in zip(*results, strict=True))
    rows = [[getattr(results[c, layer], field) for layer in range(n_layers)] for c in range(n_components)]
    return torch.stack([torch.stack(row) for row in rows])


def _describe(chain: Chain, position: int, names: Sequence[str], mode: str, normed: bool) -> Provenance:
    """The provenance of all layers' maps: one of their ends is named once for all layers, such as `attn_out.*`."""
    described = LinearMap(chain, Point("embed"), Point("final"), position).provenance()
    points = ", ".join(f"{name}.*" for name in names)
    source = {"suffix": points, "layerwise": "resid_pre.*"}.get(mode, "embed")
    return replace(described, source=source, target="final" if mode == "suffix" else points, normed=normed)
