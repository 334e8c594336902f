"""The entry point: a model linearized at one prompt or at several, with every analysis as a method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loclin.analyses.attribution.attribute import attribute as _attribute
from loclin.analyses.attribution.heads import head as _head
from loclin.analyses.attribution.heads import path as _path
from loclin.analyses.attribution.scores import attention_score as _attention_score
from loclin.analyses.explain import explain as _explain
from loclin.analyses.exploration.explore import explore as _explore
from loclin.analyses.generation import generate as _generate
from loclin.analyses.intervene import intervene as _intervene
from loclin.analyses.layers import explain_layers as _explain_layers
from loclin.analyses.logit_lens import logit_lens as _logit_lens
from loclin.analyses.patching import patch as _patch
from loclin.analyses.prompt_comparison import compare_prompts as _compare_prompts
from loclin.analyses.similarity import similarity as _similarity
from loclin.analyses.validity import validity as _validity
from loclin.common.sums import relative_error
from loclin.common.surroundings import eager_code, in_plain_torch
from loclin.errors import ModelError, OptionError, PromptError
from loclin.freeze import Gate, Precision
from loclin.maps.layer_spectra import layer_spectra as _layer_spectra
from loclin.maps.linearized import Linearized
from loclin.models import Model, wrap
from loclin.models.encoding import Padding, pad_prompts, strip_padding
from loclin.models.prompts import Numbers, Prompt, as_ids, prompt_list, read_prompt
from loclin.steering.watch import watch as _watch


class Linearization(Linearized):
    """A model frozen at one prompt, with its maps (see `Linearized`) and all analyses; made by `linearize`."""

    attention_score = _attention_score
    attribute = _attribute
    compare_prompts = _compare_prompts
    explain = _explain
    explain_layers = _explain_layers
    explore = _explore
    generate = _generate
    head = _head
    intervene = _intervene
    layer_spectra = _layer_spectra
    logit_lens = _logit_lens
    patch = _patch
    path = _path
    similarity = _similarity
    validity = _validity
    watch = _watch


def linearize(
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
) -> Linearization:
    """Freeze a model at one prompt.

    Parameters
    ----------
    model: from `loclin.load` or `loclin.wrap`. A transformers model, also a compiled one or one with adapters, is
        wrapped.
    prompt: text; the messages of a chat, as mappings with `role` and `content`; token ids `[1, T]` or `[T]` as a
        tensor, an array or a list; or a tokenizer's or a processor's output for one text. None: `inputs_embeds` alone.
    decoder: for an encoder-decoder, what its decoder has read: token ids, or a text behind its start token. None: that
        token alone. The prompt's tokens are then those of the encoder and, behind them, of the decoder; all of them are
        inputs of the map.
    inputs: tensors that the model's forward pass takes beside tokens, by name: constants of the map. Where they are
        what the encoder reads (the `input_features` of Whisper), the prompt is the decoder's. With the `pixel_values`
        of images, ids hold their image tokens.
    images: for a model with a vision tower, files or PIL images, each at its image token in a text; in a chat that has
        none, in front of the user's first message. What the tower makes of them are inputs of the map, as tokens are.
    inputs_embeds: vectors `[n, d]` or `[1, n, d]` in front of the prompt's tokens, as the model's own `inputs_embeds`:
        a soft prompt. They are inputs of the map, named `<embedding 0>` and so on.
    attention_mask: for token ids `[1, T]`, zero at padding. Padding is removed; the map is that of the other tokens.
    gate: how gated MLPs are split: `"activation"` (the paper), `"up"` or `"half"`; see `loclin.freeze.FreezeOptions`.
    precision: the dtype of the linear path: `"auto"`, `"stock"`, `"single"` or `"double"`; see there. `"split"`:
        float32, whose products with weights that bfloat16 holds are made of three bfloat16 ones, if a timed trial finds
        that faster here; the certificate, which is then computed at once, decides. The provenance of results says what
        was decided, and why.
    bos: for text, True puts a beginning token in front, False none, a string names the token; None does what the
        tokenizer does. If the tokenizer appends an end token, it is removed, and `warnings` says so.
    memory: what the prompt and its analyses may use beside the weights and their results: bytes, `"2GB"`, or a fraction
        of the free memory. BudgetError for less than the least that works, before anything is run.
    strict: refuse a model that is not exact. Otherwise the certificate says what is not exact, and by how much.

    Raises
    ------
    PromptError: for an empty prompt, or one longer than the model's context; for invalid ids, or several prompts; for a
        mask with padding between tokens; for other numbers of images than of places for them.
    NotExactError: for a module that is not linear with its coefficients frozen; the message names it.

    Notes
    -----
    Cost: two forward passes, and the certificate if some layers have no explicit products. Memory: the result keeps 2 L
    T d numbers (3 L T d if the map has another dtype than the model), and coefficients up to a quarter of the budget.
    While it runs, it needs one layer's graph, and a few attention matrices `[H, T, T]` of it; for a model with SDPA
    attention only if these are within an eighth of the budget: longer prompts have them in blocks.
    """
    how: Any = {"gate": gate, "precision": precision, "bos": bos, "memory": memory, "strict": strict}
    how |= {"decoder": decoder, "inputs": inputs, "images": images, "inputs_embeds": inputs_embeds}
    return Linearization.at(model, prompt, attention_mask=attention_mask, **how)


@in_plain_torch
def linearize_batch(
    model: Model | nn.Module,
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
    """Freeze a model at each of several prompts. Padding is not part of any map.

    Each prompt is traced alone: its maps, values and certificate are those of `linearize`. One frozen pass through the
    whole batch would not be exact: a model's rounding depends on the shape of its tensors, so that coefficients
    computed for one prompt differ from those of the batch in the last bits. Where the linear path has a wider dtype
    than the model (bfloat16, or `precision="double"`), that error would be visible.

    The padded batch goes through the unmodified model once. The relative difference between its logits and those of the
    prompt alone is each result's `padded_error`. It is as small as rounding if the maps describe the batch, too. It is
    large for families in which padding changes other tokens (positions counted from the beginning of the row; states
    that read padding), and infinite if the padded batch gives NaN.

    Parameters
    ----------
    model, gate, precision, bos, memory, strict: as for `linearize`.
    prompts: texts; token ids `[1, T_b]` each; a padded tensor of ids `[B, T]`; or a tokenizer's output for several
        texts, with its `attention_mask`.
    attention_mask: for a padded tensor `[B, T]`, zero at padding. By default nothing is padding.
    padding: the side on which shorter prompts are padded for the batch; a padded tensor is used as it is.

    Returns one for each prompt, in order; its T is the length of the prompt. Raises as `linearize` does; PromptError
    also without prompts, and OptionError for one text instead of a list of texts.

    Cost: two forward passes for each prompt, and one for the padded batch. Memory: 2 L T_b d numbers for each prompt.
    """
    model = model if isinstance(model, Model) else wrap(model)
    model.refuse_other_tasks("a padded batch", "causal")
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
            raise PromptError(f"padded token ids have the shape {list(prompts.shape)}: give [B, T]")
        mask = torch.ones_like(prompts) if attention_mask is None else as_ids(attention_mask, bools=True)
        batch = prompts, mask.bool()
        rows = strip_padding(*batch)
    elif attention_mask is not None:
        raise PromptError(
            "an attention mask belongs to a padded tensor of token ids; these prompts have no padding: leave it out"
        )
    else:
        rows = prompt_list(prompts)
        for row in rows:
            read_prompt(model, row, bos=bos)  # check all prompts before the first is traced
    if not rows:
        raise PromptError("there are no prompts: give at least one")
    found = [
        linearize(model, row, gate=gate, precision=precision, bos=bos, memory=memory, strict=strict) for row in rows
    ]
    if batch is None:
        batch = pad_prompts([one.input_ids for one in found], padding, _find_filler(model))
    predicted = _predict_batch(model, *(part.to(model.device) for part in batch))
    if predicted is not None:
        for one, logits in zip(found, predicted, strict=True):
            alone = one.trace.stock_logits.double()
            error = relative_error(logits.to(alone) - alone, alone)
            one.padded_error = math.inf if math.isnan(error) else error
    return found


def _find_filler(model: Model) -> int:
    """Find a token id for padding; any id would do, since it is masked."""
    source = model.hf.config.get_text_config() if model.tokenizer is None else model.tokenizer
    named = getattr(source, "pad_token_id", None)
    return named if isinstance(named, int) and named >= 0 else 0


def _predict_batch(
    model: Model, input_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B V"] | None:
    """Compute the unmodified model's logits at the last token of each row; None if the model takes no mask."""
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
                f"{model.info.name}: the forward pass of the padded batch fails: {what}; linearize each prompt alone"
            ) from fault
    return logits[range(len(last)), last]
