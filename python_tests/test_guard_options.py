"""Options of modules that change after wrapping are obeyed in the next step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from marks import slow_but
from nets import (
    OPTIONS,
    OwnForward,
    assert_evaluates_alike,
    assert_trains_as_it_is,
    example,
    images,
    results,
    sequence,
    trained,
)
from torch import nn

from fdfa_ext import FDFA, FDFAConv2d, FDFALinear
from fdfa_ext.dual_pass import BACKENDS

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


@pytest.mark.parametrize("method", slow_but(["fdfa", "fg-a"], "fdfa"))
@pytest.mark.parametrize("backend", slow_but(BACKENDS, "fused"))
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


def test_a_pool_changed_after_wrapping_does_as_it_is_told() -> None:
    x, pool = torch.randn(3, 1, 13, 13), nn.MaxPool2d(3, 2)
    net = nn.Sequential(
        FDFAConv2d(1, 4, 2, activation="relu"),
        pool,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    model = FDFA(net, method="dfa", example_input=x)
    before = model(x)
    pool.ceil_mode = True
    output = model(x)
    assert not torch.allclose(output, before)
    torch.testing.assert_close(output, model.eval()(x))
