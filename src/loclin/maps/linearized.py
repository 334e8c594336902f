"""A model at one prompt: its predictions, and its exact linear maps there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import whole
from loclin.common.surroundings import in_plain_torch
from loclin.common.unpicklable import Unpicklable
from loclin.errors import NotExactError, OptionError
from loclin.freeze import FreezeOptions, Gate, Precision
from loclin.maps.certificate import Certificate, certify, random_operations
from loclin.maps.linear_map import LinearMap
from loclin.maps.plan import Plan
from loclin.models import Model, wrap
from loclin.models.checks import refuse_devices
from loclin.models.prompts import Numbers, Prompt, place_prompt, prompt_warnings
from loclin.network.chain import Chain
from loclin.network.memory import Budget
from loclin.network.need import allow
from loclin.network.points import Point, parse_point
from loclin.network.record import trace_prompt
from loclin.network.split import Split
from loclin.network.split_choice import choose
from loclin.network.trace import Trace
from loclin.results import display

SINK_SHARE, SINK_RATIO = 0.3, 4.0
"""An attention sink receives this share of later tokens' attention, and this many times that of the median token."""

F = TypeVar("F", bound=Callable[..., Any])
L = TypeVar("L", bound="Linearized")


class Linearized(Unpicklable):
    """A model frozen at one prompt, and its maps. `loclin.Linearization` is one that also answers questions.

    Attributes
    ----------
    model: the model, as it was.
    input_ids: the prompt's token ids `[1, T]`; -1 to -n at vectors that stand in front of its tokens.
    gate, precision: what is frozen, and the linear path's precision (see `loclin.freeze.FreezeOptions`).
    trace, chain: the traced prompt, and the links of its layers.
    memory, allowance: the budget beside the weights and results, as given, and how it is spent.
    prompt_warnings: warnings about the prompt's tokens; see `warnings`.
    padded_error: |y_padded - y| / |y| of the model's logits at the last token, in the padded batch and alone; None when
        no batch was run (see `loclin.linearize_batch`).
    """

    instead = "save the results instead, with result.save(path), or linearize the prompt again in the other process"

    def __init__(self, model: Model, input_ids: Int[Tensor, "1 T"], options: FreezeOptions, memory: Budget) -> None:
        self.model = model
        self.allowance = allow(model, input_ids.shape[1], options, memory)
        allowed = self.allowance
        self.trace = trace_prompt(model, input_ids, options, allowed.coefficients, allowed.pattern)
        self.input_ids = self.trace.input_ids
        if options.precision == "split":
            self.trace.split = choose(self.trace)
        self.gate, self.precision = options.gate, options.resolved(self.trace.sequence.dtype)
        self.padded_error: float | None = None
        self.prompt_warnings: list[str] = []
        self.memory = memory
        self.chain = Chain(self.trace)
        self._maps: dict[tuple[Point, Point, int, bool], LinearMap] = {}
        self._certificates: dict[int, Certificate] = {}

    @classmethod
    @in_plain_torch
    def at(
        cls: type[L],
        model: Model | nn.Module,
        prompt: Prompt | None = None,
        *,
        decoder: Prompt | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        images: Any = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Numbers | None = None,
        gate: Gate = "activation",
        precision: Precision = "auto",
        bos: bool | str | None = None,
        memory: int | float | str | None = None,
        strict: bool = True,
    ) -> L:
        """Freeze a model at one prompt; see `loclin.linearize`."""
        model = model if isinstance(model, Model) else wrap(model)
        refuse_devices(model.hf, model.info.name)  # to which it may have been moved since it was wrapped
        beside: Any = {"decoder": decoder, "inputs": inputs, "images": images, "inputs_embeds": inputs_embeds}
        model, ids = place_prompt(model, prompt, attention_mask=attention_mask, bos=bos, **beside)
        result = cls(model, ids, FreezeOptions(gate, precision), memory)
        result.prompt_warnings = prompt_warnings(
            model, ids, appends=model.task == "causal" and isinstance(prompt, str) and bos is None
        )
        if strict and result.trace.random:
            raise _random(result.trace)
        unproved = result.trace.nonlinear_uses or not all(result.trace.explicit)
        if result.trace.split.layers or (strict and unproved):
            certificate = result.certify()
            if strict and unproved and not certificate.passed:
                blamed = certificate.culprits[0].module if certificate.culprits else ""
                raise NotExactError(_refusal(model, certificate), blamed)
        return result

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model.info.name}, {len(self.tokens)} tokens, gate={self.gate!r})"

    def _repr_html_(self) -> str:
        return display.fragment(self)

    @property
    def embeddings(self) -> Float[Tensor, "T d"]:
        """x, the input of layer 0, on which J acts; includes any scale that the model applies to its embeddings."""
        return self.trace.layers[0].value[0]

    @cached_property
    def tokens(self) -> list[str]:
        """The T input tokens (see `Model.decode_each`); their ids without a tokenizer."""
        return self.model.decode_each(self.input_ids[0].tolist())

    @cached_property
    def text(self) -> str:
        """The prompt as the tokenizer reads it, special tokens included; `model.tokens.offsets` finds tokens in it."""
        return self.model.decode(self.input_ids[0].tolist())

    @cached_property
    @in_plain_torch
    def sinks(self) -> list[int]:
        """Positions that are attention sinks: most layers and heads attend to them, whatever the token."""
        received = self.trace.attention_received[:-1]
        if len(received) < 2:
            return []
        typical = [torch.cat([received[:i], received[i + 1 :]]).median().item() for i in range(len(received))]
        shares = list(enumerate(received.tolist()))
        return [i for i, share in shares if share >= SINK_SHARE and share >= SINK_RATIO * typical[i]]

    @property
    def _begins(self) -> bool:
        """Whether the prompt has a beginning token."""
        return self.model.bos is not None and int(self.input_ids[0, 0]) == self.model.bos

    @cached_property
    def non_words(self) -> list[int]:
        """Positions that stand for no word: attention sinks, and the beginning token."""
        return sorted({*self.sinks, *([0] if self._begins else [])})

    @cached_property
    def warnings(self) -> list[str]:
        """Warnings about this prompt, which every result of an analysis includes."""
        warnings = [*filter(None, [self.model.note]), *self.prompt_warnings]
        width = cast("Tensor", self.model.hf.get_input_embeddings().weight).shape[-1]
        if width != self.trace.width:
            warnings.append(
                f"The input embeddings are {width} wide and the residual stream is {self.trace.width}: there are no "
                "words for what maps read."
            )
        first = int(self.input_ids[0, 0])
        if (
            0 in self.sinks
            and not (self._begins or first < 0 or first in self.model.tokens.special())
            and self.model.task == "causal"
        ):
            warnings.append(
                f"{self.tokens[0]!r} is the attention sink: the prompt has no beginning token, so the first word "
                "carries the sink, and its share says little about the word. Put a beginning token first: --bos, or "
                "bos=True."
            )
        return warnings

    @in_plain_torch
    def value(self, point: str) -> Float[Tensor, "T n"]:
        """The frozen network's value at a point (see `loclin.network.points`), `[T, d]`; `[T, V]` for the logits."""
        return self.trace.value(parse_point(point, self.trace.n_layers))

    @in_plain_torch
    def next_tokens(self, k: int = 5, *, position: int = -1) -> list[tuple[str, float]]:
        """The model's k most probable next tokens (tokens at the mask; classes), as (text, probability)."""
        return [(text, probability) for _, text, probability in self.next_token_ids(k, position=position)]

    @in_plain_torch
    def next_token_ids(self, k: int = 5, *, position: int = -1) -> list[tuple[int, str, float]]:
        """As `next_tokens`, but as (id, text, probability)."""
        logits = self.trace.logits(self.trace.target_position(position)).double()
        several = getattr(self.model.hf.config, "problem_type", None) == "multi_label_classification"
        probabilities = logits.sigmoid() if several else logits.softmax(dim=-1)
        top = probabilities.topk(min(whole("k", k, 1), logits.shape[0]))
        ids = top.indices.tolist()
        return list(zip(ids, self.model.name_outputs(ids), top.values.tolist(), strict=True))

    def jacobian(
        self, source: str = "embed", target: str = "final", *, position: int = -1, normed: bool = False
    ) -> LinearMap:
        """The exact map from all tokens at `source` to one position at `target` (paper, equation 2).

        Points are `embed`, `resid_pre.L`, `attn_out.L`, `resid_mid.L`, `mlp_out.L`, `resid_post.L`, `final` and
        `logits`; negative layers count from the end. `normed` puts the final norm, frozen at the target's own value, on
        top of a target before it. Position -1 is that of the model's prediction: the last token, the first mask, or the
        token whose hidden state the classes read. Nothing is computed yet. The same arguments give the same object.

        Raises
        ------
        OptionError: for a point that does not exist, or a target that is not downstream.
        PromptError: for a position outside the prompt.
        """
        n = self.trace.n_layers
        start, end, at = parse_point(source, n), parse_point(target, n), self.trace.target_position(position)
        key = (start, end, at, normed)
        if key not in self._maps:
            self._maps[key] = LinearMap(self.chain, start, end, at, normed=normed, budget=self.allowance)
            self._maps[key].warnings = self.warnings
        return self._maps[key]

    def cost(
        self,
        source: str = "embed",
        target: str = "final",
        *,
        position: int = -1,
        k: int = 8,
        joint: bool = False,
        tolerance: float = 1e-3,
    ) -> Plan:
        """The columns, flops, memory and estimated seconds of each method of `jacobian(...).svd`; `print` it first."""
        return self.jacobian(source, target, position=position).plan(k, joint=joint, tolerance=tolerance)

    def ordinary_jacobian(self, *, position: int = -1) -> LinearMap:
        """The ordinary Jacobian embed -> final, nothing frozen: the derivative, which does not reconstruct y."""
        chain, at = Chain(self.trace, FreezeOptions(ordinary=True)), self.trace.target_position(position)
        return LinearMap(chain, Point("embed"), Point("final"), at, budget=self.allowance)

    @in_plain_torch
    def ordinary_reconstruction(self, *, position: int = -1) -> Float[Tensor, " d"]:
        """J_ordinary x, the ordinary Jacobian's output (the paper's Figure 3). Cost: one column, nothing frozen."""
        J = self.ordinary_jacobian(position=position)
        return J.matvec(J.input)

    def followed_by(self: L, *tokens: int) -> L:
        """The same prompt with more tokens (of its decoder, where there is one), frozen in the same way."""
        ids = torch.cat([self.input_ids, self.input_ids.new_tensor([[whole("token", one) for one in tokens]])], dim=1)
        n = self.model.encoder_length
        prompt: dict[str, Any] = {"prompt": ids[:, :n], "decoder": ids[:, n:]} if n else {"prompt": ids}
        how: Any = {"gate": self.gate, "precision": self.precision, "memory": self.memory, "strict": False}
        return self.at(self.model, **prompt, **how)

    @in_plain_torch
    def certify(self, *, position: int = -1) -> Certificate:
        """How exact the map embed -> final is at a position. Cost: see `loclin.maps.certificate.certify`."""
        J = self.jacobian(position=position)
        if J.position not in self._certificates:
            certificate = certify(J)
            if self.trace.split.layers and not certificate.passed:
                self._stop_splitting(f"left off: the certificate at position {J.position} failed with bf16 products")
                certificate = certify(self.jacobian(position=J.position))
            self._certificates[J.position] = certificate
        return self._certificates[J.position]

    def _stop_splitting(self, note: str) -> None:
        """Use float32 products from now on; maps that were made before stay as they are."""
        self.trace = replace(self.trace, split=Split(note=note))
        self.chain = Chain(self.trace)
        self._maps.clear()
        self._certificates.clear()


