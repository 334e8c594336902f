"""Published figures beside ours: agree, differ, or not comparable, with tolerances by dtype and trust."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loclin.analyses.decode import SingularBlock
from loclin.analyses.explain import Explanation
from loclin.analyses.layers import LayerExplanation
from loclin.report.text import error, number, visible
from loclin.reproduction.golden import Published, Setting
from loclin.reproduction.result import Compared, Verdict
from loclin.steering.steer import Steered

_WHOLE, _HALF = ("float32", "float64"), ("bfloat16", "float16")
SINGULAR = {"whole": 0.01, "half": 0.03}
"""How far singular values may be apart, relative to the published ones: both in float32 or float64, or one of them not.
The published ones of one model in float32 and in bfloat16 are up to 1 % apart."""
TIMES = 5.0
"""How many times the published error ours may be: it is rounding, whose size depends on the kernels. Less is fine."""
PLOT = {"rank": 0.25, "own_rank": 0.25, "path": 0.1}
"""How far from what was read off a plot: ranks relatively, projections absolutely."""
_WORDS = 8


class _NotComparable(Exception):
    """Why ours cannot stand beside what is published."""


Found = Explanation | LayerExplanation


def compare(published: Published, found: Found, precision: str) -> Compared:
    """Compare a published figure with ours; `precision` is the dtype of the model's weights, or how they are packed."""
    verdict: Verdict
    ours, said = "", _write(published.value)
    try:
        _check_dtype(published, precision)
        ours, agrees, tolerance = _judge(published, found, precision)
        verdict = "agree" if agrees else "differ"
    except _NotComparable as why:
        verdict, tolerance = "not comparable", str(why)
    return Compared(
        target=published.target,
        what=_name(published),
        prompt=published.prompt,
        published=said,
        ours=ours,
        verdict=verdict,
        tolerance=tolerance,
        trust=published.trust,
        source=published.source,
    )


def compare_steering(setting: Setting, found: Steered) -> list[Compared]:
    """Compare both texts of a row of the steering table: they agree if the first half of the words is the same."""
    rows = []
    for kind, text, written in (("steered", setting.steered, found.steered), ("normal", setting.normal, found.normal)):
        if text is None:
            continue
        wanted, given = text.split(), written.text.split()
        same = next((i for i, pair in enumerate(zip(wanted, given, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(wanted), len(given)) if same is None else same
        half = math.ceil(len(wanted) / 2)
        rows.append(
            Compared(
                target="steering",
                what=f"{kind} text begins",
                prompt=setting.prompt,
                published=text.strip(),
                ours=" ".join(given[: len(wanted)]),
                verdict="agree" if same >= half else "differ",
                tolerance=f"the first {half} of {len(wanted)} words are the same; {same} are",
                trust="sound",
                source="Table 4; the author's notebook",
            )
        )
    return rows


def _check_dtype(published: Published, precision: str) -> None:
    """Refuse figures of packed weights beside those of whole ones, and errors of another dtype."""
    packed = not {published.dtype, precision} - {"unknown"} <= {*_WHOLE, *_HALF}
    if published.dtype != precision and (packed or published.kind == "error"):
        raise _NotComparable(f"it is of {published.dtype} weights, and these are {precision}")


def _judge(published: Published, found: Found, precision: str) -> tuple[str, bool, str]:
    """Ours in words, whether it agrees, and by which tolerance."""
    if isinstance(found, Explanation):
        return _judge_explained(published, found, precision)
    return _judge_layers(published, found)


def _judge_explained(published: Published, found: Explanation, precision: str) -> tuple[str, bool, str]:
    value = published.value
    if published.kind == "prediction":
        word = found.predictions[0][0]
        return visible(word), _bare(word) == _bare(str(value)), "the same word"
    if published.kind == "error":
        assert isinstance(value, float)
        ours = found.certificate.std_error
        return error(ours), ours <= TIMES * value, f"at most {TIMES:g} times as large"
    tokens = found.tokens
    if published.kind == "s0":
        wanted = [float(one) for one in value if not isinstance(one, str)] if isinstance(value, list) else []
        if len(wanted) != len(tokens):
            raise _NotComparable(f"it is of {len(wanted)} tokens, and here are {len(tokens)}: see the beginning token")
        given = [token.singular_values[0] for token in tokens]
        within = SINGULAR["whole" if {published.dtype, precision} <= set(_WHOLE) else "half"]
        off = max(abs(a - b) / b for a, b in zip(given, wanted, strict=True))
        return _write(given), off <= within, f"within {within:.0%}; the largest difference is {off:.1%}"
    at = published.at
    assert isinstance(at, int)
    if at >= len(tokens):
        raise _NotComparable(f"it is of token {at}, and here are {len(tokens)} tokens")
    return _judge_words(published, _first(tokens[at].blocks, 0), _WORDS)


def _judge_layers(published: Published, found: LayerExplanation) -> tuple[str, bool, str]:
    layer, vector = published.at if isinstance(published.at, list) else (published.at or 1, 1)
    if layer > found.n_layers:
        raise _NotComparable(f"it is of layer {layer}, and there are {found.n_layers}")
    main, value = found.main, published.value
    if published.kind == "layer_words":
        return _judge_words(published, _first(main.joint_vectors[layer - 1], vector - 1), _WORDS)
    if published.kind == "table_word":
        return _judge_words(published, _first(main.token_vectors[layer - 1][0], 0), _WORDS)
    if published.kind == "path":
        assert isinstance(value, list)
        given = main.path[layer - 1]
        off = max(abs(a - float(b)) for a, b in zip(given, value, strict=True))
        return _write(given), off <= PLOT["path"], f"within {PLOT['path']:g}"
    assert isinstance(value, float)
    ranks = main.joint_stable_rank if published.kind == "rank" else main.joint_own_rank
    within = PLOT[published.kind]
    return number(ranks[layer - 1]), abs(ranks[layer - 1] - value) <= within * value, f"within {within:.0%}"


def _first(blocks: Sequence[SingularBlock], rank: int) -> list[str]:
    """What the singular vector of a rank writes, or the subspace that it belongs to."""
    return next(([word for word, _ in block.writes] for block in blocks if rank in block.indices), [])


def _judge_words(published: Published, ours: list[str], most: int) -> tuple[str, bool, str]:
    wanted = [published.value] if isinstance(published.value, str) else published.value
    assert isinstance(wanted, list)
    words, given = {_bare(str(word)) for word in wanted}, {_bare(word) for word in ours[:most]}
    half = math.ceil(len(words) / 2)
    shown = " ".join(visible(word) for word in ours[:most])
    return shown, len(words & given) >= half, f"{half} of {len(words)} words are among ours"


def _bare(word: str) -> str:
    return word.strip(" ·▁Ġ").casefold()


def _name(published: Published) -> str:
    at = published.at
    names = {
        "prediction": "next token",
        "error": "std(error) / std(y)",
        "s0": "largest singular value of each token",
        "u0": f"first left vector of token {at}, in words",
        "rank": f"stable rank up to layer {at}",
        "own_rank": f"stable rank of layer {at} alone",
        "path": f"projections on the last layer's vectors, layer {at}",
        "table_word": f"first word of token 0 at layer {at}",
    }
    if isinstance(at, list):
        return f"left vector {at[1]} up to layer {at[0]}, in words"
    return f"{names[published.kind]} ({published.dtype})"


def _write(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_write(one) for one in value)
    if isinstance(value, float):
        return error(value) if value < 1e-2 else number(value)
    return str(value)
