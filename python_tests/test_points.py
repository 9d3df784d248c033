"""Perturbation points: a model of any kind trains as one of blocks does, and is left as it is."""

import copy
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from nets import Times, step
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFABlock, FDFALinear, check
from fdfa_ext.metrics import feedback_alignment, feedback_ceiling, gradient_alignment, mean_jacobian

OPTIONS: dict[str, Any] = {"feedback": "ema", "feedback_lr": 0.3}


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 1, 12, 12)


def group(before: int, after: int, *then: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3), nn.BatchNorm2d(after), nn.ReLU(), *then]


def plain_net() -> nn.Sequential:
    """[N, 1, 12, 12] → [N, 3]; groups of layers end at '3', '6' and '9'."""
    return nn.Sequential(
        *group(1, 4, nn.MaxPool2d(2)),
        *group(4, 6),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


GROUPS = ["3", "6", "9"]


def blocks_of(net: nn.Sequential) -> nn.Sequential:
    """The same modules, each group as a block."""
    m = [*net]
    return nn.Sequential(FDFABlock(*m[:4]), FDFABlock(*m[4:7]), m[7], FDFABlock(m[8], m[9]), m[10])


class Residual(nn.Module):
    """A block of two layers with a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.second(torch.tanh(self.first(x))))


class ResidualNet(nn.Module):
    """[N, 6] → [N, 3] with a bare parameter and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.shift = nn.Parameter(torch.randn(8))
        self.body = nn.ModuleList([Residual(8), Residual(8)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.shift
        for block in self.body:
            x = block(x)
        return self.head(self.norm(x))


class Result(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class WithLoss(nn.Module):
    """Keyword inputs, and a loss of its own beside the output, as transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResidualNet()
        self.head = nn.Linear(3, 3)

    def forward(self, *, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.head(self.net(inputs))
        loss = None if labels is None else F.cross_entropy(logits.log_softmax(1), labels)
        return {"loss": loss, "logits": logits}


def wrapped(net: nn.Module, x: Any, seed: int = 3, **options: Any) -> FDFA:
    torch.manual_seed(seed)
    return FDFA(net, example_input=x, **{**OPTIONS, **options})


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a"])
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_groups_of_layers_train_as_blocks_do(method: str, patch: int, backend: str) -> None:
    net, options = plain_net(), {"method": method, "patch": patch, "backend": backend}
    blocks = wrapped(blocks_of(copy.deepcopy(net)), images(), **options)
    points = wrapped(net, images(), at="auto", **options)
    assert points.block_names == GROUPS
    optimizers = [torch.optim.SGD(m.forward_parameters(), lr=0.1) for m in (points, blocks)]
    for _ in range(3):
        x, y = images(), torch.randint(3, (5,))
        for model, optimizer in zip((points, blocks), optimizers, strict=True):
            optimizer.zero_grad()
            losses = [F.cross_entropy(out, y) for out in (model(x), *model.local_outputs)]
            sum(losses[1:], losses[0]).backward()
            optimizer.step()
        pairs = zip(points.module.parameters(), blocks.module.parameters(), strict=True)
        for mine, theirs in (
            *pairs,
            *zip(points.feedback.values(), blocks.feedback.values(), strict=True),
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


class Linearly(nn.Module):
    """Linear behind its points, so that every sample has the mean Jacobian. With bare parameters, a skip
    past a point, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, self.token.expand_as(x)], 1)
        x = torch.tanh(self.twice(x))
        first = self.first(x)
        second = self.second(first + self.token) * self.scale + first + x
        return self.head(self.twice(second).sum(1))


def test_with_exact_feedback_every_parameter_gets_backpropagations_gradient() -> None:
    net = Linearly().double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    model = wrapped(net, x, at=["first", "second"], backend="reference")
    for name, jacobian in mean_jacobian(model, x).items():
        model.feedback[name].copy_(jacobian)
    model.feedback_lr = 0
    assert max(gradient_alignment(model, (x, y)).values()) < 1e-4
    F.cross_entropy(model(x), y).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_tangent_is_that_of_the_perturbed_model() -> None:
    net, x = ResidualNet().double(), torch.randn(4, 6).double()
    model = wrapped(net, x, at="auto", backend="reference", method="fdfa", feedback_lr=1.0 - 1e-9)
    names = model.block_names
    found: list[Tensor] = []

    class Recorder(type(model.method)):  # type: ignore[misc]
        def feedback_gradients(self, blocks: Any) -> Any:
            noise.update({b.name: b.perturbation.double() for b in blocks})
            found.append(blocks[0].tangent)
            return super().feedback_gradients(blocks)

    noise: dict[str, Tensor] = {}
    torch.manual_seed(3)
    model = FDFA(net, at=names, method=Recorder(), backend="reference", example_input=x)
    model(x).sum().backward()

    def perturbed(step: float) -> Tensor:
        hooks = [
            net.get_submodule(n).register_forward_hook(lambda _, __, out, n=n: out + step * noise[n])
            for n in names
        ]
        try:
            with torch.no_grad():
                return net(x)
        finally:
            for hook in hooks:
                hook.remove()

    difference = (perturbed(1e-4) - perturbed(-1e-4)) / 2e-4
    torch.testing.assert_close(found[0].double(), difference, rtol=1e-4, atol=1e-5)


def test_auto_takes_repeated_blocks_and_groups_of_layers() -> None:
    x = torch.randn(4, 6)
    assert wrapped(ResidualNet(), x, at="auto").block_names == ["stem", "body.0", "body.1"]
    layers = wrapped(ResidualNet(), x, at="auto", granularity="layer").block_names
    assert layers == ["stem", "body.0.first", "body.0.second", "body.1.first", "body.1.second"]


class PreNorm(nn.Module):
    """Transformer layers that normalise first, with a stem and a norm at the end."""

    def __init__(self, norm_first: bool = True) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(8)
        self.neck, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.neck(self.norm(x).mean(1))))


def test_auto_stands_behind_the_norms_of_layers_that_normalise_first() -> None:
    x = torch.randn(4, 5, 6)
    # What attention reads goes to other tokens, which B has no part of: norm1 has no point.
    first = ["layers.0.norm2", "layers.1.norm2", "norm", "head.input"]
    model = wrapped(PreNorm(), x, at="auto")
    assert model.block_names == first
    # Nothing cuts the skip connections before the last norm.
    learns = [point.name for point in model.summary(x).points if "stem.weight" in point.parameters]
    assert learns == first[:-1]
    # The last norm has none where the output layer alone reads it.
    net = PreNorm()
    net.neck, net.head = nn.Identity(), nn.Linear(8, 3)
    assert wrapped(net, x, at="auto").block_names == first[:2]
    last = wrapped(PreNorm(norm_first=False), x, at="auto").block_names
    assert last == ["stem", "layers.0", "layers.1", "head.input"]


