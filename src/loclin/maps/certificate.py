"""Whether a map is exact, and if not, which module is not linear.

A small reconstruction error |J x + b - y| proves little: y x^T / |x|^2 reconstructs y too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loclin.common.sums import norms, relative_error
from loclin.common.surroundings import in_plain_torch
from loclin.freeze import FreezeOptions, Origin
from loclin.maps.linear_map import LinearMap
from loclin.maps.slow_path import SlowPath
from loclin.models.forward import Rows, hidden_output, hooked, logits_at
from loclin.network.graph import hook_input
from loclin.network.trace import Trace
from loclin.results.provenance import Provenance
from loclin.results.result import Result

_ROWS = 3
_FORWARD_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""How far the linear path's value may be from the model's: the rounding of the model's own dtype, and its casts."""
_MOST_CANCELLED = 30.0
"""The most by which the numbers that are summed may exceed their sum: beyond, a dtype is too coarse for a map."""


def tolerance(trace: Trace) -> float:
    """The largest relative error at which a map counts as exact, where nothing cancels.

    In float32 that is 25 units in the last place: kernels add in an order of their own, and the worst of 81 small
    networks is off by 4, relative to the size of the numbers that are summed (see `cancellation`).
    """
    if trace.dtype == torch.float64:
        return 1e-6 if trace.options.keeps_stock(trace.sequence.dtype) else 1e-12
    return {torch.float32: 3e-6, torch.float16: 1e-2, torch.bfloat16: 6e-2}[trace.dtype]


def cancellation(pushed: Tensor, y: Tensor) -> float:
    """By how much the numbers that are summed exceed their sum: rounding is relative to those numbers.

    `pushed` `[n, d]` is J applied to the input with random signs: its square is on average the sum of all squares.
    """
    size = norms(pushed).square().mean().sqrt() / norms(y).clamp_min(torch.finfo(y.dtype).tiny)
    return min(max(size.item(), 1.0), _MOST_CANCELLED)


@dataclass(frozen=True)
class Culprit:
    """An operation of a module that is not linear in its input although its coefficients are frozen."""

    module: str
    kind: str  # the module's class
    error: float  # |linearised value - output| / |output| of the operation
    operation: str = ""
    line: str = ""  # of code

    def __str__(self) -> str:
        return f"{self.module} ({self.kind}): {self.operation} at {self.line}, error {self.error:.1e}"


@dataclass(frozen=True)
class Check:
    """One error of a certificate: in a word, in symbols, and in a sentence."""

    name: str
    formula: str
    meaning: str
    value: float
    limit: float
    passed: bool
    identical: bool = False  # whether the compared values are equal in every bit


