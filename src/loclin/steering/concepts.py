"""The packaged concepts and prompts for measuring steering, and the tokens that begin a concept's words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import product

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
    """A concept to steer towards."""

    name: str
    phrase: str  # that a sentence uses for it
    words: list[str]  # that count as the concept's
    texts: list[str]  # about it; an operator of one text uses the first

    __repr__ = brief


@dataclass(frozen=True)
class Concepts:
    """Ten concepts, and 50 prompts and some texts about none of them, for measuring steering."""

    concepts: list[Concept]
    choosing: list[str]  # prompts for choosing layers and strengths
    measuring: list[str]  # prompts for measuring the chosen ones
    neutral: list[str]  # texts
    other_phrases: list[str]  # for other subjects

    __repr__ = brief

    def pairs(self, phrase: str) -> list[tuple[str, str]]:
        """Make pairs of texts that differ only in their stated subject."""
        return [
            tuple(f"This is a text about {about}. {text}" for about in (phrase, other))  # type: ignore[misc]
            for other, text in zip(self.other_phrases, self.neutral, strict=False)
        ]


@cache
def packaged_concepts() -> Concepts:
    """Load the packaged concepts and prompts."""
    packaged = json.loads(files("loclin.steering").joinpath("concepts.json").read_text("utf-8"))
    concepts = [Concept(**concept) for concept in packaged["concepts"]]
    prompts, n = packaged["prompts"], packaged["choosing"]
    return Concepts(concepts, prompts[:n], prompts[n:], packaged["neutral"], packaged["other_phrases"])


def words_of(text: str) -> list[str]:
    """List the words of a text in order, without function words and short words."""
    words = ("".join(c for c in word if c.isalpha() or c in "'-") for word in text.split())
    return list(dict.fromkeys(word for word in words if len(word) > 2 and word.lower() not in _STOP_WORDS))


def token_ids(model: Model, words: Sequence[str]) -> list[int]:
    """List the ids of tokens that are, or begin, one of the words, capitalised or not, after a space or not."""
    found: dict[int, None] = {}
    words = strings("words", words)
    spellings = [spelling for word in words for spelling in (word, word.lower(), word.capitalize())]
    for spelling, space in product(dict.fromkeys(spellings), (" ", "")):
        ids = model.encode(f"{space}{spelling}", bos=False)[0].tolist()
        first = model.decode_each(ids[:1])[0].strip()
        # of several tokens, the first one counts only if it has at least three letters
        if first and spelling.startswith(first) and (len(ids) == 1 or len(first) >= 3):
            found[ids[0]] = None
    if not found:
        raise PromptError(
            f"no token of {model.info.name} begins one of the words {', '.join(words) or '(none)'}: give others"
        )
    return list(found)