def question(function: F) -> F:
    """Run an analysis of a linearized prompt, its first argument, in `plain_torch`; OptionError for anything else."""
    plain = in_plain_torch(function)

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        lin = args[0] if args else kwargs.get("lin")
        if not isinstance(lin, Linearized):
            raise OptionError(
                f"{function.__name__} takes a linearized prompt, not {type(lin).__name__}: give the result of "
                "loclin.linearize(model, prompt)"
            )
        return plain(*args, **kwargs)

    return ask  # type: ignore[return-value]


def _random(trace: Trace) -> NotExactError:
    """Why a model is refused whose output differs from run to run."""
    found = random_operations(trace)
    where = "; ".join(f"{origin.operation} in {origin.module} at {origin.line}" for origin in found[:3])
    return NotExactError(
        f"{trace.model.info.name} gives another output each time it runs, so that no map is exact: "
        f"{where or 'it keeps a state, or draws random numbers outside of torch'}; it is in evaluation mode already, "
        "so set its dropout or noise to 0 in its code or config",
        found[0].module if found else "",
    )


def _refusal(model: Model, certificate: Certificate) -> str:
    """Why a model is refused, which module is not linear, and what can be done."""
    found = "; ".join(str(culprit) for culprit in certificate.culprits[:3])
    more = f" and {len(certificate.culprits) - 3} more" if len(certificate.culprits) > 3 else ""
    kind = certificate.culprits[0].kind if certificate.culprits else "ItsClass"
    return (
        f"{model.info.name} ({model.info.family}) is not exact; not linear although its coefficients are frozen: "
        f"{found or f'no single operation (error {certificate.reconstruction_error:.1e})'}{more}; "
        f'describe it with loclin.freeze.register("{kind}", form), or pass strict=False to inspect it'
    )
