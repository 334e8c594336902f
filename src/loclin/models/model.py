"""A model as loclin holds it: the transformers objects, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loclin.common.surroundings import in_plain_torch
from loclin.errors import ModelError, PromptError
from loclin.models import encoding
from loclin.models.checks import refuse_model
from loclin.models.replica import replicate
from loclin.models.tokens import Tokens
from loclin.models.unwrap import unwrapped

Source = Literal["package", "hub", "directory", "gguf", "wrapped"]


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from and what it is, as written into every result.

    Attributes
    ----------
    name
        The name it was asked for by.
    source
        What kind of place it came from.
    family
        The `model_type` of its text config.
    revision
        The hub's commit, where there is one.
    sha256
        The hash of the source file, where there is a single one.
    stored_dtype
        The type its weights were stored in.
    dtype
        The type its weights have now.
    n_parameters
        How many weights it has; tied ones count once.
    """

    name: str
    source: Source
    family: str
    revision: str | None
    sha256: str | None
    stored_dtype: str
    dtype: str
    n_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A causal language model and its tokenizer.

    Attributes
    ----------
    hf
        The transformers model.
    tokenizer
        Its tokenizer, or None; then prompts are token ids.
    info
        Where it came from.
    bos
        The id of the beginning-of-text token that `encode(bos=True)` puts in front, or None.
    context_length
        The most tokens the model takes, or None where it sets no limit.
    """

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    info: ModelInfo
    bos: int | None
    context_length: int | None

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        embeddings: Any = self.hf.get_input_embeddings()
        weight: torch.Tensor = embeddings.weight
        if weight.is_meta:  # offloaded: its hook knows where it runs
            return torch.device(embeddings._hf_hook.execution_device)
        return weight.device

    def replicate(self) -> Model:
        """The same with modules of its own around the same weights (see `loclin.models.replica`)."""
        made = replace(self, hf=replicate(self.hf))
        vars(made)["tokens"] = self.tokens  # with all that they know of the vocabulary
        return made

    def encode(self, prompt: str, bos: bool | str | None = None) -> torch.Tensor:
        """Turn a prompt into token ids [1, T].

        Parameters
        ----------
        prompt
            The text.
        bos
            The beginning-of-text token. None: what the tokenizer does by itself. True: put one in front.
            False: none. A string: put that token in front. One that already begins the text is not doubled.

        Returns
        -------
        torch.Tensor
            Token ids [1, T], on the model's device.

        Raises
        ------
        ModelError
            When the model has no tokenizer.
        PromptError
            When the prompt has no tokens, too many, or ones that the model has no embedding for.
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.info.name} has no tokenizer; pass token ids [1, T] instead of text.")
        ids = encoding.encode(self.tokenizer, prompt, bos, self.bos)
        if self.context_length is not None and len(ids) > self.context_length:
            raise PromptError(
                f"The prompt has {len(ids)} tokens; {self.info.name} takes at most {self.context_length}."
            )
        embeddings: Any = self.hf.get_input_embeddings()
        vocabulary: int = embeddings.weight.shape[0]
        if max(ids) >= vocabulary:
            raise PromptError(
                f"The tokenizer gave token {max(ids)}, but {self.info.name} has {vocabulary} embeddings: "
                "this tokenizer belongs to another model."
            )
        return torch.tensor([ids], device=self.device)

    @cached_property
    def tokens(self) -> Tokens:
        """From ids to what is shown and to text."""
        return Tokens(self.tokenizer)

    @property
    def stops(self) -> set[int]:
        """The tokens at which generation stops by itself; none where the model does not say."""
        config: Any = getattr(self.hf, "generation_config", None)
        named = None if config is None else config.eos_token_id
        return {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}

    def decode_each(self, ids: Sequence[int]) -> list[str]:
        """What is shown of each token: its own text, with the space it stands for; no two look the same.

        Bytes that are no whole character are written `⟨F0 9F⟩`, ids without a token `⟨unused 49160⟩`; without a
        tokenizer, ids are shown as numbers. For a text, see `decode`.
        """
        return self.tokens.shown(ids)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of all tokens together, with or without special tokens; `tokens.offsets` says where each one is."""
        return self.tokens.text(ids, special=special)

    def __repr__(self) -> str:
        info = self.info
        stored = "" if info.stored_dtype == info.dtype else f" (stored as {info.stored_dtype})"
        return (
            f"Model({info.name!r}: {info.family}, {info.n_parameters / 1e6:,.1f} M parameters, "
            f"{info.dtype}{stored}, {self.device}, from {info.source})"
        )


@in_plain_torch
def wrap(hf_model: object, tokenizer: PreTrainedTokenizerBase | None = None, *, name: str | None = None) -> Model:
    """Take a model that you loaded yourself; it is left exactly as it is.

    Parameters
    ----------
    hf_model
        A causal language model of transformers, compiled or with adapters of peft as you like. It keeps its mode,
        device and dtype; adapters stay as they are, and so do those that are switched off.
    tokenizer
        Its tokenizer. Without one, prompts are token ids.
    name
        What results call it; by default the name it was loaded by.

    Returns
    -------
    Model
        The model as the rest of loclin takes it. Cost: one read of all weights, for NaN and Inf.

    Raises
    ------
    ModelError
        When it is no causal decoder with a head, or its weights are missing or not finite.
    """
    given = type(hf_model).__name__
    hf_model = unwrapped(hf_model)
    if not isinstance(hf_model, PreTrainedModel):
        inside = "" if type(hf_model).__name__ == given else f" (around {type(hf_model).__name__})"
        raise ModelError(f"loclin.wrap takes a transformers PreTrainedModel, not {given}{inside}.")
    name = name or hf_model.config.name_or_path or type(hf_model).__name__
    return describe(hf_model, tokenizer, name=name, source="wrapped")


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
) -> Model:
    """Check a transformers model and hold it with what is known about it.

    Raises
    ------
    ModelError
        As for `wrap`.
    """
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
    )
    return Model(
        hf=hf,
        tokenizer=tokenizer,
        info=info,
        bos=encoding.beginning_token(tokenizer, bos_token),
        context_length=_context_length(text_config),
    )


def _context_length(text_config: Any) -> int | None:
    """The most tokens a model takes; families without a limit write -1, or nothing."""
    length = getattr(text_config, "max_position_embeddings", None)
    return length if length is not None and length > 0 else None
