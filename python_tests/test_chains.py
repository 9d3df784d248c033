"""Points in a torch.nn.Sequential of torch's modules: chains that end at points do what its modules do."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fdfa_ext import FDFA, FDFALinear, register_jvp
from fdfa_ext._torch_internals import function_modes
from fdfa_ext.chains import ChainsToPoints

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}
X, Y = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
TOKENS = torch.randn(4, 5, 6)


def images(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """[N, 1, 8, 8] → [N, 3]; points behind 2, 4, 8."""
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation(), nn.Conv2d(4, 5, 3, stride=2)]
    layers += [activation(), nn.Flatten(), nn.Linear(20, 7), activation(), nn.Dropout(0.4)]
    return nn.Sequential(*layers, nn.Linear(7, 3))


def nested() -> nn.Sequential:
    """A point stands behind a sequence within."""
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Linear(36, 5), nn.SiLU(), nn.Linear(5, 3))
    return nn.Sequential(stem, nn.Flatten(), head)


def shared() -> nn.Sequential:
    """An activation that is used twice, with a point on it."""
    act = nn.Tanh()
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), act, nn.Linear(6, 6), act, nn.Linear(6, 3))


def tokens() -> nn.Sequential:
    """[N, T, 6] → [N, T, 3]."""
    layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


class Parts(nn.Module):
    """Two sequences in a forward of its own; the second has the output layer, and a softmax behind."""

    def __init__(self, uses: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.classifier = nn.Sequential(nn.Dropout(0.4), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        self.uses = uses

    def forward(self, x: Tensor) -> Tensor:
        features = sum(self.features(x * k) for k in range(1, 1 + self.uses))
        return self.classifier(features.flatten(1)).log_softmax(1)


class BehindParameters(nn.Module):
    """What enters the sequence depends on a parameter, which learns by the point behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1) * self.scale)


NETS: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "images": (images, "auto", X),
    "in place": (lambda: images(lambda: nn.ReLU(inplace=True)), "auto", X),
    "at layers": (images, [nn.Conv2d, nn.Linear], X),
    "nested": (nested, "auto", X),
    "a sequence within": (nested, ["0", "2.1"], X),
    "at inputs": (images, ["0.input", "3.input", "6.input", "9.input"], X),
    "shared": (shared, ["2"], X),
    "tokens": (tokens, ["1", "4"], TOKENS),
    "parts": (Parts, "auto", X),
    "parts with points": (Parts, ["features.1", "features", "classifier.2"], X),
    "parts with points at inputs": (Parts, ["features.2.input", "classifier.1.input"], X),
    "parts used twice": (lambda: Parts(2), "auto", X),
    "behind parameters": (BehindParameters, ["net.1"], X),
}


def states_after_steps(
    net: nn.Module, x: Tensor, by_modules: bool, **options: Any
) -> tuple[FDFA, dict[str, Any]]:
    """by_modules: a hook that does nothing forbids chains."""
    net = copy.deepcopy(net).to(x.dtype)
    if by_modules:
        for module in net.modules():
            module.register_forward_hook(lambda *_: None)
    torch.manual_seed(3)
    model = FDFA(net, example_input=x, **{**OPTIONS, **options})
    optimizer = torch.optim.SGD(model.forward_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = [out.flatten(0, -2) for out in (model(x), *model.local_outputs)]
        losses = [F.cross_entropy(out, torch.arange(len(out)) % 3) for out in outputs]
        sum(losses[1:], losses[0]).backward()
        optimizer.step()
    return model, model.state_dict()


BY_ALL_METHODS = ("images", "tokens", "parts with points at inputs")
CASES = [
    (name, method, patch, backend)
    for name in NETS
    for method in ("fdfa", "dfa", "dkp", "fg-a", "lg-fg-a")
    for patch in (1, 2)
    for backend in ("fused", "reference")
    if method in ("fdfa", "dfa") or name in BY_ALL_METHODS
    if patch == 1 or name in ("images", "nested", "tokens")
]


@pytest.mark.parametrize(
    ("name", "method", "patch", "backend"),
    slow_but(CASES, *[case for case in CASES if case[1] == "fdfa" or case[0] == "images"]),
)
def test_chains_do_what_modules_do(name: str, method: str, patch: int, backend: str) -> None:
    """Weights, statistics, B and the noise's step after three steps, dropout included."""
    torch.manual_seed(0)
    make, at, x = NETS[name]
    net, x = make(), x if backend == "fused" else x.double()
    options = {"at": at, "method": method, "patch": patch, "backend": backend}
    chains, mine = states_after_steps(net, x, False, **options)
    modules, theirs = states_after_steps(net, x, True, **options)
    assert chains.block_names == modules.block_names
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        rounding = 1e-5 if backend == "fused" else 1e-12
        torch.testing.assert_close(value, theirs[key], rtol=rounding, atol=rounding, msg=key)


def chains_of(model: FDFA) -> list[ChainsToPoints]:
    """Those that its plan puts in the place of sequences' forwards."""
    plan = model.network.plan
    assert plan is not None
    makers = [make.args[0] for _, make in plan.forwards if make.func is not None]
    found = [getattr(make, "__self__", None) for make in makers]
    return [own for own in found if isinstance(own, ChainsToPoints)]


def test_a_sequence_is_one_list_of_calls() -> None:
    model = FDFA(images(), at="auto", example_input=X)
    model(X)
    plan = model.network.plan
    assert plan is not None
    assert plan.calls is not None
    assert plan.output_layer is model.module[-1]


def test_sequences_within_are_chains() -> None:
    model = FDFA(Parts(), at="auto", example_input=X)
    model(X)
    assert model.block_names == ["features.1", "classifier.1.input", "classifier.2"]
    assert [len(own.chains) for own in chains_of(model)] == [1, 2]


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 6), OwnReLU(), nn.Linear(6, 3)),
        lambda: nn.Sequential(nn.Flatten(2), nn.GRU(64, 6), First(), nn.ReLU(), nn.Linear(6, 3)),
    ],
)
def test_what_may_do_anything_is_called(net: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = FDFA(net(), at="auto", example_input=X)
    model(X)
    assert model.network.plan is not None
    assert model.network.plan.calls is None
    assert chains_of(model) == []


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0].flatten(1)


