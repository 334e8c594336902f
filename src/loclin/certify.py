"""Is the map exact, and if not, which module breaks it.

A small reconstruction error certifies bookkeeping only: y x^T / |x|^2 reconstructs too. So the certificate also holds
the adjoint test, linearity, a vanishing second derivative, and agreement with an independent slow path.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loclin.freeze import Hold, biases, covered, frozen
from loclin.linear_map import LinearMap
from loclin.link import LayerLink, batched_jvp
from loclin.trace import Trace, first

_ROWS = 3
FORWARD_TOLERANCE = 1e-5
"""How far `precision="double"` may move the forward pass away from the model's float32 norms and softmax."""


def tolerance(dtype: torch.dtype, hold: Hold) -> float:
    """The largest relative error at which a map in this dtype counts as exact."""
    if dtype == torch.float64:
        return 1e-12 if hold.precision == "double" else 1e-6
    return {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]


def relative(difference: Tensor, reference: Tensor) -> float:
    """|difference| / |reference|, Euclidean norms over everything."""
    return (difference.norm() / reference.norm().clamp_min(torch.finfo(reference.dtype).tiny)).item()


@dataclass(frozen=True)
class Culprit:
    """A module that is not linear in its input although its coefficients are held."""

    module: str
    kind: str
    error: float


@dataclass(frozen=True)
class Certificate:
    """How exact a map is. Every error is relative and has no unit.

    Attributes
    ----------
    reconstruction_error
        |J x + b - y_frozen| / |y_frozen|, J x by one forward product: is the algebra right?
    forward_error
        |y_frozen - y_model| / |y_model| over all positions: did freezing change the forward pass?
    bit_identical
        Whether the frozen forward pass equals the model's in every bit.
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
        What the errors must not pass in this dtype.
    culprits
        When the certificate fails: the innermost modules that are not linear.
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
    culprits: tuple[Culprit, ...]

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance."""
        errors = (
            self.reconstruction_error,
            self.adjoint_error,
            self.linearity_error,
            self.second_derivative,
            self.row_error,
        )
        exact = all(error <= self.tolerance for error in errors)
        return exact and not self.culprits and (self.bit_identical or self.forward_error <= FORWARD_TOLERANCE)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self) | {"passed": self.passed}


def certify(J: LinearMap, seed: int = 0) -> Certificate:
    """Certify a map from the embeddings.

    Cost: about ten columns, one backward pass through the whole frozen model, and one small graph per layer.
    """
    trace, hold = J.chain.trace, J.chain.hold
    random = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, *J.shape[1:], generator=random, dtype=J.dtype).to(J.device)
    u = torch.randn(J.shape[0], generator=random, dtype=J.dtype).to(J.device)
    y = J.value
    combination, pushed_v, pushed_w = J.matmat(torch.stack([3.0 * v + w, v, w]))
    reconstruction = J.matvec(J.input) + J.bias
    adjoint = (u @ pushed_v - (J.rmatvec(u) * v).sum()).abs() / (u.norm() * pushed_v.norm())
    stock = trace.stock_final[0, J.position].to(J.device) if J.target.kind == "final" else y
    error = relative(reconstruction - y, y)
    limit = tolerance(J.dtype, hold)
    second = max(_second_derivative(link) for link in J.chain.layers)
    return Certificate(
        reconstruction_error=error,
        forward_error=relative(trace.final - trace.stock_final, trace.stock_final),
        bit_identical=torch.equal(trace.final, trace.stock_final) and _logits_equal(trace),
        std_error=((reconstruction - stock).std() / stock.std()).item(),
        adjoint_error=adjoint.item(),
        linearity_error=(
            (combination - 3.0 * pushed_v - pushed_w).norm() / (3.0 * pushed_v.norm() + pushed_w.norm())
        ).item(),
        second_derivative=second,
        row_error=_row_error(J, random),
        bias_share=relative(J.bias, y),
        tolerance=limit,
        culprits=tuple(culprits(trace, hold, limit)) if not max(error, second) <= limit else (),
    )


