"""Hooks anywhere are called or refused by name, and weights that hooks or parametrizations compute are trained."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, OwnForward, assert_trains_as_it_is, batch, make, results, sequence, trained
from torch import Tensor, nn
from torch.nn.utils import prune

from fdfa_ext import FDFA, FDFABlock, FDFALinear
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.layers import Block


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["", "0", "1", "1.0", "1.1", "2", "3"])
@pytest.mark.parametrize("net", [sequence, OwnForward])
def test_forward_hooks_anywhere_are_called_and_may_change_what_passes(
    net: Callable[[], Any], name: str, when: str, method: str
) -> None:
    model = trained(net(), 0, method=method) if when == "after" else None
    mine = net() if model is None else model.module
    calls: list[str] = []

    def after(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append("after")
        return 2 * output

    def before(module: nn.Module, inputs: Any) -> Any:
        calls.append("before")
        return (inputs[0] / 2,)

    def with_keywords(module: nn.Module, inputs: Any, keywords: Any, output: Tensor) -> None:
        calls.append("keywords")

    hooked = mine.get_submodule(name)
    x = torch.randn(7, 6)
    unhooked = copy.deepcopy(mine)
    handles = [
        hooked.register_forward_hook(after),
        hooked.register_forward_pre_hook(before),
        hooked.register_forward_hook(with_keywords, with_kwargs=True),
    ]
    model = model or trained(mine, 0, method=method)
    calls.clear()
    output = model(x)
    assert sorted(calls) == ["after", "before", "keywords"]
    torch.testing.assert_close(output, model.module(x))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(model(x), unhooked(x))
    assert len(calls) == 6  # those of the model and of its module


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_side_by_side_and_on_dual_tensors_a_step_is_the_same(
    name: str, backend: str, kind: str
) -> None:
    """A hook anywhere sends the pass to torch's dual tensors."""
    x, y = batch(name)
    models = [make(name, backend=backend, feedback_lr=0.05)]
    models.append(copy.deepcopy(models[0]))
    calls = []
    getattr(models[1].module[-1], f"register_{kind}")(lambda *_: calls.append(1))
    for model in models:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
    assert len(calls) == 2
    results = [
        [*model.state_dict().values(), *[p.grad for p in model.parameters()]] for model in models
    ]
    for side_by_side, dual in zip(*results, strict=True):
        torch.testing.assert_close(side_by_side, dual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["", "0", "1", "1.0", "2", "3"])
