"""What loops do to gradients, and the loops that people use: each trains as it comes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import conv_net, mlp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fdfa_ext import FDFA, FDFALinear

INPUT, TARGET = torch.randn(32, 6), torch.randint(3, (32,))

Loop = Callable[[FDFA, torch.optim.Optimizer], Any]


def plain(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(INPUT), TARGET).backward()
    optimizer.step()


def clip(parameters: Any) -> None:
    norm = nn.utils.clip_grad_norm_(parameters, 0.01)
    assert norm > 0.01


def clipped(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(INPUT), TARGET).backward()
    clip(model.parameters())
    optimizer.step()


def clipped_weights(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(INPUT), TARGET).backward()
    clip(model.forward_parameters())
    optimizer.step()


def clipped_in_a_closure(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    """As Lightning does it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(INPUT), TARGET)
        loss.backward()
        clip(model.parameters())
        return loss

    assert optimizer.step(closure) is not None  # type: ignore[arg-type, func-returns-value]


def scaled(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(INPUT), TARGET)).backward()
    scaler.step(optimizer)
    scaler.update()


def scaled_and_clipped(model: FDFA, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(INPUT), TARGET)).backward()
    scaler.unscale_(optimizer)
    clip(model.parameters())
    scaler.step(optimizer)
    scaler.update()


