"""Prompts in every form as token ids, and warnings about them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from loclin.errors import ModelError, OptionError, PromptError
from loclin.models import Model
from loclin.models.chat import Messages, encode_chat, is_chat
from loclin.models.encoding import appended_tokens, encode, refuse_long, strip_padding
from loclin.models.forward import decoder_table, hooked, run
from loclin.models.images import encode_images
from loclin.models.placeholders import (
    PIXELS,
    SOFT,
    derived_types,
    find_placeholders,
    has_images,
    image_positions,
    image_sizes,
    placeholder,
    soft_length,
)

Prompt = str | Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]
"""What can be given as a prompt: see `read_prompt`."""
Numbers = Tensor | np.ndarray | Sequence[Any]
_SHAPE = "token ids must have the shape [1, T] with T > 0"


def read_prompt(
    model: Model, prompt: Prompt, attention_mask: Numbers | None = None, bos: bool | str | None = None
) -> Int[Tensor, "1 T"]:
    """Read a text, chat messages, token ids in any form, or a tokenizer's output as ids `[1, T]`, without padding.

    Messages are mappings with `role` and `content`, see `loclin.models.chat.encode_chat`. Ids are a tensor or array
    `[T]` or `[1, T]`, or a list of numbers; a tokenizer's output is a mapping with `input_ids`, whose `attention_mask`
    is used.

    Raises
    ------
    PromptError
        For anything else, several prompts, or ids that the model does not have; for padding between tokens.
    """
    if isinstance(prompt, str):
        if attention_mask is not None:
            raise PromptError("an attention mask belongs to token ids; text has no padding: leave the mask out")
        return model.encode(prompt, bos=bos)
    if is_chat(prompt):
        if attention_mask is not None:
            raise PromptError("an attention mask belongs to token ids; chats have no padding: leave the mask out")
        return encode_chat(model, cast("Messages", prompt), bos)
    if isinstance(prompt, Mapping):
        if "input_ids" not in prompt:
            raise PromptError(
                f"the prompt has {', '.join(map(str, prompt)) or 'nothing'}, but no input_ids: give what a tokenizer "
                "returns"
            )
        mask = prompt.get("attention_mask") if attention_mask is None else attention_mask
        prompt, attention_mask = prompt["input_ids"], mask
    ids = _row(as_ids(prompt))
    if attention_mask is not None:
        (ids,) = strip_padding(ids, _row(as_ids(attention_mask, bools=True)))
    return check_ids(model, ids)


_TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "labels", "use_cache")
_PER_TOKEN = ("attention_mask", "mm_token_type_ids", "position_ids")
"""What tokenizers and processors give for each token, and what follows from the ids."""


def place_prompt(
    model: Model,
    prompt: Prompt | None,
    *,
    attention_mask: Numbers | None = None,
    bos: bool | str | None = None,
    decoder: Prompt | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    images: Any = None,
    inputs_embeds: Tensor | None = None,
) -> tuple[Model, Int[Tensor, "1 T"]]:
    """A model at one prompt, with what it takes beside tokens; and the prompt's ids (see `read_prompt`).

    For an encoder-decoder these are the tokens of its encoder and, behind them, of its decoder. `decoder` is None, what
    the decoder starts with by itself; ids, which are taken as they are; or a text, which follows that start. Where the
    encoder reads one of the `inputs` (sound), the prompt is the decoder's. `images` go through the model's processor
    (see `loclin.models.images`), and `inputs_embeds` `[n, d]` stand in front of the tokens, with ids from -1 to -n.

    Cost: a forward pass, for an encoder-decoder that classifies, which makes its decoder's tokens from the prompt.
    """
    if decoder is not None and model.task == "causal":
        raise OptionError(f"decoder is for other tasks, and {model.info.name} is a causal model: leave it out")
    if model.has_encoder and (images is not None or inputs_embeds is not None):
        given = "inputs_embeds" if images is None else "images"
        raise OptionError(f"{given} is for models without an encoder: leave it out")
    if images is not None:
        prompt, made = encode_images(model, prompt, images, bos)
        inputs = {**_beside(model, made), **(inputs or {})}
    elif isinstance(prompt, Mapping) and model.task == "causal":
        inputs = {**_beside(model, prompt), **(inputs or {})}
    if inputs or inputs_embeds is not None:
        model = replace(model, inputs=_check_inputs(model, inputs or {}))
        if has_images(model):  # what follows from the ids is made whenever the model runs
            kept = {name: value for name, value in model.inputs.items() if name not in derived_types(model)}
            model = replace(model, inputs=kept)
    elif model.inputs and not model.has_encoder:
        model, prompt, inputs_embeds = _again(model, prompt)
    if inputs_embeds is not None:
        return _behind_vectors(model, inputs_embeds, prompt, attention_mask, bos)
    if prompt is None:
        raise PromptError("there is no prompt: give a text, a chat, token ids, or inputs_embeds")
    if model.has_encoder:
        return _place_both(model, prompt, attention_mask, bos, decoder)
    if decoder is not None:
        raise OptionError(f"{model.info.name} has no decoder beside its encoder: leave decoder out")
    ids = read_prompt(model, prompt, attention_mask, bos)
    _check_images(model, ids)
    return _with_types(model, prompt, ids), ids


def _place_both(
    model: Model, prompt: Prompt, attention_mask: Numbers | None, bos: bool | str | None, decoder: Prompt | None
) -> tuple[Model, Int[Tensor, "1 T"]]:
    """An encoder-decoder at the tokens of both."""
    table = decoder_table(model.hf)
    if (main := model.hf.main_input_name) in model.inputs:
        if decoder is not None:
            raise OptionError(f"the encoder reads {main}, and the prompt is the decoder's: leave decoder out")
        return model, check_ids(model, _decoder_ids(model, prompt), table)
    if main != "input_ids":
        raise PromptError(
            f"the encoder of {model.info.name} reads {main}, and not tokens: give inputs={{{main!r}: ...}}"
        )
    ids = read_prompt(model, prompt, attention_mask, bos)
    if model.task == "classification":
        if decoder is not None:
            raise OptionError(f"{model.info.name} makes its decoder's tokens from the prompt: leave decoder out")
        others = _made_for_decoder(model, ids, table)
    else:
        others = _decoder_ids(model, decoder)
    others = check_ids(model, others.to(ids.device), table)
    return replace(model, encoder_length=ids.shape[1]), torch.cat([ids, others], dim=1)


def _beside(model: Model, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor has made beside tokens that the model takes: images, and what belongs to them."""
    takes = inspect.signature(model.hf.forward).parameters
    left_out = {*_TOKENS, *_PER_TOKEN, *derived_types(model)}
    found = {name: value for name, value in prompt.items() if name in takes and name not in left_out}
    return found if found.keys() - {"token_type_ids"} else {}


