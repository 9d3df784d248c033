"""Outputs with a row for each token or pixel: each counts as a sample, also where strides lie between."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFAConv2d, FDFALinear
from fdfa_ext.metrics import feedback_ceiling, mean_jacobian
from fdfa_ext.positions import Cells, Positions

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}


def wrapped(net: nn.Module, x: Any, seed: int = 3, **options: Any) -> FDFA:
    torch.manual_seed(seed)
    return FDFA(net, example_input=x, **{**OPTIONS, **options})


def of_pixels(net: nn.Sequential, blocks: bool) -> nn.Sequential:
    """What a net of rows does, by convolutions of one pixel. [N, 6, *grid] → [N, 3, *grid]."""

    def conv(linear: nn.Linear, kind: Any = nn.Conv2d, **options: Any) -> nn.Module:
        module = kind(linear.in_features, linear.out_features, 1, **options)
        module.weight.data.copy_(linear.weight.view_as(module.weight))
        module.bias.data.copy_(linear.bias)
        return module

    first, act, second, gelu, head = net
    if blocks:
        hidden = [conv(first, FDFAConv2d, activation="tanh"), FDFABlock(conv(second), gelu)]
        return nn.Sequential(*hidden, conv(head))
    return nn.Sequential(conv(first), act, conv(second), gelu, conv(head))


def of_rows() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3))


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w", "bp"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_pixel_counts_as_a_sample(method: str, blocks: bool, backend: str) -> None:
    options = {"method": method, "backend": backend}
    net = of_rows()
    rows = wrapped(net, torch.randn(4, 6), at=["1", "3"], **options)
    pixels = wrapped(
        of_pixels(copy.deepcopy(net), blocks),
        torch.randn(2, 6, 3, 4),
        at=None if blocks else ["1", "3"],
        **options,
    )
    optimizers = [torch.optim.SGD(m.forward_parameters(), lr=0.1) for m in (rows, pixels)]
    for height in (3, 5, 3):
        x, y = torch.randn(2, 6, height, 4), torch.randint(3, (2, height, 4))
        inputs = x.movedim(1, -1).flatten(0, 2), x
        for model, optimizer, input in zip((rows, pixels), optimizers, inputs, strict=True):
            optimizer.zero_grad()
            out = model(input)
            shape = (2, 3, height, 4) if model is pixels else (2 * height * 4, 3)
            assert all(o.shape == shape for o in (out, *model.local_outputs))
            target = y if model is pixels else y.flatten()
            sum(F.cross_entropy(o, target) for o in (out, *model.local_outputs)).backward()
            optimizer.step()
        pairs = zip(pixels.module.parameters(), rows.module.parameters(), strict=True)
        for mine, theirs in (
            *pairs,
            *zip(pixels.feedback.values(), rows.feedback.values(), strict=True),
        ):
            torch.testing.assert_close(mine, theirs.view_as(mine), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_signals_and_volumes_have_positions_too(kind: type[nn.Module]) -> None:
    grid = (4,) if kind is nn.Conv1d else (2, 3, 4)
    torch.manual_seed(0)
    net = nn.Sequential(kind(6, 8, 1), nn.Tanh(), kind(8, 3, 1))
    model = wrapped(net, torch.randn(2, 6, *grid), at="auto")
    assert [tuple(b.shape) for b in model.feedback.values()] == [(3, 8)]
    model.feedback["1"].copy_(net[2].weight.detach().view(3, 8))
    model.feedback_lr = 0
    x, y = torch.randn(2, 6, *grid), torch.randint(3, (2, *grid))
    found, expected = gradients(model, x, y), gradients(net, x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient, rtol=1e-4, atol=1e-6)


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
@pytest.mark.parametrize("feedback", ["adam", "ema", "grad"])
def test_an_output_of_one_value_a_sample(method: str, feedback: str) -> None:
    net = nn.Sequential(FDFALinear(6, 8, activation="relu"), nn.Linear(8, 1))
    options = {"method": method, "feedback": feedback}
    column = wrapped(net, torch.randn(4, 6), **options)
    single = wrapped(nn.Sequential(*copy.deepcopy(net), nn.Flatten(0)), torch.randn(4, 6), **options)
    x, y = torch.randn(4, 6), torch.rand(4)
    for model in (column, single):
        model.zero_grad()
        F.binary_cross_entropy_with_logits(model(x).flatten(), y).backward()
    for mine, theirs in zip(single.parameters(), column.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert single(x).shape == single.eval()(x).shape == (4,)


class Strided(nn.Module):
    """[N, 4, side, side] → [N, 3, 6, 6], linear behind the layer, whose pixels are cells of the output's
    or parts of its pixels."""

    def __init__(self, side: int, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.side, self.head = layer, side, nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h = F.interpolate(h, size=6) if self.side <= 6 else F.avg_pool2d(h, self.side // 6)
        return self.head(h)


CELLS = {3: 1.0, 2: 1.0, 1: 1.0, 12: 0.25}  # by side of the features, B as a part of the head's weight


@pytest.mark.parametrize("side", CELLS)
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_with_exact_feedback_cells_get_backpropagations_gradient(
    side: int, blocks: bool, backend: str
) -> None:
    torch.manual_seed(0)
    layer = FDFAConv2d(4, 5, 1) if blocks else nn.Conv2d(4, 5, 1)
    net = Strided(side, layer)
    x, y = torch.randn(2, 4, side, side), torch.randint(3, (2, 6, 6))
    model = wrapped(net, x, at=None if blocks else ["layer"], backend=backend)
    model.feedback["layer"].copy_(net.head.weight.detach().view(3, 5) * CELLS[side])
    model.feedback_lr = 0
    found, expected = gradients(model, x, y), gradients(net, x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", CELLS)
def test_feedback_of_cells_is_the_mean_jacobian_of_a_position(side: int) -> None:
    torch.manual_seed(0)
    net = Strided(side, nn.Conv2d(4, 5, 1))
    model = wrapped(net, torch.randn(2, 4, side, side), at=["layer"], feedback_lr=0.01)
    for _ in range(1500):
        model(torch.randn(16, 4, side, side)).sum().backward()
    expected = net.head.weight.detach().view(3, 5) * CELLS[side]
    torch.testing.assert_close(model.feedback["layer"], expected, rtol=0.25, atol=0.05)
    x = torch.randn(2, 4, side, side)
    torch.testing.assert_close(mean_jacobian(model, x)["layer"], expected)
    angles = feedback_ceiling(model, (x, torch.randint(3, (2, 6, 6))))
    assert max(angles.values()) < 0.1  # linear behind the layer, the Jacobian is that of every pixel


@pytest.mark.parametrize("side", [6, 7, 9, 17])
def test_what_a_stride_cuts_at_the_edges_moves_no_cell(side: int) -> None:
    """With exact B all gradients are exact but for the output at the cut edge, which has no loss."""
    torch.manual_seed(0)
    finer = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AvgPool2d(2), nn.Conv2d(5, 4, 1))
    up = nn.Upsample(scale_factor=2)
    pad = nn.ZeroPad2d((0, side % 2, 0, side % 2))
    coarser = nn.Sequential(nn.Conv2d(3, 5, 1), nn.MaxPool2d(2), up, pad, nn.Conv2d(5, 4, 1))
    even = side // 2 * 2
    for net, point, part in ((finer, "0", 0.25), (coarser, "1", 1.0)):
        x = torch.randn(2, 3, side, side)
        if net is finer:
            x[:, :, even:] = x[:, :, :, even:] = 0
        model = wrapped(net, x, at=[point])
        model.feedback[point].copy_(net[-1].weight.detach()[:, :, 0, 0] * part)
        model.feedback_lr = 0
        found = []
        for m in (model, net):
            net.zero_grad()
            m(x)[:, :, :even, :even].square().sum().backward()
            found.append(net[0].weight.grad.clone())
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


class Permuted(nn.Module):
    """[N, 3, T] → [N, K, T] by a forward of its own."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.a, self.o = FDFABlock(nn.Conv1d(3, 5, 1)), nn.Conv1d(5, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.a(x))


