"""A command and the function that it calls have the same defaults: one prompt, one result."""

from __future__ import annotations

import inspect

import pytest

import loclin
from loclin.analyses import explain, generation, layers, validity
from loclin.analyses.attribution import attribute
from loclin.analyses.coverage import run as coverage
from loclin.analyses.faithfulness import prompts, study
from loclin.cli.attribute import attribute as attribute_command
from loclin.cli.coverage import coverage as coverage_command
from loclin.cli.explain import explain as explain_command
from loclin.cli.faithfulness import faithfulness as faithfulness_command
from loclin.cli.layers import layers as layers_command
from loclin.cli.steer import steer as steer_command
from loclin.cli.validity import validity as validity_command
from loclin.cli.watch import watch as watch_command
from loclin.steering import steer, watch

COMMANDS = {
    attribute_command: (attribute.attribute, loclin.linearize, loclin.load),
    coverage_command: (coverage.coverage,),
    explain_command: (explain.explain, generation.generate, loclin.linearize, loclin.load),
    faithfulness_command: (study.faithfulness, prompts.load_prompts, loclin.load),
    layers_command: (layers.explain_layers, loclin.linearize, loclin.load),
    steer_command: (steer.steer, loclin.load),
    validity_command: (validity.validity, loclin.linearize, loclin.load),
    watch_command: (watch.watch, loclin.linearize, loclin.load),
}
RENAMED = {"tokens": "max_new_tokens", "component": "components", "model": "name", "prompts": "count"}
"""An option's name, and the parameter's."""
PRINTED = {"json", "html", "markdown", "save", "generate"}
"""Options of what is printed and written, and not of what is computed."""
UNSET = {(attribute_command, "by"): "token", (coverage_command, "family"): None, (steer_command, "toward"): ()}
"""What an option that is left out stands for, where the command says it in another way."""


def default_of(command, option):
    return UNSET.get((command, option.name), option.default)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_command_and_function_have_the_same_defaults(command):
    known = [inspect.signature(function).parameters for function in COMMANDS[command]]
    compared = set()
    for option in inspect.signature(command).parameters.values():
        if option.default is inspect.Parameter.empty or option.name in PRINTED:
            continue
        for parameters in known:
            for name in {option.name, RENAMED.get(option.name, option.name)}:
                found = parameters.get(name)
                if found is not None and found.default is not inspect.Parameter.empty:
                    assert default_of(command, option) == found.default, (command.__name__, option.name)
                    compared.add(option.name)
    if command not in (coverage_command, faithfulness_command, steer_command):
        assert {"gate", "precision", "bos", "memory", "dtype", "model"} <= compared


def test_every_linearization_holds_the_papers_gate_by_default():
    for function in (loclin.linearize, loclin.linearize_batch, steer.steer):
        assert inspect.signature(function).parameters["gate"].default == "activation"
    assert loclin.freeze.FreezeOptions().gate == "activation"


def test_every_share_is_of_the_same_target_by_default():
    for function in (attribute.attribute, loclin.Linearization.attribute, loclin.Linearization.head):
        assert inspect.signature(function).parameters["target"].default is None
