"""Every module of torch's own test suite carries a tangent between a point and the output layer."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdfa_ext import FDFA
from fdfa_ext.duals import step_by_step
from fdfa_ext.reference import perturbation

pytest.importorskip("expecttest", reason="torch.testing's suites need it")
# It would forbid all other tests of this process to set flags of torch.backends.
with mock.patch.object(torch.backends, "disable_global_flags"):
    from torch.testing._internal import common_modules

pytestmark = pytest.mark.slow
MOST = 4  # inputs of a module, of up to 857
WITHOUT_FORWARD_MODE = {"nn.MultiLabelMarginLoss", "nn.MultiMarginLoss"}


class Scale(nn.Module):
    """The place of the point: a layer that any input passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Net(nn.Module):
    """start → module → output layer [N, 3]."""

    def __init__(self, module: nn.Module, others: tuple[Any, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.start, self.module, self.head = Scale(), module, nn.LazyLinear(3)
        self.others, self.options = others, options

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.start(x))

    def rest(self, y: Tensor) -> Tensor:
        out = self.module(y, *self.others, **self.options)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(out.flatten(1) if out.dim() > 1 else out[:, None])

    def without_dropout(self) -> "Net":
        for module in self.modules():
            if isinstance(module, nn.Dropout | nn.MultiheadAttention):
                module.__dict__["p" if isinstance(module, nn.Dropout) else "dropout"] = 0.0
        return self


def nets(info: Any) -> Iterator[tuple[Net, Tensor]]:
    """Those whose first input and output are floating-point batches of as many samples."""
    torch.manual_seed(0)
    for given in info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    )[:MOST]:
        x, *others = (*given.forward_input.args, None)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            continue
        constructor = given.constructor_input
        module = info.module_cls(*constructor.args, **constructor.kwargs)
        net = Net(module, tuple(others[:-1]), given.forward_input.kwargs).without_dropout()
        try:
            fits = net(x.clone()).shape[:1] == x.shape[:1]
        except (IndexError, RuntimeError):  # a result without samples
            continue
        if fits:
            yield net, x


def step(net: Net, x: Tensor) -> tuple[FDFA | None, Tensor | str]:
    """(model after one training step, perturbation of the point), or (None, the refusal)."""
    try:
        model = FDFA(net, at=["start"], example_input=x, feedback="ema", feedback_lr=0.5)
        u = perturbation(model.noise_state, 0, "gaussian", x.shape, channels_last=x.dim() == 4)
        torch.manual_seed(1)
        model(x).sum().backward()
    except RuntimeError as error:
        return None, str(error)
    return model, u


@pytest.mark.parametrize("info", common_modules.module_db, ids=lambda info: info.name)
def test_the_estimate_behind_a_module_is_that_of_forward_mode(info: Any) -> None:
    """B after one step at rate 1/2 is dᵀu / 2N, with d of torch's forward mode, where that is finite."""
    for net, x in nets(info):
        plain = copy.deepcopy(net)
        model, u = step(net, x)
        if model is None:
            assert info.name in WITHOUT_FORWARD_MODE
            assert "torch has no forward mode for it" in u
            continue
        torch.manual_seed(1)
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), step_by_step():
            tangent = forward_ad.unpack_dual(plain.rest(forward_ad.make_dual(x, u))).tangent
        assert tangent is not None
        expected = (0.5 * tangent.T @ u.flatten(1) / len(x)).nan_to_num(0.0, 0.0, 0.0)
        actual = model.feedback["start"].flatten(1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
