"""Classes and functions put in the place of a module's own after wrapping are called, or refused by name."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import (
    OPTIONS,
    OwnForward,
    assert_trains_as_it_is,
    batch,
    example,
    images,
    make,
    results,
    sequence,
    trained,
)
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.layers import Block


def doubled(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: nn.Module, *args: Any) -> Tensor:
        return 2 * own(self, *args)

    return forward


@contextlib.contextmanager
def patched(kind: type, name: str, function: Any = None) -> Iterator[None]:
    had, own = name in vars(kind), getattr(kind, name)
    setattr(kind, name, function or doubled(own))
    try:
        yield
    finally:
        setattr(kind, name, own)
        if not had:
            delattr(kind, name)


PATCHES = [
    (nn.Linear, "forward"),
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.LeakyReLU, "forward"),
    (nn.GELU, "forward"),
    (nn.ReLU, "forward"),
    (nn.MaxPool2d, "forward"),
    (nn.MaxPool2d, "__call__"),
    (nn.Flatten, "forward"),
    (nn.Sequential, "forward"),
    (FDFALinear, "forward"),
    (FDFAConv2d, "forward"),
    (FDFABlock, "forward"),
]


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
@pytest.mark.parametrize(("kind", "name"), PATCHES)
def test_a_function_of_a_class_put_in_the_place_of_its_own_is_called(
    kind: type, name: str, method: str
) -> None:
    for net in (sequence(), images()):
        x = example(net)
        model = trained(net, method=method)
        before = model(x).detach()
        with patched(kind, name):
            output = model(x).detach()
            for inner in model.modules():
                if isinstance(inner, nn.BatchNorm2d):
                    inner.track_running_stats = False
            torch.testing.assert_close(output, model.module(x).detach())
            actual = results(model, x)
        used = any(isinstance(inner, kind) for inner in model.modules())
        assert torch.equal(output, before) != used
        torch.testing.assert_close(model(x).detach(), before)
        assert all(actual[key].any() for key in actual if key.startswith("gradient"))


@pytest.mark.parametrize("method", ["fdfa", "dfa", "bp"])
def test_a_function_of_torchs_that_no_rule_knows_is_called_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(5, 6)
    model = FDFA(nn.Sequential(FDFALinear(6, 8), nn.Softmax(1), nn.Linear(8, 3)), method=method)
    model(x)
    own, calls = F.softmax, []
    monkeypatch.setattr(F, "softmax", lambda *args, **named: calls.append(1) or own(*args, **named))
    model(x)
    assert calls == [1]


class Halved(FDFALinear):
    """Computes by a function that its forward calls."""

    def plain(self, x: Tensor) -> Tensor:
        return super().plain(x) / 2


class Last(FDFABlock):
    def plain(self, x: Tensor) -> Tensor:
        return super().plain(x) + 1


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_a_block_that_computes_by_a_plain_of_its_own_trains_as_it_evaluates(
    method: str, is_compiled: bool
) -> None:
    net = nn.Sequential(
        Halved(6, 8), Last(nn.Linear(8, 8), nn.Tanh()), FDFALinear(8, 8), nn.Linear(8, 3)
    )
    x = torch.randn(5, 6)
    model = FDFA(net, method=method, example_input=x)
    forward = torch.compile(model, dynamic=False, backend="aot_eager") if is_compiled else model
    torch.testing.assert_close(forward(x).detach(), net(x).detach())
    if not is_compiled:
        net[2].plain = lambda x: 3 * FDFALinear.plain(net[2], x)
        torch.testing.assert_close(model(x).detach(), net(x).detach())
    forward(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


FUNCTIONS = [
    (F, "linear"),
    (F, "conv2d"),
    (F, "relu"),
    (F, "gelu"),
    (F, "batch_norm"),
    (F, "layer_norm"),
    (F, "max_pool2d"),
    (torch, "tanh"),
    (torch, "relu"),
]


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
@pytest.mark.parametrize(("home", "name"), FUNCTIONS)
def test_a_function_of_torchs_that_is_replaced_for_all_is_called(
    home: Any, name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By modules and layers, in blocks and between, from the next step on, and no longer than it stands."""
    net = nn.Sequential(
        FDFAConv2d(2, 4, 3, activation="tanh"),
        nn.MaxPool2d(2),
        FDFABlock(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=0.0), nn.ReLU()),
        nn.Flatten(),
        FDFALinear(16, 8),
        nn.GELU(),
        FDFABlock(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh()),
        nn.Linear(8, 3),
    )
    x = torch.randn(5, 2, 10, 10)
    model = FDFA(net, method=method, example_input=x)
    results(model, x)
    own = getattr(home, name)
    expected = model(x).detach()
    with monkeypatch.context() as patch:
        patch.setattr(home, name, lambda *args, **kwargs: 1.5 * own(*args, **kwargs))
        actual = results(model, x)
        torch.testing.assert_close(model(x).detach(), model.module(x).detach())
        assert not torch.equal(model(x), expected)
    assert all(value.any() for key, value in actual.items() if key.startswith("gradient"))
    torch.testing.assert_close(model(x).detach(), expected)


