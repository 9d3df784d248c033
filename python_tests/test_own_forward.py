"""Nets with a forward of their own: they train as the same modules in a sequence would, and their
linear output layer is left to the method where, and only where, nothing can tell the difference."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import step
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear, own_code

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}


def sequence() -> nn.Sequential:
    return nn.Sequential(
        FDFALinear(6, 8, activation="tanh"), FDFALinear(8, 7, activation="tanh"), nn.Linear(7, 3)
    )


class Own(nn.Module):
    """sequence() as a class, whose output another function may work on."""

    def __init__(self, after: Callable[["Own", Tensor], Tensor] = lambda self, out: out) -> None:
        super().__init__()
        for name, module in sequence().named_children():
            self.add_module(name, module)
        self.after = after
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.get_submodule("1")(self.get_submodule("0")(x))
        return self.after(self, self.get_submodule("2")(hidden))


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of the output layers that were left to a method, one a forward."""
    left: list[Tensor] = []
    original = own_code.OutputLayer

    def count(weight: Tensor, *rest: Any) -> Any:
        left.append(weight)
        return original(weight, *rest)

    monkeypatch.setattr(own_code, "OutputLayer", count)
    return left


def wrapped(net: nn.Module, **options: Any) -> FDFA:
    torch.manual_seed(3)
    return FDFA(net, example_input=torch.randn(5, 6), **{**OPTIONS, **options})


def assert_same_training(
    model: FDFA, other: FDFA, loss: Callable[[FDFA, Tensor], Tensor], steps: int = 4
) -> None:
    optimizers = [torch.optim.SGD(m.module.parameters(), lr=0.1) for m in (model, other)]
    for i in range(steps):
        x = torch.randn(5, 6)
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            loss(m, m(x)).backward()
            optimizer.step()
        theirs = other.state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(value, theirs[key], msg=lambda m, k=key, i=i: f"{k} in {i}: {m}")


def squares(model: FDFA, out: Tensor) -> Tensor:
    return out.square().sum()


@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a"])
def test_a_class_trains_as_the_sequence(method: str, rule: str, layers: list[Tensor]) -> None:
    torch.manual_seed(0)
    net = sequence()
    own = Own()
    own.load_state_dict(net.state_dict())
    models = [wrapped(n, method=method, feedback=rule) for n in (own, net)]
    assert_same_training(*models, squares)
    fused = method in ("fdfa", "dfa", "dkp")
    assert len(layers) == (4 if fused else 0)
    assert all(weight is own.get_submodule("2").weight for weight in layers)


def softened(self: Own, out: Tensor) -> Tensor:
    return F.log_softmax(out, 1)


def keeps(self: Own, out: Tensor) -> Tensor:
    self.kept = [out]
    return out


def keeps_a_part(self: Own, out: Tensor) -> Tensor:
    self.kept = [out.abs().sum()]
    return out


def alternates(self: Own, out: Tensor) -> Tensor:
    self.kept.append(torch.ones(()))
    return out * 2 if len(self.kept) % 3 == 0 else out


def returns_its_hidden_layer(self: Own, out: Tensor) -> Tensor:
    return torch.cat([out, out], 1)


AFTER = [softened, keeps, keeps_a_part, alternates, returns_its_hidden_layer]


def loss_of_all(model: FDFA, out: Tensor) -> Tensor:
    kept = [t for t in model.module.kept if t.requires_grad]
    return out.square().sum() + sum(t.square().sum() for t in kept)