def _again(model: Model, prompt: Prompt | None) -> tuple[Model, Prompt | None, Tensor | None]:
    """A model that was placed at a prompt, with another: vectors and images stay where its ids have them."""
    if not isinstance(prompt, Tensor) or prompt.dim() != 2:
        return replace(model, inputs={}), prompt, None
    if has_images(model) and not image_positions(model, prompt[0].tolist()):
        return replace(model, inputs={}), prompt, None
    if SOFT not in model.inputs:
        return _with_longer_types(model, prompt.shape[1]), prompt, None
    n = min(int((prompt[0] < 0).sum()), soft_length(model))  # fewer in the beginning of that prompt
    others = {name: value for name, value in model.inputs.items() if name != SOFT}
    rest, vectors = prompt[:, n:] if n < prompt.shape[1] else None, model.inputs[SOFT][:, :n] if n else None
    return replace(model, inputs=others), rest, vectors


def _with_longer_types(model: Model, length: int) -> Model:
    """A model whose token types are as many as the tokens: more are of the second kind, as in transformers."""
    types = model.inputs.get("token_type_ids")
    if types is None or types.shape[1] == length:
        return model
    types = torch.cat([types, types.new_ones(1, max(0, length - types.shape[1]))], dim=1)[:, :length]
    return replace(model, inputs={**model.inputs, "token_type_ids": types})


def _behind_vectors(
    model: Model, vectors: Any, prompt: Prompt | None, attention_mask: Numbers | None, bos: bool | str | None
) -> tuple[Model, Int[Tensor, "1 T"]]:
    """A model with vectors in front of a prompt's tokens, or alone, as its own `inputs_embeds`."""
    name, table = model.info.name, cast("Tensor", model.hf.get_input_embeddings().weight)
    if "inputs_embeds" not in inspect.signature(model.hf.forward).parameters:
        raise OptionError(f"{name} takes no inputs_embeds: give tokens")
    if has_images(model):
        raise OptionError("inputs_embeds and images exclude one another: a model finds its images by token ids")
    vectors = torch.as_tensor(vectors)
    width, shape = table.shape[-1], list(vectors.shape)
    vectors = vectors[None] if vectors.dim() == 2 else vectors
    fits = vectors.dim() == 3 and vectors.shape[::2] == (1, width) and vectors.shape[1] > 0
    if not (fits and vectors.is_floating_point() and bool(vectors.isfinite().all())):
        raise PromptError(
            f"inputs_embeds of the shape {shape} ({vectors.dtype}): give finite numbers [n, {width}] or [1, n, {width}]"
        )
    vectors = vectors.detach().to(model.device, table.dtype, copy=True)
    ids = -1 - torch.arange(vectors.shape[1], device=model.device)[None]
    if prompt is not None:
        ids = torch.cat([ids, read_prompt(model, prompt, attention_mask, bos).to(ids.device)], dim=1)
    elif attention_mask is not None:
        raise PromptError("an attention mask belongs to token ids: leave the mask out")
    refuse_long(ids.shape[1], model.context_length, name)
    return replace(model, inputs={**model.inputs, SOFT: vectors}), ids


