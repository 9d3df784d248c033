"""What a user changes between two steps: the model trains as it now is, or says by name why not."""

import contextlib
import copy
import gc
import re
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import step
from torch import Tensor, nn
from torch.nn.utils import prune

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear, wrapper
from fdfa_ext.functional import BACKENDS
from fdfa_ext.layers import Block

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}


def sequence() -> nn.Sequential:
    """[N, 6] → [N, 3], which needs no dual tensors."""
    return nn.Sequential(
        FDFALinear(6, 6, activation="tanh"),
        FDFABlock(nn.Linear(6, 6), nn.LeakyReLU()),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


class OwnForward(nn.Module):
    """The same modules by the same names, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in sequence().named_children():
            self.add_module(name, module)

    def __getitem__(self, index: int) -> Any:
        return self._modules[str(index)]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._modules[str(index)] = module

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[3](self[2](y + self[1](y)))


def images() -> nn.Sequential:
    """[N, 1, 9, 9] → [N, 3], whatever the sizes between are."""
    return nn.Sequential(
        FDFAConv2d(1, 4, 2, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(4),
        FDFABlock(nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.ReLU(),
        nn.Flatten(),
        FDFABlock(nn.Linear(5, 6), nn.GELU()),
        nn.Linear(6, 3),
    )


def example(net: nn.Module) -> Tensor:
    return torch.randn(7, 1, 9, 9) if isinstance(net[0], FDFAConv2d) else torch.randn(7, 6)


def trained(net: Any, steps: int = 2, **options: Any) -> FDFA:
    x = example(net)
    model = FDFA(net, example_input=x, **{**OPTIONS, **options})
    for _ in range(steps):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, torch.arange(7) % 3)
    return model


def results(model: FDFA, x: Tensor) -> dict[str, Tensor]:
    """Of one more step: output, gradients, and all that is saved."""
    model.zero_grad()
    output = model(x)
    F.cross_entropy(output, torch.arange(len(x)) % output.shape[1]).backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.module.named_parameters()}
    return {"output": output.detach(), **gradients, **model.state_dict()}


def assert_trains_as_it_is(model: FDFA, x: Tensor, **close: Any) -> None:
    """As a model that was wrapped a moment ago, and computing what evaluation computes."""
    fresh = FDFA(copy.deepcopy(model.module), **{**OPTIONS, "backend": model.backend})
    fresh.load_state_dict(model.state_dict(), strict=False)
    for inner in model.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.momentum = 0.0  # or evaluation would be of other statistics
    expected = results(fresh, x)
    actual = results(model, x)
    for key, value in actual.items():
        if "running" not in key:
            torch.testing.assert_close(value, expected[key], **{"rtol": 0, "atol": 0, **close}, msg=key)
    assert all(value.any() for key, value in actual.items() if key.startswith("gradient"))
    assert list(model.feedback) == list(fresh.feedback)
    assert all(matrix.any() for matrix in model.feedback.values())


def assert_evaluates_alike(model: FDFA, x: Tensor) -> None:
    torch.testing.assert_close(model(x).detach(), model.module(x).detach())


# Exchanged modules.


def another_module(model: FDFA) -> None:
    model.module = OwnForward() if isinstance(model.module, OwnForward) else sequence()


def another_kind_of_module(model: FDFA) -> None:
    model.module = sequence() if isinstance(model.module, OwnForward) else OwnForward()


def another_block(model: FDFA) -> None:
    model.module[0] = FDFALinear(6, 6, activation="gelu")


def another_kind_of_block(model: FDFA) -> None:
    model.module[0] = FDFABlock(nn.Linear(6, 6), nn.ELU())


def swapped_blocks(model: FDFA) -> None:
    net = model.module
    net[0], net[1] = net[1], net[0]


def a_copy_put_back(model: FDFA) -> None:
    model.module[1] = copy.deepcopy(model.module[1])


def a_whole_copy_put_back(model: FDFA) -> None:
    model.module = copy.deepcopy(model.module)


def another_module_in_a_block(model: FDFA) -> None:
    model.module[1][0] = nn.Linear(6, 6)


def another_activation_in_a_block(model: FDFA) -> None:
    model.module[1][1] = nn.Softsign()


def a_longer_block(model: FDFA) -> None:
    model.module[1].append(nn.LayerNorm(6))


def another_function_between(model: FDFA) -> None:
    model.module[2] = nn.Sigmoid()


def a_function_between_without_a_rule(model: FDFA) -> None:
    model.module[2] = nn.Softplus()


def a_block_more(model: FDFA) -> None:
    model.module[2] = FDFALinear(6, 6, activation="silu")


def a_block_more_below_others(model: FDFA) -> None:
    model.module[2] = nn.Sequential(nn.Tanh(), FDFALinear(6, 6, activation="silu"))


def a_block_more_at_the_start(model: FDFA) -> None:
    old = model.module[0]
    model.module[0] = nn.Sequential(OrderedDict(new=FDFALinear(6, 6, activation="silu"), old=old))


def a_block_less(model: FDFA) -> None:
    model.module[1] = nn.Identity()


def another_output_layer(model: FDFA) -> None:
    model.module[3] = nn.Linear(6, 3, bias=False)


def a_deeper_output(model: FDFA) -> None:
    model.module[3] = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def a_block_of_another_model(model: FDFA) -> None:
    model.module[0] = trained(sequence()).module[0]


def other_parameters(model: FDFA) -> None:
    model.module[0].weight = nn.Parameter(torch.randn(6, 6))
    model.module[1][0].bias = None
    model.module[3].register_parameter("bias", None)


EXCHANGES = [
    another_module,
    another_kind_of_module,
    another_block,
    another_kind_of_block,
    swapped_blocks,
    a_copy_put_back,
    a_whole_copy_put_back,
    another_module_in_a_block,
    another_activation_in_a_block,
    a_longer_block,
    another_function_between,
    a_function_between_without_a_rule,
    a_block_more,
    a_block_more_below_others,
    a_block_more_at_the_start,
    a_block_less,
    another_output_layer,
    a_deeper_output,
    a_block_of_another_model,
    other_parameters,
]


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("net", [sequence, OwnForward])
@pytest.mark.parametrize("change", EXCHANGES)
def test_an_exchanged_module_is_trained(
    change: Callable[[FDFA], None], net: Callable[[], Any], steps: int
) -> None:
    model = trained(net(), steps)
    x = torch.randn(7, 6)
    change(model)
    assert_trains_as_it_is(model, x)
    assert_evaluates_alike(model, x)


@pytest.mark.parametrize("net", [sequence, OwnForward])
@pytest.mark.parametrize("change", EXCHANGES)
def test_an_exchanged_module_is_trained_after_loading_a_state(
    change: Callable[[FDFA], None], net: Callable[[], Any]
) -> None:
    """Changed before loading and again after it."""
    model, source = trained(net()), trained(net(), 3)
    change(source)
    results(source, torch.randn(7, 6))
    change(model)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(dict(model.feedback.items()), dict(source.feedback.items()))
    x = torch.randn(7, 6)
    for _ in range(2):
        assert_trains_as_it_is(model, x)
        assert_evaluates_alike(model, x)
        change(model)


def test_what_was_exchanged_is_given_back_its_feedback_by_name() -> None:
    """B belongs to a place in the net: a block of the same features trains on with it."""
    model = trained(sequence())
    before = {name: matrix.clone() for name, matrix in model.feedback.items()}
    assert all(matrix.any() for matrix in before.values())
    model.module[0] = FDFABlock(nn.Linear(6, 6))
    model.feedback_lr = 1e-30
    model(torch.randn(7, 6)).sum().backward()
    for name, matrix in model.feedback.items():
        assert torch.equal(matrix, before[name]), name


def test_the_feedback_of_a_block_that_left_leaves_with_it() -> None:
    model = trained(sequence(), feedback="adam")
    a_block_less(model)
    model(torch.randn(7, 6)).sum().backward()
    assert model.feedback.keys() == model.exp_avg.keys() == model.exp_avg_sq.keys() == ["0"]
    fresh = FDFA(copy.deepcopy(model.module), feedback="adam")
    assert fresh.load_state_dict(model.state_dict())


def test_modules_in_another_order_under_the_same_names() -> None:
    model = trained(sequence())
    modules = model.module._modules
    modules["2"] = modules.pop("2")  # the activation behind the output layer
    x = torch.randn(7, 6)
    assert_evaluates_alike(model, x)
    assert_trains_as_it_is(model, x)


@pytest.mark.parametrize("net", [sequence, OwnForward])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
def test_a_module_that_does_not_fit_is_refused_by_name(net: Callable[[], Any], method: str) -> None:
    x = torch.randn(7, 6)
    model = trained(net(), method=method)
    old = model.module[0], model.module[1]
    model.module[0], model.module[1] = FDFALinear(6, 9), FDFABlock(nn.Linear(9, 6), nn.Tanh())
    if isinstance(model.module, OwnForward):
        model.module[1] = FDFABlock(nn.Linear(9, 9), nn.Tanh())
        model.module[3] = nn.Linear(9, 3)
    if method == "fg-a":  # which has no feedback to fit
        assert_evaluates_alike(model, x)
        return
    message = r"FDFA: block '0': its feedback has shape \[3, 6\], but 3 outputs and features \[9\] came"
    with pytest.raises(ValueError, match=message):
        model(x)
    model.module[0], model.module[1] = old
    model.module[3] = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"its feedback has shape \[3, 6\], but 4 outputs .* wrap the"):
        model(x)
    model.module[3] = nn.Linear(6, 3)
    if method == "fdfa":
        assert_trains_as_it_is(model, x)


def test_a_net_without_a_block_is_refused_and_the_next_one_trained() -> None:
    model = trained(sequence())
    blocks = model.module
    for other, message in (
        (nn.Linear(6, 3), "the module has no block"),
        (FDFALinear(6, 3), "the module is itself a block"),
        (FDFA(sequence()), "the module has an FDFA within it"),
        (None, r"module must be a torch\.nn\.Module; got NoneType"),
    ):
        model.module = other
        with pytest.raises((ValueError, TypeError), match=message):
            model(torch.randn(7, 6))
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module; got function"):
        FDFA(lambda x: x)
    model.module = blocks
    assert_trains_as_it_is(model, torch.randn(7, 6))


def test_parameters_left_between_blocks_are_refused() -> None:
    model = trained(sequence())
    model.module[0] = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match="the input of block '1' depends on parameters"):
        model(torch.randn(7, 6))


def test_a_new_block_that_no_optimizer_can_have_is_refused() -> None:
    model = trained(sequence(), feedback="grad")
    a_block_more(model)
    with pytest.raises(RuntimeError, match="block '2' came after wrapping, and no optimizer has its"):
        model(torch.randn(7, 6))
    model = trained(sequence(), steps=0, method="lg-fg-a")
    a_block_more(model)
    with pytest.raises(RuntimeError, match="block '1' needs a local head that no optimizer has"):
        model(torch.randn(7, 6))


def test_two_wrappers_of_one_net_train_in_turns() -> None:
    net, x = sequence(), torch.randn(7, 6)
    models = [FDFA(net, example_input=x, **OPTIONS) for _ in range(2)]
    for _ in range(2):
        for model in models:
            assert_trains_as_it_is(model, x)


@pytest.mark.parametrize("net", [sequence, OwnForward])
def test_a_compiler_is_told_of_exchanged_blocks(net: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    model = trained(net())
    x = torch.randn(7, 6)
    compiled = torch.compile(model, backend="eager", dynamic=False, fullgraph=True)
    compiled(x)
    a_copy_put_back(model)
    with pytest.raises(Exception, match="blocks were exchanged since the last training forward"):
        compiled(x)
    model(x)
    torch.testing.assert_close(compiled(x), model.module(x))


# Classes, functions and options.


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


CIRCULAR = {"padding_mode": "circular", "padding": (1, 1), "_reversed_padding_repeated_twice": [1] * 4}
CHANGED_OPTIONS = [
    (images, "0", {"activation": "gelu"}),
    (images, "0", {"stride": (2, 2)}),
    (images, "1", {"ceil_mode": True}),
    (images, "1", {"stride": 3, "padding": 1}),
    (images, "1", {"kernel_size": 2}),
    (images, "1", {"dilation": 2}),
    (images, "2", {"output_size": (4, 5)}),
    (images, "3.0", CIRCULAR),
    (images, "3.0", {"padding": "same"}),
    (images, "3.1", {"eps": 0.1}),
    (images, "3.1", {"momentum": None}),
    (images, "3.1", {"momentum": 0.7}),
    (images, "3.1", {"affine": False, "weight": None, "bias": None}),
    (images, "3.1", {"track_running_stats": False}),
    (images, "3.1", {"running_mean": None, "running_var": None, "num_batches_tracked": None}),
    (images, "3.2", {"negative_slope": 0.3}),
    (images, "3.2", {"inplace": True}),
    (images, "3.3", {"ceil_mode": True}),
    (images, "3.3", {"kernel_size": 3}),
    (images, "3.3", {"stride": 1}),
    (images, "5", {"inplace": True}),
    (images, "6", {"start_dim": -3}),
    (images, "7.1", {"approximate": "tanh"}),
    (sequence, "1.1", {"negative_slope": 0.3}),
    (sequence, "1.1", {"inplace": True}),
    (OwnForward, "1.1", {"negative_slope": 0.3}),
]


def assert_obeyed(changed: FDFA, name: str, options: dict[str, Any], training: bool) -> None:
    """As by torch, buffers included, and by a model of which it was an option from the start."""
    x = example(changed.module)
    changed.module.train(training)
    features = [tuple(matrix.shape[1:]) for matrix in changed.feedback.values()]
    module = changed.module.get_submodule(name)
    for key, value in options.items():
        setattr(module, key, value)
    plain = copy.deepcopy(changed.module)
    same = {"method": type(changed.method)(), "backend": changed.backend, **OPTIONS}
    fresh = FDFA(copy.deepcopy(changed.module), example_input=x, **same)
    if features != [tuple(matrix.shape[1:]) for matrix in fresh.feedback.values()]:
        with pytest.raises(ValueError, match=r"FDFA: block '\d': its feedback has shape"):
            changed(x)
        return
    torch.testing.assert_close(changed(x), plain(x))
    for key, buffer in plain.named_buffers():
        torch.testing.assert_close(changed.module.get_buffer(key), buffer, msg=key)
    fresh.load_state_dict(changed.state_dict())
    fresh.module.train(training)
    expected, actual = results(fresh, x), results(changed, x)
    for key, value in actual.items():
        assert torch.equal(value, expected[key]), key
        assert value.any() or "gradient" not in key


@pytest.mark.parametrize("method", ["fdfa", "fg-a"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("net", "name", "options"), CHANGED_OPTIONS)
def test_a_changed_option_is_obeyed(
    net: Callable[[], Any], name: str, options: dict[str, Any], method: str, backend: str
) -> None:
    assert_obeyed(trained(net(), method=method, backend=backend), name, options, training=True)


@pytest.mark.parametrize("options", [o for net, name, o in CHANGED_OPTIONS if name == "3.1"])
def test_a_changed_norm_in_eval_mode_is_obeyed(options: dict[str, Any]) -> None:
    assert_obeyed(trained(images()), "3.1", options, training=False)


def test_an_output_changed_in_place_by_an_option_is_refused_by_name() -> None:
    for net in (sequence(), OwnForward()):
        net[2] = nn.SiLU()
        net[1] = FDFALinear(6, 6, activation="relu")
        model = trained(net)
        model.module[2].inplace = True
        if isinstance(net, nn.Sequential):
            with pytest.raises(RuntimeError, match="output of block '1' was changed in place"):
                model(torch.randn(7, 6))
        else:  # a sum is not the output
            assert_trains_as_it_is(model, torch.randn(7, 6))


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


def test_a_convolution_assigned_after_wrapping_is_called() -> None:
    """As is done to tile images."""
    model = trained(images(), method="dfa")
    x = example(model.module)
    model.module[3][1].track_running_stats = False
    for convolution in (model.module[0], model.module[3][0]):
        own = convolution._conv_forward
        convolution._conv_forward = lambda x, weight, bias, own=own: 3 * own(x, weight, bias)
        torch.testing.assert_close(model(x), model.module(x))


# Modules that are not called as torch calls them.


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
    ("net", "method"), [(sequence, "fdfa"), (OwnForward, "fdfa"), (sequence, "dfa")]
)
@pytest.mark.parametrize("compile", [compiled, compiled_in_place])
@pytest.mark.parametrize("name", ["0", "1.0", "2", ""])
@pytest.mark.parametrize("when", ["before", "after"])
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


# Hooks.


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_error_leaves_no_hook_and_no_mode_behind() -> None:
    """Neither on the user's modules nor for all of them, whatever fails."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    for net in (
        nn.Sequential(FDFALinear(6, 6), Fails(), nn.Linear(6, 3)),
        nn.Sequential(FDFALinear(6, 6), FDFABlock(Fails()), nn.Linear(6, 3)),
        nn.Sequential(FDFALinear(6, 6), nn.Linear(6, 3), nn.Hardtanh(-1e-9, 1e-9)),
        nn.Sequential(FDFALinear(6, 6), torch.jit.script(nn.ReLU()), nn.Linear(5, 3)),
    ):
        with pytest.raises((ArithmeticError, RuntimeError)):
            FDFA(net, example_input=torch.randn(7, 6))
        for module in net.modules():
            assert module.training
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        assert not nn.modules.module._global_forward_hooks
        passes = [block.block_pass for block in net.modules() if isinstance(block, Block)]
        assert all(own is None or own.dual is None for own in passes)


