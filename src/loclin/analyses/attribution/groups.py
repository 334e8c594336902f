"""Groups of a prompt's tokens: words, sentences, lines, chat turns, the matches of a pattern, or named positions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from loclin.common.brief import brief
from loclin.errors import OptionError
from loclin.maps.linearized import Linearized
from loclin.models.placeholders import find_images, image_positions

Unit = Literal["word", "sentence", "line", "turn", "example"]
UNITS: tuple[Unit, ...] = get_args(Unit)
Grouping = str | re.Pattern[str] | Mapping[str, Sequence[int] | slice]
"""The name of a unit; a pattern; or each group by name: its positions, or a span of characters of `lin.text`."""
Skip = str | Sequence[int]
"""`special` tokens, attention `sink`s, or positions."""

_PARTS = {
    # letters and digits, with an apostrophe or a hyphen inside; any other sign stands alone
    "word": re.compile(r"\s*(?:[^\W_]+(?:['’-][^\W_]+)*|\S)"),
    "sentence": re.compile(r"\s*\S.*?(?:[.!?…。！？]+[\"'”’)\]]*(?=\s|$)|(?=\n\s*\n)|$)", re.DOTALL),
    "line": re.compile(r"[^\n]*(?:\n+|$)"),
    "example": re.compile(r"\s*\S.*?(?:\n[^\S\n]*\n\s*|$)", re.DOTALL),  # text between empty lines
}


@dataclass(frozen=True)
class Group:
    """Some tokens of a prompt, by their positions in order."""

    name: str
    positions: list[int]

    __repr__ = brief


def find_groups(lin: Linearized, by: Grouping, skipped: Sequence[int] = ()) -> list[Group]:
    """Put every token of a prompt into exactly one group, in the order of their first tokens.

    Special tokens are groups of their own (in a chat turn they are part of it), and so is each skipped token. Among
    words, sentences and lines each image is one. What a pattern or a mapping leaves out is one group of the other
    tokens. A token that lies in two parts of the text belongs to that in which it begins.

    Raises OptionError for an unknown unit, groups that overlap, positions outside the prompt, or a pattern without a
    match.
    """
    length = lin.trace.length
    if isinstance(by, Mapping):
        labels, names = _read_mapping(lin, by)
    elif isinstance(by, re.Pattern):
        labels, names = _match(lin, by), {}
        if not any(label is not None for label in labels):
            raise OptionError(f"the pattern {by.pattern!r} matches nothing in the prompt; give another")
    elif by == "turn":
        labels, names = list[Any](_number_turns(lin)), {}
    elif by in _PARTS:
        labels, names = _match(lin, _PARTS[by]), {}
        for i in find_skipped(lin, "special"):
            labels[i] = ("special", i)
        labels = _joined(labels)
        for number, held in enumerate(find_images(lin.model, lin.input_ids[0].tolist()), 1):
            names[("image", number)] = f"<image {number}>"
            for i in held:
                labels[i] = ("image", number)
    else:
        raise OptionError(f"by={by!r}: choose one of {', '.join(UNITS)}, a pattern, or a mapping of names to positions")
    for position in skipped:
        labels[position] = ("skipped", position)
    positions: dict[Any, list[int]] = {}
    for i in range(length):
        positions.setdefault(labels[i], []).append(i)
    return [
        Group(names.get(label) or ("other tokens" if label is None else name_group(lin, held)), held)
        for label, held in positions.items()
    ]


def find_skipped(lin: Linearized, skip: Skip | None) -> list[int]:
    """The positions to leave out of rankings: those of special tokens, of attention sinks, or as given."""
    if skip is None:
        return []
    if skip == "special":
        special, ids = lin.model.tokens.special(), lin.input_ids[0].tolist()
        images = {*image_positions(lin.model, ids)}
        return [i for i, token in enumerate(ids) if token in special and i not in images]
    if skip == "sink":
        return list(lin.sinks)
    if isinstance(skip, str):
        raise OptionError(f"skip={skip!r}: choose special, sink, or give positions")
    return sorted({lin.trace.position(one) for one in skip})


def _read_mapping(lin: Linearized, groups: Mapping[str, Sequence[int] | slice]) -> tuple[list[Any], dict[Any, str]]:
    labels: list[Any] = [None] * lin.trace.length
    for name, given in groups.items():
        held = _find_span(lin, str(name), given) if isinstance(given, slice) else given
        for position in held:
            at = lin.trace.position(position)
            if labels[at] is not None:
                raise OptionError(
                    f"groups {labels[at]!r} and {name!r} both have the token at position {at}: a share belongs to one"
                )
            labels[at] = str(name)
    return labels, {str(name): str(name) for name in groups}


def _find_span(lin: Linearized, name: str, span: slice) -> list[int]:
    """The positions of the tokens that begin, behind their spaces, in a span of the text's characters."""
    characters = set(range(*span.indices(len(lin.text))))
    found = [i for i, start in enumerate(_starts(lin)) if start in characters]
    if not found:
        raise OptionError(f"group {name!r}: no token begins in characters {span.start} to {span.stop} of lin.text")
    return found


def _starts(lin: Linearized) -> Iterator[int]:
    """The character with which each token begins, behind its spaces."""
    ids = lin.input_ids[0].tolist()
    text = lin.model.tokens.text(ids)
    for start, end in lin.model.tokens.offsets(ids):
        spaces = len(text[start:end]) - len(text[start:end].lstrip())
        yield start + spaces if spaces < end - start else start


def _match(lin: Linearized, pattern: re.Pattern[str]) -> list[Any]:
    """The number of the match in which each token begins, behind its spaces; None outside of all."""
    text = lin.model.tokens.text(lin.input_ids[0].tolist())
    owner: list[int | None] = [None] * (len(text) + 1)
    for number, found in enumerate(pattern.finditer(text)):
        owner[found.start() : found.end()] = [number] * (found.end() - found.start())
    return [owner[start] for start in _starts(lin)]


def _joined(labels: list[Any]) -> list[Any]:
    """Tokens outside of all parts (trailing spaces) belong to what is in front of them; and parts are contiguous."""
    found: list[Any] = []
    for i, label in enumerate(labels):
        found.append(found[-1] if label is None and found else ("first", i) if label is None else label)
    runs, number = [], 0
    for i, label in enumerate(found):
        number += i > 0 and label != found[i - 1]
        runs.append(number)
    return runs


def _number_turns(lin: Linearized) -> Iterator[int]:
    """Number the turns of a chat: one ends behind a token at which the model stops, before the next special token."""
    special, stops, number, ended = lin.model.tokens.special(), lin.model.stops, 0, False
    for i, token in enumerate(lin.input_ids[0].tolist()):
        if ended and token in special and token not in stops:
            number, ended = number + 1, False
        yield number
        ended = ended or (token in stops and i > 0)


def name_group(lin: Linearized, positions: list[int]) -> str:
    """The text of some tokens of a prompt."""
    ids = lin.input_ids[0].tolist()
    if positions != list(range(positions[0], positions[-1] + 1)):
        return " … ".join(lin.model.decode_each([ids[i] for i in positions]))
    return lin.model.tokens.continuation(ids[: positions[0]], [ids[i] for i in positions]) or "".join(
        lin.model.decode_each([ids[i] for i in positions])
    )
