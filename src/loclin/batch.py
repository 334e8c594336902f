"""Several prompts at once: each one's exact map, and whether the model does the same in a padded batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import Gate, Precision
from loclin.linearization import Linearization, linearize
from loclin.models import Model, wrap
from loclin.padding import Padding, padded, without_padding
from loclin.prompts import Numbers, Prompt, as_ids, read_prompt
from loclin.sums import relative
from loclin.surroundings import eager_code, in_plain_torch


@in_plain_torch
def linearize_batch(
    model: Model | PreTrainedModel,
    prompts: Prompt,
    *,
    attention_mask: Numbers | None = None,
    padding: Padding = "left",
    gate: Gate = "activation",
    precision: Precision = "auto",
    bos: bool | str | None = None,
    memory: int | float | str | None = None,
    strict: bool = True,
) -> list[Linearization]:
    """Freeze a model at each of several prompts. Padding is no part of any map.

    Each prompt is traced alone: its maps, values and certificate are those that `linearize` gives. One frozen pass
    through the whole batch would not do, for a model's own rounding depends on the shape of its tensors: coefficients
    rebuilt for one prompt are then not, to the last bit, those of the batch, and where the linear path is wider than
    the model (bfloat16, or `precision="double"`) no map would be exact.

    The padded batch goes through the untouched model once. How far its predictions there are from those at the prompt
    alone is each result's `padded_error`: rounding where the maps describe the batch too. It is large where a family's
    padded tokens move the others (positions that are counted from the row's beginning; states that padding enters), and
    infinite where the padded batch is not a number.

    Parameters
    ----------
    model
        From `loclin.load` or `loclin.wrap`; a transformers model is wrapped.
    prompts
        Texts; or token ids, `[1, T_b]` each; or a padded tensor of them `[B, T]`; or what a tokenizer gave for several
        texts, with its `attention_mask`.
    attention_mask
        For a padded tensor: zero at padding `[B, T]`. By default nothing is padding.
    padding
        The side on which shorter prompts are padded for the batch; a padded tensor is taken as it is.
    gate, precision, bos, memory, strict
        As for `linearize`.

    Returns
    -------
    list[Linearization]
        One for each prompt, in order; its T is the prompt's own length.

    Raises
    ------
    PromptError, NotExactError
        As for `linearize`; also without prompts, or for a mask with padding between tokens.
    OptionError
        For one text, which is no list of texts.

    Notes
    -----
    Cost: two forward passes for each prompt, and one of the padded batch. Memory: 2 L T_b d numbers for each prompt.
    """
    model = model if isinstance(model, Model) else wrap(model)
    batch: tuple[Tensor, Tensor] | None = None
    if isinstance(prompts, str):
        raise OptionError(f"prompts={prompts!r} is one text where a list is meant: [{prompts!r}]")
    if isinstance(prompts, Mapping):
        mask = prompts.get("attention_mask") if attention_mask is None else attention_mask
        prompts, attention_mask = as_ids(prompts.get("input_ids", ())), mask
    rows: list[Any]
    if isinstance(prompts, (Tensor, np.ndarray)):
        prompts = as_ids(prompts)
        if prompts.dim() != 2:
            raise PromptError(f"padded token ids must have the shape [B, T], not {list(prompts.shape)}")
        mask = torch.ones_like(prompts) if attention_mask is None else as_ids(attention_mask, bools=True)
        batch = prompts, mask.bool()
        rows = without_padding(*batch)
    elif attention_mask is not None:
        raise PromptError("an attention mask belongs to a padded tensor of token ids; these prompts have no padding")
    else:
        rows = list(prompts)
        for row in rows:
            read_prompt(model, row, bos=bos)  # all of them before the first is traced
    if not rows:
        raise PromptError("there are no prompts")
    found = [
        linearize(model, row, gate=gate, precision=precision, bos=bos, memory=memory, strict=strict) for row in rows
    ]
    if batch is None:
        batch = padded([one.input_ids for one in found], padding, _fill(model))
    predicted = _predicted(model, *(part.to(model.device) for part in batch))
    if predicted is not None:
        for one, logits in zip(found, predicted, strict=True):
            alone = one.trace.stock_logits.double()
            error = relative(logits.to(alone) - alone, alone)
            one.padded_error = math.inf if math.isnan(error) else error
    return found


def _fill(model: Model) -> int:
    """The token that stands where nothing is; any would do, for no other looks at it."""
    holder = model.hf.config.get_text_config() if model.tokenizer is None else model.tokenizer
    named = getattr(holder, "pad_token_id", None)
    return named if isinstance(named, int) and named >= 0 else 0


def _predicted(model: Model, input_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B V"] | None:
    """The untouched model's logits at the last token of each row; None where it takes no mask. Cost: one pass."""
    hf = model.replicate().hf
    takes = inspect.signature(hf.forward).parameters
    if "attention_mask" not in takes:
        return None
    more: dict[str, Tensor] = {"attention_mask": mask.long()}
    if "position_ids" in takes:
        more["position_ids"] = (more["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    if "logits_to_keep" in takes:
        more["logits_to_keep"], last = torch.unique(last, return_inverse=True)
    with eager_code(), torch.no_grad():
        try:
            logits = hf(input_ids=input_ids, use_cache=False, **more).logits
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as fault:
            what = str(fault).partition("\n")[0]
            raise ModelError(
                f"{model.info.name}: the model's own pass through the padded batch fails: {what}"
            ) from fault
    return logits[range(len(last)), last]
