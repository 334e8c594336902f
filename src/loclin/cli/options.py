"""Options that several commands have, and what they do with them."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loclin.cli.console import NOTHING, importing, kept, note, stderr, step
from loclin.cli.streams import read_prompt
from loclin.common import arguments
from loclin.errors import MissingExtraError, OptionError, OutputError, PromptError
from loclin.results.files import check_apart, check_writable

if TYPE_CHECKING:
    from loclin.linearization import Linearization
    from loclin.models import Model


def _flag(param: Any) -> str:
    """What a person types for a parameter."""
    return max(param.opts, key=len) if param.param_type_name == "option" else f"the {param.name}"


def plain(_context: Any, param: Any, value: Any) -> Any:
    """Check an option's text, or each of several: not empty, and whole characters."""
    if isinstance(value, list | tuple):
        return [_whole(_flag(param), one) for one in value]
    return value if value is None else _whole(_flag(param), value)


def _whole(name: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # bytes that the locale does not have, as Python keeps them: perhaps they are UTF-8
        try:
            value = os.fsencode(value).decode("utf-8")
        except UnicodeError:
            raise PromptError(f"{name} is not UTF-8 text; give whole UTF-8 characters") from None
    if "\0" in value:
        raise PromptError(f"{name} has a NUL character; leave it out")
    return arguments.text(name, value.removeprefix("\ufeff"))  # of "$(cat FILE)"


def place(_context: Any, param: Any, value: Any) -> Any:
    """Check the name of a file or of a model: not empty, and text that every library can open."""
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [place(_context, param, one) for one in value]
    name, path = _flag(param), str(value)
    if not path.strip():
        raise OptionError(f"{name} is empty: give a name")
    if path == "-":
        raise OptionError(f"{name} -: give a name; '-' is for the prompt alone")
    if "\0" in path or path.encode("utf-8", "ignore").decode("utf-8") != path:
        raise OptionError(f"{name}: the name is not UTF-8 in this locale; rename it, or set PYTHONUTF8=1")
    return value


def text(help: str) -> Any:
    """An option that is checked by `plain`."""
    return typer.Option(help=help, callback=plain)


def path(help: str) -> Any:
    """An option that is checked by `place`."""
    return typer.Option(help=help, callback=place)


def finite(help: str, least: float | None = None, above: float | None = None) -> Any:
    """An option whose number is checked: finite, and in a range."""

    def check(_context: Any, param: Any, value: Any) -> Any:
        return value if value is None else arguments.real(_flag(param), value, least, above)

    return typer.Option(help=help, callback=check)


def several_of(help: str, *names: str) -> Any:
    """An option that is given several times, each time one of these names."""

    def check(_context: Any, param: Any, values: Any) -> Any:
        for value in values or ():
            if value not in names:
                raise OptionError(f"{_flag(param)} {value}: choose one of {', '.join(names)}")
        return values

    return typer.Option(help=help, metavar=f"<{'|'.join(names)}>", callback=check)


DEFAULT_MODEL = "gemma-3-270m"
SEEDS = 2**63 - 1
"""The largest seed that every random generator takes."""
Gate = Literal["activation", "up", "half"]
Task = Literal["causal", "masked", "classification", "seq2seq"]
Prompt = Annotated[str, typer.Argument(help="The text to explain; '-' reads it from standard input.", callback=plain)]
ModelName = Annotated[str, path("Packaged name (see 'loclin models'), hub id, local directory, or .gguf file.")]
Position = Annotated[
    int, typer.Option(help="Explain the prediction at this token; -1 is the last, the mask or the class.")
]
Dtype = Annotated[str, text("float32, float64, bfloat16, float16, or auto (as stored).")]
Revision = Annotated[str | None, text("A hub model's branch, tag or commit.")]
Memory = Annotated[
    str | None, text("Memory beside weights and results, such as 2GB. Default: a quarter of what is free.")
]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Put a beginning token in front, or none; by default the tokenizer's way."),
]
Chat = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Put the prompt into the model's chat template: as the user's message, or several, as a JSON list of "
        "objects with role and content.",
    ),
]
Json = Annotated[Path | None, path("Write everything to this JSON file.")]
Html = Annotated[Path | None, path("Write an interactive page to this file.")]
Top = Annotated[int, typer.Option(help="How many of the largest shares to print.", min=1)]
Record = Annotated[Path | None, path("Write what is finished to this JSON file, and go on from what it holds.")]
Markdown = Annotated[Path | None, path("Write the tables to this Markdown file.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Ignore what the JSON file holds, and write over it.")]
_OUTPUTS = ("json", "html", "markdown", "save", "output")
_INPUTS = ("image", "words", "operator", "model", "saved")


