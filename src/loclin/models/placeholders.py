"""Positions of a prompt that are not text: tokens that stand for images, and vectors given in their place."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loclin.models.model import Model

SOFT = "inputs_embeds"
"""The name in a model's `inputs` of the vectors `[1, n, d]` in front of a prompt's tokens; their ids are -1 to -n."""
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What a model is given for each kind of placeholder."""
_KINDS = ("image", "video", "audio", "vision")
"""Prefixes of the names of placeholder tokens, in the configs of models that take more than text."""
_TYPES = {"image": 1, "video": 2, "audio": 3}


def soft_length(model: Model) -> int:
    """How many vectors stand in front of the prompt's tokens."""
    return model.inputs[SOFT].shape[1] if SOFT in model.inputs else 0


def has_images(model: Model) -> bool:
    """Whether images or videos take the places of tokens."""
    return model.task == "causal" and not model.inputs.keys().isdisjoint(PIXELS.values())


def enters_decoder(model: Model) -> bool:
    """Whether what enters the decoder is not what its table of embeddings gives: vectors, or those of images."""
    return SOFT in model.inputs or has_images(model)


def find_placeholders(model: Model) -> dict[int, str]:
    """The ids that stand for images and other inputs that are not text, and for which kind."""
    named = {**vars(model.hf.config.get_text_config()), **vars(model.hf.config)}
    return {
        token: name.partition("_")[0]
        for name, token in named.items()
        if name.startswith(_KINDS) and name.endswith(("_token_id", "_token_index")) and isinstance(token, int)
    }


def placeholder(model: Model, kind: str) -> int | None:
    """The id that stands for a part of an image (a video, sound); None for a model that takes none."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    return next((found for name in names if isinstance(found := getattr(model.hf.config, name, None), int)), None)


def image_positions(model: Model, ids: Sequence[int]) -> list[int]:
    """The positions at which images are, where there are any."""
    token = placeholder(model, "image")
    return [i for i, one in enumerate(ids) if one == token] if "pixel_values" in model.inputs else []


def image_sizes(model: Model) -> list[int] | None:
    """How many tokens each image fills; None where the model's inputs do not say it."""
    config: Any = model.hf.config
    if "image_grid_thw" in model.inputs:
        merged = config.vision_config.spatial_merge_size**2
        return [int(grid.prod()) // merged for grid in model.inputs["image_grid_thw"]]
    each = getattr(config, "mm_tokens_per_image", None)
    return [each] * len(model.inputs["pixel_values"]) if isinstance(each, int) else None


def find_images(model: Model, ids: Sequence[int]) -> list[list[int]]:
    """The positions of each image, in order."""
    positions, sizes = image_positions(model, ids), None
    if positions:
        pixels = model.inputs["pixel_values"]
        sizes = image_sizes(model)
        if sizes is None and pixels.dim() == 4 and len(positions) % len(pixels) == 0:  # all are of one size
            sizes = [len(positions) // len(pixels)] * len(pixels)
    if sizes is None or sum(sizes) != len(positions):
        starts = [n for n, i in enumerate(positions) if n == 0 or i != positions[n - 1] + 1]
        sizes = [b - a for a, b in pairwise([*starts, len(positions)])]
    return [part.tolist() for part in torch.tensor(positions).split(sizes)] if positions else []


def token_types(model: Model, input_ids: Int[Tensor, "n T"]) -> dict[str, Tensor]:
    """What a model with images takes for each token, by its name: 0 for text, 1 image, 2 video, 3 sound.

    Gemma 3 lets the tokens of one image attend to one another by it, and others place them in two dimensions.
    """
    if not has_images(model):
        return {}
    types = torch.zeros_like(input_ids)
    for kind, number in _TYPES.items():
        if (token := placeholder(model, kind)) is not None:
            types[input_ids == token] = number
    takes = inspect.signature(model.hf.forward).parameters
    return {name: types for name in derived_types(model) if name in takes}


def derived_types(model: Model) -> tuple[str, ...]:
    """The names of what `token_types` derives: PaliGemma's token types, for one, are others."""
    return ("mm_token_type_ids", *(("token_type_ids",) if model.hf.config.model_type == "gemma3" else ()))
