"""The text of token ids: of each token by itself, and of all of them together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED = re.compile("[\udc80-\udcff]+")
_CONTEXT = 8
"""How many tokens before a continuation are decoded with it."""
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}
"""The character that stands for each byte in byte-level vocabularies (GPT-2's)."""


def soft_name(token: int) -> str:
    """The name of a vector that stands in the place of a token: ids of such positions count down from -1."""
    return f"<embedding {-1 - token}>"


class Tokens:
    """The texts of a tokenizer's ids; without a tokenizer, ids are shown as numbers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._size = 0
        self._shown: dict[int, str] = {}

    def shown(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, as `Model.decode_each` says. Cost: some microseconds for each new id."""
        if self._tokenizer is None:
            return [soft_name(int(token)) if token < 0 else str(int(token)) for token in ids]
        if self._size != len(self._tokenizer):  # tokens have been added
            self._size, self._shown = len(self._tokenizer), {}
        new = [token for token in dict.fromkeys(map(int, ids)) if token not in self._shown]
        if new:
            self._shown.update(zip(new, self._made(self._tokenizer, new), strict=True))
        return [self._shown[int(token)] for token in ids]

    def text(self, ids: Sequence[int], *, special: bool = True) -> str:
        """All tokens together, as the tokenizer reads them; ids without a token are written `⟨unused 49160⟩`."""
        ids = [int(token) for token in ids]
        if self._tokenizer is None:
            return " ".join(self.shown(ids))
        unused = [i for i, token in enumerate(ids) if self._raw(token) is None]
        pieces, start = [], 0
        for i in (*unused, len(ids)):
            if start < i:
                pieces.append(_decoded(self._tokenizer, ids[start:i], special))
            pieces += self.shown(ids[i : i + 1]) if special else []
            start = i + 1
        return "".join(pieces)

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The place `(start, end)` of each token in their `text`; tokens that form one character share its place."""
        ids, text = [int(token) for token in ids], self.text(ids)
        groups: list[tuple[int, str]] = []  # how many tokens, and what they add
        first = read = 0
        for i in range(len(ids)):
            before, now = self.text(ids[first:read]), self.text(ids[first : i + 1])
            if now.endswith(_BROKEN) and i + 1 < len(ids):
                continue  # the rest of the character follows
            groups.append((i + 1 - read, now[len(before) :]))
            first, read = read, i + 1
        ends = list(accumulate(len(added) for _, added in groups))
        if "".join(added for _, added in groups) != text:
            groups = [(1, "")] * len(ids)
            ends = list(accumulate((len(commonprefix([text, self.text(ids[: i + 1])])) for i in range(len(ids))), max))
        return [(a, b) for a, b, (n, _) in zip([0, *ends], ends, groups, strict=False) for _ in range(n)]

    def continuation(self, before: Sequence[int], ids: Sequence[int], *, special: bool = True) -> str:
        """The text of `ids` as a continuation of others: a space at its beginning stays."""
        if not ids:
            return ""
        if self._tokenizer is None:
            return self.text(ids)
        context = list(before)[-_CONTEXT:]
        if not special:
            ids = [token for token in ids if token not in self.special()]
            context = [token for token in context if token not in self.special()]
        both = [*context, *ids]
        return self.text(both)[self.offsets(both)[len(context)][0] :] if ids else ""

    def alike(self, text: str) -> list[int]:
        """The ids of tokens that are shown as (without characters: decoded to) this text. Cost: decoding all tokens."""
        if self._tokenizer is None:
            return []
        ids = range(len(self._tokenizer))
        texts = self.shown(ids) if text.strip(_BROKEN) else [_decoded(self._tokenizer, [token]) for token in ids]
        return [token for token, own in zip(ids, texts, strict=True) if own == text]

    def knows(self, token: int) -> bool:
        """Whether an id has a token; models may have more embeddings than their tokenizer has tokens."""
        return self._tokenizer is None or self._raw(token) is not None

    def special(self) -> set[int]:
        """The ids of special tokens: beginnings, ends, padding, the marks of chat templates."""
        if self._tokenizer is None:
            return set()
        added: dict[int, Any] = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {*self._tokenizer.all_special_ids, *(token for token, held in added.items() if held.special)}

    def _raw(self, token: int) -> Any:
        """The vocabulary's own entry; None for an id without one."""
        tokenizer = self._tokenizer
        if token < 0:
            return None
        try:
            raw = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, ValueError, OverflowError):  # tokenizers in Python say it in their own ways
            return None
        if tokenizer is not None and raw == tokenizer.unk_token and token != tokenizer.unk_token_id:
            return None
        return raw

    def _made(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
        """The shown texts of ids: what each one appends to a text."""
        context = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        base, special, prefix = _decoded(tokenizer, context), self.special(), _word_prefix(tokenizer)
        found = []
        for token in ids:
            raw = self._raw(token)
            if raw is None:
                text = soft_name(token) if token < 0 else f"⟨unused {token}⟩"
            elif token in special:
                text = str(raw)
            elif prefix is not None:  # its decoder takes the spaces of punctuation away
                text = raw.removeprefix(prefix) if raw.startswith(prefix) else f" {raw}"
            else:
                text = _decoded(tokenizer, [*context, token])
                added = text.removeprefix(base) if text.startswith(base) else _decoded(tokenizer, [token])
                text = self._bytes_shown(raw, added)
            found.append(text or f"⟨empty {token}⟩")
        return found

    def _bytes_shown(self, raw: Any, text: str) -> str:
        """A token's text; its bytes, if they are not a whole character or another token has that character."""
        byte = _BYTE.fullmatch(raw) if isinstance(raw, str) else None
        if byte is not None:
            taken = text == " " or _BROKEN in text or self._has(text)
            return f"⟨{byte[1].upper()}⟩" if taken else text
        if _BROKEN not in text:
            return text
        if not isinstance(raw, bytes) and not all(sign in _BYTES for sign in raw):
            return text  # the replacement character itself
        held = raw if isinstance(raw, bytes) else bytes(_BYTES[sign] for sign in raw)
        parts = held.decode("utf-8", "surrogateescape")
        return _ESCAPED.sub(lambda hit: f"⟨{' '.join(f'{ord(sign) - 0xDC00:02X}' for sign in hit[0])}⟩", parts)

    def _has(self, text: str) -> bool:
        found = None if self._tokenizer is None else self._tokenizer.convert_tokens_to_ids(text)
        return isinstance(found, int) and self._raw(found) == text


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: bool = True) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def _word_prefix(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The prefix of WordPiece tokens that continue a word; None for other tokenizers."""
    decoder: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return str(decoder.prefix) if type(decoder).__name__ == "WordPiece" else None
