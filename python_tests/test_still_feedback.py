"""Steps that learn no feedback: those of a fixed one, at the price of it."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import conv_net
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear
from fdfa_ext.autograd import BlockStep
from fdfa_ext.feedback import FeedbackUpdate
from fdfa_ext.methods import ForwardFeedback
from fdfa_ext.metrics import estimator_variance
from fdfa_ext.train.data import load_dataset
from fdfa_ext.train.training import Config, Run, read_checkpoint

X, Y = torch.randn(6, 1, 12, 12), torch.arange(6) % 3


def plain_net() -> nn.Sequential:
    """[N, 1, 12, 12] → [N, 3]."""
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(100, 7),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.Linear(7, 3))


class Still(FeedbackUpdate):
    """Counts its calls, and moves nothing."""

    calls = 0

    def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
        self.calls += 1


class OwnError(ForwardFeedback):
    """Reads d where it makes the error."""

    def delta(self, block: BlockStep) -> Tensor:
        return super().delta(block) + 0 * block.tangent.sum()


class WithoutTangents(OwnError):
    """Its error is e B, as it says."""

    def tangents_of_error(self) -> str:
        return "none"

    def delta(self, block: BlockStep) -> Tensor:
        return ForwardFeedback.delta(self, block)


def step_of(model: FDFA) -> list[Tensor | None]:
    """The gradients of one step."""
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    return [parameter.grad for parameter in model.forward_parameters()]


def moved_in_step(model: FDFA) -> list[str]:
    """What of the model's state a step moves, but for the statistics of modules."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    step_of(model)
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    return [name for name in moved if not name.startswith("module.")]


LEARNS: list[dict[str, Any]] = [
    {},
    {"feedback": "ema", "backend": "reference"},
    {"patch": 2},
    {"method": "dkp"},
    {"method": "dkp", "backend": "reference"},
    {"method": OwnError()},
    {"method": WithoutTangents()},
    {"feedback": Still()},
]


