"""Outside training the blocks are their torch counterparts; their arguments and names are torch.nn's."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.layers import ACTIVATIONS


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_linear_is_torch_linear_then_activation(device: torch.device, activation: str) -> None:
    layer = FDFALinear(7, 5, activation=activation, device=device)
    plain = nn.Linear(7, 5, device=device)
    plain.load_state_dict(layer.state_dict())
    for shape in ((7,), (3, 7), (2, 3, 7)):
        x = torch.randn(shape, device=device)
        assert torch.equal(layer(x), ACTIVATIONS[activation](plain(x)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1, "bias": False},
        {"dilation": (1, 2), "groups": 2},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
def test_conv2d_is_torch_conv2d_then_activation(device: torch.device, arguments: dict) -> None:
    layer = FDFAConv2d(4, 6, 3, activation="relu", device=device, **arguments)
    plain = nn.Conv2d(4, 6, 3, device=device, **arguments)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 9, 8, device=device)
    assert torch.equal(layer(x), F.relu(plain(x)))


def test_block_is_the_chain_of_its_modules() -> None:
    chain = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()]
    x = torch.randn(5, 4)
    assert torch.equal(FDFABlock(*chain)(x), nn.Sequential(*chain)(x))


def test_gradients_outside_training_are_ordinary_autograd() -> None:
    net = nn.Sequential(FDFALinear(4, 6, activation="tanh"), FDFALinear(6, 2))
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(net.double(), x)


def test_dtype_and_device_reach_the_parameters(device: torch.device) -> None:
    for layer in (
        FDFALinear(2, 3, device=device, dtype=torch.bfloat16),
        FDFAConv2d(2, 3, 1, device=device, dtype=torch.bfloat16),
    ):
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.device.type == device.type


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"FDFALinear: activation must be one of identity, .*'swish'"):
        FDFALinear(2, 2, activation="swish")
    with pytest.raises(ValueError, match=r"FDFAConv2d: activation must be one of identity, .*'swish'"):
        FDFAConv2d(2, 2, 1, activation="swish")
    with pytest.raises(ValueError, match=r"FDFABlock: needs at least one module"):
        FDFABlock()


def test_repr_shows_the_activation() -> None:
    assert "activation=relu" in repr(FDFALinear(2, 2, activation="relu"))
    assert "activation=tanh" in repr(FDFAConv2d(2, 2, 1, activation="tanh"))


def test_a_convolution_reads_its_weight_once() -> None:
    """A parametrization computes it, and spectral_norm moves its vectors each time."""
    reads: list[int] = []

    class Counts(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            reads.append(1)
            return weight

    layer = FDFAConv2d(3, 6, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counts())
    reads.clear()
    layer(torch.randn(2, 3, 9, 9))
    assert len(reads) == 1