@pytest.mark.parametrize(("outputs", "length"), [(4, 9), (8, 16), (8, 8), (16, 8), (1, 8)])
def test_the_layer_that_returns_the_output_tells_its_layout(outputs: int, length: int) -> None:
    model = wrapped(Permuted(outputs), torch.randn(2, 3, length))
    assert model.feedback["a"].shape == (outputs, 5)
    assert model.network.returning == "o"
    model(torch.randn(2, 3, length)).sum().backward()


class UNet(nn.Module):
    """[N, 1, H, W] → [N, 3, H, W] in two scales, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = Double(1, 6), Double(6, 8)
        self.up, self.join, self.head = (
            nn.ConvTranspose2d(8, 6, 2, 2),
            Double(12, 6),
            nn.Conv2d(6, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.deep(F.max_pool2d(skip, 2))
        return self.head(self.join(torch.cat([skip, self.up(deep)], 1)))


class Double(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers = [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(
            *layers, nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()
        )


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
@pytest.mark.parametrize("feedback", ["adam", "ema", "grad"])
def test_parts_of_other_positions_make_one_step(method: str, feedback: str) -> None:
    net, x = UNet(), torch.randn(2, 1, 8, 8)
    model = wrapped(net, x, at="auto", method=method, feedback=feedback)
    assert model.block_names == ["down", "deep", "up", "join"]
    optimizer = torch.optim.Adam(model.parameters())
    twin = copy.deepcopy(model), torch.optim.Adam(model.parameters())
    for step in range(1, 4):
        model.zero_grad()
        F.cross_entropy(model(x), torch.randint(3, (2, 8, 8))).backward()
        optimizer.step()
        assert model.updates.item() == (step if feedback == "adam" and method != "dfa" else 0)
        assert model.noise_state[1] == (step if method == "fdfa" else 0)
    assert all(p.grad is not None and p.grad.any() for p in net.parameters() if p.dim() > 1)
    assert all(b.any() for b in model.feedback.values())
    assert twin


def test_adams_count_is_that_of_the_backward_for_all_parts() -> None:
    """Two forwards before their backwards are two updates, for the blocks of each grid alike."""
    x, y = torch.randn(2, 4, 3, 3), torch.randint(3, (2, 6, 6))
    net = Strided(3, nn.Conv2d(4, 5, 1))
    # The same with features of the output's own positions: a copy for each pixel of a cell.
    models = [wrapped(copy.deepcopy(net), x, at=["layer"], feedback="adam") for _ in range(2)]
    apart, together = models
    losses = [F.cross_entropy(together(x), y) for _ in range(2)]
    for loss in losses:
        loss.backward()
    for _ in range(2):
        F.cross_entropy(apart(x), y).backward()
    torch.testing.assert_close(together.feedback["layer"], apart.feedback["layer"], rtol=0, atol=0)
    assert together.updates.item() == 2


@pytest.mark.parametrize("method", ["fg-a", "lg-fg-a"])
def test_forward_gradients_want_the_outputs_own_positions(method: str) -> None:
    x = torch.randn(2, 4, 3, 3)
    model = wrapped(Strided(3, nn.Conv2d(4, 5, 1)), x, at=["layer"], method=method)
    with pytest.raises(ValueError, match=r"'layer' has \[2, 5, 3, 3\]"):
        model(x)


def test_features_of_other_positions_are_refused() -> None:
    class Cropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[..., 2:, :])

    message = "'layer' must have features of each; got .*, of 2 x 8 x 6 pixels"
    with pytest.raises(ValueError, match=message):
        wrapped(Cropping(), torch.randn(2, 4, 8, 6), at=["layer"])
    model = wrapped(Cropping(), torch.randn(2, 4, 8, 6), at="auto")
    assert model.block_names == ["head.input"]  # which is cropped


@pytest.mark.parametrize(
    ("before", "after"), [(6, 3), (7, 3), (33, 16), (33, 17), (5, 1), (3, 6), (3, 7)]
)
def test_cells_are_those_of_a_stride(before: int, after: int) -> None:
    rows = torch.randn(2 * before, 3)
    cells = Cells(Positions(2, (before,), True), (after,))
    sums, means = (f(rows).view(2, after, 3) for f in (cells.errors, cells.tangents))
    values = rows.view(2, before, 3)
    stride = round(max(before, after) / min(before, after))
    if after > before:
        expected = values[:, (torch.arange(after) // stride).clamp(max=before - 1)]
        torch.testing.assert_close(sums, expected)
        torch.testing.assert_close(means, expected)
        return
    index = (torch.arange(before) // stride).clamp(max=after - 1)
    expected = torch.zeros(2, after, 3).index_add_(1, index, values)
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(means, expected / index.bincount().view(-1, 1))


class OfGraphs(nn.Module):
    """Nodes [V, 4] of concatenated graphs, and the graph of each → [N, 3], linear behind the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.neck, self.head = layer, nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, nodes: Tensor, graph: Tensor) -> Tensor:
        h = self.layer(nodes)
        sums = h.new_zeros(int(graph[-1]) + 1, 5).index_add(0, graph, h)
        return self.head(self.neck(sums))


