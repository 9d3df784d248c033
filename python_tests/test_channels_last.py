"""What crashes in torch for images in channels_last, and must not here.

Such cases train in a process of their own, which a spoiled heap ends.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but
from torch import nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, reference

TRAINING = """
import torch
from torch import nn
from fdfa_ext import FDFA, FDFABlock, FDFAConv2d

torch.set_num_threads(2)

class Down(nn.Module):
    def __init__(self, c, stride):
        super().__init__()
        self.wide, self.short = nn.Conv2d(c, 16, 3, stride, 1), nn.Conv2d(c, 16, 1, stride)

    def forward(self, x):
        return torch.relu(self.wide(x) + self.short(x))

class Own(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

def listed(convolution):
    convolution.stride, convolution.padding = list(convolution.stride), list(convolution.padding)
    return convolution

for c, stride in ((3, 2), (8, (1, 2))):
    for block in (
        FDFAConv2d(c, 16, 1, stride=stride, activation="relu"),
        FDFABlock(nn.Conv2d(c, 16, 1, stride), nn.ReLU()),
        FDFABlock(nn.Conv2d(c, 16, 1, stride), nn.BatchNorm2d(16)),
        FDFABlock(listed(nn.Conv2d(c, 16, 1, stride)), nn.BatchNorm2d(16)),
        FDFABlock(Down(c, stride)),
    ):
        net = nn.Sequential(block, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3))
        for whole in (net, Own(net)):
            model = FDFA(whole, method={method!r}, backend={backend!r})
            for _ in range(10):
                x = torch.randn(17, c, 12, 12).contiguous(memory_format=torch.channels_last)
                model(x).sum().backward()
"""


@pytest.mark.parametrize("method", slow_but(["fdfa", "dfa", "bp"], "fdfa"))
@pytest.mark.parametrize("backend", slow_but(["fused", "reference"], "fused"))
def test_training_leaves_the_heap_alone(method: str, backend: str) -> None:
    script = TRAINING.format(method=method, backend=backend)
    # With MALLOC_CHECK_ glibc looks at its heap at each call.
    environment = {"MALLOC_CHECK_": "3", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": ":".join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
    assert ran.returncode == 0, ran.stderr[-300:]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [2, 3, (1, 2), (20, 20)])
def test_the_result_and_its_gradients_are_torchs(groups: int, stride: int | tuple[int, int]) -> None:
    """In row-major order, where torch's own are right."""
    plain = nn.Conv2d(4, 6, 1, stride, groups=groups)
    layer = FDFAConv2d(4, 6, 1, stride, groups=groups)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(5, 4, 11, 9)
    inputs = [x.clone().requires_grad_() for _ in range(3)]
    geometry = (plain.stride, plain.padding, plain.dilation, groups)
    outputs = [
        plain(inputs[0]),
        layer(inputs[1]),
        reference.convolve(inputs[2], layer.weight, layer.bias, *geometry),
    ]
    delta = torch.randn_like(outputs[0])
    wanted = torch.autograd.grad(outputs[0], (inputs[0], plain.weight, plain.bias), delta)
    for output, given in zip(outputs[1:], inputs[1:], strict=True):
        torch.testing.assert_close(output, outputs[0])
        found = torch.autograd.grad(output, (given, layer.weight, layer.bias), delta)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("norm", slow_but(["group", "block"], "group"))
def test_group_normalisation_first_in_a_block_learns_without_a_tangent(norm: str) -> None:
    """torch's own backward for an input without a gradient crashes in channels_last."""
    script = """
import torch
from torch import nn
from fdfa_ext import FDFA, FDFABlock, FDFAConv2d
first = nn.GroupNorm(2, 8)
if {norm!r} == "block":
    first = nn.Sequential(first, nn.ReLU())
net = nn.Sequential(FDFAConv2d(1, 8, 3), FDFABlock(first), nn.Flatten(), nn.Linear(800, 3))
for method in ("dfa", "fdfa"):
    FDFA(net, method=method)(torch.randn(4, 1, 12, 12)).sum().backward()
    assert net[1][0].get_parameter({name!r}).grad.isfinite().all()
"""
    name = "weight" if norm == "group" else "0.weight"
    ran = subprocess.run(
        [sys.executable, "-c", script.format(norm=norm, name=name)],
        env={"PYTHONPATH": ":".join(sys.path)},
        stderr=subprocess.PIPE,
    )
    assert ran.returncode == 0, ran.stderr[-300:]


def test_a_strided_kernel_in_a_residual_branch_has_its_gradient() -> None:
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short = nn.Conv2d(4, 6, 1, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.short(x))

    x = torch.randn(5, 4, 8, 8)
    block = FDFABlock(Down())
    model = FDFA(nn.Sequential(block, nn.Flatten(), nn.Linear(96, 3)), method="dfa", example_input=x)
    model(x).sum().backward()
    short = copy_of(block[0].short)
    y = torch.tanh(F.conv2d(x, short.weight, short.bias, 2))
    y.backward(torch.ones(5, 3).matmul(model.feedback["0"].flatten(1)).view_as(y))
    torch.testing.assert_close(block[0].short.weight.grad, short.weight.grad, rtol=1e-4, atol=1e-5)


def copy_of(layer: nn.Conv2d) -> nn.Conv2d:
    copied = nn.Conv2d(4, 6, 1, 2)
    copied.load_state_dict(layer.state_dict())
    return copied


class EverySecond(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, ::2, ::2]


def test_a_strided_kernel_within_a_block_carries_the_tangent_of_the_pixels_that_it_reads() -> None:
    x = torch.randn(5, 2, 8, 8)
    found = []
    for start in ([nn.Conv2d(4, 6, 1, 2)], [EverySecond(), nn.Conv2d(4, 6, 1)]):
        block = FDFABlock(*start, nn.Tanh(), nn.Conv2d(6, 4, 1), nn.Tanh())
        first = FDFAConv2d(2, 4, 1, activation="tanh")
        net = nn.Sequential(first, block, nn.Flatten(), nn.Linear(64, 3))
        torch.manual_seed(4)
        for p in net.parameters():
            nn.init.normal_(p)
        model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
        model(x).sum().backward()
        found.append([*model.feedback.values(), *[p.grad for p in net.parameters()]])
    for actual, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