class Vocabulary(nn.Module):
    """A language model whose output layer has more outputs than `width` features."""

    def __init__(self, outputs: int, width: int = 8, factor: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(outputs, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)
        self.factor = factor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        features = self.norm(x)[:, slice(0, None)]
        features = features if self.factor is None else features * self.factor
        return {"logits": self.head(features)}


@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp"])
@pytest.mark.filterwarnings("error")
def test_auto_takes_the_features_before_a_vocabulary_for_the_output(
    method: str, factor: float | None
) -> None:
    """B is then [D, D], and all behind the last point has backpropagation's gradient."""
    x = torch.randint(40, (4, 5))
    net = Vocabulary(40, factor=factor)
    model = FDFA(net, at="auto", method=method, example_input=x)
    assert model.block_names == ["layers.0.norm2", "layers.1.norm2"]
    summary = model.summary(x)
    assert (summary.output, summary.outputs) == ("norm", 8)
    assert {"head.weight", "norm.weight"} <= {*summary.exact}
    assert not summary.untrained
    assert all(B.shape == (8, 8) for B in model.feedback.values())
    F.cross_entropy(model(x)["logits"].flatten(0, 1), x.flatten()).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    net.zero_grad()
    F.cross_entropy(net(x)["logits"].flatten(0, 1), x.flatten()).backward()
    behind = ["norm.weight", "head.weight", "layers.1.linear1.weight", "layers.1.linear2.weight"]
    for name in behind:
        torch.testing.assert_close(found[name], net.get_parameter(name).grad, msg=name)


class Turned(Vocabulary):
    """The norm at the end reads its features in another layout than the output layer."""

    def __init__(self, to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> None:
        super().__init__(40)
        self.to_layout, self.back = to, back

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.back(self.norm(self.to_layout(x))))
        return logits


def test_an_output_within_a_checkpoint_is_refused() -> None:
    class Checkpointed(Vocabulary):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](self.embedding(x)))
            return torch.utils.checkpoint.checkpoint(
                lambda features: self.head(self.norm(features)), x, use_reentrant=False
            )

    x = torch.randint(40, (4, 5))
    with pytest.raises(RuntimeError, match="output module 'norm' is called within"):
        FDFA(Checkpointed(40), at="auto", method="dfa", example_input=x)(x)


@pytest.mark.parametrize(
    ("to", "back"),
    [
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1)),
        (lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, (-1, 5))),
    ],
)
def test_auto_takes_no_features_of_another_layout_for_the_output(
    to: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> None:
    model = FDFA(Turned(to, back), at="auto", example_input=torch.randint(40, (4, 5)))
    assert (model.block_names, model.network.output) == (["layers.0.norm2", "layers.1.norm2"], "head")


def test_auto_has_points_where_they_were_before_features_that_are_the_output() -> None:
    """No layer is cut from the norm behind it, whose place was the last point."""
    x = torch.randint(40, (4, 5))
    chain = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU())
    chain.extend([nn.LayerNorm(8), nn.Linear(8, 40)])
    model = FDFA(chain, at="auto", example_input=x)
    assert (model.block_names, model.network.output) == (["2"], "5")
    net = Vocabulary(40)
    net.norm = nn.Identity()
    for layer in net.layers:
        layer.norm_first = False
    model = FDFA(net, at="auto", example_input=x)
    assert (model.block_names, model.network.output) == (["layers.0"], "layers.1.norm2")
    chain[5] = nn.Sequential(nn.LayerNorm(8), Times(0.5))
    model = FDFA(chain, at="auto", example_input=x)
    assert (model.block_names, model.network.output) == (["2"], "5.0")
    model(x).sum().backward()
    single = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 40))
    model = FDFA(single, at="auto", example_input=x)
    assert (model.block_names, model.network.output) == (["2"], "3")


def test_auto_takes_the_output_layers_own_unless_a_vocabulary_is_far_wider_than_its_features() -> None:
    def outputs(net: nn.Module, **options: Any) -> tuple[str | None, int]:
        summary = FDFA(net, at="auto", example_input=x, **options).summary(x)
        return summary.output, summary.outputs

    x = torch.randint(32, (4, 5))
    assert outputs(Vocabulary(32)) == ("head", 32)
    assert outputs(Vocabulary(33)) == ("norm", 8)
    assert outputs(Vocabulary(33), output="head") == ("head", 33)
    # Local heads make outputs of their own, and others have no feedback that could be smaller.
    for method in ("lg-fg-a", "fg-a"):
        assert outputs(Vocabulary(33), method=method) == ("head", 33)
    assert outputs(Vocabulary(33), output="norm") == ("norm", 8)
    assert check(Vocabulary(33), x).outputs == 8
    assert check(Vocabulary(33), x, method="lg-fg-a").outputs == 33


class MixerLayer(nn.Module):
    """A branch that mixes positions, by weights that may be zero, and one that does not; each behind a
    norm of its own."""

    def __init__(self, tokens: int, each: bool, zero: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.inner, self.outer = nn.Linear(tokens, tokens), nn.Linear(8, 16), nn.Linear(16, 8)
        self.each, self.causal = each, causal
        if zero:
            nn.init.zeros_(self.mix.weight)
            nn.init.zeros_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.mix.weight.tril() if self.causal else self.mix.weight
        x = x + F.linear(self.norm1(x).mT, weight, self.mix.bias).mT
        return x + self.outer(torch.relu(self.inner(self.norm2(x) if self.each else x)))


@pytest.mark.parametrize("options", [{}, {"zero": True}, {"causal": True}])
def test_auto_lets_the_error_through_what_mixes_positions(options: dict[str, bool]) -> None:
    x, names = torch.randn(4, 5, 8), ["1.norm2", "2.norm2"]
    layers = [MixerLayer(5, each=True, **options) for _ in range(2)]
    net = nn.Sequential(nn.Linear(8, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 3))
    assert wrapped(net, x, at="auto").block_names == names
    # Which no NaN of its own disturbs.
    with torch.autograd.set_detect_anomaly(True):
        assert wrapped(net, x, at="auto").block_names == names


class Stage(nn.Sequential):
    """Layers whose class repeats, in a module whose class repeats."""


class FeedForwardFirst(MixerLayer):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(torch.relu(self.inner(self.norm1(x))))
        return x + self.mix(self.norm2(x).mT).mT


def of_layers(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 3))


def test_auto_looks_as_far_as_the_next_norm_for_what_mixes_positions() -> None:
    x = torch.randn(4, 5, 8)
    stages = [Stage(*(MixerLayer(5, each=True) for _ in range(2))) for _ in range(2)]
    found = wrapped(of_layers(*stages), x, at="auto").block_names
    assert found == ["1.0.norm2", "1.1.norm2", "2.0.norm2", "2.1.norm2"]
    net = of_layers(*(FeedForwardFirst(5, each=True) for _ in range(2)))
    assert wrapped(net, x, at="auto").block_names == ["1.norm1", "2.norm1"]


