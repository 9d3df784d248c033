"""Alignment and variance against values known in closed form, and models left as they were."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from nets import NETS, batch, mlp
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear, FeedbackUpdate
from fdfa_ext.methods import METHODS
from fdfa_ext.metrics import (
    estimator_variance,
    feedback_alignment,
    feedback_ceiling,
    gradient_alignment,
    mean_jacobian,
)


def make(name: str, method: str, **options: Any) -> FDFA:
    torch.manual_seed(1)
    return FDFA(NETS[name][0](), method=method, example_input=batch(name)[0], **options)


@pytest.mark.parametrize("name", ["mlp", "block_net"])
@pytest.mark.parametrize("method", METHODS)
def test_a_measured_model_is_left_as_it_was(name: str, method: str) -> None:
    model, data = make(name, method), batch(name)
    F.cross_entropy(model(data[0]), data[1]).backward()
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    gradient_alignment(model, data, draws=2)
    estimator_variance(model, data, draws=2)
    if len(model.feedback):
        feedback_alignment(model, data[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.grad is gradient or torch.equal(p.grad, gradient)
    assert not any(module.training for module in model.modules())
    assert model.feedback_lr == 1e-4


def test_buffers_that_are_not_saved_are_put_back_too() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += self.training
            return x

    counter, data = Counter(), batch("mlp")
    model = FDFA(nn.Sequential(FDFALinear(6, 8), counter, nn.Linear(8, 3)), example_input=data[0])
    before = counter.count.clone()
    gradient_alignment(model, data, draws=2)
    assert counter.count == before


def test_backpropagation_is_aligned_and_has_no_variance() -> None:
    model, data = make("conv_net", "bp"), batch("conv_net")
    assert max(gradient_alignment(model, data).values()) < 1e-3
    assert max(estimator_variance(model, data, draws=3).values()) == 0


def test_feedback_equal_to_the_output_weight_is_exact_and_its_negative_opposite() -> None:
    """eq. 13: with one hidden layer B = W of the output makes FDFA backpropagation."""
    net = nn.Sequential(FDFALinear(6, 8, activation="tanh"), nn.Linear(8, 3))
    data = batch("mlp")
    model = FDFA(net, example_input=data[0])
    model.feedback["0"].copy_(net[1].weight.detach())
    assert feedback_alignment(model, data[0])["0"] < 1e-3
    assert max(gradient_alignment(model, data).values()) < 1e-2
    model.feedback["0"].neg_()
    assert feedback_alignment(model, data[0])["0"] > 180 - 1e-3
    assert gradient_alignment(model, data)["0.weight"] > 180 - 1e-2


def test_alignment_holds_feedback_whatever_moves_it() -> None:
    """With B at zero no hidden layer has a gradient, though the update would write ones."""

    class Ones(FeedbackUpdate):
        def step(self, name: str, feedback: Tensor, gradient: Tensor) -> None:
            feedback.fill_(1)

    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    update = Ones()
    model = FDFA(mlp(), feedback=update, example_input=x)
    angles = gradient_alignment(model, (x, y))
    assert angles["0.weight"] == 90
    assert model.feedback_update is update
    model(x).sum().backward()
    assert model.feedback["0"].eq(1).all()


def test_the_outputs_of_local_heads_are_those_of_the_last_step() -> None:
    x, y = torch.randn(8, 6), torch.randint(0, 3, (8,))
    model = FDFA(mlp(), method="lg-fg-a", example_input=x)
    model(x)
    before = model.local_outputs
    gradient_alignment(model, (x, y))
    assert model.local_outputs is before


def test_random_modules_draw_the_same_for_estimate_and_truth() -> None:
    net = nn.Sequential(FDFALinear(6, 40, activation="relu"), nn.Dropout(0.5), nn.Linear(40, 3))
    data = batch("mlp")
    model = FDFA(net, method="bp", example_input=data[0])
    before = torch.get_rng_state()
    assert max(gradient_alignment(model, data, draws=2).values()) < 1e-3
    assert min(estimator_variance(model, data, draws=3).values()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_feedback_is_compared_with_the_jacobian_that_evaluation_has() -> None:
    net = nn.Sequential(FDFALinear(6, 40, activation="relu"), nn.Dropout(0.5), nn.Linear(40, 3))
    x, _ = batch("mlp")
    model = FDFA(net, example_input=x)
    model.feedback["0"].copy_(net[2].weight.detach())
    assert model.module.training
    assert feedback_alignment(model, x)["0"] < 1e-3


@pytest.mark.parametrize("between", [(), (3,), (2, 2)])
def test_feedback_is_compared_with_the_jacobian_of_its_block(between: tuple[int, ...]) -> None:
    """Frozen or not, changed in place by the next module or not, in any dimensions."""
    torch.manual_seed(0)
    x = torch.randn(200, *between, 6)
    units = 8 * torch.Size(between).numel()
    found = []
    for frozen, inplace in ((False, False), (True, False), (False, True)):
        torch.manual_seed(1)
        layers = [FDFALinear(6, 8), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(units, 3)]
        net = nn.Sequential(*layers)
        net[0].requires_grad_(not frozen)
        model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
        for _ in range(3):
            model(x).sum().backward()
        found.append(feedback_alignment(model, x)["0"])
    assert found[0] == found[1] == found[2] < 30


def test_forward_gradients_align_with_more_draws() -> None:
    model, data = make("mlp", "fg-a"), batch("mlp")
    few, many = (gradient_alignment(model, data, draws=n)["1.weight"] for n in (1, 1600))
    assert many < 20 < few


@pytest.mark.parametrize(
    ("method", "draws", "close"),
    [*slow_but([("fg-w", 8000, 0.1), ("fg-a", 8000, 0.1)]), ("fg-a", 1000, 0.2)],
)
def test_variance_of_forward_gradients_is_lemma_4(method: str, draws: int, close: float) -> None:
    """Var[(g · v) vᵢ] = gᵢ² + |g|²: for FG-W over all parameters, for FG-A over one sample's neurons."""
    net = nn.Sequential(FDFALinear(6, 8), nn.Linear(8, 3))
    data = batch("mlp", n=1)
    model = FDFA(net, method=method, example_input=data[0])
    loss = F.cross_entropy(net(data[0]), data[1])
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    if method == "fg-w":
        norm = sum(g.square().sum() for g in gradients)
        expected = (gradients[0].square() + norm).mean()
    else:
        by_neuron = gradients[1]  # of the bias, and so of the activation too
        x2 = data[0].square().mean()
        expected = ((by_neuron.square() + by_neuron.square().sum()).mean()) * x2
    found = estimator_variance(model, data, draws=draws)["0.weight"]
    assert found == pytest.approx(float(expected), rel=close)
    # By the mean square of the estimate, E g² + Var g, less the share of 1/draws.
    part = estimator_variance(model, data, draws=draws, normalize=True)["0.weight"]
    mean_square = gradients[0].square().mean() + expected
    assert part == pytest.approx(float(expected / mean_square), rel=close)


