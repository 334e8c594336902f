"""Hooks are taken off again whatever happens, and hidden states are put where they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loclin.models.forward import hidden_input, hidden_output, hooked, with_hidden_input, with_hidden_output


def test_hooks_are_taken_off_again_also_after_errors():
    module = nn.Linear(2, 2)

    def put_on():
        yield module.register_forward_hook(lambda *_: None)
        yield module.register_forward_pre_hook(lambda *_: None)

    def put_on_and_fail():
        yield from put_on()
        raise RuntimeError("no third hook")

    with hooked(put_on()):
        assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == (1, 1)
    assert not module._forward_hooks
    with pytest.raises(KeyError), hooked(put_on()):
        raise KeyError
    assert not module._forward_hooks
    with pytest.raises(RuntimeError, match="no third hook"), hooked(put_on_and_fail()):
        pass
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_hidden_states_are_replaced_where_they_are():
    old, new = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for args, kwargs in (((old, "mask"), {"cache": None}), ((), {"hidden_states": old, "cache": None})):
        assert hidden_input(args, kwargs) is old
        changed = with_hidden_input(args, kwargs, new)
        assert hidden_input(*changed) is new
        assert (changed[0][1:], changed[1].get("cache", 0)) == (args[1:], None)
    for output in (old, (old, "probs"), [old, "probs"]):
        assert hidden_output(output) is old
        changed = with_hidden_output(output, new)
        assert hidden_output(changed) is new
        assert type(changed) is type(output)
