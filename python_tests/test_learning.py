"""What the feedback converges to (eq. 12, 13), on frozen nets whose answer is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.noise import NOISES


def mean_of_estimates(model: FDFA, x: Tensor, steps: int) -> dict[str, Tensor]:
    """The mean of G = dᵀu / N over steps: eq. 8 with α = 1/t from B = 0."""
    for t in range(1, steps + 1):
        model.feedback_lr = 1 / t
        model(x).sum().backward()
    return {name: b.clone() for name, b in model.feedback.items()}


def assert_learned(actual: Tensor, expected: Tensor, cosine: float, scale: float) -> None:
    a, b = actual.flatten().double(), expected.flatten().double()
    assert F.cosine_similarity(a, b, dim=0) > cosine
    assert abs(a @ b / (b @ b) - 1) < scale


@pytest.mark.parametrize("noise", NOISES)
def test_feedback_of_a_linear_net_is_the_product_of_the_later_weights(
    device: torch.device, noise: str
) -> None:
    net = nn.Sequential(
        FDFALinear(5, 12), FDFALinear(12, 10), FDFALinear(10, 8), FDFALinear(8, 6), nn.Linear(6, 4)
    ).to(device)
    x = torch.randn(512, 5, device=device)
    model = FDFA(net, feedback="ema", feedback_lr=0.5, noise=noise, example_input=x)
    weights = [layer.weight.detach() for layer in net]
    learned = mean_of_estimates(model, x, 1500)
    product = torch.eye(4, device=device)
    for index in (3, 2, 1, 0):
        product = product @ weights[index + 1]
        assert_learned(learned[str(index)], product, cosine=0.99, scale=0.05)
    # eq. 13: with a linear output the penultimate feedback is the output weight.
    assert_learned(learned["3"], weights[4], cosine=0.999, scale=0.01)


@pytest.mark.parametrize("rule", ["ema", "adam", "grad"])
def test_every_rule_finds_the_output_weight(device: torch.device, rule: str) -> None:
    """eq. 13, with the penultimate activation a nonlinear one."""
    net = nn.Sequential(FDFALinear(5, 16, activation="relu"), nn.Linear(16, 4)).to(device)
    x = torch.randn(256, 5, device=device)
    model = FDFA(net, feedback=rule, feedback_lr=2e-2 if rule == "ema" else 2e-3, example_input=x)
    if rule == "grad":
        optimizer = torch.optim.SGD(model.feedback_parameters(), lr=2e-2)
    for _ in range(500):
        if rule == "grad":
            optimizer.zero_grad()
        model(x).sum().backward()
        if rule == "grad":
            optimizer.step()
    assert_learned(model.feedback["0"].detach(), net[1].weight.detach(), cosine=0.99, scale=0.05)


def mean_jacobian(after: nn.Module, y: Tensor) -> Tensor:
    """E[∂output/∂y] over the batch, by autograd, [K, *features]."""
    y = y.detach().requires_grad_()
    output = after(y)
    rows = [
        torch.autograd.grad(output[:, k].sum(), y, retain_graph=True)[0] for k in range(output.shape[1])
    ]
    return torch.stack([row.mean(0) for row in rows])


def test_mean_estimate_on_a_relu_net_is_the_mean_jacobian(device: torch.device) -> None:
    net = nn.Sequential(
        FDFALinear(5, 10, activation="relu"),
        FDFALinear(10, 8, activation="relu"),
        FDFALinear(8, 6, activation="tanh"),
        nn.Linear(6, 3),
    ).to(device)
    x = torch.randn(512, 5, device=device)
    model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
    learned = mean_of_estimates(model, x, 2000)
    for index in range(3):
        expected = mean_jacobian(net[index + 1 :], net[: index + 1](x))
        assert_learned(learned[str(index)], expected, cosine=0.985, scale=0.05)


@pytest.mark.slow
def test_mean_estimate_on_a_convolutional_net_is_the_mean_jacobian(device: torch.device) -> None:
    """Through pooling, flatten and a block of Conv → BatchNorm → ReLU, all in (h, w, c) order."""
    net = nn.Sequential(
        FDFAConv2d(1, 3, 3, activation="relu"),
        nn.MaxPool2d(2),
        FDFABlock(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).to(device)
    net.eval()  # running statistics: the Jacobian of a sample does not depend on the others
    x = torch.randn(256, 1, 8, 8, device=device)
    model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
    model.training = True
    learned = mean_of_estimates(model, x, 1500)
    for name, after, y in (("0", net[1:], net[0](x)), ("2", net[3:], net[:3](x))):
        assert_learned(learned[name], mean_jacobian(after, y), cosine=0.97, scale=0.05)


def test_feedback_of_an_image_block_in_row_major_memory_is_the_mean_jacobian() -> None:
    """The noise of images is counted in (h, w, c) order whatever the layout of the block's output is."""
    net = nn.Sequential(
        FDFABlock(nn.Linear(5, 24), nn.Tanh(), nn.Unflatten(1, (2, 3, 4))),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    x = torch.randn(256, 5)
    model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
    learned = mean_of_estimates(model, x, 500)
    assert_learned(learned["0"], mean_jacobian(net[1:], net[0](x)), cosine=0.97, scale=0.05)


def test_training_on_a_task_reaches_what_backpropagation_reaches() -> None:
    x = torch.randn(512, 10)
    teacher = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 4))
    y = teacher(x).argmax(1)
    accuracies = []
    for wrapped in (True, False):
        torch.manual_seed(1)
        net = nn.Sequential(
            FDFALinear(10, 64, activation="relu"),
            FDFALinear(64, 64, activation="relu"),
            nn.Linear(64, 4),
        )
        model = FDFA(net, feedback_lr=1e-3, example_input=x) if wrapped else net
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(400):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        accuracies.append((net(x).argmax(1) == y).float().mean().item())
    fdfa, bp = accuracies
    assert fdfa > 0.97
    assert bp > 0.97