class Scale(nn.Module):
    """A norm, of which the name tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize("norm", [Scale, lambda: nn.Sequential(Scale(), nn.Dropout(0.1))])
def test_auto_knows_norms_by_what_they_do(norm: Any) -> None:
    layers = [MixerLayer(5, each=True) for _ in range(2)]
    for layer in layers:
        layer.norm1, layer.norm2 = norm(), norm()
    net = of_layers(*layers)
    net[3] = Scale()
    inner = "" if norm is Scale else ".0"
    found = wrapped(net, 1e-3 * torch.randn(4, 5, 8), at="auto").block_names
    assert found == [f"1.norm2{inner}", f"2.norm2{inner}"]


def test_auto_takes_norms_over_positions_for_parts_of_layers() -> None:
    layers = [MixerLayer(5, each=True) for _ in range(2)]
    for layer in layers:
        layer.norm1, layer.norm2 = nn.InstanceNorm1d(5), nn.InstanceNorm1d(5)
    assert wrapped(of_layers(*layers), torch.randn(4, 5, 8), at="auto").block_names == ["0", "1", "2"]


def test_auto_stands_within_a_single_layer_and_one_that_is_used_again() -> None:
    x, layer = torch.randn(4, 5, 8), MixerLayer(5, each=True)
    assert wrapped(of_layers(layer), x, at="auto").block_names == ["1.norm2"]
    shared = wrapped(of_layers(layer, layer), x, at="auto")
    assert shared.block_names == ["1.norm2", "1.norm2:2"]


def test_auto_asks_frozen_layers_too_and_leaves_them_frozen() -> None:
    net = of_layers(*(MixerLayer(5, each=True) for _ in range(2)))
    net[0].requires_grad_(False)
    net[1].norm1.requires_grad_(False)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    model = wrapped(net, torch.randn(4, 5, 8), at="auto")
    assert model.block_names == ["1.norm2", "2.norm2"]
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == frozen != []


def test_auto_calls_no_backward_hook_of_a_module() -> None:
    net = of_layers(*(MixerLayer(5, each=True) for _ in range(2)))
    called: list[Any] = []
    net[1].inner.register_full_backward_hook(lambda *values: called.append(values))
    wrapped(net, torch.randn(4, 5, 8), at="auto", method="dfa")
    assert called == []
    net(torch.randn(4, 5, 8)).sum().backward()
    assert len(called) == 1


def test_auto_says_where_a_backward_in_eval_mode_fails() -> None:
    class Overwriting(MixerLayer):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(self.mix(self.norm1(x).mT)).mT
            x = x + gate * x
            if not self.training:
                gate.zero_()
            return x + self.outer(torch.relu(self.inner(self.norm2(x))))

    net = of_layers(*(Overwriting(5, each=True) for _ in range(2)))
    with pytest.warns(
        UserWarning, match="puts points after all norms of transformer layers; a backward"
    ):
        model = wrapped(net, torch.randn(4, 5, 8), at="auto")
    assert model.block_names == ["1.norm1", "1.norm2", "2.norm1", "2.norm2"]


def test_auto_stands_behind_norms_that_all_mix_positions_for_want_of_others() -> None:
    layers = [MixerLayer(5, each=False) for _ in range(2)]
    net = nn.Sequential(nn.Linear(8, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 3))
    for inner in (net[1], net[2]):
        inner.norm2 = nn.Identity()
    assert wrapped(net, torch.randn(4, 5, 8), at="auto").block_names == ["1.norm1", "2.norm1"]


class ImageBlock(nn.Module):
    """A residual block of images that normalises first, with a skip connection of its own where it halves
    them."""

    def __init__(self, before: int, after: int, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stride = 1 if before == after else 2
        self.norm1, self.relu = norm(before), nn.ReLU(inplace=True)
        self.first = nn.Conv2d(before, after, 3, self.stride, 1)
        self.norm2, self.second = norm(after), nn.Conv2d(after, after, 3, 1, 1)
        self.short = nn.Conv2d(before, after, 1, self.stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm1(x))
        y = self.second(torch.relu(self.norm2(self.first(h))))
        return y + (x if self.stride == 1 else self.short(h))


class ImageStage(nn.Sequential):
    """Blocks in a module whose class repeats and changes its features' shape."""


def _of_images(*layers: nn.Module) -> nn.Sequential:
    end = [nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(1, 4, 3), *layers, *end)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)])
def test_auto_stands_behind_the_first_norm_of_residual_blocks_of_images(norm: Any) -> None:
    x = torch.randn(4, 1, 10, 10)
    net = _of_images(ImageBlock(4, 4, norm), ImageBlock(4, 8, norm))
    model = wrapped(net, x, at="auto")
    assert model.block_names == ["1.relu", "2.relu", "5"]
    # The stem's error comes by the skip connection too, which nothing cuts.
    learns = [point.name for point in model.summary(x).points if "0.weight" in point.parameters]
    assert learns == ["1.relu", "2.relu"]
    model(x).sum().backward()
    without = [name for name, p in net.named_parameters() if p.grad is None]
    assert without == ["1.short.weight", "1.short.bias"]  # which it does not use


def test_auto_takes_stages_of_blocks_that_normalise_first_as_one() -> None:
    first = ImageStage(ImageBlock(4, 6), ImageBlock(6, 6))
    net = _of_images(first, ImageStage(ImageBlock(6, 8), ImageBlock(8, 8)))
    names = wrapped(net, torch.randn(4, 1, 10, 10), at="auto").block_names
    assert names == ["1.0.relu", "2.0.relu", "5"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_auto_takes_a_norm_by_itself_where_its_activation_is_no_module(norm: Any) -> None:
    class Functional(ImageBlock):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(torch.relu(self.norm2(self.first(torch.relu(self.norm1(x))))))

    net = _of_images(*(Functional(4, 4, norm) for _ in range(2)), nn.Conv2d(4, 8, 1))
    names = wrapped(net, torch.randn(4, 1, 10, 10), at="auto").block_names
    assert names == ["1.norm1", "2.norm1", "6"]


class InnerNorm(nn.Module):
    """A residual block that normalises behind its first layer alone, as ConvNeXt's do."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.LayerNorm(4)
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.narrow(torch.relu(self.wide(h))).permute(0, 3, 1, 2)


class ImageNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_auto_stands_behind_the_norm_within_residual_blocks_that_end_without_one() -> None:
    end = [nn.AdaptiveAvgPool2d(1), ImageNorm(4), nn.Flatten(), nn.Linear(4, 3)]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), InnerNorm(), InnerNorm(), *end)
    names = wrapped(net, torch.randn(4, 1, 10, 10), at="auto").block_names
    assert names == ["1.norm", "2.norm", "4"]


class Gated(InnerNorm):
    """It ends with a norm, whose result its last layer only scales."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.gate = nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(super().forward(x) - x)
        return x + y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]


def test_auto_stands_behind_residual_blocks_that_end_with_a_norm() -> None:
    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Gated(), Gated(), *end)
    names = wrapped(net, torch.randn(4, 1, 10, 10), at="auto").block_names
    assert names == ["0", "1", "2"]


class Concatenated(nn.Module):
    """Layers that normalise what all before them return, as DenseNet's do."""

    def __init__(self, before: int, growth: int = 2, layers: int = 2) -> None:
        super().__init__()
        widths = range(before, before + layers * growth, growth)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, 1, 1)) for w in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def test_auto_stands_behind_the_first_norm_of_dense_blocks() -> None:
    x = torch.randn(4, 1, 10, 10)
    model = wrapped(_of_images(Concatenated(4, 1), Concatenated(6, 1)), x, at="auto")
    assert model.block_names == ["1.layers.0.1", "2.layers.0.1", "5"]


def test_auto_stands_behind_the_norms_that_alone_read_a_layer() -> None:
    x = torch.randn(4, 1, 10, 10)
    net = _of_images(Concatenated(4))
    assert wrapped(net, x, at="auto").block_names == ["1.layers.0.1", "1.layers.1.1", "4"]
    by_layer = wrapped(copy.deepcopy(net), x, at="auto", granularity="layer").block_names
    assert by_layer == ["1.layers.0.1", "1.layers.0.2", "1.layers.1.2"]


class LastRow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm = nn.LSTM(6, 5, batch_first=True), nn.LayerNorm(5)
        self.output = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(self.rows(x)[0][:, -1]))


