"""The packaged concepts and prompts for measuring steering, and the tokens that begin a concept's words."""

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
        The name of the concept, and the phrase that a sentence uses for it.
    words
        The words that count as the concept's.
    texts
        Texts about it; an operator of one text uses the first.
    """

    name: str
    phrase: str
    words: list[str]
    texts: list[str]

    __repr__ = brief


@dataclass(frozen=True)
class Concepts:
    """The concepts, prompts and texts for measuring steering.

    Attributes
    ----------
    concepts
        Ten concepts.
    choosing, measuring
        Prompts about none of the concepts: for choosing layers and strengths, and for measuring the chosen ones.
    neutral
        Texts about none of the concepts.
    other_phrases
        Phrases for other subjects.
    """

    concepts: list[Concept]
    choosing: list[str]
    measuring: list[str]
    neutral: list[str]
    other_phrases: list[str]

    __repr__ = brief

    def pairs(self, phrase: str) -> list[tuple[str, str]]:
        """Make pairs of texts that differ only in their stated subject."""
        return [
            tuple(f"This is a text about {about}. {text}" for about in (phrase, other))  # type: ignore[misc]
            for other, text in zip(self.other_phrases, self.neutral, strict=False)
        ]


@cache
def packaged_concepts() -> Concepts:
    """Load the packaged 10 concepts and 50 prompts."""
    packaged = json.loads(files("loclin.steering").joinpath("concepts.json").read_text("utf-8"))
    prompts, n = packaged["prompts"], packaged["choosing"]
    return Concepts(
        concepts=[Concept(**concept) for concept in packaged["concepts"]],
        choosing=prompts[:n],
        measuring=prompts[n:],
        neutral=packaged["neutral"],
        other_phrases=packaged["other_phrases"],
    )


def words_of(text: str) -> list[str]:
    """List the words of a text in order, without function words and short words."""
    words = ("".join(c for c in word if c.isalpha() or c in "'-") for word in text.split())
    return list(dict.fromkeys(word for word in words if len(word) > 2 and word.lower() not in _STOP_WORDS))


def token_ids(model: Model, words: Sequence[str]) -> list[int]:
    """List the ids of tokens that are, or begin, one of the words: capitalised or not, with or without a leading space.

    For a spelling of several tokens, the first one counts only if it has at least three letters.

    Raises
    ------
    PromptError
        When there is no such token.
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
        raise PromptError(
            f"no token of {model.info.name} begins one of the words {', '.join(words) or '(none)'}: give others"
        )
    return list(found)