def trained(loop: Loop, **options: Any) -> list[Tensor]:
    """Weights and B after some steps, each by SGD, which the size of a gradient matters to."""
    torch.manual_seed(0)
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, **options)
    for _ in range(5):
        loop(model, optimizer)
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize(
    ("loop", "same"),
    [
        (clipped, clipped_weights),
        (clipped_in_a_closure, clipped_weights),
        (scaled, plain),
        (scaled_and_clipped, clipped_weights),
    ],
)
def test_loops_leave_the_gradients_of_feedback_as_they_are(
    loop: Loop, same: Loop, options: dict[str, bool]
) -> None:
    for a, b in zip(trained(loop, **options), trained(same, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("loop", [scaled, scaled_and_clipped])
def test_feedback_that_learns_by_the_error_is_scaled_with_it(loop: Loop) -> None:
    """As the weights are, which the feedback of Kolen and Pollack's method is to become like."""
    same = plain if loop is scaled else clipped
    results = []
    for each in (loop, same):
        torch.manual_seed(0)
        model = FDFA(mlp(), method="dkp", feedback="grad", example_input=INPUT[:2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            each(model, optimizer)
        results.append([p.detach() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_feedback_moves_by_the_mean_over_accumulated_batches() -> None:
    """Of which each has a part of the loss, as loops have it."""
    torch.manual_seed(0)
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    parts, found = copy.deepcopy(model), []
    for part in (slice(16), slice(16, 32)):
        alone = copy.deepcopy(model)
        alone.noise_state.copy_(parts.noise_state)
        F.cross_entropy(alone(INPUT[part]), TARGET[part]).backward()
        alone.give_feedback_gradients()
        found.append([b.grad for b in alone.feedback.values()])
        (F.cross_entropy(parts(INPUT[part]), TARGET[part]) / 2).backward()
    assert not any(b.grad.any() for b in parts.feedback.values())
    parts.give_feedback_gradients()
    for b, *each in zip(parts.feedback.values(), *found, strict=True):
        torch.testing.assert_close(b.grad, sum(each) / 2)


@pytest.mark.parametrize("weight", [torch.inf, 1e25])
def test_a_gradient_of_infinite_square_is_left_out_of_the_mean(weight: float) -> None:
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model.zero_grad()
    twin = copy.deepcopy(model)
    F.cross_entropy(model(INPUT), TARGET).backward()
    F.cross_entropy(twin(INPUT), TARGET).backward()
    with torch.no_grad():
        model.module[-1].weight.fill_(weight)
    model(INPUT).sum().backward()
    for each in (model, twin):
        each.give_feedback_gradients()
    for a, b in zip(model.feedback.values(), twin.feedback.values(), strict=True):
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_feedback_that_no_optimizer_moves_is_said() -> None:
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    optimizer = torch.optim.SGD(model.forward_parameters(), lr=0.1)
    for _ in range(99):
        plain(model, optimizer)
    with pytest.warns(UserWarning, match="have waited for 100 backwards"):
        plain(model, optimizer)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("steps", [False, True])
def test_zero_grad_drops_gradients_that_wait(outer: bool, steps: bool) -> None:
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if steps else 0.1)
    F.cross_entropy(model(INPUT[:8]), TARGET[:8]).backward()
    if steps:
        optimizer.step()
    (nn.Sequential(model) if outer else optimizer).zero_grad()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for each in (model, twin):
        F.cross_entropy(each(INPUT), TARGET).backward()
    optimizer.step()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    for a, b in zip(model.feedback.values(), twin.feedback.values(), strict=True):
        assert a.any()
        assert torch.equal(a, b)


def test_a_batch_without_samples_has_no_part_in_the_mean() -> None:
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    F.cross_entropy(model(INPUT), TARGET).backward()
    model(INPUT[:0]).sum().backward()
    twin = copy.deepcopy(model)
    model.give_feedback_gradients()
    twin.noise_state[1] -= 2
    F.cross_entropy(twin(INPUT), TARGET).backward()
    twin.give_feedback_gradients()
    for a, b in zip(model.feedback.values(), twin.feedback.values(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_feedback_as_parameters_can_be_swapped() -> None:
    """Which torch refuses where tensors have weak references."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
        F.cross_entropy(model(INPUT), TARGET).backward()
        model.zero_grad()
        saved = copy.deepcopy(model.state_dict())
        model.to("meta").to_empty(device="cpu").load_state_dict(saved)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    plain(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(b.any() for b in model.feedback.values())


def test_data_of_the_module_is_that_of_the_model() -> None:
    net = mlp()
    net.config, net.seen = {"a": 1}, 0
    model = FDFA(net)
    assert model.config is net.config
    model.seen += 1
    assert net.seen == 1
    for name in ("0", "nothing"):
        assert not hasattr(model, name)
    model.name = "mine"
    assert not hasattr(net, "name")


def test_methods_of_the_module_are_those_of_the_model_but_train_nothing() -> None:
    class Net(nn.Sequential):
        def width(self) -> int:
            return 6

        def probabilities(self, x: Tensor) -> Tensor:
            return self(x).softmax(1)

        def hidden(self, x: Tensor) -> Tensor:
            return self[0](x)

    model = FDFA(Net(*mlp()), example_input=INPUT[:2])
    assert model.width() == 6
    for name in ("probabilities", "hidden"):
        with pytest.raises(RuntimeError, match=f"{name} of Net runs the module"):
            getattr(model, name)(INPUT)
        with torch.no_grad():
            expected = getattr(model, name)(INPUT)
        assert torch.equal(getattr(copy.deepcopy(model).eval(), name)(INPUT), expected)
    F.cross_entropy(model(INPUT), TARGET).backward()  # no hook was left


def test_tied_weights_are_loaded_as_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = FDFALinear(6, 6)
            self.head = nn.Linear(6, 6)
            self.head.weight = self.hidden.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(x))

    for make in (lambda model: model, nn.Sequential):
        model = make(FDFA(Tied(), example_input=INPUT[:2]))
        state = model.state_dict()
        values = [t.untyped_storage().data_ptr() for t in state.values()]
        assert len({*values}) == len(values)
        model.load_state_dict(state, assign=True)
        inner = model.get_submodule("0.module" if isinstance(model, nn.Sequential) else "module")
        assert inner.head.weight.data_ptr() == inner.hidden.weight.data_ptr()


@pytest.mark.parametrize("change", [copy.deepcopy, "loaded"])
def test_other_parameters_in_place_of_the_feedback_are_kept_from_loops_too(change: Any) -> None:
    model = FDFA(mlp(), feedback="grad", example_input=INPUT[:2])
    if change == "loaded":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model = change(model)
    F.cross_entropy(model(INPUT), TARGET).backward()
    assert not any(b.grad.any() for b in model.feedback.values())
    model.give_feedback_gradients()
    assert all(b.grad.any() for b in model.feedback.values())


@pytest.mark.parametrize("feedback", ["adam", "ema", "grad"])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_models_is_one_of_their_weights(feedback: str, use_buffers: bool) -> None:
    x, y = torch.randn(16, 1, 12, 12), torch.randint(3, (16,))
    model = FDFA(conv_net(), feedback=feedback, example_input=x[:2])
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    expected = [p.detach().clone() for p in model.module.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        for mean, p in zip(expected, model.module.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.5 if step else 1.0)
    for mean, p in zip(expected, average.module.module.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), mean)