@dataclass(frozen=True, repr=False)
class Loading:
    """The options of every command that loads a model."""

    model: ModelName = DEFAULT_MODEL
    dtype: Dtype = "float32"
    device: Annotated[str | None, text("Such as cpu or cuda:0.")] = None
    devices: Annotated[str | None, text("Several that share the work: all, or such as cuda:0,cuda:1.")] = None
    device_map: Annotated[str | None, text("Spread the layers, such as auto.")] = None
    revision: Revision = None
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read layers from disk one by one; by default only if the weights do not fit into memory.",
        ),
    ] = None
    bos: Bos = None
    gate: Annotated[Gate, typer.Option(help="Freeze act(gate) (the paper), freeze up, or the mean of both.")] = (
        "activation"
    )
    memory: Memory = None
    attn: Annotated[str | None, text("The attention of transformers to use, such as eager or sdpa.")] = None
    quantization: Annotated[
        Literal["nf4", "fp4"] | None,
        typer.Option(help="Quantise weights to four bits while loading (bitsandbytes)."),
    ] = None
    adapter: Annotated[Path | None, path("A PEFT adapter to put on the model: a directory.")] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a hub repository brings along.")
    ] = False
    task: Annotated[
        Task | None,
        typer.Option(help="What the model is for; by default that of the class from which it was stored."),
    ] = None

    def load(self) -> Model:
        """Load the model."""
        with importing():
            from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 (what load will ask for)

            from loclin.models import load
        with stderr.status(f"loading {self.model}"):
            how: dict[str, Any] = {"device": self.device, "devices": self.devices, "device_map": self.device_map}
            how |= {"revision": self.revision, "stream": self.stream, "attn_implementation": self.attn}
            how |= {"quantization": self.quantization, "adapter": self.adapter}
            how |= {"trust_remote_code": True} if self.trust_remote_code else {}
            model = load(self.model, dtype=self.dtype, task=self.task, **how)
        if model.note:
            note(model.note)
        return model


