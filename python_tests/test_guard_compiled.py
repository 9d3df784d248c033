"""Modules that torch scripts, traces or compiles train as they are."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import slow_but
from nets import OPTIONS, OwnForward, results, sequence
from torch import nn

from fdfa_ext import FDFA


@pytest.mark.parametrize(
    "make",
    [lambda m: torch.jit.script(m), lambda m: torch.jit.trace(m, torch.randn(7, 6))],
    ids=["script", "trace"],
)
@pytest.mark.parametrize("name", ["1.0", "1.1", "2", "3"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_trained(make: Callable[[nn.Module], Any], name: str, when: str) -> None:
    x = torch.randn(7, 6)
    net = sequence()
    plain = FDFA(copy.deepcopy(net), example_input=x, **OPTIONS)
    scripted = FDFA(net, example_input=x, **OPTIONS) if when == "after" else None
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, make(net.get_submodule(name)))
    scripted = scripted or FDFA(net, example_input=x, **OPTIONS)
    scripted.noise_state.copy_(plain.noise_state)
    for _ in range(4):  # torch.jit compiles after the second call
        expected, actual = results(plain, x), results(scripted, x)
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6, msg=key)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="aot_eager")


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="aot_eager")
    return module


@pytest.mark.parametrize(
    ("net", "method"),
    [(sequence, "fdfa"), (OwnForward, "fdfa"), *slow_but([(sequence, "dfa")])],
)
@pytest.mark.parametrize("compile", [compiled, compiled_in_place])
@pytest.mark.parametrize("name", ["0", "1.0", "2", ""])
@pytest.mark.parametrize("when", slow_but(["before", "after"], "after"))
def test_a_compiled_module_is_trained(
    net: Callable[[], Any], compile: Callable[[nn.Module], nn.Module], name: str, when: str, method: str
) -> None:
    torch._dynamo.reset()
    x = torch.randn(7, 6)
    mine = net()
    plain = FDFA(copy.deepcopy(mine), method=method, example_input=x, **OPTIONS)
    model = FDFA(mine, method=method, example_input=x, **OPTIONS) if when == "after" else None
    if name:
        parent, _, child = name.rpartition(".")
        mine.get_submodule(parent)._modules[child] = compile(mine.get_submodule(name))
    else:
        mine = compile(mine)
    if model is None:
        model = FDFA(mine, method=method, example_input=x, **OPTIONS)
    model.module = mine

    def bare(key: str) -> str:
        """Without the part that torch.compile puts into the names of what it wraps."""
        return re.sub(r"_orig_mod[./]|[./]_orig_mod$", "", key)

    for unprepared in (plain, model):
        unprepared(x)
    model.load_state_dict({key: plain.state_dict()[bare(key)] for key in model.state_dict()})
    for _ in range(2):
        expected, actual = results(plain, x), results(model, x)
        for key, value in actual.items():
            torch.testing.assert_close(value, expected[bare(key)], rtol=1e-5, atol=1e-6, msg=key)
            assert value.any() or "gradient" not in key
    torch.testing.assert_close(model(x), model.module(x))
