"""How a prediction forms with depth: the maps of every layer, their ranks and words, and the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.decode import Decoder, SingularBlock, Triples, Words, decoder_at, put_into_words
from loclin.analyses.logit_lens import LensLayer, logit_lens
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.maps.certificate import tolerance
from loclin.maps.layer_spectra import LayerSpectra, layer_spectra
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import AtPrompt
from loclin.results.serialise import TENSORS_ONLY

SHOWN = 3
"""How many singular vectors of each map are put into words."""
_CANCELLED = 10.0
"""How much larger the terms of an inner map may be than their sum: the large values of an attention sink cancel."""
WORDS = 5
"""How many words each side of a vector gets."""
APPEARS = 10
"""A word has appeared at a layer if it is among this many first words."""
_LAYERWISE_TRIPLES = 1  # a stable rank needs only the largest singular value

Signs = Literal["layer", "final"]
Place = tuple[int, int, int | None]
"""Component, layer, and token; None: the joint map of all tokens."""


@dataclass(frozen=True)
class ComponentLayers:
    """The maps of one component from the first layer to the last, followed by the frozen final norm.

    Lists have one entry for each of L layers. The *joint* map is [J_0 ... J_{T-1}], the maps of all tokens side by
    side; maps are from the embeddings, but *own* ones from the layer's input.

    Attributes
    ----------
    name: `resid_post`, `attn_out` or `mlp_out`.
    joint_sigma1, joint_spectra: the largest singular value, and the k largest ones divided by it (paper, Figure 6A).
    path, path_defined: the first two joint left vectors against those of the last layer, |<u1, u1_last>| and |<u2,
        u2_last>| (Figure 6B), without sign, since singular vectors have none. False where a near-equal singular value
        leaves one of the four vectors undefined.
    joint_stable_rank, token_stable_rank: stable ranks of the joint map (Figure 6C), and of each of the T tokens' maps.
    joint_own_rank, token_own_rank: the same of the layer's own maps (Figure 6D).
    joint_vectors, token_vectors: the first singular vectors in words (Tables 1 to 3 and 5 to 7). Joint ones have no
        `reads`; a token whose map is zero has no vectors.
    joint_word_rank, token_word_rank: the predicted token's rank among the words of the first left vector: of the joint
        map, and of the map of the token at the position itself. None where that vector is not defined.
    reconstruction_error, own_reconstruction_error: |J x + b - y| / |y|.
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

    derived = ("largest_error",)
    __repr__ = brief

    @property
    def largest_error(self) -> float:
        """The largest reconstruction error of the component's maps."""
        return max(self.reconstruction_error + self.own_reconstruction_error)


@dataclass(frozen=True)
class LayerExplanation(AtPrompt):
    """Every layer of a prompt explained; made by `explain_layers`.

    Attributes
    ----------
    settings: `k`, `signs`, and the cost of the sweeps.
    tokens, sinks: the T input tokens, and the positions of attention sinks.
    predictions: the model's most probable next tokens, as (text, probability).
    target: the token that is followed with depth, the most probable one: its `id`, `text` and `probability`.
    components: the attention output, the MLP output and the residual stream after the layer, if every layer has them.
    lens: the logit lens at the position, layer by layer.
    appears, leads: the first layer at which the predicted token is among the first ten words, and at which it is the
        first one; None: never. Keys: `lens`, and `joint` and `token` for each component, such as `resid_post joint`.
    tolerance: the largest reconstruction error at which a map counts as exact.
    spectra: the triples of all maps from the embeddings; too large for JSON: save the result as `.safetensors`.
    """

    provenance: Provenance
    settings: dict[str, Any]
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
    spectra: LayerSpectra | None = field(default=None, repr=False, compare=False, metadata=TENSORS_ONLY)

    derived = ("prompt", "largest_error", "passed")

    def table(self) -> dict[str, list[Any]]:
        """One row per component and layer: stable ranks, word ranks and errors."""
        rows = [(c, layer) for c in self.components for layer in range(self.n_layers)]
        numbers = (
            "joint_sigma1", "joint_stable_rank", "joint_own_rank", "joint_word_rank", "token_word_rank",
            "reconstruction_error", "own_reconstruction_error",
        )  # fmt: skip
        columns = {name: [getattr(c, name)[layer] for c, layer in rows] for name in numbers}
        return {"component": [c.name for c, _ in rows], "layer": [layer for _, layer in rows], **columns}

    @property
    def n_layers(self) -> int:
        """L, the number of layers."""
        return len(self.lens)

    @property
    def largest_error(self) -> float:
        """The largest reconstruction error of all maps."""
        return max(component.largest_error for component in self.components)

    @property
    def passed(self) -> bool:
        """Whether every map of every layer reconstructs its output."""
        return self.largest_error <= self.tolerance

    @property
    def main(self) -> ComponentLayers:
        """The last component: the residual stream, unless other components were chosen."""
        return self.components[-1]


