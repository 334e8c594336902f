"""The packaged concepts and prompts on which steering is measured, and which tokens begin a concept's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from loclin.common.arguments import strings
from loclin.common.brief import brief
from loclin.errors import PromptError
from loclin.models import Model

_STOP = """
a about above after all also an and another any are as at be been before being below between both but by can
could did do does down each few for from had has have he her here him his how i if in into is it its just me
more most my new no nor not of off on once only or other our out over own same she should so some such than
that the their them then there these they this those through to too under until up very was we were what when
where which while who whom why will with would you your
"""
_STOP_WORDS = frozenset(_STOP.split())


@dataclass(frozen=True)
class Concept:
    """A concept to steer towards.

    Attributes
    ----------
    name, phrase
        What it is called, and how a sentence names it.
    words
        What counts as speaking of it.
    texts
        Texts that mean it; the first is the one for an operator of one text.
    """

    name: str
    phrase: str
    words: list[str]
    texts: list[str]

    __repr__ = brief


@dataclass(frozen=True)
class Concepts:
    """What steering is measured on.

    Attributes
    ----------
    concepts
        Ten concepts.
    choosing, measuring
        Prompts that mean none of them: for choosing layers and strengths, and for measuring what was chosen.
    neutral
        Texts that mean none of them.
    other_phrases
        What else a sentence can name.
    """

    concepts: list[Concept]
    choosing: list[str]
    measuring: list[str]
    neutral: list[str]
    other_phrases: list[str]

    __repr__ = brief

    def pairs(self, phrase: str) -> list[tuple[str, str]]:
        """Pairs of texts that differ in what they are said to be about."""
        return [
            tuple(f"This is a text about {about}. {text}" for about in (phrase, other))  # type: ignore[misc]
            for other, text in zip(self.other_phrases, self.neutral, strict=False)
        ]


@cache
def packaged_concepts() -> Concepts:
    """The packaged list: 10 concepts, 50 prompts."""
    held = json.loads(files("loclin.steering").joinpath("concepts.json").read_text("utf-8"))
    prompts, n = held["prompts"], held["choosing"]
    return Concepts(
        concepts=[Concept(**concept) for concept in held["concepts"]],
        choosing=prompts[:n],
        measuring=prompts[n:],
        neutral=held["neutral"],
        other_phrases=held["other_phrases"],
    )


def words_of(text: str) -> list[str]:
    """The words of a text that mean something by themselves, in order."""
    words = ("".join(c for c in word if c.isalpha() or c in "'-") for word in text.split())
    return list(dict.fromkeys(word for word in words if len(word) > 2 and word.lower() not in _STOP_WORDS))


def token_ids(model: Model, words: Sequence[str]) -> list[int]:
    """The ids of tokens that are, or begin, one of the words: capitalised or not, with a space in front or not.

    A spelling of several tokens counts by its first one only where that has at least three letters.

    Raises
    ------
    PromptError
        When no token does.
    """
    found: dict[int, None] = {}
    words = strings("words", words)
    for word in words:
        for spelling in dict.fromkeys((word, word.lower(), word.capitalize())):
            for text in (f" {spelling}", spelling):
                ids = model.encode(text, bos=False)[0].tolist()
                first = model.decode_each(ids[:1])[0].strip()
                if first and spelling.startswith(first) and (len(ids) == 1 or len(first) >= 3):
                    found[ids[0]] = None
    if not found:
        raise PromptError(f"no token of {model.info.name} begins one of the words {', '.join(words) or '(none)'}")
    return list(found)