GRAPH = torch.tensor([0, 0, 1, 1, 1, 2])


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_nodes_of_graphs_have_their_graphs_error(blocks: bool, backend: str) -> None:
    torch.manual_seed(0)
    net = OfGraphs(FDFALinear(4, 5) if blocks else nn.Linear(4, 5))
    at = ["layer", "neck"] if not blocks else ["neck"]
    x, y = torch.randn(6, 4), torch.tensor([0, 2, 1])
    model = wrapped(net, (x, GRAPH), at=at, sample_index="graph", backend=backend)
    model.feedback["layer"].copy_(net.head.weight.detach() @ net.neck.weight.detach())
    model.feedback["neck"].copy_(net.head.weight.detach())
    model.feedback_lr = 0
    F.cross_entropy(model(x, graph=GRAPH), y).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    F.cross_entropy(net(x, GRAPH), y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_feedback_of_nodes_is_the_mean_jacobian_of_a_node() -> None:
    torch.manual_seed(0)
    net = OfGraphs(nn.Linear(4, 5))
    options = {"at": ["layer", "neck"], "sample_index": "graph", "feedback_lr": 0.003}
    model = wrapped(net, (torch.randn(6, 4), GRAPH), **options)
    graph = torch.arange(30).sort().values // 3
    for _ in range(2000):
        model(torch.randn(30, 4), graph).sum().backward()
    expected = net.head.weight.detach() @ net.neck.weight.detach()
    torch.testing.assert_close(model.feedback["layer"], expected, rtol=0.25, atol=0.05)
    batch = (torch.randn(6, 4), GRAPH), torch.tensor([0, 1, 2])
    torch.testing.assert_close(mean_jacobian(model, batch[0])["layer"], expected)
    assert max(feedback_ceiling(model, batch).values()) < 0.1


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_an_output_layer_behind_parts_is_autograds(method: str, backend: str) -> None:
    """The last linear layer of a net of blocks may be left to the method, but where rows differ."""
    net = OfGraphs(FDFALinear(4, 5))
    net.neck = nn.Identity()
    options = {"sample_index": "graph", "method": method, "backend": backend}
    model = wrapped(net, (torch.randn(6, 4), GRAPH), **options)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(6, 4), GRAPH).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("method", ["dfa", "dkp", "fg-a"])