def test_auto_stands_behind_a_norm_of_the_last_step_of_a_sequence() -> None:
    assert wrapped(LastRow(), torch.randn(4, 7, 6), at="auto").block_names == ["norm"]


@pytest.mark.parametrize(
    "at",
    [
        ["stem", "body.0", "body.1"],
        [Residual, "stem"],
        lambda name, module: isinstance(module, Residual) or name == "stem",
    ],
)
def test_at_takes_names_classes_and_functions(at: Any) -> None:
    model = wrapped(ResidualNet(), torch.randn(4, 6), at=at)
    assert model.block_names == ["stem", "body.0", "body.1"]


def test_a_list_that_changes_later_changes_no_point() -> None:
    at: list[Any] = ["stem"]
    model = wrapped(ResidualNet(), torch.randn(4, 6), at=at)
    at.append("body.0")
    model.module.body[0] = Residual(8)  # so that the model is planned again
    model(torch.randn(4, 6)).sum().backward()
    assert model.block_names == ["stem"]


def test_points_may_stand_within_each_other_and_beside_blocks() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(FDFALinear(6, 8, activation="tanh"), Residual(8), nn.Linear(8, 3))
    model = wrapped(net, torch.randn(4, 6), at=["1", "1.first"])
    assert model.block_names == ["0", "1", "1.first"]
    for _ in range(200):
        model(torch.randn(64, 6)).sum().backward()
    angles = feedback_alignment(model, torch.randn(256, 6))
    assert max(angles.values()) < 45, angles


def test_a_loss_within_the_forward_trains_the_output_module_exactly() -> None:
    torch.manual_seed(0)
    net = WithLoss()
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    plain = copy.deepcopy(net)
    model = wrapped(net, {"inputs": x, "labels": y}, at="auto")
    assert model.network.output == "head"
    result = model(inputs=x, labels=y)
    assert set(result) == {"loss", "logits"}
    result["loss"].backward()
    expected = plain(inputs=x, labels=y)
    expected["loss"].backward()
    torch.testing.assert_close(result["loss"], expected["loss"])
    for mine, theirs in zip(net.head.parameters(), plain.head.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(p.grad is not None for p in net.parameters())
    assert all(matrix.any() for matrix in model.feedback.values())


def test_the_output_module_may_be_named() -> None:
    x = torch.randn(4, 6)
    net = nn.Sequential(ResidualNet(), nn.Tanh())
    model = wrapped(net, x, at="auto", output="0.head")
    by_default = wrapped(copy.deepcopy(net), x, at="auto")
    for m in (model, by_default):
        m(x)[:, 0].sum().backward()
    error = model.module[0].head.bias.grad
    assert error is not None
    torch.testing.assert_close(error, by_default.module[0].head.bias.grad)
    # The tangent of the head, not that of what the model makes of it.
    assert not torch.allclose(model.feedback["0.stem"], by_default.feedback["0.stem"])


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return torch.tanh(self.layer(x)), 1


class OfPairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Pair(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, count = self.first(x)
        return self.head(y * count)


def test_a_point_may_stand_at_the_first_of_a_tuple() -> None:
    model = wrapped(OfPairs(), torch.randn(4, 6), at=["first"])
    model(torch.randn(4, 6)).sum().backward()
    assert model.feedback["first"].any()
    assert gradient_alignment(model, (torch.randn(4, 6), torch.randint(3, (4,))))
    assert (
        feedback_ceiling(model, (torch.randn(64, 6), torch.randint(3, (64,))))["first.layer.weight"] < 1
    )


def test_the_model_is_left_as_it_is() -> None:
    net, x = plain_net(), images()
    net.eval()
    before = net(x)
    keys, forwards = [*net.state_dict()], [vars(m).get("forward") for m in net.modules()]
    hooks = [len(m._forward_hooks) for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    model = wrapped(net, x, at="auto")
    assert not net.training
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    step(model.train(), torch.optim.SGD(net.parameters(), lr=0.1), x, torch.randint(3, (5,)))
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7, 12, 12))
    assert [*net.state_dict()] == keys
    assert [vars(m).get("forward") for m in net.modules()] == forwards
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    assert not isinstance(net, FDFA)


def test_a_forward_of_the_instances_own_is_called_and_kept() -> None:
    net, x = plain_net(), images()
    calls: list[int] = []
    layer = net[9]
    original = layer.forward

    def own(value: Tensor) -> Tensor:
        calls.append(1)
        return original(value)

    layer.forward = own  # type: ignore[method-assign]
    model = wrapped(net, x, at=GROUPS)
    calls.clear()
    model(x).sum().backward()
    assert calls == [1]
    assert vars(layer)["forward"] is own
    assert model.feedback["9"].any()


def test_running_statistics_move_once_a_step() -> None:
    net, x = plain_net(), images()
    model, plain = wrapped(net, x, at="auto"), copy.deepcopy(net)
    model(x)
    plain.train()(x)
    torch.testing.assert_close(net[1].running_mean, plain[1].running_mean)
    assert net[1].num_batches_tracked == 1


def test_copies_and_checkpoints_train_on_alike() -> None:
    x, y = images(), torch.randint(3, (5,))
    model = wrapped(plain_net(), x, at="auto", feedback="adam", feedback_lr=1e-2)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    step(model, optimizer, x, y)
    twin = copy.deepcopy(model)
    other = wrapped(plain_net(), x, seed=9, at="auto", feedback="adam", feedback_lr=1e-2)
    other.load_state_dict(model.state_dict())
    for m in (model, twin, other):
        step(m, torch.optim.SGD(m.module.parameters(), lr=0.1), x, y)
    for m in (twin, other):
        torch.testing.assert_close(m.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_module_that_replaces_one_at_a_point_has_its_feedback() -> None:
    net, x = plain_net(), images()
    model = wrapped(net, x, at=GROUPS)
    model(x).sum().backward()
    before = model.feedback["9"].clone()
    net[9] = nn.Sigmoid()
    model.feedback_lr = 0
    model(x).sum().backward()
    torch.testing.assert_close(model.feedback["9"], before)
    net[9] = FDFABlock(nn.Sigmoid())
    with pytest.raises(RuntimeError, match="depends on parameters of a module before it"):
        model(x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"at": "auto", "example_input": None},
            ValueError,
            'FDFA: at="auto" finds the points on an example',
        ),
        ({"at": "stem"}, TypeError, 'FDFA: at must be "auto", a list of module names'),
        ({"at": nn.Linear}, TypeError, 'FDFA: at must be "auto", a list of module names'),
        ({"at": nn.Linear(6, 6)}, TypeError, 'FDFA: at must be "auto", a list of module names'),
        ({"at": [3]}, TypeError, "FDFA: at lists names and classes of modules; got 3"),
        ({"at": ["stam"]}, ValueError, "FDFA: at names 'stam', but the model has no such module"),
        ({"at": [""]}, ValueError, "FDFA: at means the model itself"),
        (
            {"at": [nn.Conv2d]},
            ValueError,
            r"FDFA: no module of ResidualNet is meant by at=\['Conv2d'\]",
        ),
        (
            {"at": lambda name, module: False},
            ValueError,
            "FDFA: no module of ResidualNet is meant by at=<lambda>",
        ),
        (
            {"at": ["stem"], "output": "hat"},
            ValueError,
            "FDFA: output names 'hat', but the model has no",
        ),
        (
            {"at": "auto", "granularity": "net"},
            ValueError,
            "FDFA: granularity must be one of block, layer",
        ),
        (
            {"at": ["stem", "head"], "output": "norm"},
            RuntimeError,
            "FDFA: 'head' was used after the output module",
        ),
        ({}, ValueError, 'FDFA: the module has no block; give at="auto"'),
    ],
)
def test_what_at_cannot_mean_is_refused(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FDFA(ResidualNet(), **{"example_input": torch.randn(4, 6), **options})


class Aliased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(x))


