"""How a prediction takes shape with depth: every layer's maps, their ranks and words, and a logit lens beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from loclin.analyses.decode import Decoder, Words
from loclin.analyses.explain import SingularBlock
from loclin.analyses.logit_lens import LensLayer, logit_lens
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.errors import OptionError
from loclin.maps.certificate import tolerance
from loclin.maps.layer_spectra import LayerSpectra
from loclin.maps.linearized import Linearized
from loclin.results.display import Shown
from loclin.results.result import versions

SHOWN = 3
"""Singular vectors that are put into words."""
_CANCELLED = 10.0
"""How much larger what an inner map sums may be than its sum: attention takes a sink's large values apart."""
WORDS = 5
"""Words of each vector, a side."""
APPEARS = 10
"""A word has appeared once it is among this many."""
_LAYERWISE_TRIPLES = 1  # a stable rank needs the largest value alone

Signs = Literal["layer", "final"]
Place = tuple[int, int, int | None]
"""Component, layer, and token; None: all tokens' maps side by side."""


@dataclass(frozen=True)
class ComponentLayers:
    """One component's maps from the first layer to the last, with the frozen final norm on top.

    Lists have one entry for each of L layers. *Joint* means all tokens' maps side by side.

    Attributes
    ----------
    name
        `resid_post`, `attn_out` or `mlp_out`.
    joint_sigma1, joint_spectra
        The largest singular value of the joint map from the embeddings, and the k largest over it (paper, Figure 6A).
    path, path_defined
        |<u1, u1_last>| and |<u2, u2_last>|, joint left vectors against the last layer's (Figure 6B); a vector has no
        sign of its own. False where a near-equal neighbour leaves one of the four vectors undefined.
    joint_stable_rank, token_stable_rank
        Of the maps from the embeddings: joint (Figure 6C), and each of T tokens'.
    joint_own_rank, token_own_rank
        Stable ranks of the layer's own maps, from its input (Figure 6D).
    joint_vectors, token_vectors
        The top singular vectors of the maps from the embeddings in words (Tables 1 to 3 and 5 to 7): joint ones have no
        `reads`, and a token whose map is zero has no vectors.
    joint_word_rank, token_word_rank
        The predicted token's place among the words of the first left vector: of the joint map, and of the map of the
        token at the position itself; None where that vector is not defined.
    reconstruction_error, own_reconstruction_error
        |J x + b - y| / |y|, from the embeddings and from the layer's input.
    """

    name: str
    joint_sigma1: list[float]
    joint_spectra: list[list[float]]
    path: list[list[float]]
    path_defined: list[bool]
    joint_stable_rank: list[float]
    token_stable_rank: list[list[float]]
    joint_own_rank: list[float]
    token_own_rank: list[list[float]]
    joint_vectors: list[list[SingularBlock]]
    token_vectors: list[list[list[SingularBlock]]]
    joint_word_rank: list[int | None]
    token_word_rank: list[int | None]
    reconstruction_error: list[float]
    own_reconstruction_error: list[float]

    __repr__ = brief

    @property
    def largest_error(self) -> float:
        """The largest reconstruction error of all its maps."""
        return max(self.reconstruction_error + self.own_reconstruction_error)


@dataclass(frozen=True)
class LayerExplanation(Shown):
    """Every layer of a prompt explained; made by `explain_layers`.

    Attributes
    ----------
    model, settings
        What was run, and how: enough to run it again.
    tokens, sinks
        The T input tokens, and which of them are attention sinks.
    predictions
        The model's most probable next tokens, as (text, probability).
    target
        The token that is followed with depth, the most probable one: its `id`, `text` and `probability`.
    components
        Attention's and the MLP's output and the residual stream behind them, as far as every layer has them.
    lens
        The logit lens at the position, layer by layer.
    appears, leads
        The first layer at which the predicted token is among the first ten words, and where it is the first; by reader:
        `lens`, and `joint` and `token` of each component, such as `resid_post joint`. None: never.
    tolerance
        The largest reconstruction error at which a map counts as exact.
    warnings
        What a reader should know before trusting the words.
    spectra
        The triples of all maps from the embeddings, to save; not part of the JSON.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: str
    tokens: list[str]
    sinks: list[int]
    predictions: Words
    target: dict[str, Any]
    components: list[ComponentLayers]
    lens: list[LensLayer]
    appears: dict[str, int | None]
    leads: dict[str, int | None]
    tolerance: float
    warnings: list[str]
    spectra: LayerSpectra = field(repr=False, compare=False)

    __repr__ = brief

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.lens)

    @property
    def largest_error(self) -> float:
        """The largest reconstruction error of all maps."""
        return max(component.largest_error for component in self.components)

    @property
    def passed(self) -> bool:
        """Whether every map of every layer rebuilds its output."""
        return self.largest_error <= self.tolerance

    @property
    def main(self) -> ComponentLayers:
        """The residual stream, where it was asked for."""
        return self.components[-1]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("spectra", "components", "lens")}
        components = [asdict(c) | {"largest_error": c.largest_error} for c in self.components]
        found = {"components": components, "lens": [asdict(layer) for layer in self.lens]}
        return plain | found | {"largest_error": self.largest_error, "passed": self.passed}

    def to_json(self) -> str:
        """The explanation as JSON text; floats that are not finite do not occur."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


