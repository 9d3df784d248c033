"""The feedback matrices: named as their blocks, in float32 and in the order of the noise, however they were saved."""

import copy
from collections import OrderedDict
from collections.abc import Mapping

import pytest
import torch
from nets import NETS, batch, conv_net, make, mlp
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear


def test_feedback_is_a_mapping_in_the_order_of_the_noise() -> None:
    model = make("conv_net")
    assert list(model.feedback) == model.feedback.keys() == ["0", "2", "4"]
    assert [tuple(b.shape) for b in model.feedback.values()] == [(3, 4, 10, 10), (3, 6, 5, 5), (3, 8)]
    assert "2" in model.feedback
    assert model.feedback.get("2") is model.feedback["2"]
    assert model.feedback.get("1") is None
    assert len(model.feedback) == 3
    assert isinstance(model.feedback, Mapping)
    assert model.feedback["2"].is_contiguous(memory_format=torch.channels_last)


def test_blocks_are_named_by_their_place_in_the_module() -> None:
    net = nn.Sequential()
    net.features = nn.Sequential(FDFALinear(6, 4), FDFABlock(FDFALinear(4, 4), nn.ReLU()))
    net.head = nn.Linear(4, 3)
    model = FDFA(net, example_input=torch.zeros(1, 6) + 1)
    # A block within a block is a part of it.
    assert list(model.feedback) == ["features.0", "features.1"]
    reloaded = FDFA(copy.deepcopy(net))
    reloaded.load_state_dict(model.state_dict())
    assert list(reloaded.feedback) == ["features.0", "features.1"]


@pytest.mark.parametrize("rule", ["adam", "grad"])
def test_a_block_may_have_any_name(rule: str) -> None:
    x = torch.randn(4, 6)
    names = ["keys", "values", "put"]
    layers = [(name, FDFALinear(6, 6, activation="tanh")) for name in names]
    net = nn.Sequential(OrderedDict([*layers, ("out", nn.Linear(6, 3))]))
    model = FDFA(net, feedback=rule, example_input=x)
    model(x).sum().backward()
    assert list(model.feedback) == names
    assert FDFA(copy.deepcopy(net), feedback=rule).load_state_dict(model.state_dict())


def test_feedback_is_float32_whatever_the_default_is() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = FDFA(mlp(), backend="reference", example_input=torch.randn(2, 6))
    finally:
        torch.set_default_dtype(torch.float32)
    model(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert {b.dtype for b in model.feedback.values()} == {torch.float32}


def test_feedback_keeps_dtype_and_memory_order_when_the_model_moves(device: torch.device) -> None:
    model = make("conv_net").to(device).to(torch.bfloat16).to(memory_format=torch.contiguous_format)
    for name, order in (("2", torch.channels_last), ("4", torch.contiguous_format)):
        assert model.feedback[name].dtype == torch.float32
        assert model.feedback[name].device.type == device.type
        assert model.feedback[name].is_contiguous(memory_format=order)
    x, _ = batch("conv_net", device)
    model(x.to(torch.bfloat16)).sum().backward()


def _feedback(model: FDFA) -> dict[str, Tensor]:
    names = ("feedback.", "exp_avg.", "exp_avg_sq.")
    return {key: t for key, t in model.state_dict().items() if key.startswith(names)}


def test_feedback_saved_in_another_dtype_is_float32_again() -> None:
    x, _ = batch("mlp")
    model, fresh = make("mlp"), FDFA(NETS["mlp"][0]())
    model(x).sum().backward()
    fresh.load_state_dict(
        model.half().state_dict() | {k: b.half() for k, b in _feedback(model).items()}
    )
    fresh(x).sum().backward()
    assert {t.dtype for t in _feedback(fresh).values()} == {torch.float32}


def test_feedback_saved_in_another_layout_is_put_in_order() -> None:
    trained = make("conv_net", feedback="ema", feedback_lr=0.1)
    x, _ = batch("conv_net")
    trained(x).sum().backward()
    state = {key: value.contiguous() for key, value in trained.state_dict().items()}
    fresh = FDFA(conv_net(), feedback="ema", feedback_lr=0.1)
    fresh.load_state_dict(state)
    for model in (trained, fresh):
        model(x).sum().backward()
    for key, value in trained.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
