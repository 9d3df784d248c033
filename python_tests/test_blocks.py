"""Blocks: whatever modules a block holds and ends in, it trains as the reference does, on rows, images and volumes."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Residue, batch, make, step
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.dual_pass import BACKENDS
from fdfa_ext.fusion import find_tail


def test_batch_norm_moves_its_statistics_once_and_from_the_primal_only() -> None:
    model = make("block_net")
    plain = copy.deepcopy(model.module)
    x, _ = batch("block_net")
    model(x)
    plain(x)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[key], value, msg=key)
    assert model.module[0][1].num_batches_tracked == 1


@pytest.mark.parametrize(
    "end",
    [
        lambda: [nn.BatchNorm2d(4), nn.ReLU(inplace=True)],
        lambda: [nn.BatchNorm2d(4, affine=False), nn.GELU()],
        lambda: [nn.BatchNorm2d(4, track_running_stats=False, momentum=0.3)],
        # No fused pass: each has something that it does not do.
        lambda: [nn.BatchNorm2d(4, momentum=None), nn.ReLU()],
        lambda: [nn.BatchNorm2d(4), nn.LeakyReLU(0.3)],
        lambda: [nn.BatchNorm2d(4), nn.GELU("tanh")],
        lambda: [nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)],
    ],
)
def test_a_block_with_batch_norm_trains_as_the_reference(end: Any) -> None:
    """Three steps: loss, gradients, feedback and every buffer."""

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(
            FDFABlock(nn.Conv2d(2, 4, 3, bias=False), *end()),
            FDFABlock(nn.Conv2d(4, 4, 3), *end()),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        x, labels = torch.randn(6, 2, 14, 14), torch.arange(6) % 3
        net(x)
        model = FDFA(net, backend=backend, feedback_lr=0.05, example_input=x)
        seen = []
        for _ in range(3):
            loss = F.cross_entropy(model(x), labels)
            model.zero_grad()
            loss.backward()
            seen += [loss.detach(), *[p.grad.clone() for p in net.parameters() if p.grad is not None]]
        return seen + [t.clone() for t in model.state_dict().values()]

    for actual, expected in zip(run("fused"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("chain", "fused_from"),
    [
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)], 0),
        (lambda: [nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.Tanh(), nn.MaxPool2d(3, 2, 1)], 0),
        (lambda: [nn.Conv2d(2, 20, 3, padding=1), nn.MaxPool2d((2, 3))], 0),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(16, 8, 8)], 0),
        (lambda: [nn.Conv2d(2, 4, 3, dilation=2), nn.GELU()], 0),
        (lambda: [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2)], 1),
        (lambda: [nn.Dropout2d(0.0), nn.BatchNorm2d(2), nn.MaxPool2d(2)], 1),
        (lambda: [nn.Flatten(), nn.Linear(288, 9), nn.BatchNorm1d(9), nn.SiLU()], 2),
        (lambda: [nn.Dropout2d(0.0), nn.Conv2d(2, 4, 3), nn.ReLU()], 1),
        (lambda: [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 9), nn.Tanh()], 2),
        # Each has something that the operators do not do.
        (lambda: [nn.Conv2d(2, 4, 3), nn.GELU(), nn.MaxPool2d(2)], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(17, 8, 8)], None),
        (lambda: [nn.Conv2d(2, 4, 3, padding_mode="circular", padding=1), nn.ReLU()], None),
        (lambda: [nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()], None),
        (lambda: [nn.MaxPool2d(2)], None),
    ],
)
def test_a_chain_trains_as_the_reference(chain: Any, fused_from: int | None) -> None:
    """Two such blocks, the first of which gets no tangent, over three steps."""
    end = find_tail(chain())
    assert fused_from == (None if end is None else end.start)

    def run(backend: str) -> list[Tensor]:
        torch.manual_seed(0)
        first = chain()
        x, labels = torch.randn(6, 2, 12, 12), torch.arange(6) % 3
        net = nn.Sequential(
            FDFABlock(nn.Conv2d(2, 2, 3, padding=1)),
            FDFABlock(*first),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        net = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (12, 12)), *net)
        net(x)
        model = FDFA(net, backend=backend, feedback_lr=0.05, example_input=x)
        alone = nn.Sequential(FDFABlock(*copy.deepcopy(first)), nn.Flatten(), nn.LazyLinear(3))
        alone(x)
        single = FDFA(alone, backend=backend, feedback_lr=0.05, example_input=x)
        seen = []
        for _ in range(3):
            for each in (model, single):
                loss = F.cross_entropy(each(x), labels)
                each.zero_grad()
                loss.backward()
                gradients = [p.grad.clone() for p in each.parameters() if p.grad is not None]
                seen += [loss.detach(), *gradients]
        return seen + [t.clone() for each in (model, single) for t in each.state_dict().values()]

    for actual, expected in zip(run("fused"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("normalizes", [False, True])
def test_a_pooled_block_keeps_winners_in_the_place_of_what_it_pooled(normalizes: bool) -> None:
    """A byte for each element of the pooled image, and none of the activation before the pool."""
    x = torch.randn(4, 1, 12, 12)
    norm = [nn.BatchNorm2d(5)] if normalizes else []
    block = FDFABlock(nn.Conv2d(1, 5, 3), *norm, nn.ReLU(), nn.MaxPool2d(2))
    model = FDFA(nn.Sequential(block, nn.Flatten(), nn.Linear(125, 3)), example_input=x)
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    assert [t.shape for t in saved if t.dtype == torch.uint8] == [(4, 5, 5, 5)]
    # The normalisation keeps its input, as torch's does.
    assert sum(t.shape == (4, 5, 10, 10) for t in saved) == normalizes


def test_padding_that_the_operator_has_not_is_done_before_it() -> None:
    for arguments in ({"padding": "same"}, {"padding": 1, "padding_mode": "circular"}):
        net = nn.Sequential(
            FDFAConv2d(1, 2, 4, activation="relu"),
            FDFAConv2d(2, 3, 4, **arguments),
            nn.Flatten(),
            nn.LazyLinear(3),
        )
        x = torch.randn(4, 1, 9, 9)
        net(x)
        model = FDFA(net, example_input=x)
        torch.testing.assert_close(model(x), net(x))


@pytest.mark.parametrize(
    "norm", [lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(4, 4, affine=False), Residue]
)
@pytest.mark.parametrize("method", ["fdfa", "fg-w"])
def test_group_normalisation_takes_images_in_any_order(norm: Any, method: str) -> None:
    """In a block and between blocks; torch's forward mode takes rows of contiguous images alone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        FDFAConv2d(2, 4, 3, activation="tanh"),
        FDFABlock(nn.Conv2d(4, 4, 3), norm(), nn.SiLU()),
        nn.GroupNorm(2, 4, affine=False),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    x = torch.randn(5, 2, 8, 8)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = FDFA(copy.deepcopy(net), method=method, feedback="ema", feedback_lr=0.5)
        model.noise_state.copy_(torch.tensor([7, 0, 0]))
        model(x.contiguous(memory_format=memory_format)).square().sum().backward()
        results.append([*model.feedback.values(), *[p.grad for p in model.parameters()]])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["fdfa", "fg-a"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dense_block_takes_any_dimensions_between_batch_and_features(
    method: str, backend: str
) -> None:
    found = []
    for between in ((12,), (3, 4), (3, 2, 2)):
        torch.manual_seed(0)
        x = torch.randn(5, *between, 6)
        net = nn.Sequential(FDFALinear(6, 8, activation="tanh"), nn.Flatten(), nn.Linear(96, 3))
        model = FDFA(net, method=method, backend=backend, feedback_lr=0.05, example_input=x)
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
        found.append([p.grad for p in net.parameters()])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["fdfa", "dfa", "bp"])