def test_gradients_under_a_patch_are_those_of_what_the_patch_computes() -> None:
    """nn.Linear.forward with a factor: the same numbers as weights and biases with that factor."""
    net = sequence()
    x = torch.randn(7, 6)
    model, scaled = (FDFA(n, example_input=x, **OPTIONS) for n in (net, copy.deepcopy(net)))
    scaled.noise_state.copy_(model.noise_state)
    with torch.no_grad():
        for p in scaled.module.parameters():
            p.mul_(2)
    expected = results(scaled, x)
    with patched(nn.Linear, "forward"):
        actual = results(model, x)
    for key, value in actual.items():
        if key.startswith("gradient"):
            torch.testing.assert_close(value, 2 * expected[key], rtol=1e-4, atol=1e-6)
        elif key.startswith("feedback"):
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Steep(FDFALinear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Standardized(FDFAConv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(FDFALinear):
    """A subclass that changes nothing."""


class Residual(FDFABlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
@pytest.mark.parametrize(
    ("net", "name", "kind"),
    [
        (sequence, "0", Steep),
        (sequence, "0", Renamed),
        (sequence, "1", Residual),
        (sequence, "1.0", Shifted),
        (sequence, "2", nn.Sigmoid),
        (sequence, "2", nn.Softsign),
        (sequence, "3", Shifted),
        (OwnForward, "0", Steep),
        (OwnForward, "1.0", Shifted),
        (images, "0", Standardized),
        (images, "5", nn.Identity),
    ],
)
def test_a_class_assigned_to_a_module_is_used(
    net: Callable[[], Any], name: str, kind: type, method: str
) -> None:
    model = trained(net(), method=method)
    x = example(model.module)
    before = model(x)
    model.module.get_submodule(name).__class__ = kind
    if method == "fdfa":
        assert_trains_as_it_is(model, x)
    for inner in model.modules():
        if isinstance(inner, nn.BatchNorm2d):
            inner.track_running_stats = False
    output = model(x)
    torch.testing.assert_close(output, model.module(x))
    assert torch.equal(output, before) == (kind is Renamed)


def test_a_class_that_is_no_block_any_more_is_refused() -> None:
    model = trained(sequence())
    model.module[0].__class__ = nn.Linear
    with pytest.raises(RuntimeError, match="the input of block '1' depends on parameters"):
        model(torch.randn(7, 6))


@pytest.mark.parametrize(
    ("net", "name"),
    [
        (sequence, "1.0"),
        (sequence, "2"),
        (sequence, "3"),
        (images, "3.1"),
        (images, "1"),
        (OwnForward, "1.1"),
    ],
)
def test_a_forward_assigned_after_wrapping_is_called(net: Callable[[], Any], name: str) -> None:
    model = trained(net(), method="dfa")
    x = example(model.module)
    before = model(x)
    module = model.module.get_submodule(name)
    own = module.forward
    module.forward = lambda x: 3 * own(x)
    for inner in model.modules():
        if isinstance(inner, nn.BatchNorm2d):
            inner.track_running_stats = False
    output = model(x)
    torch.testing.assert_close(output, model.module(x))
    assert not torch.allclose(output, before)
    del module.forward
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("place", range(4))
def test_a_forward_put_in_the_place_of_a_modules_own_is_called(place: int) -> None:
    """As libraries do that wrap single modules."""
    x, _ = batch("conv_net")
    model = make("conv_net", method="dfa")
    module = model.module[place]
    own = module.forward
    module.forward = lambda x: 3 * own(x)
    output = model(x)
    torch.testing.assert_close(output, model.eval()(x))
    del module.forward
    assert not torch.allclose(output, model(x))


def test_a_convolution_assigned_after_wrapping_is_called() -> None:
    """As is done to tile images."""
    model = trained(images(), method="dfa")
    x = example(model.module)
    model.module[3][1].track_running_stats = False
    for convolution in (model.module[0], model.module[3][0]):
        own = convolution._conv_forward
        convolution._conv_forward = lambda x, weight, bias, own=own: 3 * own(x, weight, bias)
        torch.testing.assert_close(model(x), model.module(x))


class Forgets(FDFALinear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, self.weight, self.bias))


class ForgetsChain(FDFABlock):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class OwnBlock(nn.Module, Block):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("make", "base"),
    [(lambda: Forgets(6, 6), "FDFALinear"), (lambda: ForgetsChain(nn.Linear(6, 6)), "FDFABlock")],
)
def test_a_subclass_that_leaves_the_blocks_forward_out_is_refused_by_name(
    make: Callable[[], nn.Module], base: str, place: int, method: str, when: str
) -> None:
    x = torch.randn(7, 6)
    net = sequence()
    model = FDFA(net, method=method, example_input=x) if when == "after" else None
    net[place] = make()
    message = f"block '{place}' \\({type(net[place]).__name__}\\) has a forward of its own that has not called {base}.forward"
    with pytest.raises(RuntimeError, match=message):
        model(x) if model else FDFA(net, method=method, example_input=x)


def test_a_blocks_forward_replaced_by_one_that_does_not_perturb_is_refused_by_name() -> None:
    """In the instance or in the class, after wrapping."""
    x = torch.randn(7, 6)
    for net in (sequence(), OwnForward()):
        model = trained(net)
        model.module[1].forward = lambda x: x.tanh()
        with pytest.raises(RuntimeError, match=r"block '1' \(FDFABlock\) has a forward of its own"):
            model(x)
        del model.module[1].forward
        with (
            patched(FDFALinear, "forward", lambda self, x: F.linear(x, self.weight)),
            pytest.raises(RuntimeError, match=r"block '0' \(FDFALinear\) has a forward of its own"),
        ):
            model(x)
        assert_trains_as_it_is(model, x)


def test_a_compiled_step_refuses_it_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(7, 6)
    model = FDFA(nn.Sequential(FDFALinear(6, 6), nn.Linear(6, 3)), example_input=x)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    compiled(x)
    model.module[0].__class__ = Forgets
    with pytest.raises(RuntimeError, match=r"block '0' \(Forgets\) has a forward of its own"):
        compiled(x)


def test_a_block_of_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"block '0' \(OwnBlock\) must derive from FDFALinear"):
        FDFA(nn.Sequential(OwnBlock(), nn.Linear(6, 3)))
    model = trained(sequence())
    model.module[1] = OwnBlock()
    with pytest.raises(TypeError, match=r"block '1' \(OwnBlock\) must derive from FDFALinear"):
        model(torch.randn(7, 6))
