"""One prompt explained: which tokens drive the prediction, and what each token's map reads and writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loclin.analyses.attribution.attribute import attribute
from loclin.analyses.attribution.groups import Group, Grouping, Skip, find_groups, find_skipped
from loclin.analyses.decode import Decoder, SingularBlock, Triples, Words, decoder_at, put_into_words
from loclin.common.arguments import whole
from loclin.common.brief import brief
from loclin.common.progress import Progress, steps, with_progress
from loclin.common.sums import norms
from loclin.maps.certificate import Certificate
from loclin.maps.linearized import Linearized, question
from loclin.results.provenance import Provenance
from loclin.results.result import AtPrompt
from loclin.results.table import make_columns
from loclin.spectral import block_krylov_svd, check_rank, singular_values, stable_rank

_WORDS = 8
_UNITS = 5


@dataclass(frozen=True)
class Unit:
    """A row or a column of a token's map: its index, its norm, and its words."""

    index: int
    norm: float
    words: Words

    __repr__ = brief


@dataclass(frozen=True)
class TokenExplanation:
    """One input token i, and its map J_i.

    `share` is its exact share of the target: J_i x_i through the output head. `rows` are the output units with the
    largest row norms, with the input tokens that drive them; `columns` the input units with the largest column norms,
    with the output tokens that they write (paper, Figure 4A).
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
class Explanation(AtPrompt):
    """A prompt explained; made by `explain`.

    Attributes
    ----------
    predictions: the model's most probable next tokens, as (text, probability).
    target: that of `loclin.attribute` without a target, the predicted token's logit minus the mean of all logits: its
        `kind`, `value` and `size`; the token's `id`, `text`, `probability` and `logit`.
    tokens: the input tokens and their maps.
    bias_share: the share of all biases.
    share_residual: value - (sum of the shares): rounding.
    certificate: how exact the map is.
    ordinary_error: std(J_ordinary x - y) / std(y), the paper's metric for the ordinary Jacobian (its Figure 3).
    groups: groups of tokens, whose shares are added up; empty where none were asked for.
    skipped: positions that are left out of rankings.
    output, reconstruction, ordinary: y, J x + b and J_ordinary x, `[d]` each: the scatter plot of Figure 3.
    """

    provenance: Provenance
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
    groups: list[Group] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    derived = ("prompt", "group_shares")

    @property
    def group_shares(self) -> list[float]:
        """The share of each group: the sum of its tokens'."""
        return [math.fsum(self.tokens[i].share for i in group.positions) for group in self.groups]

    def table(self) -> dict[str, list[Any]]:
        """One row per token: position, text, id, sink, share, Frobenius norm, stable rank, largest singular value."""
        rows = (
            (i, t.text, t.id, t.is_sink, t.share, t.frobenius_norm, t.stable_rank, t.singular_values[0])
            for i, t in enumerate(self.tokens)
        )
        return make_columns("token text id sink share frobenius_norm stable_rank singular_value", rows)


@question
@with_progress
def explain(
    lin: Linearized,
    *,
    k: int = 8,
    position: int = -1,
    group: Grouping | None = None,
    skip: Skip | None = None,
    progress: Progress = True,
) -> Explanation:
    """Explain a linearized prompt at one position (paper, Figures 3, 4 and 5).

    Cost: the dense map (d columns), T dense SVDs, and about 15 more columns. Memory: the map, T d^2 numbers; where that
    is beyond the budget, the maps of as many tokens as fit, from a temporary file.

    Raises PromptError for a position outside the prompt; OptionError for a k larger than the number of singular values,
    or groups that `loclin.attribute` would refuse.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    k: how many singular vectors of each token to put into words.
    position: the prediction after this token is explained.
    group: add the tokens' shares up, too: by a unit, a pattern or named positions, as `by` of `loclin.attribute`.
    skip: `"special"` tokens, `"sink"`s, or positions: left out of rankings.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    tell, at, k = steps(progress), lin.trace.target_position(position), whole("k", k)
    J = lin.jacobian(position=at)
    check_rank(k, J.shape[0], J.shape[2])
    skipped = find_skipped(lin, skip)
    groups = [] if group is None else find_groups(lin, group, skipped)
    tell("certificate")
    certificate = lin.certify(position=at)
    tell("ordinary Jacobian")
    ordinary = lin.ordinary_reconstruction(position=at)
    tell("exact map, its singular vectors and their words")
    decoder, described = decoder_at(lin, at), list[tuple[Any, ...]]()
    for where, maps in J.by_token():
        described += _describe_maps(maps, J.input[where], k, J.value, decoder)
    tell("shares")
    found = attribute(lin, by="token", position=at, in_words=0)
    shares, bias_share = found.by_token()
    ids, is_sink = lin.input_ids[0].tolist(), [i in lin.sinks for i in range(len(lin.tokens))]
    about_tokens = zip(lin.tokens, ids, is_sink, shares, described, strict=True)
    tokens = [
        TokenExplanation(text, id_, sink, norm, rank, share, *rest)
        for text, id_, sink, share, (norm, rank, *rest) in about_tokens
    ]
    about = found.target
    (id_,), (text,) = about["ids"], about["tokens"]
    shared = {name: about[name] for name in ("kind", "value", "size", "probability")}
    return Explanation(
        provenance=J.provenance(),
        predictions=lin.next_tokens(10, position=at),
        target={"id": id_, "text": text, "logit": lin.trace.logits(at)[id_].item()} | shared,
        tokens=tokens,
        bias_share=bias_share,
        share_residual=found.residual,
        certificate=certificate,
        ordinary_error=((ordinary - J.value).std() / J.value.std()).item(),
        output=J.value.tolist(),
        reconstruction=J.reconstruct().tolist(),
        ordinary=ordinary.tolist(),
        warnings=found.warnings,
        groups=groups,
        skipped=skipped,
    )


def _describe_maps(
    maps: Float[Tensor, "d_out g d_in"], x: Float[Tensor, "g d_in"], k: int, y: Tensor, decoder: Decoder
) -> list[tuple[Any, ...]]:
    """Norm, stable rank, singular values, blocks of singular vectors, rows and columns of some tokens' maps."""
    svd = block_krylov_svd(maps, k, align_to=y, tolerance=1e-5)
    spectra, norm = singular_values(maps), norms(maps.transpose(0, 1), 1).to(svd.S)
    triples = [Triples(svd.U[t], svd.S[t], svd.Vh[t], x[t], svd.blocks(t)) for t in range(len(svd.S))]
    blocks = put_into_words(triples, decoder, _WORDS)
    rows = _describe_units(maps.transpose(0, 1), decoder.reads)
    columns = _describe_units(maps.permute(1, 2, 0), decoder.writes)
    ranks = stable_rank(norm, spectra[:, 0])
    return list(zip(norm.tolist(), ranks.tolist(), spectra.tolist(), blocks, rows, columns, strict=True))


def _describe_units(vectors: Float[Tensor, "T n d"], decode: Callable[[Tensor, int], list[Words]]) -> list[list[Unit]]:
    """Put the largest of each token's n vectors into words; none for a token whose map is zero."""
    top = vectors.norm(dim=2).topk(min(_UNITS, vectors.shape[1]), dim=1)
    chosen = vectors.take_along_dim(top.indices[:, :, None], dim=1)
    words = iter(decode(chosen.flatten(0, 1), _WORDS))
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    found = [[Unit(*unit) for unit in zip(indices, norms, words, strict=False)] for indices, norms in rows]
    return [units if units[0].norm > 0 else [] for units in found]
