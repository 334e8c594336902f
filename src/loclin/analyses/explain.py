"""Which tokens drive a prediction, and what each token's map reads and writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.result import KINDS
from loclin.analyses.attribution.shares import by_source, swept
from loclin.analyses.attribution.target import described, read
from loclin.analyses.decode import Decoder, Words
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, silent
from loclin.common.surroundings import in_plain_torch
from loclin.maps.certificate import Certificate
from loclin.maps.linearized import Linearized
from loclin.results.display import Shown
from loclin.spectral import SVD, check_rank

_WORDS = 8
_UNITS = 5


@dataclass(frozen=True)
class SingularBlock:
    """Singular triples of one token's map that belong together: one, or several with near-equal values.

    Attributes
    ----------
    indices
        Which singular values, counted from 0.
    values
        The singular values.
    writes
        What the left vectors write, decoded by the output head.
    reads
        What the right vectors read, the nearest input embeddings.
    gain
        v . x for a single vector: how strongly the prompt's own embedding excites it; None for a block.
    """

    indices: list[int]
    values: list[float]
    writes: Words
    reads: Words
    gain: float | None

    __repr__ = brief


@dataclass(frozen=True)
class Unit:
    """A row or column of a token's map: its index, its norm, and its words."""

    index: int
    norm: float
    words: Words

    __repr__ = brief


@dataclass(frozen=True)
class TokenExplanation:
    """One input token's part of the map.

    `share` is the exact part of the target that this token gives: J_i x_i through the head.
    `rows` are the output units with the largest row norms, in the input tokens that drive them; `columns` the input
    units with the largest column norms, in the output tokens they write (paper, Figure 4A).
    """

    text: str
    id: int
    is_sink: bool
    frobenius_norm: float
    stable_rank: float
    share: float
    singular_values: list[float]
    blocks: list[SingularBlock]
    rows: list[Unit]
    columns: list[Unit]

    __repr__ = brief


@dataclass(frozen=True)
class Explanation(Shown):
    """A prompt explained; made by `explain`.

    Attributes
    ----------
    model, settings
        What was run, and how: enough to run it again.
    predictions
        The model's most probable next tokens, as (text, probability).
    target
        What is shared out, as in `loclin.attribute` without a target: the predicted token's logit over the mean of all.
        Its `kind` and `value`; the token's `id`, `text`, `probability` and plain `logit`.
    tokens
        The input tokens' parts.
    bias_share
        The part of the target that biases give.
    share_residual
        value - (sum of the shares): rounding.
    certificate
        How exact the map is.
    ordinary_error
        std(J_ordinary x - y) / std(y), the paper's metric for the ordinary Jacobian (its Figure 3).
    output, reconstruction, ordinary
        y, J x + b and J_ordinary x, `d` numbers each: the scatter of Figure 3.
    warnings
        What a reader should know before trusting the shares.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    prompt: str
    predictions: Words
    target: dict[str, Any]
    tokens: list[TokenExplanation]
    bias_share: float
    share_residual: float
    certificate: Certificate
    ordinary_error: float
    output: list[float]
    reconstruction: list[float]
    ordinary: list[float]
    warnings: list[str]

    __repr__ = brief

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"certificate": self.certificate.to_dict()}

    def to_json(self) -> str:
        """The explanation as JSON text; floats that are not finite do not occur."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


