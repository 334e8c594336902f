"""What holds for every map, whatever it is of: computed a second way, and again in other surroundings, bit for bit."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from combinations import SURROUNDINGS, Combination, torch_state
from torch import Tensor

import loclin
from loclin.analyses.attribution.result import KINDS
from loclin.errors import LoclinError, ModelError, OptionError
from loclin.linearization import Linearization, linearize
from loclin.models import Model

Numbers = dict[str, Tensor]

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""How far two ways to the same numbers may be apart, in the size of what is summed: deep networks, any kernel."""


@dataclass
class Tally:
    """What became of the combinations."""

    tried: int = 0
    unbuilt: int = 0
    computed: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    mismatches: list[str] = field(default_factory=list)
    exceptions: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        there = ", ".join(f"{name} {n}" for name, n in sorted(self.computed.items()))
        why = "".join(f"\n  {n:4d} {reason}" for reason, n in self.refused.most_common(20))
        return (
            f"{self.tried} combinations: {sum(self.computed.values())} computed ({there}), "
            f"{sum(self.refused.values())} refused in one line, {self.unbuilt} of families that are not here; "
            f"{len(self.mismatches)} mismatches, {len(self.exceptions)} bare exceptions{why}"
        )

    def add(self, combination: Combination) -> None:
        """Try one; nothing is raised, so that the others are tried too."""
        self.tried += 1
        try:
            self._try(combination)
        except Exception as fault:
            frames = traceback.extract_tb(fault.__traceback__)
            own = [f for f in frames if Path(f.filename).is_relative_to(Path(loclin.__file__).parent)]
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "the test itself"
            self.exceptions.append(f"{type(fault).__name__} at {place}: {str(fault)[:200]}\n    {combination}")

    def _try(self, c: Combination) -> None:
        try:
            model = c.model()
        except ModelError:
            self.unbuilt += 1
            return
        expected = _outcome(c, model, "none")
        if isinstance(expected, str):
            self.refused[expected[:90]] += 1
            faults = _no_remedy(expected) + (["it is refused"] if c.is_plain else [])
        else:
            self.computed[c.surroundings] += 1
            faults = wrong(c, expected)
        if c.surroundings != "none":
            faults += _differences(expected, _outcome(c, c.model(), c.surroundings))
        if faults:
            self.mismatches.append(f"{'; '.join(faults)[:600]}\n    {c}")


def _no_remedy(message: str) -> list[str]:
    """What a refusal lacks: it is one line that says enough to do something about it."""
    sound = "\n" not in message and len(message) > 20
    return [] if sound else [f"a refusal of more than one line, or of nothing: {message!r}"]


def _outcome(c: Combination, model: Model, surroundings: str) -> Numbers | str:
    """What a combination gives: its numbers, or why it is refused. The surroundings are as before afterwards."""
    inside, outside = SURROUNDINGS[surroundings], SURROUNDINGS["none"]
    prompt, random = c.prompt(model), torch.Generator().manual_seed(c.seed)
    vectors = torch.randn(2, 2, 4096, generator=random, dtype=torch.float64)
    before = torch_state()
    try:
        with (inside if c.part in ("make", "all") else outside)():
            here = torch_state()
            lin = linearize(model, prompt, gate=c.gate, precision=c.precision)
            assert torch_state() == here, "linearize leaves the surroundings changed"
        with (inside if c.part in ("use", "all") else outside)():
            here = torch_state()
            found = numbers(c, lin, vectors)
            assert torch_state() == here, "using a map leaves the surroundings changed"
    except LoclinError as refusal:
        return str(refusal)
    finally:
        assert torch_state() == before, "the surroundings stay changed"
    return _tensors(found)


def numbers(c: Combination, lin: Linearization, vectors: Tensor) -> dict[str, Any]:
    """Everything that a map and its shares say, as they say it: what is computed here is computed in surroundings."""
    J = lin.jacobian(c.source, c.target, position=c.position, normed=c.normed)
    d_out, length, d_in = J.shape
    X = vectors[0, 0, : length * d_in].reshape(length, d_in).to(J.dtype)
    u = vectors[1, :, :d_out].to(J.dtype)
    try:
        shares = lin.attribute(by=c.level, position=c.position, in_words=2)
    except OptionError:  # a network without such parts; its map is as good as any
        shares = lin.attribute(by="token", position=c.position)
    return {
        "X": X,
        "u": u,
        "matvec": J.matvec(X),
        "rmatmat": J.rmatmat(u),
        "dense": J.dense(),
        "blocks": [J.block(i).matvec(X[i : i + 1]) for i in range(length)],
        "input": J.input,
        "value": J.value,
        "bias": J.bias,
        "biases": list(J.bias_by_source().values()),
        "S": J.svd(1, tolerance=_svd_tolerance(J.dtype)).S,
        "top": [(i, p) for i, _, p in lin.next_token_ids(3, position=c.position)],
        "shares": shares.shares,
        "kinds": shares.kinds,
        "missed": shares.relative_residual,
        "tokens": [len(lin.tokens), all(isinstance(token, str) for token in lin.tokens)],
        "certified": lin.certify(position=c.position).passed,
    }