@dataclass(frozen=True, repr=False)
class Freezing(Loading):
    """The options of every command that freezes a model at a prompt."""

    precision: Annotated[
        Literal["auto", "stock", "single", "double", "split"],
        typer.Option(
            help="The map's own precision: the model's (stock), float32, float64; auto: at least float32; "
            "split: float32 by bfloat16 products, where they are as accurate and faster."
        ),
    ] = "auto"
    chat: Chat = False
    system: Annotated[str | None, text("A system message in front, with --chat.")] = None
    decoder: Annotated[
        str | None, text("What the decoder of an encoder-decoder has read, behind its start token; by default nothing.")
    ] = None
    image: Annotated[
        list[Path] | None,
        path("An image file, for a model with a vision tower; several: --image a.png --image b.png, in their order."),
    ] = None

    def linearize(self, prompt: str) -> Linearization:
        """Load the model, and freeze it at the prompt."""
        if self.system is not None and not self.chat:
            raise OptionError("--system is for chats: add --chat")
        for image in self.image or ():
            if not image.is_file():
                raise PromptError(f"--image {image}: there is no such file; check the path")
        given: Any = read_chat(prompt, self.system) if self.chat else prompt
        with importing():
            from loclin.linearization import linearize  # noqa: F401 (before the model is loaded)
        loaded = self.load()
        step("reading the prompt")
        return self.freeze(loaded, given)

    def freeze(self, model: Model, prompt: Any) -> Linearization:
        """Freeze a loaded model at a prompt."""
        from loclin.linearization import linearize

        if self.chat and isinstance(prompt, str):
            prompt = read_chat(prompt, self.system)
        how: Any = {"gate": self.gate, "precision": self.precision, "bos": self.bos, "memory": self.memory}
        return linearize(model, prompt, decoder=self.decoder, images=self.image or None, **how)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the options of a group, each under its own name, in the place of the group.

    An option that the command has itself stands in the place of the group's, which keeps its default.
    """
    parameters: dict[str, inspect.Parameter] = {}
    groups: dict[str, Any] = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation
            parameters = {**inspect.signature(groups[name], eval_str=True).parameters, **parameters}
        else:
            parameters[name] = parameter
    own = inspect.signature(command).parameters.keys()

    @wraps(command)
    def called(**given: Any) -> None:
        made = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group) if f.name not in own})
            for name, group in groups.items()
        }
        command(**made, **given)

    named = [one.replace(kind=one.KEYWORD_ONLY) for one in parameters.values()]
    called.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    called.__annotations__ = {name: one.annotation for name, one in parameters.items()}
    return called


running: ContextVar[Any] = ContextVar("running")
"""The command that runs, as the parser has it."""


def named() -> set[str]:
    """The options that were typed, and not left to their defaults."""
    context = running.get()
    return {name for name in context.params if "COMMANDLINE" in str(context.get_parameter_source(name))}


def exclude(option: str, *others: str, why: str) -> None:
    """Refuse an option that was typed beside others that contradict it."""
    typed = named()
    for other in others:
        if {option, other} <= typed:
            raise OptionError(f"{spell(option)} and {spell(other)} exclude one another: {why}")


def spell(option: str) -> str:
    """What a person types for an option."""
    return f"--{option}".replace("_", "-")


def check() -> None:
    """Refuse what cannot work before anything is loaded, for whichever command runs.

    That is an output that cannot be written, that is another output or an input, options that exclude one another, or
    a budget that is none.
    """
    given = {name: value for name, value in running.get().params.items() if value is not None}
    exclude("device", "device_map", "devices", why="one device, or several")
    if given.get("stream"):
        exclude("stream", "devices", why="layers are on disk, or copied to several devices")
        exclude("stream", "device_map", why="layers are on disk, or spread")
    if given.get("fresh") and "json" in running.get().params and "json" not in given:
        raise OptionError("--fresh is about the JSON file; name it with --json")
    kept.set(NOTHING)
    if {"fresh", "json"} <= set(given):
        kept.set(f"what is finished is kept: the same command goes on ({given['json']})")
    outputs = {f"--{name}": given[name] for name in _OUTPUTS if name in given}
    for path in outputs.values():
        check_writable(path)
    if (save := outputs.get("--save")) is not None:
        if save.suffix != ".safetensors":
            raise OutputError(f"cannot write {save}: results are safetensors files; call it {save}.safetensors")
        outputs["--save's facts"] = save.with_name(f"{save.name}.json")
        check_writable(outputs["--save's facts"])
    several = {
        name: given[name] if isinstance(given[name], list) else [given[name]] for name in _INPUTS if name in given
    }
    inputs = {
        f"--{name}" if len(each) == 1 else f"--{name} {one}": Path(one)
        for name, each in several.items()
        for one in each
    }
    check_apart(outputs, {name: path for name, path in inputs.items() if path.exists()})
    if "html" in given and find_spec("plotly") is None:
        raise MissingExtraError("an HTML page", "plotly", "html")
    if "memory" in given:
        with importing():
            from loclin.network import memory as budgets

        budgets.parse_memory(given["memory"])


def read_chat(prompt: str, system: str | None) -> list[dict[str, str]]:
    """The messages of a chat: of a JSON list, or a text as the user's only one."""
    messages: Any = None
    if prompt.lstrip().startswith("[{"):
        try:
            messages = json.loads(prompt)
        except ValueError as error:
            raise PromptError(f"--chat: the prompt begins like a JSON list of messages, and is none: {error}") from None
        if not all(isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages):
            raise PromptError("--chat: every message of the list needs a role and a content")
    found = messages or [{"role": "user", "content": prompt}]
    return found if system is None else [{"role": "system", "content": system}, *found]


def read(prompt: str) -> str:
    """Give the prompt's text, from standard input for '-'."""
    return arguments.text("the prompt", read_prompt()) if prompt == "-" else prompt