@pytest.mark.parametrize("options", LEARNS)
@pytest.mark.parametrize("at", [None, "auto"])
def test_a_step_that_learns_no_feedback_is_one_by_a_fixed_one(
    options: dict[str, Any], at: str | None
) -> None:
    """That of "dfa" by the same B; and nothing of the feedback or the noise moves."""
    torch.manual_seed(0)
    net, options = conv_net() if at is None else plain_net(), copy.deepcopy(options)
    model = FDFA(net, at=at, example_input=X, feedback_lr=0.1, **options)
    for matrix in model.feedback.values():
        nn.init.normal_(matrix, std=0.1)
    step_of(model)
    own = {name: options[name] for name in ("patch", "backend") if name in options}
    fixed = FDFA(copy.deepcopy(net), at=at, method="dfa", example_input=X, **own)
    for name, matrix in model.feedback.items():
        fixed.feedback[name].copy_(matrix)
    model.learns_feedback = False
    # A method of one's own may make its error of d, and keeps its noise.
    assert moved_in_step(model) == ["noise_state"] * (type(model.method) is OwnError)
    for gradient, expected in zip(step_of(model), step_of(fixed), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    update = model.feedback_update
    if isinstance(update, Still):
        assert update.calls == len(model.feedback)
    model.learns_feedback = True
    moved = moved_in_step(model)
    assert isinstance(update, Still) or {f"feedback.{name}" for name in model.block_names} <= {*moved}


def test_a_step_that_learns_no_feedback_has_no_tangent() -> None:
    class Untangled(torch.autograd.Function):
        """Without a forward mode."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Between(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Untangled.apply(x)

    x, net = (
        torch.randn(4, 6),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Identity(), nn.Linear(6, 3)),
    )
    model = FDFA(net, at=["1"], example_input=x)
    net[2] = Between()
    with pytest.raises(RuntimeError, match="no forward mode"):
        model(x)
    model.learns_feedback = False
    model(x).sum().backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "dfa"}, "DirectFeedback, whose feedback does not learn"),
        ({"method": "fg-a"}, "ActivityPerturbation, whose feedback does not learn"),
        ({"feedback": "grad"}, "whose B moves when its optimizer takes a step"),
    ],
)
def test_feedback_that_does_not_learn_by_itself_has_no_choice(
    options: dict[str, Any], why: str
) -> None:
    model = FDFA(conv_net(), **options)
    with pytest.raises(ValueError, match=why):
        model.learns_feedback = False


@pytest.mark.parametrize("value", ["no", None, 0, 2.5, torch.tensor([True, False])])
def test_it_learns_or_it_does_not(value: Any) -> None:
    model = FDFA(conv_net())
    with pytest.raises(TypeError, match="learns_feedback must be True or False; got"):
        model.learns_feedback = value
    for truth in (np.bool_(False), torch.tensor(False)):
        model.learns_feedback = truth  # type: ignore[assignment]
        assert model.learns_feedback is False


@pytest.mark.parametrize(("every", "phase"), [(4, 0), (2, 1), (32, 31)])
@pytest.mark.parametrize("is_dead", [True, False])
def test_feedback_that_has_not_moved_is_said_of_steps_that_learn(
    every: int, phase: int, is_dead: bool
) -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0.0 if is_dead else x

    torch.manual_seed(0)
    x, y = torch.randn(6, 10), torch.arange(6) % 3
    net = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), Dead(), nn.Linear(7, 3))
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = FDFA(net, at=["1"], example_input=x)
        optimizer = torch.optim.SGD(model.forward_parameters(), lr=0.01)
        for step in range(33 * every):
            model.learns_feedback = step % every == phase
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            said = [step for each in caught if "has not moved" in str(each.message)]
    assert bool(said) == is_dead


def test_a_model_is_prepared_as_for_a_step_that_learns() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().clone()

    model = FDFA(nn.Sequential(FDFALinear(6, 6), Drops(), nn.Linear(6, 3)))
    model.learns_feedback = False
    with pytest.raises(RuntimeError, match="the output has no tangent"):
        model(torch.randn(4, 6))


def test_the_variance_is_that_of_steps_that_learn() -> None:
    torch.manual_seed(0)
    model = FDFA(conv_net(), example_input=X, feedback="ema", feedback_lr=0.1)
    expected = estimator_variance(model, (X, Y), draws=3)
    model.learns_feedback = False
    assert estimator_variance(model, (X, Y), draws=3) == expected
    assert model.learns_feedback is False


def test_a_copy_learns_or_not_as_its_original_did() -> None:
    model = FDFA(conv_net(), example_input=X)
    model.learns_feedback = False
    other = copy.deepcopy(model)
    assert not other.learns_feedback
    other.learns_feedback = True
    assert not model.learns_feedback


def test_a_compiled_step_asks_whether_feedback_learns() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = FDFA(plain_net(), at="auto", example_input=X, feedback="ema", feedback_lr=0.1)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for learns in (True, False, True, False):
        for each, forward in ((eager, eager), (model, compiled)):
            each.learns_feedback = learns
            each.zero_grad()
            F.cross_entropy(forward(X), Y).backward()
        for a, b in zip(eager.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert int(eager.noise_state[1]) == int(model.noise_state[1]) == 2
    for name, matrix in eager.feedback.items():
        torch.testing.assert_close(model.feedback[name], matrix, rtol=1e-4, atol=1e-5)


def test_a_run_learns_feedback_in_one_of_so_many_steps(tmp_path: Any) -> None:
    """Also where it goes on from a checkpoint."""
    data = load_dataset("digits").head(64 * 5)
    whole = Run(Config(feedback_every=3, feedback="ema", feedback_lr=0.01), data)
    for _ in range(2):
        whole.train_epoch()
    assert int(whole.model.noise_state[1]) == 4  # in steps 0, 3, 6 and 9
    run = Run(whole.config, data)
    run.train_epoch()
    run.save(tmp_path / "run.pt")
    config, checkpoint = read_checkpoint(tmp_path / "run.pt")
    resumed = Run(config, data)
    resumed.load(checkpoint)
    resumed.train_epoch()
    for name, t in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], t), name
