"""Attributions made up for the tests; no model needed."""

from __future__ import annotations

from typing import Any

import torch

from loclin.analyses.attribution.result import KINDS, Attribution, Kind

from .examples import HOSTILE, provenance

TOKENS = ["<s>", " The", HOSTILE, " Gate"]
Row = tuple[Kind, int, int, int, float]
"""(kind, layer, index, token, share); -1 for none."""


def made(by: Any, rows: list[Row], tokens: list[str] | None = None, **changes: Any) -> Attribution:
    tokens = TOKENS if tokens is None else tokens
    shares = torch.tensor([row[4] for row in rows], dtype=torch.float64)
    numbers = {
        name: torch.tensor([row[i] for row in rows]) for i, name in ((1, "layers"), (2, "indices"), (3, "positions"))
    }
    target = {
        "kind": "logit",
        "tokens": [" Bridge"],
        "ids": [7],
        "value": shares.sum().item() + 2e-6,
        "size": shares.sum().item(),
        "position": len(tokens) - 1,
        "probability": 0.5,
    }
    fields: dict[str, Any] = {
        "by": by,
        "target": target,
        "shares": shares,
        "through": 2 * shares if by in ("layer", "head", "neuron") else None,
        "kinds": torch.tensor([KINDS.index(row[0]) for row in rows]),
        "biases": ["layers.0.o_proj.bias", "norm.bias"],
        "writes": {},
        "attends": {},
        "sinks": [0],
        "warnings": [],
        "provenance": provenance(tokens, target="logits"),
        **numbers,
    }
    return Attribution(**fields | changes)


def tokens(**changes: Any) -> Attribution:
    shares = (9.5, -0.75, 1.25, 2.5)
    rows: list[Row] = [("token", -1, -1, i, share) for i, share in enumerate(shares)]
    return made("token", [*rows, ("bias", -1, 0, -1, 0.25), ("bias", -1, 1, -1, 0.125)], **changes)


def layers() -> Attribution:
    rows: list[Row] = [("embed", -1, -1, -1, 0.5), ("attn_out", 0, -1, -1, 1.5), ("mlp_out", 0, -1, -1, -2.0)]
    rows += [("attn_out", 1, -1, -1, 0.25), ("mlp_out", 1, -1, -1, 4.0), ("bias", -1, 1, -1, 0.125)]
    return made("layer", rows, writes={"4": [[" left", 0.9], [HOSTILE, 0.4]]})


def heads() -> Attribution:
    rows: list[Row] = [("embed", -1, -1, -1, 0.5)]
    for layer in range(2):
        rows += [("head", layer, head, -1, (-1.0) ** head * (layer + head + 1)) for head in range(3)]
        rows += [("bias", layer, 0, -1, 0.0625), ("mlp_out", layer, -1, -1, 1.0)]
    reads = {"8": [0.5, 0.25, 3.0, -0.5]}
    return made("head", rows, writes={"8": [[" right", 1.5]]}, attends=reads, warnings=["[bold]whole in layers 1"])


def matrix(length: int = 4) -> Attribution:
    texts = TOKENS if length == 4 else [f" w{i}" for i in range(length)]
    rows: list[Row] = [("embed", -1, -1, i, 0.25 * (i == length - 1)) for i in range(length)]
    for layer in range(2):
        for kind in ("attn_out", "mlp_out"):
            rows += [(kind, layer, -1, i, (i + 1) / length) for i in range(length)]  # type: ignore[misc]
            rows.append((kind, layer, -1, -1, 0.125))  # type: ignore[arg-type]
    return made("token×layer", [*rows, ("bias", -1, 1, -1, 0.5)], texts)