@question
@with_progress
def explain_layers(
    lin: Linearized,
    *,
    k: int = 8,
    position: int = -1,
    components: Sequence[str] | None = None,
    signs: Signs = "layer",
    progress: Progress = True,
) -> LayerExplanation:
    """Explain how a prediction forms with depth (paper, section 3.4, Figure 6, Tables 1 to 3 and 5 to 7).

    Cost: `Linearization.layer_spectra` twice, `"cumulative"` (about two and a half dense maps) and `"layerwise"` (up to
    three dense maps, with three components); about 6 C L (T + 1) products with the output head or the embeddings; two
    forward passes. Memory: that of `Linearization.layer_spectra`; the result keeps 2 C L T d k numbers.

    Raises PromptError for a position outside the prompt; OptionError for a k below 2 (the path needs two vectors) or
    above the number of singular values; for unknown components or signs.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    k: how many singular values of each map from the embeddings; the first three vectors are put into words.
    position: the prediction after this token is explained.
    components: some of `resid_post`, `attn_out` and `mlp_out`. None: all that every layer has.
    signs: singular vectors have no sign of their own, but their words depend on it. "layer" chooses the sign that has a
        positive product with the layer's own output; "final" the one that has a positive product with the final hidden
        state, as the paper's author does.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    tell, k = steps(progress), whole("k", k)
    if k < 2:
        raise OptionError(f"k={k}: the path with depth needs the first two singular vectors; ask for two or more")
    if signs not in get_args(Signs):
        raise OptionError(f"signs={signs!r}: choose layer or final")
    at = lin.trace.target_position(position)
    tell("maps from the embeddings")
    cumulative = layer_spectra(lin, components=components, k=k, position=at)
    if signs == "final":
        cumulative = _orient(cumulative, lin.value("final")[at])
    tell("each layer's own map")
    own = layer_spectra(lin, components=components, mode="layerwise", k=_LAYERWISE_TRIPLES, position=at)
    tell("words")
    predictions = lin.next_token_ids(10, position=at)
    chosen, text, probability = predictions[0]
    decoder = decoder_at(lin, at)
    words = _put_into_words(cumulative, lin.embeddings, decoder)
    ranks = _rank_word(cumulative, words, decoder, chosen, at)
    found = [_describe_component(c, cumulative, own, words, ranks, at) for c in range(len(cumulative.components))]
    lens = logit_lens(lin, chosen, position=at).layers
    followed: dict[str, Sequence[int | None]] = {"lens": [layer.rank for layer in lens]}
    for component in found:
        followed[f"{component.name} joint"] = component.joint_word_rank
        followed[f"{component.name} token"] = component.token_word_rank
    return LayerExplanation(
        provenance=lin.jacobian(position=at).provenance(),
        settings={
            "k": k,
            "components": cumulative.components,
            "signs": signs,
            "direction": cumulative.direction,
            "columns": cumulative.columns + own.columns,
            "spectrum_tolerance": cumulative.tolerance,
        },
        tokens=lin.tokens,
        sinks=lin.sinks,
        predictions=[(word, p) for _, word, p in predictions],
        target={"id": chosen, "text": text, "probability": probability},
        components=found,
        lens=lens,
        appears={reader: _find_first(ranks, APPEARS) for reader, ranks in followed.items()},
        leads={reader: _find_first(ranks, 1) for reader, ranks in followed.items()},
        tolerance=_CANCELLED * tolerance(lin.trace),
        warnings=lin.warnings,
        spectra=cumulative,
    )


def _known(found: Tensor | None) -> Tensor:
    """Narrow the type of joint triples, which are always computed here."""
    assert found is not None
    return found


def _orient(spectra: LayerSpectra, towards: Tensor) -> LayerSpectra:
    """Choose the signs of all triples so that every left vector has a non-negative product with a vector `[d]`."""
    both = (spectra.U, _known(spectra.joint_U))
    sign, joint = (torch.where(towards.to(U) @ U < 0, -1.0, 1.0).to(U).unsqueeze(-2) for U in both)
    return replace(spectra, U=both[0] * sign, Vh=spectra.Vh * sign.transpose(-1, -2), joint_U=both[1] * joint)


def _find_first(ranks: Sequence[int | None], at_most: int) -> int | None:
    return next((layer for layer, rank in enumerate(ranks) if rank is not None and rank <= at_most), None)


def _describe_component(
    c: int,
    cumulative: LayerSpectra,
    own: LayerSpectra,
    words: dict[Place, list[SingularBlock]],
    ranks: dict[Place, int],
    position: int,
) -> ComponentLayers:
    layers, length = range(cumulative.n_layers), cumulative.S.shape[2]
    singles = [[len(block.indices) == 1 for block in words[c, layer, None][:2]] for layer in layers]
    pair, S = _known(cumulative.joint_U)[c, :, :, :2], _known(cumulative.joint_S)[c]
    return ComponentLayers(
        name=cumulative.components[c],
        joint_sigma1=S[:, 0].tolist(),
        joint_spectra=torch.where(S[:, :1] > 0, S / S[:, :1], 0.0).tolist(),
        path=torch.einsum("ldj,dj->lj", pair, pair[-1]).abs().clamp(max=1).tolist(),
        path_defined=[all(singles[layer]) and all(singles[-1]) for layer in layers],
        joint_stable_rank=_known(cumulative.joint_stable_rank)[c].tolist(),
        token_stable_rank=cumulative.stable_rank[c].tolist(),
        joint_own_rank=_known(own.joint_stable_rank)[c].tolist(),
        token_own_rank=own.stable_rank[c].tolist(),
        joint_vectors=[words[c, layer, None] for layer in layers],
        token_vectors=[[words[c, layer, token] for token in range(length)] for layer in layers],
        joint_word_rank=[ranks.get((c, layer, None)) for layer in layers],
        token_word_rank=[ranks.get((c, layer, position)) for layer in layers],
        reconstruction_error=cumulative.reconstruction_error[c].tolist(),
        own_reconstruction_error=own.reconstruction_error[c].tolist(),
    )


def _left_vectors(spectra: LayerSpectra, place: Place) -> tuple[Tensor, Tensor]:
    """Return the left vectors `[d, k]` and the values `[k]` of one map."""
    c, layer, token = place
    if token is not None:
        return spectra.U[c, layer, token], spectra.S[c, layer, token]
    return _known(spectra.joint_U)[c, layer], _known(spectra.joint_S)[c, layer]


def _put_into_words(
    spectra: LayerSpectra, x: Float[Tensor, "T d"], decoder: Decoder
) -> dict[Place, list[SingularBlock]]:
    """Put the first vectors of every map into words."""
    maps: dict[Place, Triples] = {}
    for c, name in enumerate(spectra.components):
        for layer in range(spectra.n_layers):
            svd = spectra.svd(name, layer)
            blocks = {token: svd.blocks(token) for token in range(len(svd.S))}
            for token, found in [*blocks.items(), (None, spectra.joint_blocks(name, layer))]:
                place = c, layer, token
                U, S = _left_vectors(spectra, place)
                Vh, own = (None, None) if token is None else (spectra.Vh[place], x[token])
                maps[place] = Triples(U, S, Vh, own, [block for block in found if block[0] < SHOWN])
    return dict(zip(maps, put_into_words(list(maps.values()), decoder, WORDS), strict=True))


def _rank_word(
    spectra: LayerSpectra, words: dict[Place, list[SingularBlock]], decoder: Decoder, chosen: int, position: int
) -> dict[Place, int]:
    """Find a token's rank among the words of each first left vector that is defined: joint, and at the position."""
    places = [
        place for place, found in words.items() if place[2] in (None, position) and found and len(found[0].indices) == 1
    ]
    if not places:
        return {}
    vectors = torch.stack([_left_vectors(spectra, place)[0][:, 0] for place in places])
    return dict(zip(places, decoder.ranks(vectors, chosen), strict=True))
