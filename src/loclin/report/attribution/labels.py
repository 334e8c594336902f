"""What an attribution's shares and its target are called, for every kind of report."""

from __future__ import annotations

from loclin.analyses.attribution.result import Attribution, Kind, Share
from loclin.report.text import error

LEVELS = {
    "token": ("Tokens", "what each token's embedding gives, by all ways"),
    "bias": ("Biases", "what each bias gives, by all ways"),
    "layer": ("Layers", "what each attention and each MLP writes into it, directly"),
    "head": ("Heads", "what each query head writes into it, directly"),
    "neuron": ("Neurons", "what each MLP neuron writes into it, directly"),
    "token×layer": ("Tokens × layers", "what each token gives by way of each part as the last that writes"),
}
"""Each level's title, and what its shares are."""
_BETWEEN = {"logit difference": " − ", "logit margin": " − "}


def quantity(found: Attribution) -> str:
    """Say what is shared out, without its tokens: "logit"."""
    return str(found.target["kind"])


def target_tokens(found: Attribution) -> list[str]:
    """Give the pieces of what stands behind "of": tokens, and the signs between them, in turn."""
    between = _BETWEEN.get(found.target["kind"], ", ")
    pieces: list[str] = []
    for text in found.target["tokens"]:
        pieces += [between, text] if pieces else [text]
    return pieces


def marks(found: Attribution, token: int) -> list[str]:
    """Say what is special about a position: an attention sink, or the last that the target can see."""
    last = found.target["position"]
    return [name for name, true in (("sink", token in found.sinks), ("last", token == last)) if true]


def reads(found: Attribution, share: Share, most: int = 2) -> list[tuple[str, float]]:
    """Tell which tokens a head reads most of its share at: (text, the part of the share read there)."""
    if share.attends is None:
        return []
    ranked = sorted(range(len(share.attends)), key=lambda i: -abs((share.attends or [])[i]))
    return [(found.texts[i], share.attends[i]) for i in ranked[:most]]


_NAMES: dict[Kind, tuple[str, str]] = {
    "token": ("token", "tokens"),
    "embed": ("embedding", "embeddings"),
    "attn_out": ("attention", "attentions"),
    "mlp_out": ("MLP", "MLPs"),
    "block": ("block", "blocks"),
    "head": ("head", "heads"),
    "neuron": ("neuron", "neurons"),
    "bias": ("bias", "biases"),
}
"""What one share of a kind is called, and several."""


def others(found: Attribution, shown: list[Share]) -> list[tuple[str, float]]:
    """Sum up by kind what is not shown: (what it is, its sum)."""
    left: dict[Kind, list[float]] = {}
    names = {(part.name, part.token) for part in shown}
    for part in found.parts:
        if (part.name, part.token) not in names:
            left.setdefault(part.kind, []).append(part.share)
    kinds = {part.kind for part in shown}
    totals = []
    for kind, shares in left.items():
        one, several = _NAMES[kind]
        count = f"{len(shares)} " if len(shares) > 1 or kind in kinds else ""
        other = "other " if kind in kinds else ""
        totals.append((f"{count}{other}{several if len(shares) > 1 else one}", sum(shares)))
    return totals


def by_layer(found: Attribution) -> dict[int, dict[str, Share]]:
    """Gather the shares of an attribution by layer: each layer's attention and MLP; a whole block as its attention."""
    layers: dict[int, dict[str, Share]] = {}
    for part in found.parts:
        if part.layer is not None:
            layers.setdefault(part.layer, {})["attn_out" if part.kind == "block" else part.kind] = part
    return layers


def sums(found: Attribution) -> str:
    """Say that the shares sum to the target, and what rounding leaves."""
    several = f"{len(found)} shares sum" if len(found) > 1 else "1 share comes"
    return (
        f"{several} to {found.shares.sum().item():.6g}, the {quantity(found)} is {found.value:.6g}: residual "
        f"{error(abs(found.residual))}, or {error(found.relative_residual)} of the sizes of what is summed"
    )
