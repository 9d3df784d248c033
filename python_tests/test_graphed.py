"""The graphed step is the eager one."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, batch, step

from fdfa_ext import FDFA, make_graphed_step
from fdfa_ext.graphed import _refuse_changes, _restore_state, _saved_state, _settings

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@needs_cuda
@pytest.mark.parametrize("rule", ["adam", "ema", "grad"])
@pytest.mark.parametrize("name", NETS)
def test_graphed_training_is_the_eager_one(name: str, rule: str) -> None:
    """Five batches: losses, weights, feedback, noise and Adam's state, with fresh noise each time."""
    device = torch.device("cuda")
    x, y = batch(name, device)
    eager = FDFA(NETS[name][0]().to(device), feedback=rule, feedback_lr=0.05, example_input=x)
    graphed = copy.deepcopy(eager)
    optimizers = [
        torch.optim.Adam(model.parameters(), lr=1e-3, capturable=True) for model in (eager, graphed)
    ]
    run = make_graphed_step(graphed, F.cross_entropy, optimizers[1], (x, y))
    for _ in range(5):
        x = torch.randn_like(x)
        torch.testing.assert_close(run(x, y), step(eager, optimizers[0], x, y), rtol=1e-4, atol=1e-5)
    assert int(graphed.noise_state[1]) == 5
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[key], value, rtol=1e-3, atol=1e-4)


@needs_cuda
def test_graphed_step_refuses_another_shape() -> None:
    x, y = batch("mlp", torch.device("cuda"))
    model = FDFA(NETS["mlp"][0]().cuda(), example_input=x)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    run = make_graphed_step(model, F.cross_entropy, optimizer, (x, y))
    with pytest.raises(ValueError, match="input must be"):
        run(x[:-1], y[:-1])


@needs_cuda
@pytest.mark.parametrize(("name", "value"), [("learns_feedback", False), ("feedback_lr", 1e-5)])
def test_graphed_step_refuses_other_settings(name: str, value: Any) -> None:
    x, y = batch("mlp", torch.device("cuda"))
    model = FDFA(NETS["mlp"][0]().cuda(), example_input=x)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)
    run = make_graphed_step(model, F.cross_entropy, optimizer, (x, y))
    setattr(model, name, value)
    with pytest.raises(ValueError, match=f"{name} was"):
        run(x, y)


def test_settings_that_a_graph_keeps_are_told_apart() -> None:
    model = FDFA(NETS["mlp"][0]())
    captured = _settings(model)
    _refuse_changes(captured, _settings(model))
    model.learns_feedback = False
    with pytest.raises(
        ValueError, match="learns_feedback was True when the graph was made, and is False"
    ):
        _refuse_changes(captured, _settings(model))


def test_what_the_warm_up_changed_is_restored_in_place() -> None:
    x, y = batch("mlp", torch.device("cpu"))
    for steps_before in (0, 2):
        model = FDFA(NETS["mlp"][0](), example_input=x)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(steps_before):
            step(model, optimizer, x, y)
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        addresses = [p.data_ptr() for p in model.parameters()]
        saved = _saved_state(model, optimizer)
        for _ in range(3):
            step(model, optimizer, x, y)
        _restore_state(model, optimizer, saved)
        assert addresses == [p.data_ptr() for p in model.parameters()]
        for _ in range(2):
            torch.testing.assert_close(
                step(model, optimizer, x, y), step(twin, twin_optimizer, x, y), rtol=0, atol=0
            )


@pytest.mark.parametrize(
    ("capturable", "training", "seen", "message"),
    [
        (False, True, True, "make Adam with capturable=True"),
        (True, False, True, "the model must be in training mode"),
        (True, True, False, "the feedback does not exist yet; give FDFA example_input"),
        (True, True, True, "the example's input must be on a CUDA device; got cpu"),
    ],
)
def test_what_cannot_be_captured_is_refused(
    capturable: bool, training: bool, seen: bool, message: str
) -> None:
    x, y = batch("mlp", torch.device("cpu"))
    model = FDFA(NETS["mlp"][0](), example_input=x if seen else None).train(training)
    optimizer = torch.optim.Adam(model.parameters(), capturable=capturable)
    with pytest.raises(ValueError, match=f"make_graphed_step: {message}"):
        make_graphed_step(model, F.cross_entropy, optimizer, (x, y))