def test_variance_of_fdfa_grows_with_the_square_of_its_rate() -> None:
    """Proposition 2, from feedback that has converged."""
    net = nn.Sequential(FDFALinear(6, 8, activation="relu"), nn.Linear(8, 3))
    data = batch("mlp")
    model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=data[0])
    model.feedback["0"].copy_(net[1].weight.detach())
    found = []
    for model.feedback_lr in (1e-3, 1e-1):
        found.append(estimator_variance(model, data, draws=50)["0.weight"])
    assert found[1] / found[0] == pytest.approx(1e4, rel=1e-2)  # the same draws, so the same numbers


class TwoOutputs(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class OwnLoss(nn.Module):
    """Keyword inputs, and a dict with a loss of its own; linear behind the layer, [N, T, 6] → [N, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, *, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        logits = self.head(self.neck(self.layer(inputs)))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_inputs_by_name_and_losses_of_the_models_own_are_measured_as_they_train() -> None:
    torch.manual_seed(0)
    net, x = OwnLoss(), torch.randn(4, 5, 6)
    batch = {"inputs": x, "labels": torch.randint(3, (4, 5))}, None
    model = FDFA(net, at=["layer", "neck"], output="head", example_input={"inputs": x})
    for name, jacobian in mean_jacobian(model, batch[0]).items():
        behind = net.neck.weight if name == "layer" else torch.eye(8)
        expected = (net.head.weight @ behind).detach()
        if name == "layer":
            assert feedback_alignment(model, batch[0])[name] > 1
            model.feedback[name].copy_(expected)
        torch.testing.assert_close(jacobian, expected)
    model.feedback["neck"].copy_(net.head.weight.detach())

    def loss(result: dict[str, Any], target: None) -> Tensor:
        own: Tensor = result["loss"]
        return own

    found = gradient_alignment(model, batch, loss)
    assert found.keys() == dict(net.named_parameters()).keys()
    assert max(found.values()) < 0.1
    assert max(feedback_ceiling(model, batch, loss).values()) < 0.1
    assert max(feedback_alignment(model, batch[0]).values()) < 0.1


def test_b_of_another_size_is_said() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.AdaptiveAvgPool2d((1, None)), nn.Flatten())
    model = FDFA(net.append(nn.Linear(8, 3)), at=["1"], example_input=torch.randn(4, 5, 6))
    with pytest.raises(ValueError, match=r"block '1': B is \[3, 5, 8\], and the Jacobian \[3, 4, 8\]"):
        feedback_alignment(model, torch.randn(4, 4, 6))


def test_nodes_that_read_each_other_have_the_jacobian_of_each_by_itself() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(adjacency @ self.layer(x))

    torch.manual_seed(0)
    net, x, adjacency = Graph(), torch.randn(6, 5), torch.rand(6, 6) - 0.5
    model = FDFA(net, at=["layer"], example_input=(x, adjacency))
    expected = net.head.weight.detach() * adjacency.diag().mean()
    torch.testing.assert_close(mean_jacobian(model, (x, adjacency))["layer"], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_jacobian_has_the_digits_of_a_sum(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    x, y = torch.randn(8, 5, dtype=dtype), torch.randint(3, (8,))
    backend = "reference" if dtype == torch.float64 else "fused"
    model = FDFA(net, at=["1"], example_input=x, backend=backend)
    jacobian = mean_jacobian(model, x)["1"]
    assert jacobian.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(jacobian, net[2].weight.detach().to(jacobian.dtype))
    assert max(feedback_ceiling(model, (x, y)).values()) < 1


def test_what_is_measured_under_autocast_stays_in_float32() -> None:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    model = FDFA(net, at=["1"], example_input=x, feedback="grad")
    with torch.autocast("cpu", torch.bfloat16):
        jacobian = mean_jacobian(model, x)["1"]
        model.feedback["1"].data.copy_(jacobian)
        angles = gradient_alignment(model, (x, y)) | feedback_ceiling(model, (x, y))
    assert jacobian.dtype == torch.float32
    torch.testing.assert_close(jacobian, net[2].weight.detach(), rtol=1e-2, atol=1e-2)
    assert max(angles.values()) < 2


def test_dropout_behind_a_convolution_draws_the_mask_of_training() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.5), nn.Tanh(), nn.Flatten())
    net.append(nn.Linear(64, 3))
    x, y = torch.randn(4, 2, 4, 4), torch.randint(3, (4,))
    model = FDFA(net, at=["2"], example_input=x)
    model.feedback["2"].copy_(net[4].weight.detach().view(3, 4, 4, 4))
    assert max(gradient_alignment(model, (x, y)).values()) < 0.1


def test_outputs_that_cannot_be_measured_are_said() -> None:
    x, net = torch.randn(4, 5, 6), OwnLoss()
    model = FDFA(net, at=["layer"], method="bp", output="head", example_input={"inputs": x})
    with pytest.raises(ValueError, match=r"knows outputs \[N, K\] alone; got \[4, 5, 3\]"):
        mean_jacobian(model, {"inputs": x})
    pair = nn.Sequential(FDFALinear(6, 8), TwoOutputs())
    model = FDFA(pair, method="bp", example_input=torch.randn(4, 6))
    with pytest.raises(ValueError, match="the model returns tuple; name the module"):
        mean_jacobian(model, torch.randn(4, 6))


def test_what_the_user_gets_wrong_is_said() -> None:
    model, data = make("mlp", "fg-a"), batch("mlp")
    with pytest.raises(ValueError, match="draws must be 1 or more; got 0"):
        gradient_alignment(model, data, draws=0)
    with pytest.raises(ValueError, match="draws must be 2 or more; got 1"):
        estimator_variance(model, data, draws=1)
    with pytest.raises(ValueError, match="no feedback matrices"):
        feedback_alignment(model, data[0])
    with pytest.raises(ValueError, match="has not seen an input yet"):
        gradient_alignment(FDFA(NETS["mlp"][0]()), data)


def test_draws_are_no_steps_that_move_nothing() -> None:
    """The model counts forwards to say which feedback has not moved, and metrics put it back."""
    model = make("mlp", "fdfa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimator_variance(model, batch("mlp"), draws=40)