def _check_images(model: Model, ids: Tensor) -> None:
    """Refuse ids whose image tokens are not as many as the images fill."""
    token = placeholder(model, "image")
    if not has_images(model) or "pixel_values" not in model.inputs or token is None:
        return
    found, sizes = len(image_positions(model, ids[0].tolist())), image_sizes(model)
    if not found or (sizes is not None and sum(sizes) != found):
        fill = "" if sizes is None else f", and {len(sizes)} images fill {sum(sizes)}"
        raise PromptError(
            f"the prompt has {found} image tokens ({_name(model, token)}){fill}: give the ids that the processor makes"
        )


def _check_inputs(model: Model, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model takes beside tokens, on its device, and in its dtype where it is not whole numbers."""
    takes = inspect.signature(model.hf.forward).parameters
    for name, value in inputs.items():
        if name not in takes or name in _TOKENS or not isinstance(value, Tensor):
            raise OptionError(f"inputs[{name!r}]: give tensors that {type(model.hf).__name__} takes beside tokens")
    return {
        name: value.to(model.device, model.hf.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _with_types(model: Model, prompt: Prompt, ids: Tensor) -> Model:
    """The model with the segments of a pair of texts, where a tokenizer has given them with the prompt."""
    types = prompt.get("token_type_ids") if isinstance(prompt, Mapping) and model.task != "causal" else None
    if types is None or "token_type_ids" in model.inputs:
        return model
    types = _row(as_ids(types))
    if types.shape != ids.shape:
        raise PromptError("token_type_ids are for the ids with their padding: give a prompt without padding")
    return replace(model, inputs={**model.inputs, **_check_inputs(model, {"token_type_ids": types})})


def _decoder_ids(model: Model, prompt: Prompt | None) -> Tensor:
    """The ids of a decoder's prompt."""
    if prompt is not None and not isinstance(prompt, str):
        return _row(as_ids(prompt["input_ids"] if isinstance(prompt, Mapping) else prompt))
    ids = [_decoder_start(model)]
    if prompt and model.tokenizer is None:
        raise ModelError(f"{model.info.name} has no tokenizer; pass the decoder's token ids [1, T] instead of text")
    if prompt and model.tokenizer is not None:
        ids += encode(model.tokenizer, prompt, False, None)
    return torch.tensor([ids], device=model.device)


def _decoder_start(model: Model) -> int:
    """The token that a decoder starts with."""
    holders = getattr(model.hf, "generation_config", None), model.hf.config
    for name in ("decoder_start_token_id", "bos_token_id"):
        for holder in holders:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    raise PromptError(f"{model.info.name} does not say what its decoder starts with: give decoder=, its token ids")


def _made_for_decoder(model: Model, input_ids: Tensor, table: nn.Module) -> Tensor:
    """The ids that an encoder-decoder gives to its decoder by itself: the last that its embeddings look up."""
    seen: list[Tensor] = []
    handle = table.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad(), hooked([handle]):
        run(model, input_ids)
    return seen[-1]


def as_ids(given: Any, *, bools: bool = False) -> Tensor:
    """Convert a tensor, an array or (nested) lists of whole numbers to a tensor of integers; bools are refused."""
    if not isinstance(given, Tensor):
        if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, (str, bytes)):
            raise PromptError(f"the prompt is {type(given).__name__}: give a text or token ids")
        if isinstance(given, Sequence) and given and all(isinstance(row, Tensor) for row in given):
            given = [row.tolist() for row in given]
        if isinstance(given, Sequence) and any(isinstance(one, str) for one in given):
            raise PromptError("a list of texts is several prompts: use loclin.linearize_batch")
        if not bools and _holds_bool(given):
            raise PromptError("True and False are not token ids: give an attention mask as attention_mask=")
        try:
            given = torch.as_tensor(np.asarray(given))
        except (TypeError, ValueError):  # lists of several lengths, or of anything
            raise PromptError("token ids must be one list of whole numbers") from None
        if not given.numel():
            raise PromptError(f"{_SHAPE}, not {list(given.shape)}")
    if given.is_floating_point() or given.is_complex() or (given.dtype == torch.bool and not bools):
        raise PromptError(f"token ids must be whole numbers, not {str(given.dtype).removeprefix('torch.')}")
    return cast("Tensor", given.long())


