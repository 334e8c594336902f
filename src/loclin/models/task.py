"""The task of a model, found from its class: which tokens it reads, and what it predicts of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

Task = Literal["causal", "masked", "classification", "seq2seq"]
"""What a model predicts: the next token, masked tokens, one of several classes, or a decoder's next token."""
TASKS: tuple[Task, ...] = get_args(Task)

AUTO: dict[Task, Any] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
}
"""The class of transformers that builds a task's models."""
NAMES: dict[Task, Mapping[str, str]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""The class of each family, by its model type."""
_WITH_IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def auto_class(config: PreTrainedConfig, task: Task) -> Any:
    """The class of transformers that builds a family's model of a task; None where there is none.

    Some causal families have a class with images alone.
    """
    if config.model_type in NAMES[task] or hasattr(config, "auto_map"):
        return AUTO[task]
    return AutoModelForImageTextToText if task == "causal" and config.model_type in _WITH_IMAGES else None


def find_task(hf: PreTrainedModel) -> Task:
    """A model's task."""
    return _task_of([kind.__name__ for kind in type(hf).__mro__], hf.config)


def config_task(config: PreTrainedConfig) -> Task:
    """The task of the class that a checkpoint was stored from; a causal one where its config does not say."""
    return _task_of(config.architectures or [], config)


def _task_of(classes: Collection[str], config: PreTrainedConfig) -> Task:
    def of(task: Task, suffix: str) -> bool:
        return any(name.endswith(suffix) or name in NAMES[task].values() for name in classes)

    if of("classification", "ForSequenceClassification"):
        return "classification"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    # some families have one class for both tasks: its attention looks ahead unless the config says it does not
    both = {*NAMES["masked"].values()} & {*NAMES["causal"].values()}
    return "masked" if of("masked", "ForMaskedLM") and not (both & {*classes} and is_causal(config)) else "causal"


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether the config of a family of encoders says that no token attends to a later one."""
    return bool(getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def find_head(hf: PreTrainedModel) -> nn.Module | None:
    """The matrix that gives the logits: of the vocabulary, or of the classes; None where there is none."""
    if find_task(hf) != "classification":
        return hf.get_output_embeddings()
    labels = hf.config.num_labels
    linear = (module for module in hf.modules() if isinstance(getattr(module, "weight", None), torch.Tensor))
    found = [module for module in linear if isinstance(module, nn.Linear) and module.out_features == labels]
    return found[-1] if found else None
