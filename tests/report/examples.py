"""Explanations made up for the tests; no model needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from loclin.analyses.decode import SingularBlock
from loclin.analyses.explain import Explanation, TokenExplanation, Unit
from loclin.maps.certificate import Certificate, Culprit
from loclin.models.model import ModelInfo
from loclin.results.provenance import Provenance

HOSTILE = '</script><b onmouseover="x()">&[red]%{x}$a$'


def provenance(tokens: list[str], **changes: Any) -> Provenance:
    made = Provenance(
        model=ModelInfo("tiny", "wrapped", "llama", None, None, "float32", "float32", 100),
        token_ids=list(range(len(tokens))),
        tokens=tokens,
        text="".join(tokens),
        gate="activation",
        precision="stock",
        dtype="float32",
        source="embed",
        target="final",
        position=len(tokens) - 1,
        normed=False,
        positions=list(range(len(tokens))),
        versions={"loclin": "0.1.0"},
        certificate=None,
        date="2026-01-01T00:00:00+00:00",
    )
    return replace(made, **changes)


def certificate(**changes: Any) -> Certificate:
    passed = Certificate(4e-7, 0.0, True, 5e-7, 2e-8, 6e-7, 0.0, 7e-8, 0.25, 3e-6, 0.0, ())
    return replace(passed, **changes)


def failed() -> Certificate:
    culprit = Culprit("layers.3.mlp.act_fn", "[bold]Odd", 0.37)
    return certificate(reconstruction_error=0.3, bit_identical=False, forward_error=2e-3, culprits=(culprit,))


def token(text: str, share: float, *, is_sink: bool = False, zero: bool = False) -> TokenExplanation:
    if zero:
        return TokenExplanation(text, 5, False, 0.0, 0.0, 0.0, [0.0] * 6, [], [], [])
    words = [(" left", 0.9), ("right", 0.4), ("\n", -0.1)]
    return TokenExplanation(
        text=text,
        id=5,
        is_sink=is_sink,
        frobenius_norm=3.25,
        stable_rank=1.5,
        share=share,
        singular_values=[2.0, 1.0, 0.9995, 0.5, 0.25, 0.0],
        blocks=[
            SingularBlock([0], [2.0], words, [(text, 0.8)], -0.125),
            SingularBlock([1, 2], [1.0, 0.9995], [("near", 0.7)], words, None),
            SingularBlock([3], [0.5], words, words, 0.5),
        ],
        rows=[Unit(17, 1.75, [("drives", 0.3)]), Unit(4, 1.25, words)],
        columns=[Unit(3, 1.125, [("driven", 3.5)])],
    )


def explanation(tokens: list[TokenExplanation] | None = None, **changes: Any) -> Explanation:
    if tokens is None:
        tokens = [
            token("The", 5.5, is_sink=True),
            token(" bridge", -0.75),
            token(HOSTILE, 1.25),
            token("\n", 0.0, zero=True),
        ]
    bias = 0.5
    made = Explanation(
        provenance=provenance([part.text for part in tokens]),
        predictions=[(" only", 0.5), (" most", 0.25), (HOSTILE, 0.125)],
        target={
            "id": 7,
            "text": " only",
            "probability": 0.5,
            "logit": 21.5,
            "kind": "logit over the mean",
            "value": sum(t.share for t in tokens) + bias,
        },
        tokens=tokens,
        bias_share=bias,
        share_residual=-2e-6,
        certificate=certificate(),
        ordinary_error=1.125,
        output=[1.0, -2.0, 0.5, 3.0, 0.0, -1.0],
        reconstruction=[1.0, -2.0, 0.5, 3.0, 0.0, -1.0],
        ordinary=[0.5, -1.0, 0.25, 1.0, 0.5, 0.0],
        warnings=["[bold]the first word <i>carries</i> the sink"],
    )
    return replace(made, **changes)


def long(length: int) -> Explanation:
    """A prompt whose later tokens have the larger shares, the signs alternating."""
    return explanation([token(f" w{i}", (-1.0) ** i * (i + 1) / length) for i in range(length)])
