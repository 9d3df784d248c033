"""What a user changes between two steps: the model trains as it now is, or says by name why not."""

import copy
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import (
    OPTIONS,
    OwnForward,
    assert_evaluates_alike,
    assert_trains_as_it_is,
    batch,
    example,
    images,
    make,
    results,
    sequence,
    step,
    trained,
)
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear, network
from fdfa_ext.dual_pass import BACKENDS

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


@pytest.mark.parametrize("steps", slow_but([0, 2], 2))
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


def test_a_module_may_be_exchanged_after_wrapping() -> None:
    """For one that needs dual tensors too, in a net that had none."""
    x, y = batch("mlp")
    models = [make(backend=backend, feedback_lr=0.05) for backend in BACKENDS]
    for model in models:
        model.module[2] = nn.Sequential(nn.LayerNorm(7), copy.deepcopy(models[0].module[2]))
        F.cross_entropy(model(x), y).backward()
    for name, matrix in models[0].feedback.items():
        assert matrix.any()
        torch.testing.assert_close(matrix, models[1].feedback[name], rtol=1e-4, atol=1e-6)


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


# Plans.


def test_a_plan_is_kept_while_nothing_changes() -> None:
    """And by training, loading, moving and switching modes nothing changes that it rests on."""
    for net in (sequence(), OwnForward(), images()):
        model = trained(net)
        plan = model.network.plan
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        model.eval()
        model.train()
        model.requires_grad_(False).requires_grad_(True)
        results(model, example(net))
        assert model.network.plan is plan


def test_attributes_that_change_in_each_step_cost_one_more_plan_and_hide_no_option() -> None:
    """Statistics that a user keeps on a module, and weights that a hook makes anew."""
    model = trained(sequence())
    x = torch.randn(7, 6)
    activation = model.module[2] = nn.SELU()
    nn.utils.parametrizations.spectral_norm(model.module[3])
    for _ in range(2):
        activation.statistics = torch.randn(3)
        model(x)
    plan = model.network.plan
    activation.statistics = torch.randn(3)
    model(x)
    assert model.network.plan is plan
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
    monkeypatch.setattr(network, "Plan", None)  # to make another is an error
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


def test_names_that_feedback_cannot_tell_apart_are_refused() -> None:
    """B of block `a.b` is saved as `a/b`."""
    inner = nn.Sequential(OrderedDict(b=FDFALinear(6, 6)))
    net = nn.Sequential(
        OrderedDict([("a/b", FDFALinear(6, 6)), ("a", inner), ("out", nn.Linear(6, 3))])
    )
    with pytest.raises(
        ValueError, match=r"name of block or point 'a\.b' differs from another's in '/'"
    ):
        FDFA(net)