@pytest.mark.parametrize("after", AFTER)
def test_whatever_becomes_of_the_output_layers_result_has_its_gradient(
    after: Callable[[Own, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the output layer is never left to the method."""
    own = Own(after)
    models = [wrapped(copy.deepcopy(own)) for _ in range(2)]
    models[1].network.look_at(models[1].module).takes_output_weight = False
    assert_same_training(*models, loss_of_all, steps=7)


@pytest.mark.parametrize("looks", [lambda out: [out], lambda out: [out.square().sum()]])
def test_a_hook_on_the_output_layer_finds_a_graph(looks: Callable[[Tensor], list[Tensor]]) -> None:
    own = Own()
    models = [wrapped(copy.deepcopy(own)) for _ in range(2)]
    models[1].network.look_at(models[1].module)
    for model in models:
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 6), torch.arange(5) % 3)
        model.load_state_dict(models[0].state_dict())
        net = model.module

        def hook(module: nn.Module, inputs: Any, out: Tensor, net: Any = net) -> None:
            net.kept = looks(out)

        net.get_submodule("2").register_forward_hook(hook)
    models[1].network.look_at(models[1].module).takes_output_weight = False
    assert_same_training(*models, loss_of_all)


def test_an_output_layer_with_other_parameters_is_another(layers: list[Tensor]) -> None:
    own = Own()
    model = wrapped(own)
    for _ in range(2):
        model(torch.randn(5, 6)).sum().backward()
    assert len(layers) == 2
    new = own.get_submodule("2").weight = nn.Parameter(torch.randn(3, 7))
    x = torch.randn(5, 6)
    out = model(x)
    torch.testing.assert_close(out, own(x))
    out.sum().backward()
    assert len(layers) == 2
    expected = own.get_submodule("1")(own.get_submodule("0")(x)).sum(0).expand(3, -1)
    torch.testing.assert_close(new.grad, expected)
    own.get_submodule("2").requires_grad_(False)
    model(x).sum().backward()
    assert len(layers) == 2


class Tied(nn.Module):
    """Its output layer's weight is in use before."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = FDFALinear(6, 6, activation="tanh")
        self.out = nn.Linear(6, 6)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if self.twice:
            hidden = hidden + self.out(hidden)
        return self.out(hidden)


def test_an_output_layer_called_twice_gets_both_gradients() -> None:
    net = Tied()
    models = [wrapped(copy.deepcopy(net)) for _ in range(2)]
    assert_same_training(*models, squares)
    for model in models:
        model.module.twice = True
    models[1].network.look_at(models[1].module).takes_output_weight = False
    models[1].network.look_at(models[1].module).output_weight = None
    assert_same_training(*models, squares)


def test_under_autocast_the_output_layer_is_autograds(layers: list[Tensor]) -> None:
    model = wrapped(Own())
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(torch.randn(5, 6))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
    assert not layers


# Modules of unknown kind within a sequence.


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.tanh()


class Add(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] + pair[1]


class Residual(nn.Module):
    """With blocks in it, one of which may stand first in the net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (FDFAConv2d(4, 4, 3, padding=1, activation="relu") for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x)) * 0.5


class Whole(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-a"])
def test_modules_of_unknown_kind_in_a_sequence_train_as_the_whole_on_dual_tensors(method: str) -> None:
    net = nn.Sequential(
        Residual(),
        nn.MaxPool2d(2),
        FDFABlock(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()),
        nn.MaxPool2d(2),
        Pair(),
        Add(),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    x = torch.randn(6, 4, 8, 8)
    models = []
    for whole in (False, True):
        torch.manual_seed(5)
        twin = copy.deepcopy(net)
        model = FDFA(Whole(twin) if whole else twin, method=method, example_input=x, **OPTIONS)
        assert (model.network.look_at(model.module).calls is None) == whole
        for _ in range(3):
            model(x).square().sum().backward()
        models.append(model)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(models[0].feedback.values(), models[1].feedback.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_several_tensors_between_two_modules_of_a_sequence_need_one_module() -> None:
    net = nn.Sequential(FDFALinear(6, 4), Pair(), nn.Identity(), Add(), nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"module '1' \(Pair\) must return one tensor; got tuple"):
        FDFA(net, example_input=torch.randn(5, 6))


class Doubled(torch.autograd.Function):
    """Without a jvp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = Doubled.apply(x)
        return doubled


class WithDoubles(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.doubles, self.output = first, Doubles(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.output(self.doubles(torch.relu(self.first(x))))
        return output


@pytest.mark.parametrize(
    ("net", "what"),
    [
        (nn.Sequential(FDFALinear(6, 4), Doubles(), nn.Linear(4, 3)), r"module '1' \(Doubles\)"),
        (
            nn.Sequential(FDFALinear(6, 6), FDFABlock(nn.Linear(6, 4), Doubles()), nn.Linear(4, 3)),
            r"block or point '1': its module 1 \(Doubles\)",
        ),
        (Own(lambda self, out: Doubles()(out)), "a function in the module's forward"),
        (WithDoubles(FDFALinear(6, 4)), r"module 'doubles' \(Doubles\)"),
        (WithDoubles(nn.Linear(6, 4)), r"module 'doubles' \(Doubles\)"),
    ],
)
def test_a_function_without_a_forward_mode_is_refused_with_its_place(net: nn.Module, what: str) -> None:
    at = ["first"] if isinstance(getattr(net, "first", None), nn.Linear) else None
    with pytest.raises(RuntimeError, match=f"FDFA: {what} cannot carry a tangent"):
        FDFA(net, at=at, example_input=torch.randn(5, 6))


# Code that does what few do.


class Side(nn.Module):
    """Two blocks, the second of which may fail, and an output layer that a function makes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.hidden, self.second = FDFALinear(6, 8, activation="tanh"), FDFALinear(8, 8)
        self.out, self.row = nn.Linear(8, 3), nn.Parameter(torch.zeros(1, 3))
        self.way = way
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.hidden(x)
        if self.way == "caught":
            with contextlib.suppress(RuntimeError):
                self.second(hidden[:, :7])
        second = self.second(hidden)
        if self.way == "bias of activations":
            return F.linear(second, self.out.weight, hidden.mean(0)[:3])
        if self.way == "bias of a row":
            return F.linear(second, self.out.weight, self.row)
        return self.out(second)


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
@pytest.mark.parametrize("way", ["plain", "caught", "bias of activations", "bias of a row"])
def test_each_step_is_the_first(way: str, method: str) -> None:
    """For equal noise and feedback; what a pass learns of the net changes nothing."""
    model = wrapped(Side(way), method=method)
    model(torch.randn(5, 6)).sum().backward()
    x = torch.randn(5, 6)
    state = copy.deepcopy(model.state_dict())
    results = []
    for _ in range(3):
        model.load_state_dict(state)
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        results.append([output.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
        fresh = wrapped(Side(way), method=method)
        fresh.load_state_dict(state)
        plan = fresh.network.look_at(fresh.module)
        plan.output_weight, plan.takes_output_weight = None, False
        fresh(x).square().sum().backward()
        for p, q in zip(model.module.parameters(), fresh.module.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


def test_a_dry_run_leaves_buffers_alone() -> None:
    model = wrapped(Side("plain"))
    assert model.module.get_buffer("calls") == 0
    model(torch.randn(5, 6))
    assert model.module.get_buffer("calls") == 1


def test_a_change_of_course_moves_buffers_once() -> None:
    model = wrapped(Side("plain"))
    for way in ("plain", "plain", "bias of activations", "plain", "caught"):
        model.module.way = way
        model(torch.randn(5, 6)).sum().backward()
    assert model.module.get_buffer("calls") == 5


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_a_whole_model_may_be_checkpointed(method: str) -> None:
    net = Side("plain")
    models = [wrapped(copy.deepcopy(net), method=method) for _ in range(2)]
    x = torch.randn(5, 6)
    for _ in range(3):
        torch.utils.checkpoint.checkpoint(models[0], x, use_reentrant=False).sum().backward()
        models[1](x).sum().backward()
    if method == "fdfa":  # which has other noise where it computes again
        assert models[0].feedback["hidden"].any()
        return
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


class Twice(nn.Module):
    """Code of the user's own between blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
def test_the_first_step_may_be_checkpointed(method: str) -> None:
    """What the model learns of its module in a pass does not change how the pass is computed again."""
    net = nn.Sequential(FDFALinear(6, 8, activation="relu"), Twice(), FDFALinear(8, 8), nn.Linear(8, 3))
    model = FDFA(net, method=method, example_input=torch.randn(2, 6))
    for _ in range(3):
        torch.utils.checkpoint.checkpoint(
            model, torch.randn(5, 6), use_reentrant=False
        ).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


class OwnDerivative(nn.Module):
    """With a derivative of a derivative in its output."""

    def __init__(self, transform: bool, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.layer, self.out = FDFALinear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.transform, self.function = transform, function

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.hidden(x))
        if self.transform:
            y, ty = torch.func.jvp(self.function, (h,), (h * 2,))
        else:
            with forward_ad.dual_level():
                dual = self.function(forward_ad.make_dual(h, h * 2))
                y, tangent = forward_ad.unpack_dual(dual)
                assert tangent is not None
                ty = tangent
        return self.out(y + ty)


@pytest.mark.parametrize("function", [torch.tanh, lambda h: F.relu(h * 1, inplace=True)])
@pytest.mark.parametrize("transform", [True, False])
@pytest.mark.parametrize("method", ["bp", "dfa"])
def test_tangents_of_ones_own_keep_their_graph(
    method: str, transform: bool, function: Callable[[Tensor], Tensor]
) -> None:
    net = OwnDerivative(transform, function)
    twin = copy.deepcopy(net)
    x = torch.randn(5, 6)
    model = FDFA(net, method=method, example_input=x)
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    names = ["layer.weight", "out.weight"] + (["hidden.weight"] if method == "bp" else [])
    for name in names:
        torch.testing.assert_close(net.get_parameter(name).grad, twin.get_parameter(name).grad)