@in_plain_torch
def explain(
    lin: Linearized,
    k: int = 8,
    position: int = -1,
    progress: Progress = silent,
) -> Explanation:
    """Explain a linearized prompt at one position (paper, Figures 3, 4 and 5).

    Parameters
    ----------
    lin
        From `loclin.linearize`.
    k
        How many singular vectors of each token to put into words.
    position
        Which prediction: the one after this token.
    progress
        Told the name of each step as it begins.

    Raises
    ------
    PromptError
        For a position outside the prompt.
    OptionError
        For a k beyond the number of singular values.

    Notes
    -----
    Cost: the dense map (d columns), T dense decompositions, and about 15 columns. Memory: the map, T d^2 numbers.
    """
    at, k = lin.trace.position(position), whole("k", k)
    J = lin.jacobian(position=at)
    check_rank(k, J.shape[0], J.shape[2])
    progress("exact map")
    dense = J.dense()
    progress("certificate")
    certificate = lin.certify(at)
    progress("ordinary Jacobian")
    ordinary = lin.ordinary_reconstruction(at)
    progress("singular vectors")
    svd = J.svd(k, tolerance=1e-5)
    spectra, norms, ranks = J.singular_values().tolist(), J.frobenius_norm().tolist(), J.stable_rank().tolist()
    progress("words of singular vectors")
    decoder = Decoder(lin.model)
    blocks = _blocks(svd, J.input, decoder)
    progress("words of rows and columns")
    rows = _units(dense.transpose(0, 1), decoder.reads)
    columns = _units(dense.permute(1, 2, 0), decoder.writes)
    progress("shares")
    reading = read(lin, None, at)
    found = swept(lin.chain, reading, lambda chain: by_source(chain, reading, together=False))
    shares, bias_share = [0.0] * len(lin.tokens), 0.0
    for kind, _, _, token, share, _ in found.rows:
        if KINDS[kind] == "token":
            shares[token] += share
        else:
            bias_share += share
    tokens = [
        TokenExplanation(
            text=lin.tokens[i],
            id=int(lin.input_ids[0, i]),
            is_sink=i in lin.sinks,
            frobenius_norm=norms[i],
            stable_rank=ranks[i],
            share=shares[i],
            singular_values=spectra[i],
            blocks=blocks[i],
            rows=rows[i],
            columns=columns[i],
        )
        for i in range(len(lin.tokens))
    ]
    return Explanation(
        model=lin.model.info.to_dict(),
        settings=_settings(lin, k, at),
        prompt=lin.text,
        predictions=lin.next_tokens(10, at),
        target=_target(described(lin, reading), lin.trace.logits(at)),
        tokens=tokens,
        bias_share=bias_share,
        share_residual=reading.value - math.fsum(shares) - bias_share,
        certificate=certificate,
        ordinary_error=((ordinary - J.value).std() / J.value.std()).item(),
        output=J.value.tolist(),
        reconstruction=J.reconstruct().tolist(),
        ordinary=ordinary.tolist(),
        warnings=[*lin.warnings, *found.notes],
    )


def _target(about: dict[str, Any], logits: Tensor) -> dict[str, Any]:
    """What is shared out, as plain values."""
    (id_,), (text,) = about["ids"], about["tokens"]
    shared = {name: about[name] for name in ("kind", "value", "size", "probability")}
    return {"id": id_, "text": text, "logit": logits[id_].item()} | shared


def _blocks(svd: SVD, x: Tensor, decoder: Decoder) -> list[list[SingularBlock]]:
    """Each token's singular vectors in words, near-equal values together; none for a token whose map is zero."""
    length, k = svd.S.shape
    writes = decoder.writes(svd.U.transpose(1, 2).reshape(length * k, -1), _WORDS)
    reads = decoder.reads(svd.Vh.reshape(length * k, -1), _WORDS)
    gains = svd.gains(x).tolist()

    def block(t: int, indices: list[int]) -> SingularBlock:
        values, first = svd.S[t, indices].tolist(), indices[0]
        if len(indices) == 1:
            return SingularBlock(indices, values, writes[t * k + first], reads[t * k + first], gains[t][first])
        written = decoder.writes_subspace(svd.U[t][:, indices], _WORDS)
        return SingularBlock(indices, values, written, decoder.reads_subspace(svd.Vh[t][indices].T, _WORDS), None)

    return [[block(t, indices) for indices in svd.blocks(t)] if svd.S[t, 0] > 0 else [] for t in range(length)]


def _units(vectors: Float[Tensor, "T n d"], decode: Callable[[Tensor, int], list[Words]]) -> list[list[Unit]]:
    """Each token's largest of n vectors in words; none for a token whose map is zero."""
    top = vectors.norm(dim=2).topk(min(_UNITS, vectors.shape[1]), dim=1)
    chosen = torch.stack([block[indices] for block, indices in zip(vectors, top.indices, strict=True)])
    words = decode(chosen.flatten(0, 1), _WORDS)
    found = [
        Unit(index, norm, word)
        for index, norm, word in zip(top.indices.flatten().tolist(), top.values.flatten().tolist(), words, strict=True)
    ]
    per_token = top.indices.shape[1]
    return [found[t * per_token : (t + 1) * per_token] if top.values[t, 0] > 0 else [] for t in range(len(vectors))]


def _settings(lin: Linearized, k: int, position: int) -> dict[str, Any]:
    return {
        "position": position,
        "k": k,
        "gate": lin.gate,
        "precision": lin.precision,
        "source": "embed (what enters layer 0, after any embedding scale)",
        "target": "final",
        "token_ids": lin.input_ids[0].tolist(),
        "versions": {name: version(name) for name in ("loclin", "torch", "transformers")},
    }