@in_plain_torch
def explain_layers(
    lin: Linearized,
    k: int = 8,
    position: int = -1,
    components: Sequence[str] | None = None,
    signs: Signs = "layer",
    progress: Progress = silent,
) -> LayerExplanation:
    """Explain how a prediction takes shape with depth (paper, section 3.4, Figure 6, Tables 1 to 3 and 5 to 7).

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    k
        How many singular values of each map from the embeddings; the first three vectors are put into words.
    position
        Which prediction: the one after this token.
    components
        Some of `resid_post`, `attn_out` and `mlp_out`; all that every layer has, unless given.
    signs
        Singular vectors have no sign of their own, and what they write depends on it. "layer" turns each towards its
        own layer's output, "final" towards the final prediction, behind the final norm, as the paper's author does.
    progress
        Told the name of each step as it begins.

    Raises
    ------
    PromptError
        For a position outside the prompt.
    OptionError
        For a k below 2 (the path needs two vectors) or beyond the number of singular values, or a component or signs
        that there are not.

    Notes
    -----
    Cost: `Linearization.layers` twice, `"cumulative"` and `"layerwise"`: about two and a half and, with three
    components, up to three dense maps, with their triples; about 6 C L (T + 1) products with the head or the
    embeddings; and two forward passes. Memory: as `Linearization.layers`, 2 C L T d k numbers of which stay.
    """
    k = whole("k", k)
    if k < 2:
        raise OptionError(f"k={k}: the path with depth needs the first two singular vectors; ask for two or more")
    if signs not in get_args(Signs):
        raise OptionError(f"signs={signs!r}: choose layer or final")
    at = lin.trace.position(position)
    progress("maps from the embeddings")
    cumulative = lin.layers(components, "cumulative", k, at)
    if signs == "final":
        cumulative = _signed(cumulative, lin.value("final")[at])
    progress("each layer's own map")
    own = lin.layers(components, "layerwise", _LAYERWISE_TRIPLES, at)
    progress("words")
    predictions = lin.next_token_ids(10, at)
    chosen, text, probability = predictions[0]
    decoder = Decoder(lin.model)
    words = _in_words(cumulative, lin.embeddings, decoder)
    ranks = _word_ranks(cumulative, words, decoder, chosen, at)
    found = [_component(c, cumulative, own, words, ranks, at) for c in range(len(cumulative.components))]
    lens = logit_lens(lin, chosen, at)
    followed: dict[str, Sequence[int | None]] = {"lens": [layer.rank for layer in lens]}
    for component in found:
        followed[f"{component.name} joint"] = component.joint_word_rank
        followed[f"{component.name} token"] = component.token_word_rank
    return LayerExplanation(
        model=lin.model.info.to_dict(),
        settings={
            "position": at,
            "k": k,
            "components": cumulative.components,
            "signs": signs,
            "gate": lin.gate,
            "precision": lin.precision,
            "source": "embed (what enters layer 0, after any embedding scale); own maps: the layer's input",
            "target": "each layer, through the final norm frozen at its own value",
            "route": cumulative.route,
            "columns": cumulative.columns + own.columns,
            "spectrum_tolerance": cumulative.tolerance,
            "token_ids": lin.input_ids[0].tolist(),
            "versions": versions(),
        },
        prompt=lin.text,
        tokens=lin.tokens,
        sinks=lin.sinks,
        predictions=[(word, p) for _, word, p in predictions],
        target={"id": chosen, "text": text, "probability": probability},
        components=found,
        lens=lens,
        appears={reader: _first(ranks, APPEARS) for reader, ranks in followed.items()},
        leads={reader: _first(ranks, 1) for reader, ranks in followed.items()},
        tolerance=_CANCELLED * tolerance(lin.trace),
        warnings=lin.warnings,
        spectra=cumulative,
    )


def _signed(spectra: LayerSpectra, towards: Tensor) -> LayerSpectra:
    """The same triples, turned so that every left vector has a non-negative product with a vector `[d]`."""
    assert spectra.joint_U is not None
    sign, joint = (
        torch.where(towards.to(U) @ U < 0, -1.0, 1.0).to(U).unsqueeze(-2) for U in (spectra.U, spectra.joint_U)
    )
    return replace(
        spectra,
        U=spectra.U * sign,
        Vh=spectra.Vh * sign.transpose(-1, -2),
        joint_U=spectra.joint_U * joint,
    )


def _first(ranks: Sequence[int | None], at_most: int) -> int | None:
    return next((layer for layer, rank in enumerate(ranks) if rank is not None and rank <= at_most), None)