def _svd_tolerance(dtype: torch.dtype) -> float:
    return max(1e-3, 50 * torch.finfo(dtype).eps)


def _tensors(found: dict[str, Any]) -> Numbers:
    """The same as tensors, made outside of all surroundings; a tensor that cannot be used there stays as it is."""
    return {
        name: value
        if isinstance(value, Tensor)
        else torch.stack(value)
        if isinstance(value, list) and value and isinstance(value[0], Tensor)
        else torch.tensor(value, dtype=torch.float64)
        for name, value in found.items()
    }


def wrong(c: Combination, n: Numbers) -> list[str]:
    """What does not hold of a map's numbers."""
    dtype = n["dense"].dtype
    limit = ROUNDING[dtype]
    if c.dtype == "float64" and c.precision != "double":  # norms that cast to float32, as the model has them
        limit = max(limit, 1e-5)
    n = {name: value.double() if value.is_floating_point() else value for name, value in n.items()}
    faults = [f"{name} is not finite" for name, value in n.items() if not value.isfinite().all()]
    dense, X, u, x = (n[name] for name in ("dense", "X", "u", "input"))
    sizes = {
        "J X": torch.einsum("oti,ti->o", dense.abs(), X.abs()),
        "u J": torch.einsum("no,oti->nti", u.abs(), dense.abs()),
    }
    size_y = torch.einsum("oti,ti->o", dense.abs(), x.abs()) + n["bias"].abs() + n["value"].abs()
    pairs = {
        "the dense map's product": (torch.einsum("oti,ti->o", dense, X), n["matvec"], sizes["J X"]),
        "the dense map's rows": (torch.einsum("no,oti->nti", u, dense), n["rmatmat"], sizes["u J"]),
        "<u, J v> = <J^T u, v>": ((u @ n["matvec"]), (n["rmatmat"] * X).sum((1, 2)), u.abs() @ sizes["J X"]),
        "J x + b": (torch.einsum("oti,ti->o", dense, x) + n["bias"], n["value"], size_y),
        "the sum of the blocks": (n["blocks"].sum(0), n["matvec"], sizes["J X"]),
        "the sum of the biases": (n["biases"].sum(0), n["bias"], size_y),
        "the largest singular value": (torch.linalg.matrix_norm(dense.transpose(0, 1), 2), n["S"][:, 0], None),
    }
    for name, (one, other, size) in pairs.items():
        scale = (other if size is None else size).norm()
        allowed = limit + (_svd_tolerance(dtype) if size is None else 0.0)
        if not (one - other).norm() <= allowed * scale:
            faults.append(f"{name} is off by {((one - other).norm() / scale).item():.1e}")
    if not n["missed"] <= max(limit, 1e-4 if c.dtype == "float32" else 0.5 if "16" in c.dtype else 0.0):
        faults.append(f"shares by {c.level} miss their sum by {n['missed'].item():.1e}")
    if c.level == "token" and (n["kinds"] == KINDS.index("token")).sum() != n["tokens"][0]:
        faults.append("not one share for each token")
    if n["tokens"].tolist() != [len(x), 1] and c.source == "embed":
        faults.append("not one text for each token")
    if not n["certified"]:
        faults.append("the certificate does not pass")
    return faults


def _differences(expected: Numbers | str, found: Numbers | str) -> list[str]:
    """How surroundings changed a result: not by a bit, unless all is refused in one line."""
    if isinstance(found, str):
        return _no_remedy(found)
    if isinstance(expected, str):
        return [f"refused without the surroundings ({expected}), computed within"]
    odd = [name for name, value in found.items() if value.is_inference() or value.device.type == "meta"]
    odd = [name for name in odd if name not in ("X", "u")]  # those are given, and may be of the surroundings
    unequal = [
        name
        for name, value in expected.items()
        if name not in odd and not torch.equal(value.nan_to_num(), found[name].nan_to_num())
    ]
    return [f"{', '.join(odd)} unusable outside"] * bool(odd) + [f"{', '.join(unequal)} not the same bits"] * bool(
        unequal
    )
