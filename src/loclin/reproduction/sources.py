"""The analyses that targets share: each is made once, and kept in the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loclin.analyses.explain import Explanation, explain
from loclin.analyses.layers import LayerExplanation, explain_layers
from loclin.linearization import Linearization, linearize
from loclin.models import Model
from loclin.network.anatomy import find_anatomy
from loclin.reproduction.folder import Folder
from loclin.reproduction.golden import PaperModel, Published, Setting, read_golden, recognise
from loclin.reproduction.published import AsPublished, repeat_mistakes
from loclin.steering.steer import Steered, steer

_STORED = ("float32", "float64", "bfloat16", "float16")
_PACKED = {"bitsandbytes": "4-bit"}
_GROWN = 3


class Sources:
    """A model's analyses at the paper's prompts, or at one that was given.

    Attributes
    ----------
    model, folder, golden: what is analysed, where it is kept, and what is published.
    paper_model, recognised: which of the paper's models it is, and by what that is known.
    precision: the dtype of its weights, or how they are packed.
    notes: what was done otherwise than asked.
    """

    def __init__(
        self,
        model: Model,
        folder: Folder,
        *,
        prompt: str | None,
        freezing: dict[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self.model, self.folder, self.golden = model, folder, read_golden()
        self.paper_model, self.recognised = recognise(model)
        stored = model.info.stored_dtype
        self.precision = model.info.dtype if stored in _STORED else _PACKED.get(stored, stored)
        self._prompt, self._freezing, self._tell = prompt, freezing, tell
        self._lins: dict[str, Linearization] = {}
        self._made: dict[str, Any] = {}
        self.notes: list[str] = []

    @property
    def weights(self) -> str:
        """The dtype of its weights, and how they were stored, in words."""
        dtype = self.model.info.dtype
        return dtype if self.precision == dtype else f"{dtype}, stored as {self.precision}"

    @property
    def golden_of(self) -> PaperModel | None:
        """The same as `paper_model`, unless another prompt than the paper's was asked for."""
        return self.paper_model if self._prompt is None else None

    @property
    def prompt(self) -> str:
        """The prompt of all targets that have one: the paper's, unless another was given."""
        return self.golden.prompt if self._prompt is None else self._prompt

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return len(find_anatomy(self.model.hf).layers)

    @property
    def settings(self) -> list[Setting]:
        """The rows of the steering table to run: a paper's model's own; for every other model all of them."""
        name = None if self.paper_model is None else self.paper_model.name
        return [one for one in self.golden.steering if one.model == name] or self.golden.steering

    def published(self, target: str) -> list[Published]:
        """What is published of this model for a target, at these prompts."""
        return [] if self.golden_of is None else self.golden.of(self.golden_of.name, target)

    def prompts(self, target: str) -> list[str]:
        """The prompt, and others at which figures of this model are published for a target."""
        return list(dict.fromkeys([self.prompt, *(one.prompt for one in self.published(target))]))

    def linearize(self, prompt: str) -> Linearization:
        """Freeze the model at a prompt."""
        if prompt not in self._lins:
            self._tell(f"reading “{prompt}”")
            self._lins[prompt] = self._freeze(prompt)
        return self._lins[prompt]

    def _freeze(self, prompt: Any) -> Linearization:
        """Freeze the model at a text or at ids; in float64 where float32 rounds more than a certificate allows."""
        freezing = self._freezing if isinstance(prompt, str) else {**self._freezing, "bos": None}
        lin = linearize(self.model, prompt, **freezing)
        certificate = lin.certify()
        if certificate.passed or certificate.culprits or self._freezing["precision"] != "auto":
            return lin
        self.notes.append(
            f"At “{lin.text}” float32 rounds too much for a certificate, {certificate.reconstruction_error:.1e} of the "
            "output: its maps are in float64."
        )
        return linearize(self.model, prompt, **{**freezing, "precision": "double"})

    def grow(self) -> list[Linearization]:
        """The growing prompts of Figure 2: a beginning token, and what the model writes behind it.

        Of a prompt that was given, or without a beginning token, the first one, two and three tokens.
        """
        if self._prompt is None and self.model.bos is not None:
            ids = [self.model.bos]
            lins = [self._freeze(ids)]
            while len(lins) < _GROWN:
                ids = [*ids, lins[-1].next_token_ids(1)[0][0]]
                lins.append(self._freeze(ids))
            return lins
        ids = self.linearize(self.prompt).input_ids[0].tolist()
        return [self._freeze(ids[:size]) for size in range(1, min(_GROWN, len(ids)) + 1)]

    def explain(self, prompt: str) -> Explanation:
        """What each token's map does."""
        return self._once(
            f"explain-{_short_hash(prompt)}",
            Explanation,
            lambda: explain(self.linearize(prompt), progress=self._tell),
        )

    def explain_layers(self) -> LayerExplanation:
        """How the prediction forms with depth."""
        return self._once(
            f"layers-{_short_hash(self.prompt)}",
            LayerExplanation,
            # the signs of the published words; the triples themselves are not needed any more
            lambda: replace(
                explain_layers(self.linearize(self.prompt), signs="final", progress=self._tell), spectra=None
            ),
        )

    def repeat_mistakes(self) -> AsPublished:
        """The published code's wrong lists."""
        self._tell("rows and right singular vectors, as published")
        return self._once("as-published", AsPublished, lambda: repeat_mistakes(self.linearize(self.prompt)))

    def steer(self, number: int, setting: Setting, layer: int) -> Steered:
        """A row of the steering table, at a layer counted from 0."""
        prompt = self._prompt or setting.prompt
        how: dict[str, Any] = {name: self._freezing[name] for name in ("gate", "bos", "memory")}
        return self._once(
            f"steering-{number + 1}-{layer}",
            Steered,
            lambda: steer(
                self.model,
                prompt,
                [setting.toward],
                method="published",
                layer=layer,
                strength=setting.strength,
                max_new_tokens=setting.tokens,
                progress=self._tell,
                **how,
            ),
        )

    def made(self) -> list[Explanation | LayerExplanation]:
        """The analyses of the prompt that were made, or that the folder has."""
        kinds: dict[str, Any] = {"explain": Explanation, "layers": LayerExplanation}
        names = {f"{kind}-{_short_hash(self.prompt)}": of for kind, of in kinds.items()}
        found = [self._made.get(name) or self.folder.source(name, of) for name, of in names.items()]
        return [one for one in found if one is not None]

    def _once(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        """An analysis from memory, from the folder, or made now."""
        if name not in self._made:
            found = self.folder.source(name, kind)
            if found is None:
                found = make()
                self.folder.keep(name, found)
            self._made[name] = found
        return self._made[name]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