@pytest.mark.parametrize("net", [sequence, OwnForward])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_is_refused_by_name(net: Callable[[], Any], name: str, register: str) -> None:
    model = trained(net())
    x = torch.randn(7, 6)
    before = copy.deepcopy(model.state_dict())
    handle = getattr(model.module.get_submodule(name), register)(lambda *_: None)
    with pytest.raises(RuntimeError, match=f"FDFA: module '{name}' has a backward hook"):
        model(x)
    with pytest.raises(RuntimeError, match=f"FDFA: module '{name}' has a backward hook"):
        FDFA(model.module, example_input=x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    handle.remove()
    assert_trains_as_it_is(model, x)


@pytest.mark.parametrize("net", [sequence, OwnForward])
def test_without_tangents_backward_hooks_are_called_where_a_gradient_passes(
    net: Callable[[], Any],
) -> None:
    """Within a block and behind the last; the output of a block gets none from autograd."""
    model = trained(net(), method="dfa")
    x = torch.randn(7, 6)
    calls: dict[str, tuple[Any, Any]] = {}
    for name in ("1.0", "3"):
        module = model.module.get_submodule(name)
        module.register_full_backward_hook(lambda m, gi, go, name=name: calls.update({name: (gi, go)}))
    model(x).sum().backward()
    assert calls.keys() == {"1.0", "3"}
    assert torch.equal(calls["3"][1][0], torch.ones(7, 3))
    bias = model.module[1][0].bias.grad
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(calls["1.0"][1][0].sum(0), model.module[1][0].bias.grad)
    assert bias.any()
    model.module[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="module '1' has a backward hook"):
        model(x)


class Between(nn.Module):
    """Modules between two blocks, behind the last, and within one, whose first has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FDFALinear(6, 8, activation="relu")
        self.between = nn.Tanh()
        self.second = FDFABlock(nn.Dropout(0.0), nn.Linear(8, 8), nn.Tanh())
        self.behind = nn.Tanh()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.behind(self.second(self.between(self.first(x)))))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("is_sequence", [False, True])
@pytest.mark.parametrize("method", ["dfa", "dkp", "fg-w", "bp"])
def test_a_backward_hook_that_no_gradient_reaches_is_refused(
    method: str, is_sequence: bool, register: str
) -> None:
    """Of each module: called as often as backpropagation calls it, or refused by its name."""
    net = Between()
    module = nn.Sequential(*net.children()) if is_sequence else net
    x = torch.randn(5, 6)
    model = FDFA(module, method=method, example_input=x)
    refused = []
    for name, inner in module.named_modules():
        calls: list[nn.Module] = []
        hook = getattr(inner, register)(lambda module, *_: calls.append(module))  # noqa: B023
        try:
            model(x).sum().backward()
            assert calls == [inner], name
        except RuntimeError as error:
            assert f"FDFA: module '{name}' has a backward hook" in str(error)  # noqa: PT017
            refused.append(type(inner).__name__)
        hook.remove()
        assert not inner._forward_hooks
        model(x).sum().backward()
    blocks = ["FDFALinear", "Tanh", "FDFABlock", "Dropout"]
    n_modules = len(list(module.modules()))
    assert {"bp": [], "fg-w": n_modules}.get(method, blocks) in (refused, len(refused))


@pytest.mark.parametrize("net", [sequence, OwnForward])
def test_global_hooks_are_called_or_refused(net: Callable[[], Any]) -> None:
    torch_module = nn.modules.module
    model = trained(net())
    x = torch.randn(7, 6)
    seen: list[nn.Module] = []
    handle = torch_module.register_module_forward_pre_hook(lambda module, _: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert set(seen) == {m for m in model.modules() if m in set(model.module.modules())} | {model}
    for register in (
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        try:
            with pytest.raises(RuntimeError, match="FDFA: there is a global backward hook"):
                model(x)
        finally:
            handle.remove()
    assert_trains_as_it_is(model, x)


@pytest.mark.parametrize("copied", [False, True])
def test_global_hooks_see_every_module(copied: bool) -> None:
    x, _ = batch("conv_net")
    model = make("conv_net")
    model = copy.deepcopy(model) if copied else model
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
    finally:
        handle.remove()
    assert seen == [*model.module, model.module, model]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_error_leaves_no_hook_and_no_mode_behind() -> None:
    """Neither on the user's modules nor for all of them, whatever fails."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    for net in (
        nn.Sequential(FDFALinear(6, 6), Fails(), nn.Linear(6, 3)),
        nn.Sequential(FDFALinear(6, 6), FDFABlock(Fails()), nn.Linear(6, 3)),
        nn.Sequential(FDFALinear(6, 6), nn.Linear(6, 3), nn.Unflatten(1, (3, 1))),
        nn.Sequential(FDFALinear(6, 6), torch.jit.script(nn.ReLU()), nn.Linear(5, 3)),
    ):
        with pytest.raises((ArithmeticError, RuntimeError, ValueError)):
            FDFA(net, example_input=torch.randn(7, 6))
        for module in net.modules():
            assert module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert not nn.modules.module._global_forward_hooks
        passes = [block.block_pass for block in net.modules() if isinstance(block, Block)]
        assert all(own is None or own.dual is None for own in passes)


REPARAMETRIZATIONS = {
    "parametrized weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm": nn.utils.weight_norm,
    "parametrized spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm": nn.utils.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "pruning": lambda module: prune.l1_unstructured(module, "weight", amount=0.3),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["0", "1.0", "3"])
@pytest.mark.parametrize("kind", REPARAMETRIZATIONS)
@pytest.mark.parametrize("net", [sequence, OwnForward])
def test_a_reparametrized_weight_learns(
    net: Callable[[], Any], kind: str, name: str, when: str
) -> None:
    model = trained(net()) if when == "after" else None
    mine = net() if model is None else model.module
    REPARAMETRIZATIONS[kind](mine.get_submodule(name))
    model = model or trained(mine)
    x = torch.randn(7, 6)
    if "spectral" in kind:  # whose vectors move with each call
        mine.eval()
        model.training = True
    torch.testing.assert_close(model(x), model.module(x))
    actual = results(model, x)
    assert all(value.any() for key, value in actual.items() if key.startswith("gradient"))