def _logits_equal(trace: Trace) -> bool:
    return torch.equal(trace.logits(trace.length - 1), trace.stock_logits)


def _second_derivative(link: LayerLink) -> float:
    """How strongly a layer's vjp depends on the layer's input; 0 for a map that is linear."""
    graph = link.graph()
    x, y = graph.points["resid_pre"], graph.points["resid_post"]
    cotangent = torch.ones_like(y)
    (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    if not pulled.requires_grad:
        return 0.0
    (again,) = torch.autograd.grad(pulled.sum(), x, allow_unused=True)
    return 0.0 if again is None else relative(again * x, pulled.detach())


def _row_error(J: LinearMap, random: torch.Generator) -> float:
    """Sampled rows of J against one backward pass through the whole frozen model, links and sweeps unused."""
    trace = J.chain.trace
    leaf = trace.layers[0].hidden.clone().requires_grad_()
    seen: dict[str, Tensor] = {}

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((leaf, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": leaf})

    def leave(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["final"] = output

    with torch.enable_grad(), frozen(trace.model.hf, J.chain.hold):
        handles = [
            trace.anatomy.layers[0].register_forward_pre_hook(enter, with_kwargs=True),
            trace.anatomy.final_norm.register_forward_hook(leave),
        ]
        try:
            trace.model.hf(input_ids=trace.input_ids, use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
    rows = torch.randint(J.shape[0], (_ROWS,), generator=random)
    cotangents = torch.zeros(_ROWS, J.shape[0], dtype=J.dtype, device=J.device)
    cotangents[range(_ROWS), rows] = 1.0
    slow = [
        torch.autograd.grad(seen["final"][0, J.position, row], leaf, retain_graph=True)[0][0] for row in rows.tolist()
    ]
    reference = torch.stack(slow).to(J.device)
    return relative(J.rmatmat(cotangents) - reference, reference)


def culprits(trace: Trace, hold: Hold, limit: float) -> list[Culprit]:
    """The innermost modules whose output is not J x + b at their own input, the worst first.

    Cost: one column through every module of every layer.
    """
    found: list[Culprit] = []
    for index, layer in enumerate(trace.anatomy.layers):
        name = f"layers.{index}"
        errors = _module_errors(layer, trace, index, hold)
        bad = {path: error for path, error in errors.items() if not error <= 10 * limit}
        inner = [
            path for path in bad if not any(other.startswith(f"{path}.".lstrip(".")) for other in bad if other != path)
        ]
        found += [
            Culprit(f"{name}.{path}".strip("."), type(layer.get_submodule(path)).__name__, bad[path]) for path in inner
        ]
    return sorted(found, key=lambda culprit: -culprit.error)


def _module_errors(layer: nn.Module, trace: Trace, index: int, hold: Hold) -> dict[str, float]:
    """|J x + b - y| / |y| of every module inside a layer at its own input, but for what the rules hold."""
    call = trace.layers[index]
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = args[0] if args else kwargs.get("hidden_states")
            if isinstance(entered, Tensor) and isinstance(first(output), Tensor):
                seen[path] = (entered, first(output))

        return hook

    x = call.hidden.clone().requires_grad_()
    with torch.enable_grad(), frozen(layer, hold, name=f"layers.{index}", live_biases=True):
        handles = [part.register_forward_hook(remember(path), with_kwargs=True) for path, part in layer.named_modules()]
        try:
            call(layer, x)
        finally:
            for handle in handles:
                handle.remove()
        errors = {}
        skipped = covered(layer)
        for path, (entered, left) in seen.items():
            if layer.get_submodule(path) in skipped:
                continue
            if not left.requires_grad or not entered.requires_grad:
                continue
            rebuilt = batched_jvp(left, entered)(entered.detach()[None])[0]
            for bias in biases(layer.get_submodule(path)).values():
                rebuilt = rebuilt + batched_jvp(left, bias)(bias.detach()[None])[0]
            errors[path] = relative(rebuilt - left.detach(), left.detach())
    return errors
