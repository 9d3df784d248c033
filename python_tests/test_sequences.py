"""Sequences in patches of positions: they are trained as the images of height 1 that they equal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import check_compiled_steps, step
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.fusion import channels_first
from fdfa_ext.metrics import feedback_alignment, feedback_ceiling, mean_jacobian

METHODS = ("fdfa", "dfa", "dkp", "fg-a", "lg-fg-a")
TARGET = torch.tensor([0, 1, 2, 0])


class Mean(nn.Module):
    """Over positions, [N, T, D] → [N, D], or over all but channels, [N, C, *] → [N, C]."""

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dimensions)


def tokens() -> nn.Sequential:
    return nn.Sequential(
        FDFALinear(5, 8, activation="gelu"),
        FDFALinear(8, 6, activation="relu"),
        FDFABlock(nn.Linear(6, 4), nn.Tanh()),
        Mean(1),
        nn.Linear(4, 3),
    )


def tokens_as_images() -> nn.Sequential:
    return nn.Sequential(
        FDFAConv2d(5, 8, 1, activation="gelu"),
        FDFAConv2d(8, 6, 1, activation="relu"),
        FDFABlock(nn.Conv2d(6, 4, 1), nn.Tanh()),
        Mean(2, 3),
        nn.Linear(4, 3),
    )


def signals() -> nn.Sequential:
    return nn.Sequential(
        FDFABlock(nn.Conv1d(5, 8, 3), nn.BatchNorm1d(8), nn.ReLU()),
        FDFABlock(nn.Conv1d(8, 4, 2), nn.GELU(), nn.AvgPool1d(2)),
        Mean(2),
        nn.Linear(4, 3),
    )


def signals_as_images() -> nn.Sequential:
    return nn.Sequential(
        FDFABlock(nn.Conv2d(5, 8, (1, 3)), nn.BatchNorm2d(8), nn.ReLU()),
        FDFABlock(nn.Conv2d(8, 4, (1, 2)), nn.GELU(), nn.AvgPool2d((1, 2))),
        Mean(2, 3),
        nn.Linear(4, 3),
    )


class Encoder(nn.Module):
    """[N, T, 6] → [N, 3], with skip connections around its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = FDFABlock(
            nn.LayerNorm(6), nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
        )
        self.wide = FDFALinear(6, 6, activation="silu")
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        self.hidden = self.wide(x)
        output: Tensor = self.head((x + self.hidden).mean(1))
        return output


def sequence(t: int = 11, features: int = 5) -> Tensor:
    return torch.randn(4, t, features, generator=torch.Generator().manual_seed(t))


def wrapped(net: nn.Module, x: Tensor, **options: Any) -> FDFA:
    torch.manual_seed(2)
    return FDFA(net, example_input=x, **{"feedback": "ema", "feedback_lr": 0.2, **options})


def trained(model: FDFA, x: Tensor, steps: int = 3) -> FDFA:
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer, x, TARGET)
    return model