class NotFeatures(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


@pytest.mark.parametrize(
    ("net", "at", "error", "message"),
    [
        (Aliased(), ["b"], ValueError, "FDFA: at names 'b', which is 'a' too; use that name"),
        (
            nn.Sequential(FDFABlock(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)),
            ["0.1"],
            ValueError,
            "FDFA: at names '0.1', which is within block '0'",
        ),
        (
            nn.Sequential(NotFeatures(), nn.Unflatten(0, (4, 1)), nn.Linear(1, 3)),
            ["0"],
            TypeError,
            r"FDFA: module '0' has a point, so it must return features \[N, \*features\]",
        ),
        (
            nn.Sequential(nn.Linear(6, 3)),
            "auto",
            ValueError,
            "FDFA: at=\"auto\" finds no hidden layer in Sequential: its only layer '0' is the output layer",
        ),
    ],
)
def test_models_without_place_for_a_point_are_refused(
    net: nn.Module, at: Any, error: type, message: str
) -> None:
    x = torch.randn(4, 6)
    with pytest.raises(error, match=message):
        FDFA(net, at=at, example_input=x)


def test_what_is_no_module_is_refused() -> None:
    for make in (FDFA, check):
        with pytest.raises(TypeError, match=r"FDFA: module must be a torch\.nn\.Module; got function"):
            make(lambda x: x, at="auto", example_input=torch.randn(4, 6))  # type: ignore[operator]


class Elsewhere(ResidualNet):
    """Uses its head as often as it is told."""

    times = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        outputs = [self.head(x) for _ in range(self.times)]
        return sum(outputs, x[:, :3])


@pytest.mark.parametrize(
    ("times", "message"),
    [(0, "output module 'head' was not used"), (2, "output module 'head' was used twice")],
)
def test_the_output_must_be_reached_once(times: int, message: str) -> None:
    net, x = Elsewhere(), torch.randn(4, 6)
    model = wrapped(net, x, at=["stem"], output="head")
    net.times = times
    with pytest.raises(RuntimeError, match=message):
        model(x)


def test_a_zero_head_learns_and_then_the_layers_do() -> None:
    torch.manual_seed(0)
    net = ResidualNet()
    nn.init.zeros_(net.head.weight)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    with pytest.warns(UserWarning, match="the tangent of the output is zero"):
        model = wrapped(net, x, at="auto")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    stem = net.stem.weight.detach().clone()
    losses = [float(step(model, optimizer, x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert not torch.equal(net.stem.weight, stem)


class Penalised(ResidualNet):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.penalty = x.abs().mean()
        return self.head(x)


def test_a_kept_activation_is_warned_of_once() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = wrapped(Penalised(), torch.randn(4, 6), at=["stem"])
        model(torch.randn(4, 6)).sum().backward()
    said = [str(warning.message) for warning in found]
    assert len(said) == 2
    assert "no gradient of the output reaches parameter 'shift' and 10 more" in said[0]
    assert "'penalty' of a Penalised keeps a hidden activation" in said[1]


class TwoHeads(nn.Module):
    """Returns more than its output: the loss on it would not train what stands before a point."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.aux, self.head = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = torch.tanh(self.a(x))
        b = torch.tanh(self.b(a))
        return {"aux": self.aux(a), "logits": self.head(b)}


def test_a_second_output_is_no_point_and_is_warned_of() -> None:
    x = torch.randn(4, 6)
    with pytest.warns(
        UserWarning,
        match="'aux.weight' and 1 more.*the output is that of 'head': output= names another",
    ):
        model = wrapped(TwoHeads(), x, at="auto")
    assert model.block_names == ["a", "head.input"]
    with pytest.warns(UserWarning, match=r"\['aux'\] of the model's result, a dict, keeps a hid"):
        model(x)


class Variational(nn.Module):
    """Has a loss on hidden features, which it returns beside its output."""

    def __init__(self, as_returned: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.as_returned = as_returned
        self.encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(8, 3), nn.Linear(8, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        output = self.decoder(mean + (log_variance / 2).exp())
        return output, self.as_returned(mean), self.as_returned(log_variance)


@pytest.mark.parametrize(
    "as_returned",
    [lambda t: t, lambda t: t.clamp(-1, 1), lambda t: t.square().mean()],
    ids=["as they are", "clamped", "as a loss"],
)
def test_auto_leaves_returned_features_to_their_own_loss(as_returned) -> None:
    """Such as a VAE's: points there would keep it from the layers that made them."""
    torch.manual_seed(0)
    x, net = torch.randn(16, 6), Variational(as_returned)
    model = wrapped(net, x, at="auto")
    assert model.block_names == ["encoder.1", "decoder.0.input", "decoder.1"]
    with pytest.warns(UserWarning, match=r"\[1\] of the model's result, a tuple, keeps a hidden"):
        _, mean, log_variance = model(x)
    penalty = mean.square().sum() + log_variance.square().sum()
    grads = torch.autograd.grad(penalty, [*net.mean.parameters(), *net.log_variance.parameters()])
    _, mean, log_variance = net(x)
    penalty = mean.square().sum() + log_variance.square().sum()
    exact = torch.autograd.grad(penalty, [*net.mean.parameters(), *net.log_variance.parameters()])
    for actual, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(actual, expected)


def test_auto_keeps_points_where_all_features_are_returned() -> None:
    class Features(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self[0](x)
            return self[1](hidden), hidden

    model = wrapped(Features(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(4, 6), at="auto")
    assert model.block_names == ["0"]


class MoreInTraining(TwoHeads):
    """Returns an auxiliary output in training mode alone, as GoogLeNet does."""

    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        return tuple(outputs.values())[::-1] if self.training else outputs["logits"]


@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches")
def test_a_model_may_return_more_in_training_than_in_eval_mode() -> None:
    x = torch.randn(4, 6)
    net = MoreInTraining()
    model = wrapped(net, x, at="auto")
    assert model.network.output == "head"
    with pytest.warns(UserWarning, match=r"\[1\] of the model's result, a tuple, keeps a hidde"):
        logits, aux = model(x)
    (logits.square().sum() + aux.square().sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    assert model.eval()(x).shape == (4, 3)


class Summed(nn.Module):
    """A dict of what two layers add up to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.low = nn.Linear(6, 8), nn.Linear(8, 3)
        self.b, self.high = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = torch.tanh(self.a(x))
        return {"out": self.low(a) + self.high(torch.tanh(self.b(a)))}


@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches")
def test_layers_beside_that_of_the_output_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="taken to be that of 'high', but .* depends on layer 'low'"):
        wrapped(Summed(), torch.randn(4, 6), at="auto")


class OwnLoss(ResidualNet):
    """Returns its loss alone, of whatever shape, or with the logits."""

    def __init__(self, shape: tuple[int, ...], both: bool) -> None:
        super().__init__()
        self.shape, self.both = shape, both
        self.penalty = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        penalty = self.penalty(self.stem(x)).square().mean()
        logits = super().forward(x)
        loss = (logits.square().mean() + penalty).view(self.shape)
        return {"loss": loss, "logits": logits} if self.both else loss


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches parameter 'penalty")
@pytest.mark.filterwarnings("ignore:FDFA. the output is taken to be that of 'head'")
@pytest.mark.filterwarnings("ignore:FDFA. the result of the model, a")
def test_a_loss_is_no_output(shape: tuple[int, ...]) -> None:
    for both in (True, False):
        net = OwnLoss(shape, both)
        if not shape or both:
            model = wrapped(net, torch.randn(4, 6), at="auto")
            assert model.network.output == "head"
            result = model(torch.randn(4, 6))
            (result["loss"] if both else result).sum().backward()
            assert net.body[0].first.weight.grad.any()


def test_a_single_number_without_layers_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).sum()

    with pytest.raises(ValueError, match="FDFA: the output of Scale is a single number"):
        wrapped(Scale(), torch.randn(4, 6), at="auto")


def test_layers_within_the_output_module_have_points() -> None:
    net = nn.Sequential(nn.Sequential(*plain_net()[7:]), nn.Softmax(1))
    assert wrapped(net, torch.randn(4, 54), at="auto", output="0").block_names == ["0.2"]


class Parallel(nn.Module):
    """Two heads, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        return torch.cat([self.boxes(h), self.classes(h)], 1)


def test_layers_that_lead_to_no_other_learn_exactly() -> None:
    x = torch.randn(4, 6)
    model = wrapped(Parallel(), x, at="auto")
    assert model.block_names == ["body"]
    assert model.summary(x).exact == ["boxes.weight", "boxes.bias", "classes.weight", "classes.bias"]


def test_a_warning_is_at_the_line_that_led_to_it() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="stands at the output itself") as caught:
        FDFA(net, at=["1"], example_input=torch.randn(4, 8))
    assert caught[0].filename == __file__


def test_a_point_at_the_output_itself_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="since point '1' stands at the output itself"):
        wrapped(nn.Sequential(nn.ReLU(), Parallel().classes), torch.randn(4, 8), at=["1"])
    frozen = Parallel()
    frozen.boxes.requires_grad_(False)
    frozen.classes.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(frozen, torch.randn(4, 6), at=["body"])


class OutputFirst(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(x)
        return {
            "loss": outputs["aux"].sum(),
            "logits": outputs["logits"],
            "aux": self.aux(x @ torch.ones(6, 8)),
        }


@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches")
def test_the_output_is_by_default_that_which_most_layers_are_behind() -> None:
    assert wrapped(OutputFirst(), torch.randn(4, 6), at="auto").network.output == "head"


def test_the_signature_is_that_of_the_model() -> None:
    net = WithLoss()
    model = wrapped(net, {"inputs": torch.randn(4, 6)}, at="auto")
    assert inspect.signature(model.forward) == inspect.signature(net.forward)
    assert [*inspect.signature(FDFA.forward).parameters] == ["self", "args", "labels", "kwargs"]
    calls: list[int] = []
    original = model.forward

    def own(*args: Any, **kwargs: Any) -> Any:  # as libraries put in its place
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = own
    model(inputs=torch.randn(4, 6))["logits"].sum().backward()
    assert calls == [1]


class Viewed(nn.Module):
    """Changes a view of an image, its input, and what else it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(256, 3)

    def forward(self, x: Tensor, memory: Tensor, log: list[str]) -> Tensor:
        log.append("called")
        h = self.first(x)
        h.view(len(h), -1).clamp_(min=0)
        memory.copy_(h.detach())
        return self.head(self.second(h).view(len(x), -1))


@pytest.mark.parametrize("method", ["fdfa", "dfa", "bp"])
@pytest.mark.parametrize("at", ["first", "second"])
def test_code_that_changes_views_and_arguments_is_the_models_own(method: str, at: str) -> None:
    torch.manual_seed(0)
    net, x = Viewed(), torch.randn(2, 3, 8, 8)
    memories = torch.zeros(2, 2, 4, 8, 8).unbind()
    model = wrapped(net, (x, memories[0].clone(), []), at=[at], method=method)
    log: list[str] = []
    before = x.clone()
    output = model(x, memories[0], log)
    torch.testing.assert_close(output, net(x, memories[1], []))
    torch.testing.assert_close(memories[0], memories[1])
    assert log == ["called"]
    assert torch.equal(x, before)
    assert x.is_contiguous()
    output.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.body, self.stem(x).relu(), use_reentrant=False)
        return self.head(x.relu().mean((2, 3)))


def test_a_checkpoint_that_computes_otherwise_is_an_error() -> None:
    x = torch.randn(4, 3, 8, 8)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        wrapped(Checkpointed(), x, at=["stem"])(x).sum().backward()


READ = ["a", "head.input"]


@pytest.mark.parametrize(
    ("output", "points"), [("aux", ["a"]), ("head", READ), ("b", ["a"]), (None, READ)]
)
@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches")
def test_auto_goes_to_the_output_that_is_named(output: str | None, points: list[str]) -> None:
    model = wrapped(TwoHeads(), torch.randn(4, 6), at="auto", output=output)
    assert model.block_names == points


def test_auto_adds_points_to_the_blocks_of_a_model() -> None:
    net = nn.Sequential(
        FDFABlock(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )
    assert wrapped(net, torch.randn(4, 6), at="auto").block_names == ["0", "2"]
    only_blocks = nn.Sequential(FDFALinear(6, 8), nn.Linear(8, 3))
    assert wrapped(only_blocks, torch.randn(4, 6), at="auto").block_names == ["0"]


class OverPositions(nn.Module):
    """Its inner layers see no [N, *]: one takes positions, one has the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.mixed = nn.Linear(2, 8), nn.Linear(6, 8)
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.tanh(self.places(torch.ones(1, 2)))
        mixed = torch.tanh(self.mixed(x.transpose(0, 1)))
        return self.head(torch.tanh(self.inner(mixed.mean(0) + places)))


def test_auto_leaves_out_what_does_not_keep_the_batch_first() -> None:
    """What is read of it with the batch first has a point."""
    points = wrapped(OverPositions(), torch.randn(4, 5, 6), at="auto").block_names
    assert points == ["inner.input", "head.input"]


def test_auto_sees_parametrized_layers() -> None:
    spectral = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(
        spectral(nn.Linear(6, 8)), nn.ReLU(), spectral(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 3)
    )
    assert wrapped(net, torch.randn(4, 6), at="auto").block_names == ["1", "3"]


class Merging(nn.Linear):
    """Changes its weight when its mode changes, as layers of low rank do."""

    def train(self, mode: bool = True) -> "Merging":
        if mode != self.training:
            self.weight.data += 1 if mode else -1
        super().train(mode)
        return self


def test_dry_runs_do_not_call_the_modules_own_change_of_mode() -> None:
    net = nn.Sequential(Merging(6, 8), nn.Tanh(), nn.Linear(8, 3))
    before = net[0].weight.detach().clone()
    wrapped(net, torch.randn(4, 6), at="auto")
    assert torch.equal(net[0].weight, before)


def test_the_output_cannot_stand_within_a_point() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))
    with pytest.raises(RuntimeError, match="FDFA: '1' was used after the output module"):
        wrapped(net, torch.randn(4, 6), at=["0", "1"], output="1.1")


class Reader(nn.Module):
    """The point returns its own input, changed in place, and another layer reads it too."""

    def __init__(self, passes: nn.Module) -> None:
        super().__init__()
        self.before, self.passes = nn.Linear(6, 6), passes
        self.after, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.head(self.after(self.passes(h)) + h)


@pytest.mark.parametrize("passes", [nn.Identity(), nn.ReLU(inplace=True)])
def test_the_mean_jacobian_is_that_behind_the_point(passes: nn.Module) -> None:
    net, x = Reader(passes), torch.randn(64, 6)
    model = wrapped(net, x, at=["passes"])
    expected = net.head.weight @ net.after.weight
    torch.testing.assert_close(mean_jacobian(model, x)["passes"], expected)


class NamedInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Scaled()
        self.head = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x, name=2.0, module=1.0, forward=1.0), name=1.0)


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: Tensor, name: float, module: float = 1.0, forward: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x) * name * module * forward


def test_inputs_may_have_any_name() -> None:
    model = wrapped(NamedInputs(), torch.randn(4, 6), at=["layer"], output="head")
    model(torch.randn(4, 6)).sum().backward()
    assert model.feedback["layer"].any()


def test_an_output_module_that_is_gone_is_named() -> None:
    net = ResidualNet()
    model = wrapped(net, torch.randn(4, 6), at=["stem"], output="head")
    del net.head
    with pytest.raises(ValueError, match="FDFA: output names 'head', but the model has no such module"):
        model(torch.randn(4, 6))


def test_a_point_may_return_one_of_torchs_pairs() -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.max(x.unflatten(1, (3, 2)), 2)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.largest, self.head = nn.Linear(6, 6), Largest(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.largest(self.layer(x)).values)

    model = wrapped(Net(), torch.randn(4, 6), at=["largest"])
    model(torch.randn(4, 6)).sum().backward()
    assert model.feedback["largest"].any()


def rowwise(blocks: bool) -> nn.Sequential:
    """[*, 6] → [*, 3], each row by itself."""
    torch.manual_seed(5)
    first, second = FDFALinear(6, 8, activation="tanh"), FDFABlock(nn.Linear(8, 7), nn.GELU())
    if blocks:
        return nn.Sequential(first, second, nn.Linear(7, 3))
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, 3))
    weights = [first.weight, first.bias, second[0].weight, second[0].bias]
    for mine, theirs in zip(net.parameters(), weights, strict=False):
        mine.data.copy_(theirs)
    return net