# Reparametrized weights.


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


def test_a_plan_is_kept_while_nothing_changes() -> None:
    """And by training, loading, moving and switching modes nothing changes that it rests on."""
    for net in (sequence(), OwnForward(), images()):
        model = trained(net)
        plan = model._plan
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.eval()
        model.train()
        model.requires_grad_(False).requires_grad_(True)
        results(model, example(net))
        assert model._plan is plan


def test_attributes_that_change_in_each_step_cost_one_more_plan_and_hide_no_option() -> None:
    """Statistics that a user keeps on a module, and weights that a hook makes anew."""
    model = trained(sequence())
    x = torch.randn(7, 6)
    activation = model.module[2] = nn.SELU()
    nn.utils.parametrizations.spectral_norm(model.module[3])
    for _ in range(2):
        activation.statistics = torch.randn(3)
        model(x)
    plan = model._plan
    activation.statistics = torch.randn(3)
    model(x)
    assert model._plan is plan
    activation.__class__ = nn.Tanh
    assert_evaluates_alike(model, x)
    model.module[1] = nn.Sequential(FDFALinear(6, 6), nn.Sigmoid())
    activation.__class__ = nn.LeakyReLU
    activation.negative_slope, activation.inplace = 0.1, False
    model(x)
    activation.negative_slope, activation.inplace = 0.2, True
    assert_evaluates_alike(model, x)