def test_a_hook_that_comes_later_is_called() -> None:
    """Chains call no hooks, so that a module with one ends them."""
    model, seen = FDFA(images(), at="auto", example_input=X), []
    model(X)
    assert model.network.plan is not None
    assert model.network.plan.calls is not None
    handle = model.module[3].register_forward_hook(lambda *_: seen.append(1))
    model(X)
    assert seen == [1]
    assert model.network.plan.calls is None
    handle.remove()
    model(X)
    assert seen == [1]
    assert model.network.plan.calls is not None


def test_what_made_the_input_gets_its_gradient() -> None:
    torch.manual_seed(0)
    net, before = images(), nn.Conv2d(1, 1, 1)
    model = FDFA(net, at="auto", example_input=X)
    F.cross_entropy(model(before(X)), Y).backward()
    assert before.weight.grad is not None
    assert before.weight.grad.abs().max() > 0


def test_an_output_in_the_midst_of_a_sequence_is_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*images(), nn.LogSoftmax(1))
    pairs = [states_after_steps(net, X, by_modules, at="auto") for by_modules in (False, True)]
    assert pairs[0][0].network.output == "9"
    assert pairs[0][0].network.plan is not None
    assert pairs[0][0].network.plan.calls is None
    assert [len(own.chains) for own in chains_of(pairs[0][0])] == [3]
    for key, value in pairs[0][1].items():
        torch.testing.assert_close(value, pairs[1][1][key], rtol=1e-5, atol=1e-5, msg=key)


def test_a_checkpoint_within_is_refused() -> None:
    class Net(Parts):
        def forward(self, x: Tensor) -> Tensor:
            features = checkpoint(self.features, x, use_reentrant=False)
            return self.classifier(features.flatten(1))

    with pytest.raises(RuntimeError, match="is called within torch"):
        FDFA(Net(), at=["features.1"], example_input=X)


def test_blocks_in_a_sequence_with_points_are_called() -> None:
    net = nn.Sequential(
        nn.Flatten(), FDFALinear(64, 6, activation="relu"), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    )
    pairs = [states_after_steps(net, X, by_modules, at=["3"]) for by_modules in (False, True)]
    for key, value in pairs[0][1].items():
        torch.testing.assert_close(value, pairs[1][1][key], rtol=1e-5, atol=1e-5, msg=key)


class Halving(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x) * 0.5
        return x


class HalvingMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 0.5 if func is F.leaky_relu else result


class Changing(nn.Module):
    """Does something to its sequence before it calls it."""

    def __init__(self, change: str) -> None:
        super().__init__()
        layers = [nn.Linear(10, 7), nn.LeakyReLU(), nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3)]
        self.body = nn.Sequential(*layers)
        self.other = nn.Linear(10, 7)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        body: Any = self.body
        first, undo = body[0], contextlib.ExitStack()
        with undo:
            if self.change == "a hook":
                undo.callback(first.register_forward_hook(lambda m, i, out: out * 0.5).remove)
            if self.change == "a hook on all":
                undo.callback(register_module_forward_hook(lambda m, i, out: out * 0.9).remove)
            if self.change == "another layer":
                body[0] = self.other
                undo.callback(body.__setitem__, 0, first)
            if self.change == "one more":
                body.append(nn.Tanh())
                undo.callback(body.__delitem__, 5)
            if self.change in ("a layer's forward", "a point's forward"):
                member = first if self.change == "a layer's forward" else body[1]
                forward, had = member.forward, member.__dict__.get("forward")
                member.forward = lambda x: forward(x) * 0.5
                undo.callback(setattr, member, "forward", had or forward)
            if self.change == "an option":
                body[1].negative_slope = 0.5
                undo.callback(setattr, body[1], "negative_slope", 0.01)
            if self.change == "its class":
                body.__class__ = Halving
                undo.callback(setattr, body, "__class__", nn.Sequential)
            if self.change == "its class's forward":
                halved = Halving.forward
                undo.enter_context(mock.patch.object(nn.Sequential, "forward", halved))
            if self.change == "its own forward":
                forward = body.forward
                body.forward = lambda x: forward(x) * 0.5
                undo.callback(delattr, body, "forward")
            if self.change == "a mode":
                undo.enter_context(HalvingMode())
            if self.change == "a function":
                undo.enter_context(mock.patch.object(F, "leaky_relu", lambda x, *_, **__: x * 0.7))
            result: Tensor = body(x)
            return result


