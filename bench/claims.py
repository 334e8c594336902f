"""What of the paper holds at small scale: each of its claims, tested over many prompts on both packaged models.

    python bench/claims.py                        measure what is missing, then write docs/claims.md
    python bench/claims.py --models smollm2-135m --prompts 16
    python bench/claims.py --page                 write docs/claims.md again from the lines that are there

Every prompt is one line of `bench/results/claims-MODEL.jsonl`, appended when it is finished; the same command goes on
from there. The first line has the settings, which must be the same. Networks of the same shape with random weights are
measured by the same code on fewer prompts: they are the null models. What is needed for each claim to hold is written
in `claims_rules.py`, and the page is made from the lines alone. One prompt takes several seconds on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

import loclin
from claims_measure import NULLS, VARIANTS, measure, vary
from claims_page import page
from harness import RESULTS
from loclin.analyses.faithfulness.prompts import StudyPrompt, load_prompts
from loclin.common.versions import versions_of
from loclin.errors import LoclinError, OptionError, OutputError
from loclin.models import Model
from loclin.results.files import check_writable, read_text, write_text

MODELS = ("smollm2-135m", "gemma-3-270m")
PAGE = Path(__file__).parent.parent / "docs" / "claims.md"
PROMPTS, FEW = 104, 8
"""How many prompts; and how many of them for null models, and maps of all tokens to every layer, which cost more."""


class Lines:
    """The file of one model: a line of settings, then one for each prompt and variant, appended as they come."""

    def __init__(self, path: Path, settings: dict[str, Any], fresh: bool = False) -> None:
        self.path = path
        check_writable(path)
        held = [] if fresh or not path.exists() else read(path)
        if held and held[0] != settings:
            other = ", ".join(sorted(name for name in held[0] | settings if held[0].get(name) != settings.get(name)))
            raise OutputError(
                f"{path} was measured with another {other}: measure again with --fresh, or elsewhere with --out"
            )
        self.held = held or [settings]
        write_text(path, "".join(map(_line, self.held)))  # without what an interrupted run left of its last line
        self.done = {(line["variant"], line["text"]) for line in self.held[1:]}

    def add(self, found: dict[str, Any]) -> None:
        """Append one line, with a single write."""
        self.held.append(found)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(handle, _line(found).encode())
        finally:
            os.close(handle)


def _line(found: dict[str, Any]) -> str:
    return json.dumps(found, ensure_ascii=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, settings first, without one that was not finished; OutputError for something else."""
    try:
        return [json.loads(line) for line in read_text(path).split("\n")[:-1]]
    except ValueError as error:
        raise OutputError(
            f"{path} does not have the lines of bench/claims.py: name another folder with --out"
        ) from error


def choose(count: int) -> list[StudyPrompt]:
    """`count` packaged prompts: those with fewest words and marks of each kind in turn, so that kinds are as many."""
    kinds: dict[str, list[StudyPrompt]] = {}
    for prompt in load_prompts():
        kinds.setdefault(prompt.kind, []).append(prompt)
    if not 1 <= count <= sum(map(len, kinds.values())):
        raise OptionError(
            f"--prompts {count}: there are {sum(map(len, kinds.values()))} packaged prompts; ask for 1 or more"
        )
    for own in kinds.values():
        own.sort(key=lambda prompt: (len(re.findall(r"\w+|[^\w\s]", prompt.text)), len(prompt.text), prompt.text))
    turns = range(max(map(len, kinds.values())))
    return [own[turn] for turn in turns for own in kinds.values() if turn < len(own)][:count]


def plan(prompts: list[StudyPrompt], layers: int, few: int) -> Iterator[tuple[str, StudyPrompt]]:
    """Which variant is measured on which prompts."""
    counts = {"model": len(prompts), "layers": layers}
    for variant in VARIANTS:
        for prompt in prompts[: counts.get(variant, few)]:
            yield variant, prompt


def run(model: Model, path: Path, prompts: list[StudyPrompt], layers: int, few: int, fresh: bool) -> None:
    """Measure what the file does not have yet."""
    settings = {"model": model.info.to_dict(), "bos": True, "gate": "activation", "seed": 0}
    settings["versions"] = versions_of("loclin", "torch", "transformers")
    lines = Lines(path, settings, fresh)
    left = [work for work in plan(prompts, layers, few) if (work[0], work[1].text) not in lines.done]
    null: dict[str, Model] = {}
    for variant, prompt in tqdm(left, desc=model.info.name, unit="prompt", disable=None):
        if variant in NULLS and variant not in null:
            null = {variant: vary(model, variant, settings["seed"])}
        found = measure(null.get(variant, model), variant, prompt.text)
        lines.add({"variant": variant, "kind": prompt.kind, "text": prompt.text, **found})


def main() -> int:
    """Measure and write the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="how many packaged prompts")
    parser.add_argument("--layers", type=int, default=PROMPTS, help="how many of them for the maps of single layers")
    parser.add_argument("--few", type=int, default=FEW, help="how many for null models, and all tokens at every layer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the lines")
    parser.add_argument("-o", type=Path, default=PAGE, dest="page_file", help="the page")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--fresh", action="store_true", help="forget what is finished")
    options = parser.parse_args()
    try:
        for name, count in (("layers", options.layers), ("few", options.few)):
            if count < 1:
                raise OptionError(f"--{name} {count}: ask for 1 or more")
        prompts = choose(options.prompts)
        for name in () if options.page else options.models:
            with torch.random.fork_rng():
                path = file_of(name, options.out)
                run(loclin.load(name), path, prompts, options.layers, options.few, options.fresh)
        found = {name: read(file_of(name, options.out)) for name in MODELS if file_of(name, options.out).exists()}
        if not found:
            raise OptionError(f"no lines of any model in {options.out}: measure some first, without --page")
        write_text(options.page_file, page(found))
    except LoclinError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.page_file}")
    return 0


def file_of(name: str, folder: Path) -> Path:
    """The lines of a model."""
    return folder / f"claims-{name}.jsonl"


if __name__ == "__main__":
    sys.exit(main())