def test_a_child_that_is_none_is_torchs_error() -> None:
    model = trained(sequence())
    model.module[2] = None
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        model(torch.randn(7, 6))


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_and_attributes_in_new_dictionaries_are_seen(hooked: bool) -> None:
    """Some libraries clear hooks by a new dictionary, or give a module all that another one has."""
    model = trained(sequence())
    x = torch.randn(7, 6)
    calls = []
    if hooked:
        model.module[1].register_forward_hook(lambda *_: calls.append("old"))
    model(x)
    calls.clear()
    model.module[1]._forward_hooks = OrderedDict()
    model.module[1].register_forward_hook(lambda *_: calls.append("new"))
    model(x)
    assert calls == ["new"]
    model.module.__dict__ = sequence().__dict__
    assert_trains_as_it_is(model, x)
    assert calls == ["new"]


@pytest.mark.parametrize("kind", ["kernel_size", "dilation"])
def test_an_option_that_is_a_list_may_change_in_place(kind: str) -> None:
    net = images()
    net[3][3] = nn.MaxPool2d([2, 2])
    net[3][3].dilation = [1, 1]
    model = trained(net, method="fg-a")
    x = example(net)
    net[3][1].track_running_stats = False
    getattr(net[3][3], kind)[:] = [1, 2]
    assert_evaluates_alike(model, x)


# Cost.


class Extends(FDFALinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


@pytest.mark.parametrize("first", [FDFALinear, Extends])
def test_a_net_that_stays_as_it_is_is_planned_once(
    first: type[FDFALinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(nn.Sequential(first(6, 6, activation="tanh"), nn.Linear(6, 3)))
    assert model.prepared
    monkeypatch.setattr(wrapper, "Plan", None)  # to make another is an error
    step(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(7, 6), torch.arange(7) % 3)


def test_a_model_that_its_net_leads_back_to_is_collected() -> None:
    def gone() -> weakref.ref[FDFA]:
        model = trained(sequence())
        model.module[0].register_forward_hook(lambda *_: model and None)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, optimizer, torch.randn(7, 6), torch.arange(7) % 3)
        return weakref.ref(model)

    model = gone()
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(("name", "value"), [("method", "dfa"), ("rule", "grad")])
def test_what_the_state_was_made_for_cannot_be_changed(name: str, value: str) -> None:
    model = trained(sequence())
    before = getattr(model, name)
    with pytest.raises(AttributeError, match=f"FDFA: {name} cannot be changed"):
        setattr(model, name, value)
    assert getattr(model, name) is before