@pytest.mark.parametrize("patch", [2, 4, 50])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a"])
@pytest.mark.parametrize(
    ("net", "as_images", "turn"),
    [
        (tokens, tokens_as_images, lambda x: x.transpose(1, 2).unsqueeze(2)),
        (signals, signals_as_images, lambda x: x.unsqueeze(2)),
    ],
    ids=["tokens", "signals"],
)
def test_a_sequence_is_trained_as_an_image_of_height_1(
    net: Callable[[], nn.Module],
    as_images: Callable[[], nn.Module],
    turn: Callable[[Tensor], Tensor],
    method: str,
    patch: int,
) -> None:
    torch.manual_seed(0)
    image_net, sequence_net = as_images(), net()
    weights = image_net.state_dict()
    shapes = sequence_net.state_dict()
    sequence_net.load_state_dict({key: value.view_as(shapes[key]) for key, value in weights.items()})
    x = sequence() if net is tokens else sequence().transpose(1, 2)
    image = trained(wrapped(image_net, turn(x), method=method, patch=patch), turn(x))
    model = trained(wrapped(sequence_net, x, method=method, patch=patch), x)
    states = image.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        actual = states[1][key]
        torch.testing.assert_close(actual, value.view_as(actual), rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("patch", [2, 50])
@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_train_alike(method: str, patch: int) -> None:
    x, states = sequence(features=6), []
    for backend in BACKENDS:
        torch.manual_seed(0)
        model = wrapped(Encoder(), x, method=method, patch=patch, backend=backend)
        states.append(trained(model, x).state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
def test_one_patch_for_all_positions_takes_sequences_of_any_length(method: str) -> None:
    torch.manual_seed(0)
    model = wrapped(Encoder(), sequence(features=6), method=method, patch=64)
    assert {name: list(b.shape) for name, b in model.feedback.items()} == {
        name: [3, 6, 1, 1] for name in ("mix", "wide")
    }
    for t in (11, 3, 64):
        before = [matrix.clone() for matrix in model.feedback.values()]
        assert trained(model, sequence(t, 6), steps=1).feedback["wide"].isfinite().all()
        after = list(model.feedback.values())
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(moved) == (method != "dfa")
    with pytest.raises(ValueError, match="in patches of 64"):
        model(sequence(65, 6))


def test_several_dimensions_between_are_one_row_of_positions() -> None:
    net = nn.Sequential(FDFALinear(5, 8, activation="relu"), Mean(1, 2), nn.Linear(8, 3))
    x = sequence(12).view(4, 3, 4, 5)
    for method in ("fdfa", "dfa"):
        model = wrapped(net, x, method=method, patch=6)
        assert list(model.feedback["0"].shape) == [3, 8, 1, 2]
        trained(model, x, steps=1)
        assert feedback_alignment(model, x)["0"] < 180
        # Positions have the same Jacobian here.
        assert feedback_ceiling(model, (x, TARGET), patch=6)["0.weight"] < 60


class ConvolutionModule(nn.Module):
    """[N, T, 6] → [N, T, 6], turned for its convolution alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + y


def test_where_the_features_of_a_sequence_are() -> None:
    first = (
        [nn.Conv1d(2, 3, 1), nn.ReLU()],
        [nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())],
        [nn.LayerNorm(4), nn.ConvTranspose1d(2, 3, 1), nn.AdaptiveAvgPool1d(2)],
        [nn.Conv2d(3, 8, 4, 4), nn.Flatten(2)],
        [nn.Linear(4, 4), nn.LazyBatchNorm1d()],
    )
    last = (
        [nn.Linear(2, 3), nn.ReLU()],
        [nn.Conv1d(2, 3, 1), nn.ReLU(), nn.Linear(4, 4)],
        [nn.TransformerEncoderLayer(4, 2, 4)],
        [nn.Conv1d(2, 3, 1), ConvolutionModule(), nn.ReLU()],
        [nn.Linear(4, 4), nn.Flatten(1, 2)],
        [nn.ReLU()],
    )
    assert all(channels_first(modules) for modules in first)
    assert not any(channels_first(modules) for modules in last)


def test_a_module_of_ones_own_returns_features_last() -> None:
    net = nn.Sequential(FDFABlock(ConvolutionModule()), Mean(1), nn.Linear(6, 3))
    model = wrapped(net, sequence(11, 6), patch=64)
    assert list(model.feedback["0"].shape) == [3, 6, 1, 1]
    trained(model, sequence(9, 6), steps=1)


def test_a_lazy_norm_trains_on() -> None:
    net = nn.Sequential(FDFABlock(nn.Linear(11, 11), nn.LazyBatchNorm1d()), Mean(2), nn.Linear(6, 3))
    model = FDFA(net, patch=4)
    for _ in range(2):
        F.cross_entropy(model(sequence().transpose(1, 2)[:, [0, 1, 2, 3, 4, 0]]), TARGET).backward()
    assert list(model.feedback["0"].shape) == [3, 6, 1, 3]


def test_errors_have_the_shape_that_the_block_returns() -> None:
    model = wrapped(Encoder(), sequence(features=6), patch=4)
    with pytest.raises(ValueError, match=r"features \[20, 6\] in patches of 4 came"):
        model(sequence(20, 6))


class Doubled(FDFALinear):
    def plain(self, x: Tensor) -> Tensor:
        return 2 * FDFALinear.plain(self, x)


def test_metrics_count_the_patches_that_a_block_has() -> None:
    """A block that computes something of its own returns images where it has four dimensions."""
    x = torch.randn(4, 3, 4, 6)
    net = nn.Sequential(Doubled(6, 5, activation="relu"), Mean(1, 2), nn.Linear(5, 3))
    model = wrapped(net, x, patch=2)
    assert list(model.feedback["0"].shape) == [3, 3, 2, 3]
    trained(model, x, steps=1)
    assert feedback_alignment(model, x)["0"] != 90
    assert feedback_ceiling(model, (x, TARGET), patch=2)["0.weight"] > 1


@pytest.mark.parametrize("patch", [1, 3])
def test_a_loss_on_a_hidden_sequence_reaches_its_block(patch: int) -> None:
    """By its exact gradient, whatever the patch."""
    torch.manual_seed(0)
    net, x = Encoder(), sequence(features=6)
    model = wrapped(net, x, method="dfa", patch=patch)
    with torch.no_grad():
        for matrix in model.feedback.values():
            matrix.zero_()
    model(x)
    net.hidden.square().mean().backward()
    found = net.wide.weight.grad
    expected = torch.autograd.grad(
        F.silu(F.linear((x + net.mix(x)).detach(), net.wide.weight, net.wide.bias)).square().mean(),
        net.wide.weight,
    )
    torch.testing.assert_close(found, expected[0])


def test_metrics_compare_patches_of_positions() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(FDFALinear(5, 4), nn.Flatten(), nn.Linear(44, 3))  # one Jacobian: its weights
    x = sequence()
    jacobian = net[2].weight.detach().view(3, 11, 4)
    model = wrapped(net, x, patch=4)
    torch.testing.assert_close(mean_jacobian(model, x)["0"], jacobian)
    stretches = [jacobian[:, i : i + 4].mean(1) for i in (0, 4, 8)]
    with torch.no_grad():
        model.feedback["0"].copy_(torch.stack(stretches, 2).unsqueeze(2))
    means = torch.cat(
        [m.unsqueeze(1).expand(-1, n, -1) for m, n in zip(stretches, (4, 4, 3), strict=True)], 1
    )
    cosine = F.cosine_similarity(means.flatten(), jacobian.flatten(), dim=0)
    angle = torch.rad2deg(cosine.acos())
    assert feedback_alignment(model, x)["0"] == pytest.approx(float(angle), abs=0.01)
    assert feedback_ceiling(model, (x, TARGET))["0.weight"] < 0.01
    # The ceiling is what that B reaches, and no business of the model's own patch.
    unpatched = wrapped(net, x, patch=1)
    for one in (model, unpatched):
        ceiling = feedback_ceiling(one, (x, TARGET), patch=4)["0.weight"]
        e = (net(x).softmax(1) - F.one_hot(TARGET, 3)).detach()
        estimate = torch.einsum("nk,ktd,nti->di", e, means, x).flatten()
        exact = torch.einsum("nk,ktd,nti->di", e, jacobian, x).flatten()
        expected = torch.rad2deg(F.cosine_similarity(estimate, exact, dim=0).acos())
        assert ceiling == pytest.approx(float(expected), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fdfa", "dkp", "fg-a"])
def test_a_compiled_step_is_the_eager_one(method: str) -> None:
    def model() -> FDFA:
        torch.manual_seed(0)
        return wrapped(tokens(), sequence(), method=method, patch=3)

    check_compiled_steps(model, sequence(), TARGET)
