"""Images in a prompt: what a model's processor makes of them, and of the text around them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from loclin.errors import ModelError, PromptError, first_line
from loclin.models.chat import Messages, is_chat, write_chat
from loclin.models.model import Model
from loclin.models.options import require
from loclin.models.placeholders import placeholder
from loclin.models.quiet import quiet


def encode_images(
    model: Model, prompt: object, images: Any, bos: bool | str | None = None
) -> tuple[Int[Tensor, "1 T"], Mapping[str, Any]]:
    """Encode a text or a chat with images by the model's processor: its ids, and all that the processor returns.

    `images` are files, or what the processor takes (PIL images, arrays): several, or one. A text has the processor's
    image token where each image belongs. In a chat that names none, images are in front of the user's first message.

    Raises ModelError for a model that takes no images, or has no processor; PromptError for another number of image
    tokens than of images, or an image that cannot be read; MissingExtraError without pillow.
    """
    processor = _processor(model)
    if isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence):
        images = [images]
    if not images:
        raise PromptError("images is empty: give at least one, or leave it out")
    pictures = [_open(image) for image in images]
    if is_chat(prompt):
        text = write_chat(model, processor, _with_parts(cast("Messages", prompt), len(pictures)))
    elif isinstance(prompt, str):
        text = prompt
    else:
        raise PromptError(
            "images belong to a text or a chat; for token ids, which hold the image tokens, give what the processor "
            'makes of them as inputs={"pixel_values": ...}'
        )
    token = str(processor.image_token)
    if (written := text.count(token)) != len(pictures):
        raise PromptError(
            f"the prompt has {token} {written} times, and there are {len(pictures)} images: write it where each image "
            "belongs, or give a chat"
        )
    try:
        with quiet():
            made = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
    except Exception as fault:  # as many kinds as there are processors
        raise PromptError(f"the processor of {model.info.name} refuses the images: {first_line(fault)}") from fault
    # what stands in front of the text by `bos`, which the text itself does not have
    assert model.tokenizer is not None
    plain = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = model.encode(text, bos=(bos or False) if is_chat(prompt) else bos)[0].tolist()
    front, ids = whole[: len(whole) - len(plain)], made["input_ids"][0].tolist()
    if is_chat(prompt) and bos is False and ids[0] == model.bos:
        ids = ids[1:]
    return torch.tensor([[*front, *ids]], device=model.device), made


def _processor(model: Model) -> Any:
    """The model's processor of images."""
    if placeholder(model, "image") is None:
        raise ModelError(
            f"{model.info.name} ({model.info.family}) takes no images: leave them out, or load a model with a vision "
            "tower"
        )
    require("PIL", "an image", "images")
    if getattr(model.processor, "image_token", None) is None:
        raise ModelError(
            f"{model.info.name} has no processor of images: load it from where it has one, or give it to "
            'loclin.wrap(model, processor); or give ids and inputs={"pixel_values": ...}'
        )
    return model.processor


def _open(image: Any) -> Any:
    """An image from a file, or as it is."""
    if not isinstance(image, (str, os.PathLike)):
        return image
    from PIL import Image, ImageOps

    try:
        with Image.open(image) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except OSError as fault:
        raise PromptError(f"cannot read the image {os.fspath(image)}: {first_line(fault)}") from fault


def _with_parts(messages: Messages, count: int) -> list[dict[str, Any]]:
    """Messages whose contents are lists of parts, with the places of the images among them."""
    turns: list[dict[str, Any]] = []
    for number, turn in enumerate(messages):
        content = turn.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise PromptError(f"message {number} ({turn['role']!r}) has no text: give its content as a string or parts")
        turns.append({**turn, "content": [*parts]})
    if not any(part.get("type") == "image" for turn in turns for part in turn["content"]):
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first["content"] = [{"type": "image"}] * count + first["content"]
    return turns
