"""A model and its tokenizer, with where they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from loclin.common.surroundings import in_plain_torch
from loclin.errors import ModelError, PromptError
from loclin.models import encoding
from loclin.models.checks import refuse_model
from loclin.models.crew import Crew
from loclin.models.lease import largest_layer_bytes
from loclin.models.options import parse_devices
from loclin.models.replica import replicate
from loclin.models.spread import refuse_sharing
from loclin.models.task import Task, find_head, find_task
from loclin.models.tokens import Tokens

Source = Literal["package", "hub", "directory", "gguf", "wrapped"]


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from and what it is, as written into every result."""

    name: str  # by which it was asked for
    source: Source
    family: str  # the `model_type` of its text config
    revision: str | None  # the hub's commit
    sha256: str | None  # of the source file, where there is a single one
    stored_dtype: str  # the type its weights were stored in; `dtype` is the one they have now
    dtype: str
    n_parameters: int  # tied ones count once
    task: Task = "causal"  # what it predicts

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A language model and its tokenizer.

    Attributes
    ----------
    hf: the transformers model.
    tokenizer: None if prompts are token ids.
    info: where it came from, and what it is.
    bos: the id of the beginning-of-text token that `encode(bos=True)` puts in front, or None.
    context_length: the most tokens the model takes, or None where it sets no limit.
    note: what results say of how it was loaded; empty where there is nothing to say.
    encoder_length: at one prompt of an encoder-decoder, how many of its tokens the encoder reads; the decoder reads the
        others. 0 for other models, and where the encoder reads `inputs`.
    inputs: at one prompt, what the model's forward pass takes beside tokens: constants of the map; and the vectors that
        stand in front of its tokens (see `loclin.models.placeholders`).
    read_processor: reads what turns images into tokens and tensors; None where there is none.
    devices: those that share the work; empty where there is one.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: ModelInfo
    bos: int | None
    context_length: int | None
    note: str = ""
    encoder_length: int = 0
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    read_processor: Callable[[], Any] | None = None

    @property
    def task(self) -> Task:
        """What it predicts."""
        return self.info.task

    @property
    def mask(self) -> int | None:
        """The id of the token that stands for a masked one; None if neither the tokenizer nor the config names it."""
        holder = self.hf.config if self.tokenizer is None else self.tokenizer
        found = getattr(holder, "mask_token_id", None)
        return found if isinstance(found, int) else None

    @property
    def has_encoder(self) -> bool:
        """Whether it is an encoder-decoder, of whatever task."""
        return bool(getattr(self.hf.config, "is_encoder_decoder", False))

    devices: tuple[torch.device, ...] = ()

    @cached_property
    def processor(self) -> Any:
        """What turns images into tokens and tensors; None without one. Read when it is first asked for."""
        return None if self.read_processor is None else self.read_processor()

    @property
    def streamed(self) -> bool:
        """Whether its layers' weights are read from disk whenever they are used."""
        return largest_layer_bytes(self.hf) > 0

    @property
    def _embeddings(self) -> Any:
        return self.hf.get_input_embeddings()

    @property
    def head(self) -> nn.Module:
        """The matrix that gives the logits."""
        head = find_head(self.hf)
        assert head is not None  # or it would have been refused
        return head

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        weight: torch.Tensor = self._embeddings.weight
        if weight.is_meta:  # offloaded: its hook knows where it runs
            return torch.device(self._embeddings._hf_hook.execution_device)
        return weight.device

    def replicate(self) -> Model:
        """The same with modules of its own around the same weights (see `loclin.models.replica`)."""
        made = replace(self, hf=replicate(self.hf))
        vars(made)["tokens"] = self.tokens  # with what they have decoded already
        vars(made)["crew"] = self.crew  # with the weights that they have copied already
        return made

    def shared_by(self, devices: Sequence[torch.device]) -> Model:
        """The same model, whose work some devices share; OptionError where its weights cannot be copied to them."""
        refuse_sharing(self.hf, devices, self.info.name)
        return replace(self, devices=tuple(devices) if len(devices) > 1 else ())

    @cached_property
    def crew(self) -> Crew | None:
        """The devices that share its work, where there are several."""
        return Crew(self.devices) if self.devices else None

    def encode(self, prompt: str, bos: bool | str | None = None) -> torch.Tensor:
        """Turn a text into token ids [1, T], on the model's device.

        `bos` is the beginning-of-text token. None: what the tokenizer does by itself. True: one is put first. False:
        none. A string: that token is put first. One with which the text begins already is not doubled. What the
        tokenizer puts behind a text, such as `[SEP]`, is left out for a causal model, and kept for others unless `bos`
        is given.

        Raises
        ------
        ModelError
            When the model has no tokenizer.
        PromptError
            When the prompt has no tokens, too many, or ones that the model has no embedding for.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.info.name} has no tokenizer; pass token ids [1, T] instead of text")
        ids = encoding.encode(self.tokenizer, prompt, bos, self.bos, whole=self.task != "causal")
        encoding.refuse_long(len(ids), self.context_length, self.info.name)
        if max(ids) >= (vocabulary := self._embeddings.weight.shape[0]):
            raise PromptError(
                f"the tokenizer returned token {max(ids)}, but {self.info.name} has {vocabulary} embeddings: give the "
                "model's own tokenizer"
            )
        return torch.tensor([ids], device=self.device)

    @cached_property
    def tokens(self) -> Tokens:
        """The text of ids, token by token and together."""
        return Tokens(self.tokenizer)

    @property
    def stops(self) -> set[int]:
        """The tokens at which generation stops; empty if the model names none."""
        config: Any = getattr(self.hf, "generation_config", None)
        named = None if config is None else config.eos_token_id
        return {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """Each token's own text, with the space that it includes, so that different tokens look different.

        Bytes that are no whole character are written `⟨F0 9F⟩`, ids without a token `⟨unused 49160⟩`, tokens without
        any text `⟨empty 7⟩`; without a tokenizer, ids are shown as numbers. For a text, see `decode`.
        """
        return self.tokens.shown(ids)

    def refuse_other_tasks(self, what: str, *tasks: Task) -> None:
        """Refuse, by a ModelError, what is defined for models of these tasks only."""
        if self.task not in tasks:
            raise ModelError(
                f"{what} is not defined for a {self.task} model ({self.info.name}): give a {' or '.join(tasks)} one"
            )

    def name_outputs(self, ids: Sequence[int]) -> list[str]:
        """The text of each thing that the model may predict: a token, or the name of a class."""
        if self.task != "classification":
            return self.decode_each(ids)
        names: Any = self.hf.config.id2label
        return [names.get(i, str(i)) for i in ids]

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of all tokens together, with or without special tokens; see `tokens.offsets` for their places."""
        return self.tokens.text(ids, special=special)

    def __repr__(self) -> str:
        info = self.info
        stored = "" if info.stored_dtype == info.dtype else f" (stored as {info.stored_dtype})"
        return (
            f"Model({info.name!r}: {info.family}, {info.n_parameters / 1e6:,.1f} M parameters, "
            f"{info.dtype}{stored}, {self.device}, from {info.source}{', read layer by layer' * self.streamed})"
        )


