"""Explore a prompt: the vectors of all its parts, from which the shares of any word follow without the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from loclin.analyses.attribution.groups import UNITS, Group, find_groups, find_skipped
from loclin.analyses.attribution.target import Token, find_token
from loclin.analyses.exploration.parts import find_heads, find_parts
from loclin.analyses.exploration.result import Exploration
from loclin.analyses.exploration.words import Lens, choose_words, look_at_layers, read_rows
from loclin.common.arguments import whole
from loclin.common.progress import Progress, steps, with_progress
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized, question

MOST_ROWS = 512
"""The most rows of tokens; the tokens of longer prompts are put into groups."""
_PREDICTIONS = 20


@question
@with_progress
def explore(
    lin: Linearized,
    words: Sequence[Token] = (),
    *,
    count: int = 1200,
    position: int = -1,
    progress: Progress = True,
) -> Exploration:
    """Compute the vectors whose products with rows of the output head are the exact shares of any word's logit.

    Its page answers for each word, and each difference of two, in the browser.

    Cost: T columns forward, of long prompts one for each of 512 groups of tokens at most; a graph of each layer and H
    columns of its output projection; the certificate; and the logit lens, L T products with the output head (of long
    prompts L). Memory: T d numbers for each token, within the budget; the result has (T + 1) (2 L + 1) d.

    Raises OptionError for a text that is not one token, an id that the model does not have, or a model whose layers
    cannot be told apart; PromptError for a position outside the prompt.

    Parameters
    ----------
    lin: from `loclin.linearize`.
    words: words to have in any case, by text or id, beside those that are predicted, the prompt's own, and frequent
        ones.
    count: how many words to have.
    position: the prediction after this token is explored.
    progress: True: bars on a terminal; False: nothing; a function is told the name of each step as it begins.
    """
    tell, at, count = steps(progress), lin.trace.target_position(position), whole("count", count, 1)
    if isinstance(words, str):
        raise OptionError(f"words={words!r} is one text where a list is meant: [{words!r}]")
    asked = [find_token(lin, word) for word in words]
    if (why := lin.trace.sequence.fallback_reason) is not None:
        raise OptionError(f"{lin.model.info.name} has no layers to tell apart: {why}; use attribute(by='token')")
    if lin.model.encoder_length:
        raise OptionError(f"{lin.model.info.name} is an encoder-decoder, which cannot be explored yet: use attribute")
    tell("certificate")
    certificate = lin.certify(position=at)
    by, rows = _find_rows(lin)
    tell(f"vectors by {by} and component")
    parts = find_parts(lin, at, [row.positions for row in rows])
    tell("vectors of heads")
    head_names, heads, without = find_heads(lin, at)
    tell("words")
    ids = choose_words(lin, at, asked, count)
    head = read_rows(lin, at, ids)
    tell("layers in words")
    lens = look_at_layers(lin, at, ids) if lin.model.task == "causal" else _no_lens()
    seen = lens.top.unique().tolist()
    dtype, warnings = lin.trace.dtype, [*lin.warnings]
    if by != "token":
        warnings.append(f"The prompt has {lin.trace.length} tokens, which are summed up by {by}: {len(rows)} rows.")
    if without and len(without) < lin.trace.n_layers:
        warnings.append(f"Not split into heads: the attention of layers {', '.join(map(str, without))}.")
    return Exploration(
        by=by,
        rows=rows,
        components=parts.components,
        cells=parts.cells.cpu().to(dtype),
        head_names=head_names,
        heads=heads.cpu(),
        ids=ids,
        words=lin.model.name_outputs(ids),
        directions=head.directions.cpu().to(dtype),
        offsets=head.offsets.cpu(),
        logits=head.logits.cpu(),
        predictions=lin.next_token_ids(_PREDICTIONS, position=at),
        lens_positions=lens.positions,
        lens_top=lens.top.cpu(),
        lens_ranks=lens.ranks.cpu(),
        ranks=lens.ranks_here.cpu(),
        lens_words={str(i): text for i, text in zip(seen, lin.model.name_outputs(seen), strict=True)},
        groups={unit: find_groups(lin, unit) for unit in UNITS if lin.model.tokenizer is not None},
        sinks=lin.sinks,
        special=find_skipped(lin, "special"),
        certificate=certificate,
        provenance=lin.jacobian(position=at).provenance(),
        warnings=warnings,
    )


def _find_rows(lin: Linearized) -> tuple[str, list[Group]]:
    """Every token, or the smallest unit of which a long prompt has few enough; else as many tokens for each row."""
    if (length := lin.trace.length) <= MOST_ROWS:
        return "token", [Group(text, [i]) for i, text in enumerate(lin.tokens)]
    for unit in ("word", "sentence", "line") if lin.model.tokenizer is not None else ():
        rows = find_groups(lin, unit, lin.sinks)
        if len(rows) <= MOST_ROWS:
            return unit, rows
    size = -(-length // MOST_ROWS)
    together = [list(range(first, min(first + size, length))) for first in range(0, length, size)]
    return "group", [Group("".join(lin.tokens[i] for i in held), held) for held in together]


def _no_lens() -> Lens:
    empty = torch.zeros(0, 0, 0, dtype=torch.int32)
    return Lens([], empty, empty, empty.flatten(1))