@pytest.mark.parametrize("at", [None, ["0", "1"]])
@pytest.mark.parametrize("channels", [1, 4])
def test_group_normalisation_takes_one_channel_and_one_pixel(
    channels: int, at: Any, method: str, backend: str
) -> None:
    """Which are in both memory orders at once: torch's backward crashes where the strides are those of
    channels_last and the input needs no gradient, as behind a block, a point or a frozen layer."""
    size = 1 if channels == 4 else 6
    layers: list[nn.Module] = [nn.Conv2d(2, channels, 7 - size, bias=False), nn.GroupNorm(1, channels)]
    if at is None:
        layers = [FDFABlock(layers[0]), FDFABlock(layers[1])]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size**2, 3))
    x = torch.randn(5, 2, 6, 6)
    model = FDFA(net, at=at, method=method, backend=backend, example_input=x)
    for matrix in model.feedback.values():
        matrix.normal_()
    for _ in range(3):  # memory that is not the tensor's need not be another's at once
        F.cross_entropy(model(x), torch.arange(5) % 3).backward()
    assert all(p.grad.any() and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("method", ["fdfa", "dfa", "bp"])
@pytest.mark.parametrize("at", [None, ["3"]])
def test_one_sample_has_exact_gradients_through_instance_norm(at: Any, method: str) -> None:
    found = []
    for dtype, backend in ((torch.float32, "fused"), (torch.float64, "reference")):
        torch.manual_seed(1)
        layers: list[nn.Module] = [
            nn.Conv2d(2, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.InstanceNorm2d(4),
        ]
        if at is None:
            layers = [FDFABlock(*layers[:2]), FDFABlock(*layers[2:])]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)).to(dtype)
        x = torch.randn(1, 2, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
        model = FDFA(net, at=at, method=method, backend=backend, example_input=x)
        F.cross_entropy(model(x), torch.tensor([1])).backward()
        found.append([p.grad.double() for p in net.parameters() if p.grad is not None])
    scale = max(gradient.norm() for gradient in found[1])
    for fused, exact in zip(*found, strict=True):
        assert (fused - exact).norm() < 1e-5 * scale


def test_volumes_train_as_the_reference() -> None:
    x, y = torch.randn(4, 1, 3, 3, 4), torch.arange(4) % 3
    net = nn.Sequential(
        FDFABlock(nn.Conv3d(1, 6, (2, 1, 1)), nn.ReLU()), nn.Flatten(), nn.Linear(144, 3)
    )
    for method in ("fdfa", "fg-a"):
        gradients = []
        for backend in BACKENDS:
            torch.manual_seed(0)
            model = FDFA(copy.deepcopy(net), method=method, backend=backend, example_input=x)
            F.cross_entropy(model(x), y).backward()
            gradients.append([p.grad for p in model.module.parameters()])
        for actual, expected in zip(*gradients, strict=True):
            assert expected.any()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_a_block_may_return_an_expanded_tensor() -> None:
    class Repeat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1, keepdim=True).expand(-1, 4, -1)

    net = nn.Sequential(FDFABlock(nn.Linear(6, 6), Repeat()), nn.Flatten(), nn.Linear(24, 3))
    x, y = torch.randn(16, 5, 6), torch.randint(3, (16,))
    model = FDFA(net, feedback="ema", feedback_lr=0.05, example_input=x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x, y) for _ in range(100)]
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(model(x), model.eval()(x))