@dataclass(frozen=True)
class Certificate(Result):
    """How exact a map is. Every error is relative and has no unit.

    Attributes
    ----------
    reconstruction_error: |J x + b - y_frozen| / |y_frozen|, J x by one forward product: is the algebra right?
    forward_error: |y_frozen - y_model| / |y_model| over all positions, of the size of the model's own rounding.
    bit_identical: whether the model's forward pass inside the freeze equals the one outside in every bit.
    std_error: std(J x + b - y_model) / std(y_model), the paper's metric.
    adjoint_error: |<u, J v> - <J^T u, v>| / (|u| |J v|) for random u and v.
    linearity_error: |J(a v + w) - a J v - J w| / (|a J v| + |J w|) for random v and w.
    second_derivative: how much the vjp still depends on the input: 0 when the freeze holds.
    row_error: difference of sampled rows of J from slow ones, by autograd through each layer (see `slow_path`).
    bias_share: |b| / |y|.
    tolerance: the limit of the errors: rounding in this dtype, more where larger numbers cancel.
    forward_tolerance: the limit of the forward error: 0 where the linear path has the model's dtype.
    culprits: when the certificate fails, the operations that are not linear.
    provenance, warnings: which map it is of, and warnings about the prompt.
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
    provenance: Provenance | None = None
    warnings: list[str] = field(default_factory=list)

    derived = ("passed",)

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
        gives_back = "The map, applied to the prompt's own embeddings, gives back the output."
        frozen_values = "The frozen network's values are the model's own, up to the rounding of the model's dtype."
        frozen_coefficients = "The map does not depend on its input: every nonlinear coefficient is frozen."
        slow = "Rows agree with a slow, separate backward pass through every layer."
        rows = (
            ("reconstruction", "|Jx + b − y| / |y|", gives_back, self.reconstruction_error),
            ("adjoint", "⟨u, Jv⟩ = ⟨Jᵀu, v⟩", "The map and its transpose belong together.", self.adjoint_error),
            ("linearity", "J(av + w) = aJv + Jw", "It is linear, tried on random vectors.", self.linearity_error),
            ("second derivative", "∂J/∂x = 0", frozen_coefficients, self.second_derivative),
            ("rows", "sampled rows of J", slow, self.row_error),
        )
        first, *others = (Check(*row, self.tolerance, row[-1] <= self.tolerance) for row in rows)
        same = self.bit_identical and self.forward_error == 0
        ends = (self.forward_error, self.forward_tolerance, self.same_forward, same)
        return [first, Check("forward", "|y − y_model| / |y_model|", frozen_values, *ends), *others]

    def table(self) -> dict[str, list[Any]]:
        """One row per check: name, formula, value, limit, passed."""
        checks = self.checks()
        return {name: [getattr(c, name) for c in checks] for name in ("name", "formula", "value", "limit", "passed")}

    def facts(self) -> dict[str, Any]:
        """Its errors, and whether it passed, as plain values: what the provenance of other results holds."""
        left_out = ("provenance", "warnings", "result")
        return {name: value for name, value in self.to_dict().items() if name not in left_out}


@in_plain_torch
def certify(J: LinearMap, seed: int = 0) -> Certificate:
    """Certify a map from the embeddings; results that are made of it later carry the certificate.

    Cost: ten columns, in one sweep forward and one backward; one for the biases; and of each layer two forward passes
    and four backward ones. Memory: one layer's graph.
    """
    trace = J.chain.trace
    random = torch.Generator().manual_seed(seed)
    v, w = torch.randn(2, *J.shape[1:], generator=random, dtype=J.dtype).to(J.device)
    u = torch.randn(J.shape[0], generator=random, dtype=J.dtype).to(J.device)
    y = J.value
    signs = torch.randint(0, 2, (2, *J.input.shape), generator=random).to(J.input) * 2 - 1
    tangents = torch.cat([torch.stack([J.input, 3.0 * v + w, v, w]), signs * J.input])
    pushed_input, combination, pushed_v, pushed_w, *signed = J.matmat(tangents)
    rows = torch.randint(J.shape[0], (_ROWS,), generator=random)
    cotangents = torch.zeros(1 + _ROWS, J.shape[0], dtype=J.dtype, device=J.device)
    cotangents[0] = u
    cotangents[range(1, 1 + _ROWS), rows] = 1.0
    pulled_u, *pulled_rows = J.rmatmat(cotangents)
    reconstruction = pushed_input + J.bias
    products = u.double() @ pushed_v.double(), (pulled_u.double() * v.double()).sum()
    adjoint = (products[0] - products[1]).abs() / (norms(u) * norms(pushed_v))
    nonlinear = norms(combination - 3.0 * pushed_v - pushed_w)
    stock = trace.stock_final[0, J.position].to(J.device, J.dtype) if J.target.kind == "final" else y
    error = relative_error(reconstruction - y, y)
    limit = tolerance(trace) * cancellation(torch.stack(signed), y)
    slow = SlowPath(trace, J.chain.options, J.position, rows.tolist())
    second, row_error = slow.second_derivative, slow.row_error(torch.stack(pulled_rows))
    exact = max(error, second, row_error) <= limit and not trace.nonlinear_uses and not trace.random
    model_final = trace.stock_final.to(J.dtype)
    keeps = trace.options.keeps_stock(trace.sequence.dtype)
    certificate = Certificate(
        reconstruction_error=error,
        forward_error=relative_error(trace.final - model_final, model_final),
        bit_identical=trace.bit_identical,
        std_error=((reconstruction - stock).std() / stock.std()).item(),
        adjoint_error=adjoint.item(),
        linearity_error=(nonlinear / (3.0 * norms(pushed_v) + norms(pushed_w))).item(),
        second_derivative=second,
        row_error=row_error,
        bias_share=relative_error(J.bias, y),
        tolerance=limit,
        forward_tolerance=0.0 if keeps else _FORWARD_TOLERANCE[trace.sequence.dtype],
        culprits=() if exact else tuple(find_culprits(trace, J.chain.options, limit)),
        provenance=J.provenance(),
        warnings=J.warnings,
    )
    J.certificate = certificate.facts()
    return certificate


def find_culprits(trace: Trace, options: FreezeOptions, limit: float) -> list[Culprit]:
    """The operations that are not linear, in the order in which they run.

    Every operation's linearised value is compared with the model's own value. A module whose output does not depend on
    its live input by any operation that loclin sees is named too. Cost: three forward passes.
    """
    hf = trace.model.hf
    kinds = {name or "model": type(module).__name__ for name, module in hf.named_modules()}

    with torch.no_grad(), trace.freeze(hf, options) as mode:
        mode.graph, mode.audit = False, max(10 * limit, 1e-6 if trace.sequence.dtype == torch.float64 else 1e-4)
        if trace.sequence.dtype in (torch.float16, torch.bfloat16):
            mode.audit = 0.1

        def enter(hidden: Tensor, _rows: Rows, _tokens: slice) -> None:
            mode.enter(hidden)  # returns nothing: a hook's result would replace what enters

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            if mode.status(hidden_output(output)) is not None:
                mode.live(hidden_output(output))

        handles = [*(mode.watch(module) for module in hf.modules()), *hook_input(trace, enter)]
        handles.append(trace.sequence.exit.register_forward_hook(leave))
        with hooked(handles):
            logits_at(trace.model, trace.input_ids, trace.length - 1)
    found = dict.fromkeys(use.origin for use in (*trace.nonlinear_uses, *mode.nonlinear_uses))
    errors = {use.origin: use.error for use in (*mode.nonlinear_uses, *trace.nonlinear_uses)}
    named = [origin for origin in found if origin.line] or list(found)
    named_errors = [(origin, errors[origin]) for origin in named] + [(o, 1.0) for o in random_operations(trace)]
    return [Culprit(o.module, kinds.get(o.module, "?"), error, o.operation, o.line) for o, error in named_errors]


def random_operations(trace: Trace) -> list[Origin]:
    """Each operation that draws random numbers, if the model's output differs from run to run. Cost: three passes."""
    if not trace.random:
        return []
    hf = trace.model.hf
    with torch.no_grad(), trace.freeze(hf, trace.options) as mode:
        mode.noise = []
        logits_at(trace.model, trace.input_ids, trace.length - 1)
    return list(dict.fromkeys(mode.noise))
