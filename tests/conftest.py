"""Shapes and types of everything in loclin are checked at run time, in tests only.

All but `loclin.freeze`, whose functions run at every torch operation: there the check would take ten times the work.
"""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import CodeType, FunctionType
from typing import Any

import pytest
from jaxtyping import install_import_hook

# Imported first, because the hook below compiles anew, at every run, whatever is first imported by a module of loclin.
for name in (
    "beartype.door",
    "beartype.vale",
    "plotly.graph_objects",
    "rich.live",
    "scipy.sparse.linalg",
    "torch",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_utils",
    "typer.rich_utils",
):
    with suppress(ImportError):
        import_module(name)

spec = find_spec("loclin")
assert spec is not None
assert spec.submodule_search_locations is not None
package = Path(spec.submodule_search_locations[0])
rooms = [f"loclin.{path.stem}" for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
install_import_hook([room for room in rooms if room not in ("loclin.freeze", "loclin.__init__")], "beartype.beartype")


TESTS = Path(__file__).parent
PROCESSES = {"subprocess", "multiprocessing", "fork"}
"""A test that names one of these starts a process."""


# A shell's background job ignores Ctrl-C, and with it every process that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much `tests/fuzz` tries, and whether a missing library is a failure."""
    parser.addoption("--examples", type=int, default=None, help="random combinations that tests/fuzz tries")
    parser.addoption(
        "--device", default="cpu", help="where tests/tiny.py puts its models: cuda, or fake (tests/fake_device.py)"
    )
    parser.addoption(
        "--every-library", action="store_true", help="fail, rather than skip, what needs a library that is missing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the tiny models of all tests on another device."""
    import fake_device
    import tiny

    tiny.DEVICE = config.getoption("device")
    if tiny.DEVICE == fake_device.DEVICE:
        fake_device.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts a process as `subprocess`, cases outside a sample as `slow`, and those of `long_for` as `long`.

    On another device, skip what is of the processor alone.
    """
    known: dict[FunctionType, bool] = {}
    cases: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [vars(item.module).get(name) for name in item.fixturenames]
            if any(starts_processes(one, known) for one in (item.function, *fixtures)):
                item.add_marker("subprocess")
        if any(mark.args[0] in item.nodeid.partition("[")[2] for mark in item.iter_markers("long_for")):
            item.add_marker("long")
        if config.getoption("device") != "cpu" and item.get_closest_marker("processor") is not None:
            item.add_marker(pytest.mark.skip(reason="is of the processor alone"))
        if (sampled := item.get_closest_marker("sampled")) is not None:
            cases.setdefault((item.nodeid.partition("[")[0], *sampled.args), []).append(item)
    for (name, count), each in cases.items():
        chosen = Random(name).sample(range(len(each)), min(count, len(each)))  # the same in every process
        for number, item in enumerate(each):
            if number not in chosen:
                item.add_marker("slow")


def starts_processes(found: object, known: dict[FunctionType, bool]) -> bool:
    """Whether a function or fixture of the tests uses `subprocess`, or another function of the tests that does."""
    function = inspect.unwrap(found) if callable(found) else found
    if not isinstance(function, FunctionType) or not Path(function.__code__.co_filename).is_relative_to(TESTS):
        return False
    if function not in known:
        known[function] = False  # while functions that call one another are looked at
        used = set(names(function.__code__))
        known[function] = not used.isdisjoint(PROCESSES) or any(
            starts_processes(function.__globals__.get(name), known) for name in used
        )
    return known[function]


def names(code: CodeType) -> Iterator[str]:
    """The global names and attributes that a function uses, and those of the functions inside it."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from names(inner)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Refuse to start Python from a test that is not marked so: `make check` would run it."""
    if item.get_closest_marker("subprocess") is not None:
        return (yield)
    start = subprocess.Popen.__init__

    def refuse(process: subprocess.Popen[Any], command: Any, *args: Any, **options: Any) -> None:
        if not isinstance(command, (str, bytes, Path)) and command[0] == sys.executable:
            pytest.fail("this test starts Python: mark it pytest.mark.subprocess")
        start(process, command, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Let a test whose library is missing fail where every library should be there."""
    return fail_without_library((yield), item.config)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for a whole file."""
    return fail_without_library((yield), collector.config)


def fail_without_library(report: Any, config: pytest.Config) -> Any:
    """Return the report, as a failure if it is of a skip for want of a library."""
    why = str(report.longrepr)
    if report.skipped and "could not import" in why and config.getoption("every_library"):
        report.outcome, report.longrepr = "failed", why
    return report


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer of whole words, saved."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import tiny

    path = tmp_path_factory.mktemp("model")
    tiny.llama(dtype=torch.float32).save_pretrained(path)
    words = ["<s>", "<unk>", *(f"w{i}" for i in range(tiny.VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(path)
    return path
