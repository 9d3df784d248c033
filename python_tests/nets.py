"""Small nets, training steps and comparisons that several tests share."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def mlp(activation: str = "relu") -> nn.Sequential:
    """[N, 6] → [N, 3] over blocks '0' and '1'."""
    return nn.Sequential(
        FDFALinear(6, 8, activation=activation),
        FDFALinear(8, 7, activation=activation),
        nn.Linear(7, 3),
    )


def conv_net() -> nn.Sequential:
    """The README's kind of net on images [N, 1, 12, 12] → [N, 3]."""
    return nn.Sequential(
        FDFAConv2d(1, 4, 3, activation="relu"),
        nn.MaxPool2d(2),
        FDFAConv2d(4, 6, 3, padding=1, activation="relu"),
        nn.Flatten(),
        FDFALinear(150, 8, activation="relu"),
        nn.Linear(8, 3),
    )


def block_net() -> nn.Sequential:
    """Blocks of Conv → BatchNorm → ReLU → MaxPool, one pool outside; [N, 1, 12, 12] → [N, 3]."""
    return nn.Sequential(
        FDFABlock(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        FDFABlock(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        FDFABlock(nn.Linear(24, 8), nn.BatchNorm1d(8), nn.GELU()),
        nn.Linear(8, 3),
    )


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


NETS = {"mlp": (mlp, (6,)), "conv_net": (conv_net, (1, 12, 12)), "block_net": (block_net, (1, 12, 12))}


def batch(name: str, device: torch.device | str = "cpu", n: int = 5) -> tuple[Tensor, Tensor]:
    shape = NETS[name][1]
    return torch.randn(n, *shape, device=device), torch.randint(3, (n,), device=device)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def check_compiled_steps(make_model: Callable[[], FDFA], x: Tensor, y: Tensor) -> None:
    """Two steps of a compiled model leave the state that those of an eager one do."""
    states = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = make_model()
        run: Any = torch.compile(model) if compiles else model
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.05)
        for _ in range(2):
            step(run, optimizer, x, y)
        states.append(model.state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


def make(name: str = "mlp", device: torch.device | str = "cpu", **options: Any) -> FDFA:
    """One of NETS, with the same weights and noise each time."""
    torch.manual_seed(1)
    net = NETS[name][0]().to(device)
    return FDFA(net, example_input=batch(name, device)[0], **options)


OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}  # of trained()


def sequence() -> nn.Sequential:
    """[N, 6] → [N, 3], which needs no dual tensors."""
    return nn.Sequential(
        FDFALinear(6, 6, activation="tanh"),
        FDFABlock(nn.Linear(6, 6), nn.LeakyReLU()),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


class OwnForward(nn.Module):
    """The same modules by the same names, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in sequence().named_children():
            self.add_module(name, module)

    def __getitem__(self, index: int) -> Any:
        return self._modules[str(index)]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        self._modules[str(index)] = module

    def forward(self, x: Tensor) -> Tensor:
        y = self[0](x)
        return self[3](self[2](y + self[1](y)))


def images() -> nn.Sequential:
    """[N, 1, 9, 9] → [N, 3], whatever the sizes between are."""
    return nn.Sequential(
        FDFAConv2d(1, 4, 2, activation="relu"),
        nn.MaxPool2d(3, 2),
        nn.AdaptiveAvgPool2d(4),
        FDFABlock(nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.AdaptiveAvgPool2d(1),
        nn.ReLU(),
        nn.Flatten(),
        FDFABlock(nn.Linear(5, 6), nn.GELU()),
        nn.Linear(6, 3),
    )


def example(net: nn.Module) -> Tensor:
    return torch.randn(7, 1, 9, 9) if isinstance(net[0], FDFAConv2d) else torch.randn(7, 6)


def trained(net: Any, steps: int = 2, **options: Any) -> FDFA:
    x = example(net)
    model = FDFA(net, example_input=x, **{**OPTIONS, **options})
    for _ in range(steps):
        step(model, torch.optim.SGD(model.parameters(), lr=0.1), x, torch.arange(7) % 3)
    return model


def results(model: FDFA, x: Tensor) -> dict[str, Tensor]:
    """Of one more step: output, gradients, and all that is saved."""
    model.zero_grad()
    output = model(x)
    F.cross_entropy(output, torch.arange(len(x)) % output.shape[1]).backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.module.named_parameters()}
    return {"output": output.detach(), **gradients, **model.state_dict()}


def assert_trains_as_it_is(model: FDFA, x: Tensor, **close: Any) -> None:
    """As a model that was wrapped a moment ago, and computing what evaluation computes."""
    fresh = FDFA(copy.deepcopy(model.module), **{**OPTIONS, "backend": model.backend})
    fresh.load_state_dict(model.state_dict(), strict=False)
    for inner in model.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            inner.momentum = 0.0  # or evaluation would be of other statistics
    expected = results(fresh, x)
    actual = results(model, x)
    for key, value in actual.items():
        if "running" not in key:
            torch.testing.assert_close(value, expected[key], **{"rtol": 0, "atol": 0, **close}, msg=key)
    assert all(value.any() for key, value in actual.items() if key.startswith("gradient"))
    assert list(model.feedback) == list(fresh.feedback)
    assert all(matrix.any() for matrix in model.feedback.values())


def assert_evaluates_alike(model: FDFA, x: Tensor) -> None:
    torch.testing.assert_close(model(x).detach(), model.module(x).detach())