def test_other_methods_train_nodes(method: str) -> None:
    net = OfGraphs(nn.Linear(4, 5))
    options = {"sample_index": "graph", "method": method}
    model = wrapped(net, (torch.randn(6, 4), GRAPH), at=["layer", "neck"], **options)
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(6, 4), GRAPH).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    ("options", "graph", "error", "message"),
    [
        (
            {"sample_index": "batch"},
            GRAPH,
            ValueError,
            "sample_index names argument 'batch', which OfG",
        ),
        ({}, GRAPH.int(), TypeError, "'graph' must be an int64 tensor"),
        (
            {},
            torch.tensor([0, 0, 1, 1, 2, 5]),
            ValueError,
            "'layer' has 6 rows, and these may be the 6",
        ),
        ({"method": "lg-fg-a"}, GRAPH, ValueError, "LocalGreedy needs features of the output's own"),
    ],
)
def test_what_gives_no_sample_of_a_row_is_refused(
    options: dict[str, Any], graph: Tensor, error: type, message: str
) -> None:
    x = torch.randn(6, 4)
    own = {"at": ["layer", "neck"], "sample_index": "graph", **options}
    with pytest.raises(error, match=message):
        wrapped(OfGraphs(nn.Linear(4, 5)), (x, graph), **own)(x, graph)
