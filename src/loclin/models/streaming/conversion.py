"""Which stored tensors a model's parameters and buffers come from, by transformers' own names and conversions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from loclin.errors import ModelError, first_line
from loclin.models.streaming.checkpoint import Checkpoint, StoredTensor
from loclin.models.streaming.plan import Packed, Places


def find_places(
    hf: Any, checkpoint: Checkpoint, name: str, quantised: Sequence[Packed] = ()
) -> dict[str, list[Places]]:
    """What each parameter and buffer is made of, by its name in the model; more than one where it is stored twice.

    Names are matched as in transformers' `convert_and_load_state_dict_in_model`, and its conversions run on `Places`.
    A quantised weight takes the place of its parts. ModelError where a conversion does more than put tensors together.
    """
    transforms = get_model_conversion_mapping(hf)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    converts = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = hf.state_dict(), hf.base_model_prefix
    found: defaultdict[str, list[Places]] = defaultdict(list)
    merged: dict[str, WeightConverter] = {}
    parts = {part.name for packed in quantised for part in packed.parts}
    stored: dict[str, StoredTensor | Packed] = {key: own for key, own in checkpoint.tensors.items() if key not in parts}
    stored |= {packed.name: packed for packed in quantised}
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if target not in known and key in known:
            target, pattern = rename_source_key(key, [], [], prefix, known)
        if pattern is not None:
            own: Any = merged.setdefault(target, deepcopy(converts[pattern]))
            own.add_tensor(target, key, pattern, Places.of(stored[key]))
        elif target in known:
            found[target].append(Places.of(stored[key]))
    for target, converter in merged.items():
        first = min(converter.layer_targets[target], key=dot_natural_key)
        try:
            made = converter.convert(target, model=hf, config=hf.config)
        except Exception as fault:  # an operation of transformers on what it was not written for
            what = ", ".join(type(operation).__name__ for operation in converter.operations)
            raise ModelError(
                f"{name} ({hf.config.model_type}) stores {first} in another form than {target}, and stream cannot "
                f"convert it ({what}: {first_line(fault)}): give a complete checkpoint, or load it without stream"
            ) from fault
        for own, places in made.items():
            found[own].append(places)
    return found
