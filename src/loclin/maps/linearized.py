"""A model at one prompt: what it predicts, and the linear maps that it exactly is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loclin.common.arguments import whole
from loclin.common.surroundings import in_plain_torch
from loclin.errors import NotExactError
from loclin.freeze import Gate, Hold, Precision
from loclin.maps.certificate import Certificate, certify, random_operations
from loclin.maps.layer_spectra import LayerSpectra, layer_spectra
from loclin.maps.linear_map import LinearMap
from loclin.maps.plan import Plan
from loclin.models import Model, wrap
from loclin.models.prompts import Numbers, Prompt, prompt_warnings, read_prompt
from loclin.network.chain import Chain
from loclin.network.memory import budget
from loclin.network.points import parse
from loclin.network.trace import Trace, trace

SINK_SHARE, SINK_RATIO = 0.3, 4.0
"""An attention sink gets this share of later tokens' attention, and this many times what the median token gets."""

L = TypeVar("L", bound="Linearized")


class Linearized:
    """A model frozen at one prompt, and its maps. `loclin.Linearization` is one that also answers questions.

    Attributes
    ----------
    model
        The model, as it was.
    input_ids
        The prompt's token ids `[1, T]`.
    gate, precision
        What was held (see `loclin.freeze.Hold`).
    trace, chain
        The remembered forward pass, and its links.
    memory
        The budget of sweeps beside their results, as it was given.
    prompt_warnings
        What is odd about the prompt's tokens; see `warnings`.
    padded_error
        |y_padded - y| / |y| of the model's logits at the last token, in the padded batch and alone; None when no batch
        was run (see `loclin.linearize_batch`).
    """

    def __init__(
        self, model: Model, input_ids: Int[Tensor, "1 T"], hold: Hold, memory: int | float | str | None
    ) -> None:
        self.model = model
        self.trace = trace(model, input_ids, hold, keep=budget(memory, model.device) // 4)
        self.input_ids = self.trace.input_ids
        self.gate, self.precision = hold.gate, hold.resolved(self.trace.route.dtype)
        self.padded_error: float | None = None
        self.prompt_warnings: list[str] = []
        self.memory = memory
        self.chain = Chain(self.trace)
        self._maps: dict[tuple, LinearMap] = {}
        self._certificates: dict[int, Certificate] = {}

    @classmethod
    @in_plain_torch
    def at(
        cls: type[L],
        model: Model | nn.Module,
        prompt: Prompt,
        *,
        attention_mask: Numbers | None = None,
        gate: Gate = "activation",
        precision: Precision = "auto",
        bos: bool | str | None = None,
        memory: int | float | str | None = None,
        strict: bool = True,
    ) -> L:
        """Freeze a model at one prompt; everything is explained at `loclin.linearize`."""
        model = model if isinstance(model, Model) else wrap(model)
        ids = read_prompt(model, prompt, attention_mask, bos)
        result = cls(model, ids, Hold(gate, precision), memory)
        result.prompt_warnings = prompt_warnings(model, ids, appends=isinstance(prompt, str) and bos is None)
        if strict and result.trace.random:
            raise _random(result.trace)
        if strict and (result.trace.misuses or not all(result.trace.explicit)):
            certificate = result.certify()
            if not certificate.passed:
                blamed = certificate.culprits[0].module if certificate.culprits else ""
                raise NotExactError(_refusal(model, certificate), blamed)
        return result

    def __repr__(self) -> str:
        """Name the model, the length and what was held."""
        return f"{type(self).__name__}({self.model.info.name}, {len(self.tokens)} tokens, gate={self.gate!r})"

    @property
    def embeddings(self) -> Float[Tensor, "T d"]:
        """x, what enters layer 0 and what J acts on; any scale that the family puts on its embeddings included."""
        return self.trace.layers[0].value[0]

    @cached_property
    def tokens(self) -> list[str]:
        """The T input tokens, each as it is shown (see `Model.decode_each`); their ids without a tokenizer."""
        return self.model.decode_each(self.input_ids[0].tolist())

    @cached_property
    def text(self) -> str:
        """The prompt as the tokenizer reads it, special tokens included; `model.tokens.offsets` finds tokens in it."""
        return self.model.decode(self.input_ids[0].tolist())

    @cached_property
    @in_plain_torch
    def sinks(self) -> list[int]:
        """Positions that are attention sinks: most layers and heads look at them, whatever they mean."""
        received = self.trace.attention_received[:-1]
        return [
            i
            for i, share in enumerate(received.tolist())
            if len(received) > 1
            and share >= SINK_SHARE
            and share >= SINK_RATIO * torch.cat([received[:i], received[i + 1 :]]).median().item()
        ]

    @cached_property
    def warnings(self) -> list[str]:
        """What a reader should know before trusting what is said of this prompt; every analysis passes it on."""
        warnings = [*self.prompt_warnings]
        width = cast("Tensor", self.model.hf.get_input_embeddings().weight).shape[-1]
        if width != self.trace.width:
            warnings.append(
                f"The input embeddings are {width} wide and the residual stream is {self.trace.width}: there are no "
                "words for what maps read."
            )
        first_is_word = self.model.bos is None or int(self.input_ids[0, 0]) != self.model.bos
        if 0 not in self.sinks or not first_is_word:
            return warnings
        return [
            *warnings,
            f"{self.tokens[0]!r} is the attention sink: the prompt has no beginning token, so the first word carries "
            "the sink and its share says little about the word. Put a beginning token in front: --bos, or bos=True.",
        ]

    @in_plain_torch
    def value(self, point: str) -> Float[Tensor, "T n"]:
        """The frozen network's value at a point (see `loclin.network.points`), `[T, d]`; `[T, V]` for the logits."""
        return self.trace.value(parse(point, self.trace.n_layers))

    @in_plain_torch
    def next_tokens(self, k: int = 5, position: int = -1) -> list[tuple[str, float]]:
        """The model's k most probable next tokens, as (text, probability)."""
        return [(text, probability) for _, text, probability in self.next_token_ids(k, position)]

    @in_plain_torch
    def next_token_ids(self, k: int = 5, position: int = -1) -> list[tuple[int, str, float]]:
        """The model's k most probable next tokens, as (id, text, probability)."""
        logits = self.trace.logits(self.trace.position(position))
        top = torch.softmax(logits.double(), dim=-1).topk(min(whole("k", k, 1), logits.shape[0]))
        ids = top.indices.tolist()
        return list(zip(ids, self.model.decode_each(ids), top.values.tolist(), strict=True))

    def jacobian(
        self, source: str = "embed", target: str = "final", position: int = -1, *, normed: bool = False
    ) -> LinearMap:
        """The exact map from all tokens at `source` to one position at `target` (paper, equation 2).

        Parameters
        ----------
        source, target
            Points along the network: `embed`, `resid_pre.L`, `attn_out.L`, `resid_mid.L`, `mlp_out.L`,
            `resid_post.L`, `final`, `logits`. Negative layers count from the end.
        position
            The target's position in the prompt.
        normed
            Put the final norm, frozen at the target's own value, on top of a target before it.

        Returns
        -------
        LinearMap
            An operator; nothing is computed yet. The same arguments give the same object.

        Raises
        ------
        OptionError
            For a point that does not exist or is not downstream.
        PromptError
            For a position outside the prompt.
        """
        n = self.trace.n_layers
        start, end, at = parse(source, n), parse(target, n), self.trace.position(position)
        key = (start, end, at, normed)
        if key not in self._maps:
            self._maps[key] = LinearMap(self.chain, start, end, at, normed=normed, budget=self.memory)
        return self._maps[key]

    def cost(
        self,
        source: str = "embed",
        target: str = "final",
        position: int = -1,
        *,
        k: int = 8,
        joint: bool = False,
        tolerance: float = 1e-3,
    ) -> Plan:
        """What `jacobian(source, target, position).svd(k, joint)` costs by each way; `print` it before running.

        Columns, flops, bytes that are held, and seconds on this machine by the speed of one large product.
        """
        return self.jacobian(source, target, position).plan(k, joint, tolerance)

    def ordinary_jacobian(self, position: int = -1) -> LinearMap:
        """The ordinary Jacobian embed -> final, nothing held: the derivative, which does not rebuild the output."""
        chain = Chain(self.trace, Hold(ordinary=True))
        return LinearMap(chain, parse("embed", 0), parse("final", 0), self.trace.position(position), budget=self.memory)

    @in_plain_torch
    def ordinary_reconstruction(self, position: int = -1) -> Float[Tensor, " d"]:
        """J_ordinary x: the output as the ordinary Jacobian, nothing held, would rebuild it (the paper's Figure 3).

        Cost: one column with live coefficients.
        """
        J = self.ordinary_jacobian(position)
        return J.matvec(J.input)

    @in_plain_torch
    def layers(
        self,
        components: Sequence[str] | None = None,
        mode: str = "cumulative",
        k: int = 8,
        position: int = -1,
        *,
        normed: bool | None = None,
        joint: bool = True,
        tolerance: float = 1e-3,
        route: str | None = None,
    ) -> LayerSpectra:
        """Spectra of every layer's exact maps to one position, from one sweep (paper, section 3.4 and Figure 6).

        Parameters
        ----------
        components
            Some of `"resid_post"`, `"attn_out"` and `"mlp_out"`; all that every layer has, unless given. In a parallel
            block, attention and MLP both read the layer's input, and their maps are from there as ever.
        mode
            `"cumulative"`: from the embeddings to each layer; `"layerwise"`: from the layer's own input; `"suffix"`:
            from each layer to `final`, where attention's and the MLP's output reach it through the residual stream.
        k
            How many singular triples of each map.
        position
            Where the maps end.
        normed
            Put the final norm, frozen at the point's own value, on top of maps that end at a layer: what a vector
            writes is then read as the output head would read it. The default, but for `"suffix"`.
        joint
            Also decompose all tokens' maps side by side.
        tolerance
            How far singular values may be off, as a share of each.
        route
            For `"cumulative"`: `"forward"` (one sweep) or `"backward"` (one for each layer and component); the cheaper
            one, unless given.

        Raises
        ------
        OptionError
            For a component, mode or k that there is not; the message names a layer that has no such component.
        PromptError
            For a position outside the prompt.

        Notes
        -----
        Cost: about two and a half dense maps for `"cumulative"` with explicit products and a short prompt (see
        `loclin.network.cost.prefix_sweep`), one at most for each component of `"layerwise"`, one for `"suffix"`; and
        the triples. Memory: T^2 d^2 / 2 numbers for the forward sweep, if that is within the budget; one layer's maps;
        and the triples of all of them.
        """
        return layer_spectra(
            self.chain,
            self.trace.position(position),
            components=components,
            mode=mode,
            k=k,
            normed=normed,
            joint=joint,
            tolerance=tolerance,
            route=route,
            budget=self.memory,
        )

    def followed_by(self: L, token: int) -> L:
        """The same prompt with one more token, frozen there in the same way."""
        ids = torch.cat([self.input_ids, self.input_ids.new_tensor([[whole("token", token)]])], dim=1)
        return self.at(self.model, ids, gate=self.gate, precision=self.precision, memory=self.memory, strict=False)

    @in_plain_torch
    def certify(self, position: int = -1) -> Certificate:
        """How exact the map embed -> final is at a position. Cost: see `loclin.maps.certificate.certify`."""
        J = self.jacobian(position=position)
        if J.position not in self._certificates:
            self._certificates[J.position] = certify(J)
        return self._certificates[J.position]


def _random(trace: Trace) -> NotExactError:
    """Why a model is refused that gives another output each time it runs."""
    found = random_operations(trace)
    where = "; ".join(f"{origin.operation} in {origin.module} at {origin.line}" for origin in found[:3])
    return NotExactError(
        f"{trace.model.info.name} gives another output each time it runs, so no map is its map: "
        f"{where or 'it keeps a state, or draws random numbers elsewhere than in torch'}. It is in evaluation mode "
        "already: set the dropout or noise to 0 in its code or config",
        found[0].module if found else "",
    )


def _refusal(model: Model, certificate: Certificate) -> str:
    """Why a model is refused, which module is to blame, and what can be done."""
    found = "; ".join(str(culprit) for culprit in certificate.culprits[:3])
    more = f" and {len(certificate.culprits) - 3} more" if len(certificate.culprits) > 3 else ""
    kind = certificate.culprits[0].kind if certificate.culprits else "ItsClass"
    return (
        f"{model.info.name} ({model.info.family}) is not exact. Not linear although its coefficients are held: "
        f"{found or f'no single operation (error {certificate.reconstruction_error:.1e})'}{more}. "
        f'Say what to hold there with loclin.freeze.register("{kind}", form), or pass strict=False to look at it'
    )