def check_ids(model: Model, input_ids: Tensor, table: nn.Module | None = None) -> Int[Tensor, "1 T"]:
    """Refuse token ids of another shape, too many, or such as the model, or a table of embeddings, does not have."""
    if input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.numel():
        raise PromptError(f"{_SHAPE}, not {list(input_ids.shape)}")
    refuse_long(input_ids.numel(), model.context_length, model.info.name)
    vocabulary = cast("Tensor", (table or model.hf.get_input_embeddings()).weight).shape[0]
    if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < vocabulary:
        raise PromptError(f"token ids must be whole numbers from 0 to {vocabulary - 1}")
    return input_ids


def prompt_list(prompts: Any) -> list[Any]:
    """Several prompts as a list."""
    try:
        return list(prompts)
    except TypeError:
        raise PromptError(f"the prompts are {type(prompts).__name__}: give a list of texts or of token ids") from None


def prompt_warnings(model: Model, input_ids: Int[Tensor, "1 T"], *, appends: bool = False) -> list[str]:
    """Warnings about a prompt's ids: ends, padding, placeholders, ids without a token.

    `appends`: the prompt was a text to which the tokenizer would have appended an end.
    """
    ids, found = input_ids[0].tolist(), []
    if model.task == "masked" and (model.mask is None or model.mask not in ids):
        found.append("The prompt has no mask token: position -1 is its last token.")
    if model.task == "classification" and model.hf.config.num_labels == 1:
        found.append("The model has one class, whose probability is 1 whatever the prompt: see its logit.")
    ends = _ends(model)
    holder = model.hf.config.get_text_config() if model.tokenizer is None else model.tokenizer
    pad = getattr(holder, "pad_token_id", None)
    if appends and model.tokenizer is not None and (behind := appended_tokens(model.tokenizer)):
        names = " ".join(model.decode_each(behind))
        found.append(
            f"The tokenizer appends {names} to every text. It is left out, so that the prediction follows the text. "
            "Give token ids to keep it."
        )
    if model.task == "causal" and ids[-1] in ends and len(ids) > 1:
        found.append(
            f"The prompt ends with {_name(model, ids[-1])}, which ends a text: the prediction is what the model says "
            "after the end. Leave it out to explain what follows the words."
        )
    if isinstance(pad, int) and len(ids) > 1 and not model.has_encoder:  # a decoder may start with it
        # a text may begin with what else stands for padding, but not twice
        begins = ids[0] == pad and (pad != model.bos or ids[1] == pad)
        if begins or (ids[-1] == pad and pad not in ends):
            found.append(
                f"The prompt {'begins' if begins else 'ends'} with {_name(model, pad)}, which is padding: it counts as "
                "a word here. Pass the tokenizer's attention_mask, and padding is left out."
            )
    given = {kind for kind, name in PIXELS.items() if name in model.inputs}
    given |= {"vision"} if given else set()
    kinds = {token: kind for token, kind in find_placeholders(model).items() if kind not in given}
    for token in dict.fromkeys(ids[soft_length(model) :]):
        if token in kinds:
            found.append(
                f"{_name(model, token)} stands for {kinds[token]}, which loclin does not pass to the model: the map "
                "is that of the placeholder's own embedding."
            )
        elif model.tokenizer is not None and not model.tokens.knows(token):
            found.append(f"Token {token} is not in the tokenizer's vocabulary: its embedding cannot have been trained.")
    return found


def _name(model: Model, token: int) -> str:
    return f"token {token}" if model.tokenizer is None else model.decode_each([token])[0]


def _row(ids: Tensor) -> Tensor:
    return ids[None] if ids.dim() == 1 else ids


def _holds_bool(given: Any) -> bool:
    if isinstance(given, Sequence):
        return any(_holds_bool(one) for one in given)
    return given.dtype == np.bool_ if isinstance(given, np.ndarray) else isinstance(given, (bool, np.bool_))


def _ends(model: Model) -> set[int]:
    """The tokens that end a text: the tokenizer's end and separator, and those at which generation stops."""
    tokenizer = model.tokenizer
    named = [] if tokenizer is None else [tokenizer.eos_token_id, tokenizer.sep_token_id]
    return model.stops | {token for token in named if isinstance(token, int)}