def _component(
    c: int,
    cumulative: LayerSpectra,
    own: LayerSpectra,
    words: dict[Place, list[SingularBlock]],
    ranks: dict[Place, int],
    position: int,
) -> ComponentLayers:
    U, S = cumulative.joint_U, cumulative.joint_S
    joint, own_joint = cumulative.joint_stable_rank, own.joint_stable_rank
    assert U is not None
    assert S is not None
    assert joint is not None
    assert own_joint is not None
    layers, length = range(cumulative.n_layers), cumulative.S.shape[2]
    singles = [[len(block.indices) == 1 for block in words[c, layer, None][:2]] for layer in layers]
    pair = U[c, :, :, :2]
    largest = S[c, :, :1]
    return ComponentLayers(
        name=cumulative.components[c],
        joint_sigma1=largest[:, 0].tolist(),
        joint_spectra=torch.where(largest > 0, S[c] / largest, 0.0).tolist(),
        path=torch.einsum("ldj,dj->lj", pair, pair[-1]).abs().clamp(max=1).tolist(),
        path_defined=[all(singles[layer]) and all(singles[-1]) for layer in layers],
        joint_stable_rank=joint[c].tolist(),
        token_stable_rank=cumulative.stable_rank[c].tolist(),
        joint_own_rank=own_joint[c].tolist(),
        token_own_rank=own.stable_rank[c].tolist(),
        joint_vectors=[words[c, layer, None] for layer in layers],
        token_vectors=[[words[c, layer, token] for token in range(length)] for layer in layers],
        joint_word_rank=[ranks.get((c, layer, None)) for layer in layers],
        token_word_rank=[ranks.get((c, layer, position)) for layer in layers],
        reconstruction_error=cumulative.reconstruction_error[c].tolist(),
        own_reconstruction_error=own.reconstruction_error[c].tolist(),
    )


def _left(spectra: LayerSpectra, place: Place) -> tuple[Tensor, Tensor]:
    """The left vectors `[d, k]` and the values `[k]` of one map."""
    c, layer, token = place
    if token is not None:
        return spectra.U[c, layer, token], spectra.S[c, layer, token]
    assert spectra.joint_U is not None
    assert spectra.joint_S is not None
    return spectra.joint_U[c, layer], spectra.joint_S[c, layer]


def _in_words(spectra: LayerSpectra, x: Tensor, decoder: Decoder) -> dict[Place, list[SingularBlock]]:
    """The first vectors of every map in words, near-equal ones together; those that stand alone in one product."""
    groups: dict[Place, list[list[int]]] = {}
    for c, name in enumerate(spectra.components):
        for layer in range(spectra.n_layers):
            svd = spectra.svd(name, layer)
            groups |= {(c, layer, token): svd.blocks(token) for token in range(len(svd.S))}
            groups[c, layer, None] = spectra.joint_blocks(name, layer)
    groups = {
        place: [group for group in found if group[0] < SHOWN] if _left(spectra, place)[1][0] > 0 else []
        for place, found in groups.items()
    }
    alone = [(place, group[0]) for place, found in groups.items() for group in found if len(group) == 1]
    left = [_left(spectra, place)[0][:, j] for place, j in alone]
    writes = dict(zip(alone, decoder.writes(torch.stack(left), WORDS) if left else [], strict=True))
    right: dict[tuple[Place, int], Tensor] = {
        ((c, layer, t), j): spectra.Vh[c, layer, t, j] for (c, layer, t), j in alone if t is not None
    }
    read = decoder.reads(torch.stack(list(right.values())), WORDS) if right else []
    reads = dict(zip(right, read, strict=True))

    def block(place: Place, indices: list[int]) -> SingularBlock:
        c, layer, token = place
        U, S = _left(spectra, place)
        values, key = S[indices].tolist(), (place, indices[0])
        if len(indices) == 1:
            gain = None if token is None else (right[key] @ x[token].to(right[key])).item()
            return SingularBlock(indices, values, writes[key], reads.get(key, []), gain)
        spanned = [] if token is None else decoder.reads_subspace(spectra.Vh[c, layer, token, indices].T, WORDS)
        return SingularBlock(indices, values, decoder.writes_subspace(U[:, indices], WORDS), spanned, None)

    return {place: [block(place, group) for group in found] for place, found in groups.items()}


def _word_ranks(
    spectra: LayerSpectra, words: dict[Place, list[SingularBlock]], decoder: Decoder, chosen: int, position: int
) -> dict[Place, int]:
    """A token's rank under the first left vector of the joint map and of the position's own, where it stands alone."""
    places = [
        place for place, found in words.items() if place[2] in (None, position) and found and len(found[0].indices) == 1
    ]
    if not places:
        return {}
    vectors = torch.stack([_left(spectra, place)[0][:, 0] for place in places])
    return dict(zip(places, decoder.ranks(vectors, chosen), strict=True))