@pytest.mark.parametrize("method", ["fdfa", "dfa", "dkp", "fg-a", "lg-fg-a", "fg-w"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_a_token_counts_as_a_sample(method: str, blocks: bool, backend: str) -> None:
    options = {"method": method, "at": None if blocks else ["1", "3"], "backend": backend}
    of_rows = wrapped(rowwise(blocks), torch.randn(4, 6), **options)
    of_tokens = wrapped(rowwise(blocks), torch.randn(2, 5, 6), **options)
    optimizers = [torch.optim.SGD(m.forward_parameters(), lr=0.1) for m in (of_rows, of_tokens)]
    for tokens in (5, 3, 5):
        x, y = torch.randn(2, tokens, 6), torch.randint(3, (2, tokens))
        for model, optimizer in zip((of_rows, of_tokens), optimizers, strict=True):
            optimizer.zero_grad()
            out = model(x if model is of_tokens else x.flatten(0, 1))
            assert out.shape == ((2, tokens, 3) if model is of_tokens else (2 * tokens, 3))
            outputs = [out, *model.local_outputs]
            sum(F.cross_entropy(o.reshape(-1, 3), y.flatten()) for o in outputs).backward()
            optimizer.step()
        mine, theirs = of_tokens.state_dict(), of_rows.state_dict()
        for key in ("module.0.weight", *(k for k in mine if k.startswith("feedback"))):
            torch.testing.assert_close(mine[key], theirs[key], rtol=1e-4, atol=1e-6, msg=key)


class Mixing(nn.Module):
    """Tokens that read each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)))


def test_feedback_of_tokens_is_the_mean_jacobian_of_a_token_by_itself() -> None:
    torch.manual_seed(0)
    net = Mixing()
    x = torch.randn(4, 5, 6)
    model = wrapped(net, x, at=["embed", "layer"], feedback_lr=0.003)
    model.eval()
    model.training = True  # the exact Jacobian is that of fixed weights
    for _ in range(3000):
        model(x).sum().backward()
    embedded = net.embed(x).detach()
    jacobian = torch.autograd.functional.jacobian(
        lambda h: net.head(net.layer(h)).sum((0,)), embedded, vectorize=True
    )  # [T, K, N, T, D]
    expected = torch.stack([jacobian[t, :, :, t].mean(1) for t in range(5)]).mean(0)
    torch.testing.assert_close(mean_jacobian(model, x)["embed"], expected)
    cosine = F.cosine_similarity(model.feedback["embed"].flatten(), expected.flatten(), dim=0)
    assert cosine > 0.95
    assert feedback_alignment(model, x)["embed"] < 20
    torch.testing.assert_close(model.feedback["layer"], net.head.weight.detach(), rtol=0.2, atol=0.1)


def test_an_output_that_comes_to_be_of_samples_is_refused() -> None:
    net = rowwise(blocks=False)
    model = wrapped(net, torch.randn(2, 5, 6), at=["1", "3"])
    with pytest.raises(ValueError, match=r"point '1' must have features of each; got \[4, 8\]"):
        model(torch.randn(4, 6))
    model = wrapped(net, torch.randn(4, 6), at=["1", "3"])
    with pytest.raises(
        ValueError,
        match=r"the output was \[N, K\] in the dry run, in eval mode, and is \[N, T, K\] now",
    ):
        model(torch.randn(2, 5, 6))


def test_auto_takes_what_has_the_tokens_of_the_output() -> None:
    class Pooled(Mixing):
        def __init__(self) -> None:
            super().__init__()
            self.pooler, self.of_sample = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.of_sample(self.pooler(x.mean(1)).relu()).unsqueeze(1))

    net = Pooled()
    del net.layer
    with pytest.warns(
        UserWarning, match="puts no point after layer 'pooler', whose features have other"
    ):
        model = wrapped(net, torch.randn(4, 5, 6), at="auto")
    assert model.block_names == ["embed", "head.input"]


class Swapped(nn.Module):
    """A layer over [T, N, 6], as torch has sequences by default, or [N, 6, T]; the output is [N, T, 3]."""

    def __init__(self, layer: nn.Module, dims: tuple[int, int]) -> None:
        super().__init__()
        self.layer, self.dims, self.head = layer, dims, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(*self.dims)).transpose(*self.dims))


@pytest.mark.parametrize("layer", [nn.Linear(6, 6), FDFALinear(6, 6), FDFABlock(nn.Linear(6, 6))])
def test_features_with_the_tokens_first_are_refused(layer: nn.Module) -> None:
    at = None if type(layer) is not nn.Linear else ["layer"]
    message = (
        r"of 2 x 5 tokens, as .*, so .* 'layer' must have features of each; got \[5, 2, 6\], of 5 x 2"
    )
    with pytest.raises(ValueError, match=message):
        wrapped(Swapped(layer, (0, 1)), torch.randn(2, 5, 6), at=at)


@pytest.mark.parametrize("tokens", [5, 6])
@pytest.mark.parametrize("blocks", [True, False])
def test_convolutions_over_tokens_have_features_of_each_token(tokens: int, blocks: bool) -> None:
    conv = nn.Conv1d(6, 6, 1)
    net = Swapped(FDFABlock(conv) if blocks else conv, (1, 2))
    model = wrapped(net, torch.randn(2, tokens, 6), at=None if blocks else ["layer"])
    model.feedback["layer"].copy_(net.head.weight.detach())
    model.feedback_lr = 0
    x, y = torch.randn(2, tokens, 6), torch.randint(3, (2, tokens))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    found = conv.weight.grad
    conv.weight.grad = None
    F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
    torch.testing.assert_close(found, conv.weight.grad, rtol=1e-4, atol=1e-6)


class _Convolutions(nn.Module):
    """That return [N, D, T], whatever else they have."""

    def __init__(self, channels: int, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels, channels, 3, padding=1)
        self.second = nn.Conv1d(channels, channels, 3, padding=1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.silu(self.first(x)))
        return x + (y if self.gate is None else y * self.gate(x.mean(-1)).unsqueeze(-1))


def _of_convolutions(gate: Any, outputs: int) -> nn.Sequential:
    middle = [_Convolutions(8, gate()) for _ in range(2)]
    return nn.Sequential(nn.Conv1d(3, 8, 1), *middle, nn.Conv1d(8, outputs, 1))


class _OfTokens(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.out = nn.Linear(6, 8), layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        given = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        result: Tensor = self.layer(*given)[0]
        return self.out(x + result)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "layer", [nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 8, batch_first=True)]
)
def test_torchs_layers_of_tokens_tell_where_features_lie(layer: nn.Module) -> None:
    """Of as many tokens as features a module of one's own would be warned of."""
    x = torch.randn(4, 8, 6)
    assert "layer" in FDFA(_OfTokens(layer), at=["first", "layer"], example_input=x).feedback


def test_the_search_for_points_leaves_no_hook() -> None:
    hooks = {name: dict(held) for name, held in vars(nn.modules.module).items() if "_hooks" in name}
    FDFA(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), at="auto", example_input=torch.randn(4, 6))
    assert {name: vars(nn.modules.module)[name] for name in hooks} == hooks


@pytest.mark.parametrize("gated", [False, True])
def test_a_module_of_ones_own_that_may_return_channels_first_is_warned_of(gated: bool) -> None:
    def gate() -> nn.Module | None:
        return nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()) if gated else None

    message = r"'1' returns \[4, 8, 8\], which counts as \[N, T, D\], since a module of your own"
    with pytest.warns(UserWarning, match=message):  # as many tokens as channels
        FDFA(_of_convolutions(gate, 5), at="auto", example_input=torch.randn(4, 3, 8))
    with pytest.raises(ValueError, match=r"got \[4, 8, 12\], of 4 x 8 tokens, as \[N, T, D\]"):
        FDFA(_of_convolutions(gate, 5), at=[_Convolutions], example_input=torch.randn(4, 3, 12))
    net = nn.Sequential(_of_convolutions(gate, 6), nn.Flatten(), nn.Linear(72, 3))
    with pytest.warns(UserWarning, match=r"'0.1' returns \[2, 8, 12\], which counts as \[N, T, D\]"):
        FDFA(net, at="auto", patch=4, example_input=torch.randn(2, 3, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FDFA(net, at="auto", patch=4, granularity="layer", example_input=torch.randn(2, 3, 12))
        FDFA(net, at="auto", example_input=torch.randn(2, 3, 12))


def test_a_patch_without_effect_is_warned_of() -> None:
    net = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GELU(), nn.Conv1d(8, 5, 1))
    with pytest.warns(UserWarning, match="patch=4 has no effect, since the output has K values"):
        FDFA(net, at="auto", patch=4, example_input=torch.randn(2, 4, 16))


def test_auto_takes_modules_with_bare_weights() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(1, 8)
            self.weight = nn.Parameter(torch.randn(8, 8, 3) / 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.conv1d(self.norm(x), self.weight, padding=1)

    net = nn.Sequential(nn.Conv1d(3, 8, 1), Bare(), Bare(), nn.Flatten(), nn.Linear(40, 3))
    model = FDFA(net, at="auto", example_input=torch.randn(2, 3, 5))
    assert list(model.feedback) == ["0", "1", "2"]


def test_a_summary_leaves_what_a_sample_is() -> None:
    model = wrapped(rowwise(blocks=False), torch.randn(4, 6), at=["1", "3"])
    with pytest.raises(ValueError, match=r"the output was \[N, K\] in the dry run"):
        model.summary(torch.randn(2, 5, 6))
    model(torch.randn(4, 6)).sum().backward()


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_dry_runs_draw_nothing_from_torchs_generator() -> None:
    net, x = nn.Sequential(nn.Linear(6, 8), Draws(), nn.Linear(8, 3)), torch.randn(4, 6)
    model = wrapped(net, x, at=["0"])
    state = torch.get_rng_state()
    check(net, x, at=["0"])
    model.summary(x)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert str(model.summary(x)) == str(check(net, x, at=["0"], **OPTIONS))


def test_auto_puts_no_point_after_what_does_not_learn() -> None:
    net = ResidualNet()
    net.stem.requires_grad_(False)
    net.body[0].requires_grad_(False)
    assert wrapped(net, torch.randn(4, 6), at="auto").block_names == ["body.1"]


def test_the_summary_says_what_each_parameter_learns_by() -> None:
    net, x = ResidualNet(), torch.randn(4, 6)
    net.unused = nn.Linear(2, 2)
    net.body[1].first.requires_grad_(False)
    state = torch.get_rng_state()
    before = copy.deepcopy(net.state_dict())
    found = check(net, x, feedback="adam")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert [point.name for point in found.points] == ["stem", "body.0", "body.1"]
    assert [point.parameters for point in found.points] == [
        ["shift", "stem.weight", "stem.bias"][1:],
        ["shift", *(f"body.0.{n}" for n, _ in net.body[0].named_parameters())],
        [f"body.1.second.{n}" for n, _ in net.body[1].second.named_parameters()],
    ]
    assert found.exact == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert found.untrained == ["unused.weight", "unused.bias"]
    with pytest.warns(
        UserWarning, match="no gradient of the output reaches parameter 'unused.weight' and 1 more"
    ):
        model = wrapped(net, x, at="auto", feedback="adam")
    assert model.summary(x) == found
    banks = (model.feedback, model.exp_avg, model.exp_avg_sq)
    assert found.feedback_bytes == sum(t.nbytes for bank in banks for t in bank.values())
    for word in ("body.0", "Residual", "[8]", "norm.bias", "unused.weight"):
        assert word in str(found)


@pytest.mark.parametrize("patch", [1, 4])
@pytest.mark.parametrize(("method", "tensors"), [("fdfa", 1), ("dfa", 1), ("fg-a", 0)])
def test_the_bytes_of_a_summary_are_those_of_the_model(method: str, tensors: int, patch: int) -> None:
    net = blocks_of(plain_net())
    model = wrapped(net, images(), method=method, patch=patch)
    found = model.summary(images())
    assert found == check(net, images(), at=None, method=method, patch=patch, **OPTIONS)
    assert found.feedback_bytes == sum(t.nbytes for t in model.feedback.values()) * tensors


def test_methods_without_points_have_no_summary() -> None:
    model = wrapped(blocks_of(plain_net()), images(), method="bp")
    with pytest.raises(ValueError, match="FDFA: Backpropagation has no points"):
        model.summary(images())
