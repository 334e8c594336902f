"""Questions with a known answer, from a JSON file: what a study asks, and which tokens it may take away."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loclin.common.access import reason
from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.models import Model

_ANSWERS = ("answer", "attribute")
_READING = "Context: {context}\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Item:
    """A prompt, the answer that should follow, and which characters of the prompt are its context."""

    name: str
    prompt: str
    answer: str
    context: tuple[int, int]

    __repr__ = brief

    def answer_id(self, model: Model, ids: list[int]) -> int:
        """The token with which the answer begins behind the prompt `ids`, as the tokenizer writes both together."""
        both = model.encode(f"{self.prompt} {self.answer.strip()}", bos=False)[0].tolist()
        plain = model.encode(self.prompt, bos=False)[0].tolist()
        if both[: len(plain)] == plain and len(both) > len(plain) and ids[-len(plain) :] == plain:
            return int(both[len(plain)])
        return int(model.encode(f" {self.answer.strip()}", bos=False)[0, 0])

    def positions(self, model: Model, ids: list[int]) -> list[int]:
        """The tokens of the context, by position: those with a character of it, without special tokens."""
        special, (start, end) = model.tokens.special(), self.context
        offsets = self._offsets(model, ids)
        return [
            i for i, (begins, ends) in enumerate(offsets) if begins < end and ends > start and ids[i] not in special
        ]

    def _offsets(self, model: Model, ids: list[int]) -> list[tuple[int, int]]:
        """The place of each token in the prompt: the tokenizer's own, where it gives one; (0, 0) for what it adds."""
        tokenizer: Any = model.tokenizer
        if getattr(tokenizer, "is_fast", False):
            own = tokenizer(self.prompt, add_special_tokens=False, return_offsets_mapping=True)
            if own["input_ids"] == ids[-len(own["input_ids"]) :]:
                return [(0, 0)] * (len(ids) - len(own["input_ids"])) + own["offset_mapping"]
        shift = max(0, model.tokens.text(ids).find(self.prompt))
        return [(begins - shift, ends - shift) for begins, ends in model.tokens.offsets(ids)]


def load_items(path: str | os.PathLike[str]) -> tuple[list[Item], str]:
    """Read a list of items for `disruption` from the JSON file at `path`, and the file's SHA-256.

    An item has a `prompt` and an `answer` (or `attribute`), as Known-1000 and IOI have; or a `context`, a `question`
    and an `answer`, as SQuAD has, of which only the context counts as tokens to take away.

    Raises OptionError for a file that cannot be read, is not such a list, or is empty.
    """
    try:
        raw = Path(path).read_bytes()
        found = json.loads(raw)
    except OSError as error:
        raise OptionError(f"cannot read {path}: {reason(error, Path(path))}") from None
    except ValueError as error:
        raise OptionError(f"{path} is not JSON ({error}): give a list of prompts with their answers") from None
    if not isinstance(found, list) or not found:
        raise OptionError(f"{path} holds no list of items: give a list of prompts with their answers")
    return [_read(path, number, one) for number, one in enumerate(found)], hashlib.sha256(raw).hexdigest()


def _read(path: object, number: int, given: Any) -> Item:
    def text(*names: str) -> str | None:
        values = (given.get(name) for name in names)
        return next((value for value in values if isinstance(value, str) and value.strip()), None)

    if isinstance(given, Mapping):
        prompt, answer, context, question = text("prompt"), text(*_ANSWERS), text("context"), text("question")
        name = str(next((given[key] for key in ("known_id", "case_id", "id") if key in given), number))
        if prompt is not None and answer is not None:
            return Item(name, prompt, answer, (0, len(prompt)))
        if context is not None and question is not None and answer is not None:
            whole = _READING.format(context=context, question=question)
            start = whole.index(context)
            return Item(name, whole, answer, (start, start + len(context)))
    raise OptionError(
        f"{path}: item {number} has no prompt with an answer, and no context with a question and an answer"
    )
