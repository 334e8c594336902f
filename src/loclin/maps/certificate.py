"""Is the map exact, and if not, which module breaks it.

A small reconstruction error certifies bookkeeping only: y x^T / |x|^2 reconstructs too. So the certificate also holds
the adjoint test, linearity, a vanishing second derivative, and agreement with an independent slow path.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loclin.common.brief import brief
from loclin.common.sums import norms, relative
from loclin.common.surroundings import in_plain_torch
from loclin.freeze import Hold, Origin, frozen
from loclin.maps.linear_map import LinearMap
from loclin.network.link import LayerLink, at_entry, whole_graph
from loclin.network.route import first, logits_at
from loclin.network.trace import Trace

_ROWS = 3
_FORWARD_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""How far the linear path's value may be from the model's: the rounding of the model's own dtype, and its casts."""


_MOST_CANCELLED = 30.0
"""Where what is summed is larger than the sum by more, the dtype is too coarse for the map to count as exact."""


def tolerance(trace: Trace) -> float:
    """The largest relative error at which a map counts as exact, where nothing cancels.

    In float32 that is 25 units in the last place: kernels add in an order of their own, and the worst of 81 small
    networks missed by 4 on any of them, measured in the size of what is summed (see `cancelled`).
    """
    if trace.dtype == torch.float64:
        return 1e-6 if trace.hold.keeps_stock(trace.route.dtype) else 1e-12
    return {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[trace.dtype]


def cancelled(pushed: Tensor, y: Tensor) -> float:
    """How much larger the numbers that are summed are than their sum: rounding is relative to those.

    `pushed` `[n, d]` is J applied to the input with random signs: its square is on average the sum of all squares.
    """
    size = norms(pushed).square().mean().sqrt() / norms(y).clamp_min(torch.finfo(y.dtype).tiny)
    return min(max(size.item(), 1.0), _MOST_CANCELLED)


@dataclass(frozen=True)
class Culprit:
    """An operation that is not linear in its input although its coefficients are held.

    Attributes
    ----------
    module
        The path of the module that does it.
    kind
        The module's class.
    error
        How much of the operation's output is not linear: |what a linear twin misses| / |output|.
    operation, line
        The operation, and its line of code.
    """

    module: str
    kind: str
    error: float
    operation: str = ""
    line: str = ""

    def __str__(self) -> str:
        return f"{self.module} ({self.kind}): {self.operation} at {self.line}, error {self.error:.1e}"


@dataclass(frozen=True)
class Check:
    """One error of a certificate.

    Attributes
    ----------
    name, formula, meaning
        What it is: in a word, in symbols, in a sentence.
    value, limit
        The error, and what it must not pass.
    passed
        Whether it does not.
    identical
        Whether what is compared is equal in every bit.
    """

    name: str
    formula: str
    meaning: str
    value: float
    limit: float
    passed: bool
    identical: bool = False


@dataclass(frozen=True)
class Certificate:
    """How exact a map is. Every error is relative and has no unit.

    Attributes
    ----------
    reconstruction_error
        |J x + b - y_frozen| / |y_frozen|, J x by one forward product: is the algebra right?
    forward_error
        |y_frozen - y_model| / |y_model| over all positions. Zero where the linear path has the model's dtype; else what
        the model's own rounding amounts to.
    bit_identical
        Whether the model's forward pass inside the freeze equals the one outside in every bit.
    std_error
        std(J x + b - y_model) / std(y_model): the paper's metric.
    adjoint_error
        |<u, J v> - <J^T u, v>| / (|u| |J v|) for random u and v.
    linearity_error
        |J(a v + w) - a J v - J w| / (|a J v| + |J w|) for random v and w.
    second_derivative
        How much the vjp still depends on the input: 0 when the freeze holds.
    row_error
        Difference of sampled rows of J from one backward pass through the whole frozen model.
    bias_share
        |b| / |y|.
    tolerance
        What the errors must not pass: rounding in this dtype, more where larger numbers cancel.
    forward_tolerance
        What the forward error must not pass: 0 where the linear path has the model's dtype.
    culprits
        When the certificate fails: the operations that are not linear.
    """

    reconstruction_error: float
    forward_error: float
    bit_identical: bool
    std_error: float
    adjoint_error: float
    linearity_error: float
    second_derivative: float
    row_error: float
    bias_share: float
    tolerance: float
    forward_tolerance: float
    culprits: tuple[Culprit, ...]

    __repr__ = brief

    @property
    def same_forward(self) -> bool:
        """Whether the frozen network's values are the model's: every bit, or to the rounding of the model's dtype."""
        return self.forward_error <= self.forward_tolerance and (self.bit_identical or self.forward_tolerance > 0)

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        return not self.culprits and all(check.passed for check in self.checks())

    def checks(self) -> list[Check]:
        """Every error that decides whether the map counts as exact, the reconstruction first."""

        def check(name: str, formula: str, meaning: str, value: float) -> Check:
            return Check(name, formula, meaning, value, self.tolerance, value <= self.tolerance)

        return [
            check(
                "reconstruction",
                "|Jx + b − y| / |y|",
                "The map, applied to the prompt's own embeddings, gives back the output.",
                self.reconstruction_error,
            ),
            Check(
                "forward",
                "|y − y_model| / |y_model|",
                "The frozen network's values are the model's own, up to the rounding of the model's dtype.",
                self.forward_error,
                self.forward_tolerance,
                self.same_forward,
                identical=self.bit_identical and self.forward_error == 0,
            ),
            check("adjoint", "⟨u, Jv⟩ = ⟨Jᵀu, v⟩", "The map and its transpose belong together.", self.adjoint_error),
            check("linearity", "J(av + w) = aJv + Jw", "It is linear, tried on random vectors.", self.linearity_error),
            check(
                "second derivative",
                "∂J/∂x = 0",
                "It no longer depends on its input: nothing nonlinear was left live.",
                self.second_derivative,
            ),
            check(
                "rows",
                "sampled rows of J",
                "Rows agree with a slow, separate backward pass through the whole model.",
                self.row_error,
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"culprits": [asdict(culprit) for culprit in self.culprits], "passed": self.passed}


@in_plain_torch
def certify(J: LinearMap, seed: int = 0) -> Certificate:
    """Certify a map from the embeddings; from then on, what is saved of it carries the certificate.

    Cost: about ten columns, one backward pass through the whole frozen model, and one small graph per layer.
    """
    trace = J.chain.trace
    random = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, *J.shape[1:], generator=random, dtype=J.dtype).to(J.device)
    u = torch.randn(J.shape[0], generator=random, dtype=J.dtype).to(J.device)
    y = J.value
    signs = torch.randint(0, 2, (2, *J.input.shape), generator=random).to(J.input) * 2 - 1
    combination, pushed_v, pushed_w, *signed = J.matmat(torch.cat([torch.stack([3.0 * v + w, v, w]), signs * J.input]))
    reconstruction = J.matvec(J.input) + J.bias
    products = u.double() @ pushed_v.double(), (J.rmatvec(u).double() * v.double()).sum()
    adjoint = (products[0] - products[1]).abs() / (norms(u) * norms(pushed_v))
    stock = trace.stock_final[0, J.position].to(J.device, J.dtype) if J.target.kind == "final" else y
    error = relative(reconstruction - y, y)
    limit = tolerance(trace) * cancelled(torch.stack(signed), y)
    second = max(_second_derivative(link) for link in J.chain.layers)
    row_error = _row_error(J, random)
    exact = max(error, second, row_error) <= limit and not trace.misuses and not trace.random
    model_final = trace.stock_final.to(J.dtype)
    keeps = trace.hold.keeps_stock(trace.route.dtype)
    certificate = Certificate(
        reconstruction_error=error,
        forward_error=relative(trace.final - model_final, model_final),
        bit_identical=trace.bit_identical,
        std_error=((reconstruction - stock).std() / stock.std()).item(),
        adjoint_error=adjoint.item(),
        linearity_error=(
            norms(combination - 3.0 * pushed_v - pushed_w) / (3.0 * norms(pushed_v) + norms(pushed_w))
        ).item(),
        second_derivative=second,
        row_error=row_error,
        bias_share=relative(J.bias, y),
        tolerance=limit,
        forward_tolerance=0.0 if keeps else _FORWARD_TOLERANCE[trace.route.dtype],
        culprits=() if exact else tuple(culprits(trace, J.chain.hold, limit)),
    )
    J.certificate = certificate.to_dict()
    return certificate


def _second_derivative(link: LayerLink) -> float:
    """How strongly a layer's vjp depends on the layer's input; 0 for a map that is linear."""
    graph = link.graph()
    x, y = graph.points["resid_pre"], graph.points["resid_post"]
    if not y.requires_grad:
        return 0.0
    (pulled,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    if not pulled.requires_grad:
        return 0.0
    (again,) = torch.autograd.grad(pulled.sum(), x, allow_unused=True)
    return 0.0 if again is None else relative(again * x, pulled.detach())


def _row_error(J: LinearMap, random: torch.Generator) -> float:
    """Sampled rows of J against one backward pass through the whole frozen model, links and sweeps unused."""
    trace = J.chain.trace
    graph = whole_graph(trace, J.chain.hold)
    leaf, final = graph.points["resid_pre"], graph.points["resid_post"]
    if not final.requires_grad:
        return 1.0
    rows = torch.randint(J.shape[0], (_ROWS,), generator=random)
    cotangents = torch.zeros(_ROWS, J.shape[0], dtype=J.dtype, device=J.device)
    cotangents[range(_ROWS), rows] = 1.0
    slow = [torch.autograd.grad(final[0, J.position, row], leaf, retain_graph=True)[0][0] for row in rows.tolist()]
    reference = torch.stack(slow).to(J.device)
    return relative(J.rmatmat(cotangents) - reference, reference)


def culprits(trace: Trace, hold: Hold, limit: float) -> list[Culprit]:
    """The operations that are not linear, in the order in which they run.

    Every operation's twin is compared with the model's own value; a module that takes something live and gives
    something that no operation tied to it is named too. Cost: three forward passes.
    """
    hf = trace.model.hf
    kinds = {name or "model": type(module).__name__ for name, module in hf.named_modules()}

    with torch.no_grad(), frozen(hf, hold, trace.dtype) as mode:
        mode.graph, mode.audit = False, max(10 * limit, 1e-6 if trace.route.dtype == torch.float64 else 1e-4)
        if trace.route.dtype in (torch.float16, torch.bfloat16):
            mode.audit = 0.1

        def entered(hidden: Tensor) -> None:
            mode.enter(hidden)

        handles = [*(mode.watch(module) for module in hf.modules()), at_entry(trace, entered)]

        def left_all(_module: nn.Module, _args: Any, output: Any) -> None:
            if mode.status(first(output)) is not None:
                mode.live(first(output))

        handles.append(trace.route.exit.register_forward_hook(left_all))
        try:
            logits_at(trace.model, trace.input_ids, trace.length - 1)
        finally:
            for handle in handles:
                handle.remove()
    found = dict.fromkeys(misuse.origin for misuse in (*trace.misuses, *mode.misuses))
    errors = {misuse.origin: misuse.error for misuse in (*mode.misuses, *trace.misuses)}
    named = [origin for origin in found if origin.line] or list(found)
    named_errors = [(origin, errors[origin]) for origin in named] + [(o, 1.0) for o in random_operations(trace)]
    return [Culprit(o.module, kinds.get(o.module, "?"), error, o.operation, o.line) for o, error in named_errors]


def random_operations(trace: Trace) -> list[Origin]:
    """The operations that draw random numbers, where the model gives another output at each run; each once.

    Cost: three forward passes.
    """
    if not trace.random:
        return []
    hf = trace.model.hf
    with torch.no_grad(), frozen(hf, trace.hold, trace.dtype) as mode:
        mode.noise = []
        logits_at(trace.model, trace.input_ids, trace.length - 1)
    return list(dict.fromkeys(mode.noise))
