"""What a random combination is made of: a network, a prompt, a map through it, and what surrounds the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loclin.models import Model, tiny, wrap
from loclin.network.points import ENDS, KINDS

GROUPS: tuple[tuple[str, ...], ...] = (
    ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite", "olmo2", "gemma", "gemma2", "gemma3_text"),
    (
        "gpt2",
        "opt",
        "gpt_neox",
        "gptj",
        "phi",
        "bloom",
        "falcon",
        "codegen",
        "biogpt",
        "starcoder2",
        "stablelm",
    ),
    ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "dbrx", "gpt_oss", "deepseek_v2", "deepseek_v3", "minimax"),
    ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "recurrent_gemma", "qwen3_next", "lfm2", "rwkv"),
    ("cohere", "cohere2", "gemma3n_text", "arcee", "nemotron", "ernie4_5", "exaone4", "helium", "bert", "bart"),
    tiny.families(),
)
"""Kinds of networks, so that what few families have comes up as often as what most have."""

PLAIN = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt2", "opt", "phi", "gpt_neox", "bloom", "mixtral", "mamba")

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GATES = ("activation", "up", "half")
PRECISIONS = ("auto", "stock", "single", "double")
LEVELS = ("token", "bias", "layer", "head", "neuron", "token×layer")
PARTS = ("make", "use", "all")
"""Which calls are surrounded: those that make a linearization, those that use one, or both."""


@contextmanager
def _switched(read: Callable, write: Callable, value: object) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "gradients off": lambda: _switched(torch.is_grad_enabled, torch.set_grad_enabled, False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: _switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16 by default": lambda: _switched(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta by default": lambda: torch.device("meta"),
    "deterministic": lambda: _switched(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


def torch_state() -> dict[str, object]:
    """What torch is set to, as far as anything in `SURROUNDINGS` sets it."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
    }


_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", *(f"<r{i}>" for i in range(4, 16))]
_LETTERS = list("abcdefgh")


def _bytes() -> Tokenizer:
    vocabulary = [*_SPECIAL, "Ġ", *_LETTERS, "ab", "Ġa", "Ġab", "cd", "Ã", "¤"]
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "ab"), ("c", "d")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made


def _metaspace() -> Tokenizer:
    pieces = [*_SPECIAL, "▁", *_LETTERS, "ab", "▁a", "▁ab", "cd"]
    made = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def _wordpiece() -> Tokenizer:
    pieces = [*_SPECIAL, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), "ab", "##cd", "cab"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer] | None] = {
    "none": None,
    "bytes": _bytes,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast | None:
    """A small tokenizer, whose ids every tiny model has."""
    make = TOKENIZERS[kind]
    if make is None:
        return None
    return PreTrainedTokenizerFast(
        tokenizer_object=make(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@dataclass(frozen=True)
class Combination:
    """One of them; `repr` is the code that makes it again."""

    family: str
    dtype: str
    gate: str
    precision: str
    source: str
    target: str
    position: int
    normed: bool
    level: str
    tokens: str
    text: str
    length: int
    seed: int
    surroundings: str
    part: str

    def model(self) -> Model:
        """A new network with its tokenizer; raises ModelError where there is none."""
        hf = tiny.build(self.family, dtype=DTYPES[self.dtype], seed=self.seed)
        return wrap(hf, tokenizer(self.tokens), name=self.family)

    def prompt(self, model: Model) -> str | torch.Tensor:
        """Text where there is a tokenizer, else ids."""
        return self.text if model.tokenizer is not None else tiny.prompt(model.hf, self.length, self.seed)

    @property
    def is_plain(self) -> bool:
        """Whether nothing about it may be refused: a common family and precision, and a map that certainly flows."""
        return (
            self.family in PLAIN
            and DTYPES[self.dtype].itemsize >= 4
            and self.source in ("embed", "resid_pre.0")
            and self.target in ("final", "logits", "resid_post.-1", "resid_post.2")
            and not (self.normed and self.target in ENDS)
            and self.position in (-1, 0)
            and self.level in ("token", "bias", "layer")
        )


def _points(random: Random) -> tuple[str, str]:
    """A source and a target: from the embeddings to the end, between any two, and seldom backwards."""
    ends = ("embed", random.choice(["final", "logits"]))
    places = sorted((random.randrange(3), random.randrange(len(KINDS))) for _ in range(2))
    first, second = (f"{KINDS[kind]}.{layer - random.choice([0, 3])}" for layer, kind in places)  # from the end, too
    chances = {ends: 2, (first, ends[1]): 2, (ends[0], second): 2, (first, second): 2, (second, first): 1}
    chances[ends[0], f"{KINDS[0]}.9"] = 0.3
    return random.choices(list(chances), list(chances.values()))[0]


def combination(random: Random) -> Combination:
    """Any of them; few ask for what there is not."""
    source, target = _points(random)
    return Combination(
        family=random.choice(random.choice(GROUPS)),
        dtype=random.choice(["float64", "float32", "float32", "bfloat16", "float16"]),
        gate=random.choice(GATES),
        precision=random.choice(PRECISIONS),
        source=source,
        target=target,
        position=random.choice([-1, -1, -1, 0, 0, 1, -2, 3, -9]),
        normed=random.random() < 0.5 and target not in ENDS,
        level=random.choice(LEVELS),
        tokens=random.choice(list(TOKENIZERS)),
        text="a" + "".join(random.choices("abcdefgh äx", k=random.randint(3, 8))),
        length=random.randint(2, 8),
        seed=random.randrange(100),
        surroundings=random.choice(list(SURROUNDINGS)),
        part=random.choice(PARTS),
    )
