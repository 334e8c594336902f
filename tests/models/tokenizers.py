"""Small real tokenizers of every kind, made with the tokenizers library."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .helpers import tiny_tokenizer

NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = ["▁The", "▁Golden", "▁Gate", "Gate", "▁", "▁a", "a", "e", "s", ".", "é", "\u0301", "▁of", "字"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _spaced(inner: Tokenizer, **more: str) -> PreTrainedTokenizerFast:
    """SentencePiece's way with spaces: `▁` for each, and one in front of the text."""
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **(NAMES | more))


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram with byte fallback."""
    pieces = [(piece, -2.0 - len(piece) / 100) for piece in WORDS]
    specials = [(piece, 0.0) for piece in ("<unk>", "<s>", "</s>")]
    return _spaced(Tokenizer(models.Unigram([*specials, *((b, -20.0) for b in BYTES), *pieces], 0, byte_fallback=True)))


def _bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    letters = sorted(set("".join(WORDS)) - {"字", "\u0301"})
    merges = [("G", "a"), ("t", "e"), ("Ga", "te"), ("▁", "Gate"), ("T", "h"), ("Th", "e"), ("▁", "The")]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *letters, *dict.fromkeys(a + b for a, b in merges)]
    return {token: i for i, token in enumerate(tokens)}, merges


def spaced_bpe() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE with byte fallback."""
    vocabulary, merges = _bpe()
    return _spaced(Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True)))


def llama() -> LlamaTokenizer:
    """Transformers' own tokenizer for Llama."""
    vocabulary, merges = _bpe()
    return LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=False)


def metaspace() -> PreTrainedTokenizerFast:
    """Metaspace in front of a Unigram without byte fallback."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -2.0 - len(piece) / 100) for piece in WORDS)]
    inner = Tokenizer(models.Unigram(pieces, 0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **NAMES)


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's, with `[SEP]` behind every text."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "golden", "gate", "##gate", "##s", "s", ".", "##.", "a"]
    inner = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def ending(pad: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts `</s>` behind every text, and `<s>` in front."""
    made = tiny_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    if pad is not None:
        made.add_special_tokens({"pad_token": AddedToken(pad, special=True)})
    return made


KINDS: dict[str, PreTrainedTokenizerBase] = {
    "bytes": tiny_tokenizer(),
    "unigram": unigram(),
    "bpe": spaced_bpe(),
    "llama": llama(),
    "metaspace": metaspace(),
    "wordpiece": wordpiece(),
}