@in_plain_torch
def wrap(
    hf_model: object,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    *,
    name: str | None = None,
    devices: str | Sequence[str | torch.device] | None = None,
) -> Model:
    """Take a model that you loaded yourself; it is left exactly as it is.

    Cost: one read of all weights, for NaN and Inf.

    Parameters
    ----------
    hf_model
        A causal or masked language model, a sequence classifier or an encoder-decoder of transformers, compiled or with
        adapters of peft as you like. It keeps its mode, device and dtype; adapters stay as they are, and so do those
        that are switched off.
    tokenizer, name
        Without a tokenizer, prompts are token ids. A processor of transformers, which has one, turns images into
        tokens, too. The name in results is by default that by which it was loaded.
    devices
        Devices that share the work, as in `loclin.load`; those of the model must be among them.

    Raises
    ------
    ModelError
        When it is a causal model that attends to later tokens, or has no output head, or its weights are missing or not
        finite.
    OptionError
        For devices that do not exist, or to which its weights cannot be copied.
    """
    shared = None if devices is None else parse_devices(devices)
    given = type(hf_model).__name__
    hf_model = unwrap(hf_model)
    if not isinstance(hf_model, PreTrainedModel):
        inside = "" if type(hf_model).__name__ == given else f" (around {type(hf_model).__name__})"
        raise ModelError(f"loclin.wrap takes a transformers PreTrainedModel, not {given}{inside}: give one")
    name = name or hf_model.config.name_or_path or type(hf_model).__name__
    processor = tokenizer if isinstance(tokenizer, ProcessorMixin) else None
    inner: Any = tokenizer if processor is None else processor.tokenizer
    read = None if processor is None else lambda: processor
    model = describe(hf_model, inner, name=name, source="wrapped", read_processor=read)
    return model if shared is None else model.shared_by(shared)


def describe(
    hf: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    name: str,
    source: Source,
    revision: str | None = None,
    sha256: str | None = None,
    stored_dtype: str | None = None,
    bos_token: str | None = None,
    read_processor: Callable[[], Any] | None = None,
) -> Model:
    """Check a transformers model, and combine it with what is known about it."""
    refuse_model(hf, name)
    text_config = hf.config.get_text_config()
    dtype = str(hf.dtype).removeprefix("torch.")
    info = ModelInfo(
        name=name,
        source=source,
        family=text_config.model_type,
        revision=revision,
        sha256=sha256,
        stored_dtype=stored_dtype or dtype,
        dtype=dtype,
        n_parameters=hf.num_parameters(),
        task=find_task(hf),
    )
    length = getattr(text_config, "max_position_embeddings", None)  # families without a limit write -1, or nothing
    limit = length if length is not None and length > 0 else None
    note = getattr(hf, "_loclin_note", "")
    bos = encoding.beginning_token(tokenizer, bos_token)
    return Model(hf, tokenizer, info, bos, limit, note, read_processor=read_processor)


def unwrap(model: Any) -> Any:
    """The model inside `torch.compile`'s module or a `PeftModel`, whose adapters stay in its layers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            _refuse_prompts(model)
            model = model.get_base_model()
        else:
            return model


def _refuse_prompts(model: Any) -> None:
    """Refuse adapters that act outside the base model's layers: a learned prompt or prefix."""
    for name in (model.active_adapter,) if isinstance(model.active_adapter, str) else model.active_adapter:
        config = model.peft_config[name]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            raise ModelError(
                f"the adapter {name!r} ({kind}) acts in front of the model's layers, in {type(model).__name__}, and "
                "not inside them; use an adapter inside layers, such as LoRA, or give a learned prompt's vectors as "
                "inputs_embeds=, with the model under the adapter"
            )