class _Both(nn.Module):
    """[N, 6] → [N, 3] of a block's output and of what the next block makes of it."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = FDFALinear(6, 8, activation="tanh"), second
        self.output = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.output(torch.cat([self.second(y), y], dim=1))


@pytest.mark.parametrize("chain", [[nn.BatchNorm1d(8)], [nn.Flatten(), nn.BatchNorm1d(8), nn.ReLU()]])
def test_a_block_leaves_the_tangent_of_its_input_to_others(chain: list[nn.Module]) -> None:
    """Batch-norm may write its tangent over the one that it was given, but not over another block's."""
    x = torch.randn(5, 6)
    torch.manual_seed(2)
    models = [FDFA(_Both(FDFABlock(*chain)), feedback_lr=0.1, example_input=x)]
    models.append(copy.deepcopy(models[0]))
    models[1].backend = "reference"
    for model in models:
        model(x).square().sum().backward()
    for name, matrix in models[0].feedback.items():
        torch.testing.assert_close(matrix, models[1].feedback[name], rtol=1e-4, atol=1e-5)


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """[N, T, E] → [N, T, E]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "attention",
    [Attention(8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)],
    ids=["own", "torch"],
)
def test_residual_and_attention_blocks_learn(attention: nn.Module, backend: str) -> None:
    attention = copy.deepcopy(attention)
    net = nn.Sequential(
        FDFALinear(6, 8, activation="gelu"),
        FDFABlock(attention, nn.LayerNorm(8)),
        nn.Flatten(),
        FDFABlock(Residual(32)),
        nn.Linear(32, 3),
    )
    x, y = torch.randn(16, 4, 6), torch.randint(3, (16,))
    model = FDFA(net, feedback="ema", feedback_lr=0.05, example_input=x, backend=backend)
    assert {name: tuple(b.shape) for name, b in model.feedback.items()} == {
        "0": (3, 4, 8),
        "1": (3, 4, 8),
        "3": (3, 32),
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [step(model, optimizer, x, y) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    for parameter in model.forward_parameters():
        assert parameter.grad is not None


def test_attention_alone_does_without_fused_kernels_and_leaves_them_as_they_are() -> None:
    """They have no forward mode, so a tangent shows that they gave way."""
    cuda = torch.backends.cuda
    enabled = [cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.cudnn_sdp_enabled]
    within = []

    class Attends(nn.Module):
        features = 8

        def forward(self, x: Tensor) -> Tensor:
            within.append([ask() for ask in enabled])
            key = x[..., : self.features]
            return F.scaled_dot_product_attention(x, key, x)

    attends = Attends()
    net = nn.Sequential(FDFALinear(6, 8), attends, nn.Flatten(), nn.Linear(40, 3))
    x = torch.randn(4, 5, 6)
    cuda.enable_cudnn_sdp(False)  # the user's own choice
    try:
        model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
        model(x).sum().backward()
        within.append([ask() for ask in enabled])
        attends.features = 7
        with pytest.raises(RuntimeError, match="size"):
            model(x)
        within.append([ask() for ask in enabled])
    finally:
        cuda.enable_cudnn_sdp(True)
    assert model.feedback["0"].abs().max() > 0
    assert within == [[True, True, False]] * 7


@pytest.mark.parametrize("norm", [[], [nn.BatchNorm2d(4)]], ids=["convolution", "batch norm"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_a_pool_after_a_block_trains_as_the_reference(
    norm: list[nn.Module], activation: type[nn.Module]
) -> None:
    """In the same pass as the end of the block."""
    x, y = torch.randn(6, 1, 12, 12), torch.arange(6) % 3
    net = nn.Sequential(
        FDFABlock(nn.Conv2d(1, 4, 3), *copy.deepcopy(norm), activation()),
        nn.MaxPool2d(2),
        FDFABlock(nn.Conv2d(4, 4, 2), *copy.deepcopy(norm), activation()),
        nn.MaxPool2d(3, 1, padding=1),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    models = [FDFA(copy.deepcopy(net), feedback_lr=0.05, backend=b, example_input=x) for b in BACKENDS]
    models[1].noise_state.copy_(models[0].noise_state)
    for model in models:
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
    results = [[*m.state_dict().values(), *[p.grad for p in m.parameters()]] for m in models]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


class PoolWithIndices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, return_indices=True)[0]


def test_a_pool_that_returns_indices_too_has_the_same_tangent() -> None:
    x = torch.randn(5, 1, 8, 8)
    found = []
    for pool in (nn.MaxPool2d(2), PoolWithIndices()):
        torch.manual_seed(3)
        blocks = [FDFABlock(nn.Conv2d(1, 4, 3), nn.Tanh()), FDFABlock(nn.Conv2d(4, 4, 1), pool)]
        net = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(36, 3))
        model = FDFA(net, feedback="ema", feedback_lr=0.5, example_input=x)
        model(x).sum().backward()
        found.append([*model.feedback.values(), *[p.grad for p in net.parameters()]])
    for actual, expected in zip(*found, strict=True):
        assert expected.any()
        torch.testing.assert_close(actual, expected)