@pytest.mark.parametrize(
    "change",
    [
        *("a hook", "a hook on all", "another layer", "one more", "a layer's forward"),
        *("a point's forward", "an option", "a function", "a mode"),
        *("its class", "its class's forward", "its own forward"),
    ],
)
def test_what_a_forward_changes_before_it_calls_a_sequence_counts(change: str) -> None:
    torch.manual_seed(0)
    x, net = torch.randn(6, 10), Changing(change)
    model = FDFA(net, at=["body.1", "body.3"], example_input=x)
    output = model(x)
    torch.testing.assert_close(output, net(x))
    assert not torch.allclose(output, nn.Sequential(*net.body)(x), rtol=1e-3)
    output.sum().backward()
    assert (net.body[0].weight.grad is None) == (change == "another layer")


def test_a_point_that_is_used_once_more_lets_the_use_through() -> None:
    act, x = nn.Tanh(), torch.randn(6, 10)
    net = nn.Sequential(nn.Linear(10, 7), act, nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 3))
    model = FDFA(net, at=["1"], example_input=x)
    model(x)
    net[3] = act
    model(x).sum().backward()
    assert net[2].weight.grad is not None


def test_what_comes_to_change_its_input_is_refused_at_a_point() -> None:
    x, net = torch.randn(6, 10), nn.Sequential(nn.Linear(10, 7), nn.ELU(), nn.Linear(7, 3))
    model = FDFA(net, at=["1.input"], example_input=x)
    model(x)
    net[1].inplace = True
    with pytest.raises(
        RuntimeError, match=r"point '1\.input' is at the input of a module that changes it"
    ):
        model(x)


class Ruled(nn.Module):
    """Has a JVP rule, and points within."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x) + x
        return y


@register_jvp(Ruled)
def _ruled(module: Ruled, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    y = module.layers(x)
    within = tangent @ module.layers[0].weight.detach().T
    return y + x, tangent + (1 - y.detach() ** 2) * within


def test_points_within_a_module_with_a_rule_are_points() -> None:
    torch.manual_seed(0)
    x, gradients = torch.randn(6, 10), []
    net = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), Ruled(), nn.ReLU(), nn.Linear(7, 3))
    for by_modules in (False, True):
        own = copy.deepcopy(net)
        if by_modules:
            own[0].register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        model = FDFA(own, at=["1", "2.layers.1", "3"], example_input=x, method="dfa")
        F.cross_entropy(model(x), Y).backward()
        gradients.append([parameter.grad for parameter in own.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


class Halved(Tensor):
    """A weight with code of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return (result * 0.5).as_subclass(Tensor) if func is F.linear else result


@pytest.mark.parametrize("method", ["fdfa", "dfa"])
def test_tensors_with_code_of_their_own_go_by_the_modules(method: str) -> None:
    x, net = torch.randn(6, 10), nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
    model = FDFA(net, at=["1"], example_input=x, method=method)
    torch.testing.assert_close(model(x.to_sparse()), net(x))
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Halved))
    torch.testing.assert_close(model(x), net(x))


def test_modes_of_users_see_the_functions() -> None:
    x, net = torch.randn(6, 10), nn.Sequential(nn.Linear(10, 7), nn.LeakyReLU(), nn.Linear(7, 3))
    model = FDFA(net, at=["1"], example_input=x)
    with HalvingMode():
        torch.testing.assert_close(model(x), net(x))
        assert not torch.allclose(model(x), net[2](net[1].forward(net[0](x)) * 2))


def test_the_mode_of_a_device_is_no_users() -> None:
    assert function_modes() == 0
    with torch.device("cpu"):
        assert function_modes() == 0
        with HalvingMode():
            assert function_modes() == 1


def test_errors_name_the_point() -> None:
    x, net = torch.randn(6, 10), nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
    model = FDFA(net, at=["1"], example_input=x)
    with pytest.raises(TypeError, match="module '1' has a point, so it must return features"):
        model(x[0])
    with pytest.raises(RuntimeError, match="x must be") as raised:
        model(x[:, :9])
    assert raised.value.__notes__ == ["FDFA: raised on the way to point '1'"]
