"""Models as their libraries make them: one line trains each, with exact tangents, and leaves it as it is.

Those of torchvision, timm and transformers are skipped where the package is missing: `make test-zoo`.
"""

import copy
import re
import runpy
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fdfa_ext import FDFA
from fdfa_ext.duals import first_tensor, slow_attention, with_first
from fdfa_ext.points import place_of

EXAMPLES = Path(__file__).parents[1] / "examples"

Loss = Callable[[Any], Tensor]


class Case(NamedTuple):
    """A model, its inputs, a loss of what it returns, and arguments beside the one line."""

    net: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss: Loss
    options: Mapping[str, Any] = MappingProxyType({})


def entropy(output: Tensor) -> Tensor:
    """Of classes in the second dimension."""
    return F.cross_entropy(output, torch.arange(output[:, 0].numel()).view_as(output[:, 0]) % 3)


def of_tokens(output: Tensor) -> Tensor:
    return entropy(output.flatten(0, 1))


def own_loss(result: Any) -> Tensor:
    loss: Tensor = result["loss"]
    return loss


class Last(nn.Module):
    """The last state of a recurrent layer over [N, T, 6]; or all states."""

    def __init__(self, layer: nn.Module, width: int = 8, tagger: bool = False) -> None:
        super().__init__()
        self.layer, self.head, self.tagger = layer, nn.Linear(width, 4), tagger

    def forward(self, x: Tensor) -> Tensor:
        states = self.layer(x)[0]
        return self.head(states if self.tagger else states[:, -1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.head(state[0])


class Graph(nn.Module):
    """Two graph convolutions over nodes [V, 6], with an output for each node or for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor | None = None) -> Tensor:
        for layer in (self.first, self.second):
            h = layer(nodes)
            nodes = torch.relu(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        if graph is not None:
            nodes = nodes.new_zeros(int(graph.max()) + 1, 8).index_add(0, graph, nodes)
        return self.head(nodes)


class Speech(nn.Module):
    """[N, 5, T] → log-probabilities [T / 2, N, 4] for CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(5, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.second, self.head = nn.Conv1d(8, 8, 3, stride=2, padding=1), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(h).permute(2, 0, 1).log_softmax(2)


def ctc(output: Tensor) -> Tensor:
    lengths = torch.tensor([3, 2]), torch.full((2,), len(output)), torch.tensor([3, 2])
    return F.ctc_loss(output, torch.tensor([[1, 2, 3], [3, 1, 0]]), *lengths[1:])


class Double(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        layers: list[nn.Module] = []
        for width in (before, after):
            layers += [nn.Conv2d(width, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """[N, 1, H, W] → [N, 3, H, W] in three scales."""

    def __init__(self, widths: tuple[int, ...] = (4, 6, 8)) -> None:
        super().__init__()
        pairs = [*pairwise(widths)]
        self.first = Double(1, widths[0])
        self.down = nn.ModuleList(Double(a, b) for a, b in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in reversed(pairs))
        self.join = nn.ModuleList(Double(2 * a, a) for a, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.tanh(self.encoder(a) - self.encoder(b))).squeeze(1)


def _encoder(*after: nn.Module) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), *after)


def _sequences() -> tuple[Tensor]:
    return (torch.randn(4, 5, 6),)


def _edges(graph: Tensor | None = None) -> tuple[Tensor, ...]:
    edges = torch.randint(0, 5, (2, 30)) + 5 * torch.randint(0, 4, (30,))
    inputs = torch.randn(20, 6), edges
    return inputs if graph is None else (*inputs, graph)


TORCH: dict[str, Callable[[], Case]] = {
    "encoder": lambda: Case(_encoder(nn.Flatten(), nn.Linear(40, 4)), _sequences(), entropy),
    "language_model": lambda: Case(_encoder(nn.Linear(8, 4)), _sequences(), of_tokens),
    "gru": lambda: Case(Last(nn.GRU(6, 8, batch_first=True)), _sequences(), entropy),
    "lstm": lambda: Case(Last(nn.LSTM(6, 8, 2, batch_first=True)), _sequences(), entropy),
    "tagger": lambda: Case(
        Last(nn.LSTM(6, 4, batch_first=True, bidirectional=True), tagger=True), _sequences(), of_tokens
    ),
    "lstm_cells": lambda: Case(Cells(), _sequences(), entropy),
    "conv3d": lambda: Case(
        nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4)),
        (torch.randn(4, 1, 5, 5, 5),),
        entropy,
    ),
    "unet": lambda: Case(UNet(), (torch.randn(2, 1, 12, 16),), entropy),
    "odd_unet": lambda: Case(
        nn.Sequential(nn.ZeroPad2d((0, 1, 0, 3)), UNet()), (torch.randn(2, 1, 13, 15),), entropy
    ),
    "nodes": lambda: Case(Graph(), _edges(), entropy),
    "graphs": lambda: Case(Graph(), _edges(torch.arange(20) // 5), entropy, {"sample_index": "graph"}),
    "speech": lambda: Case(Speech(), (torch.randn(2, 5, 16),), ctc, {"output": "head"}),
    "siamese": lambda: Case(
        Siamese(), (torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)), lambda out: out.square().sum()
    ),
}


def _torchvision() -> Any:
    return library("torchvision.models")


def _images(side: int = 64) -> tuple[Tensor]:
    return (torch.randn(2, 3, side, side),)


def _vision(name: str, **options: Any) -> Callable[[], Case]:
    return lambda: Case(getattr(_torchvision(), name)(num_classes=4, **options), _images(), entropy)


def _with_heads(result: Any) -> Tensor:
    """GoogLeNet's, which returns a tensor in eval mode."""
    return entropy(result.logits) + 0.3 * (entropy(result.aux_logits1) + entropy(result.aux_logits2))


def _segmentation(name: str) -> Callable[[], Case]:
    def make() -> Case:
        build = getattr(_torchvision().segmentation, name)
        net = build(weights=None, weights_backbone=None, num_classes=4)
        return Case(net, _images(), lambda result: entropy(result["out"]))

    return make


def _timm(name: str, **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        timm = library("timm")
        return Case(timm.create_model(name, num_classes=4, **options), _images(), entropy)

    return make


def _convmixer() -> Case:
    """Smaller than those that timm has names for."""
    kind = library("timm.models.convmixer").ConvMixer
    return Case(kind(32, 4, patch_size=7, num_classes=4, act_layer=nn.ReLU), _images(), entropy)


_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
_DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "n_positions": 16}
# Its vocabulary is more than four times as wide as its features.
_LLAMA = _BERT | {"vocab_size": 200}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100}


def _text(model: str, config: str, labels: str = "classes", **options: Any) -> Callable[[], Case]:
    def make() -> Case:
        transformers = library("transformers")
        net = getattr(transformers, model)(getattr(transformers, config)(**options))
        ids = torch.randint(0, 100, (4, 12))
        targets = {"classes": ids[:, 0] % 2, "tokens": ids, "tags": ids % 2}[labels]
        return Case(net, {"input_ids": ids, "labels": targets}, own_loss)

    return make


class Encoder(nn.Module):
    """The encoder of T5 as a classifier."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(ids).last_hidden_state.mean(1))


def _t5() -> Case:
    transformers = library("transformers")
    encoder = transformers.T5EncoderModel(transformers.T5Config(**_T5))
    return Case(Encoder(encoder), (torch.randint(0, 100, (4, 12)),), entropy)


LIBRARIES: dict[str, Callable[[], Case]] = {
    "resnet18": _vision("resnet18"),
    "vgg11_bn": _vision("vgg11_bn"),
    "mobilenet_v3_small": _vision("mobilenet_v3_small"),
    "densenet121": _vision("densenet121"),
    "efficientnet_b0": _vision("efficientnet_b0"),
    "convnext_tiny": _vision("convnext_tiny"),
    "swin_t": _vision("swin_t"),
    "vit": lambda: Case(
        _torchvision().VisionTransformer(64, 16, 3, 2, 32, 64, num_classes=4), _images(), entropy
    ),
    "googlenet": lambda: Case(
        _torchvision().googlenet(num_classes=4, init_weights=False), _images(), _with_heads
    ),
    "deeplab": _segmentation("deeplabv3_mobilenet_v3_large"),
    "vit_tiny": _timm("vit_tiny_patch16_224", img_size=64, depth=3),
    "mixer": _timm("mixer_s32_224", img_size=64),
    "convmixer": _convmixer,
    "bert": _text("BertForSequenceClassification", "BertConfig", **_BERT),
    "bert_tagger": _text("BertForTokenClassification", "BertConfig", "tags", **_BERT),
    "albert": _text("AlbertForSequenceClassification", "AlbertConfig", embedding_size=16, **_BERT),
    "gpt2": _text("GPT2LMHeadModel", "GPT2Config", "tokens", **_GPT2),
    "llama": _text("LlamaForCausalLM", "LlamaConfig", "tokens", **_LLAMA),
    "distilbert": _text("DistilBertForSequenceClassification", "DistilBertConfig", **_DISTILBERT),
    "t5_encoder": _t5,
}
ZOO = TORCH | LIBRARIES
POINTS = {  # at least
    "encoder": 3,
    "lstm_cells": 5,
    "unet": 5,
    "siamese": 3,
    "resnet18": 9,
    "bert": 4,
    "albert": 4,
}


def call(net: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Any:
    return net(**inputs) if isinstance(inputs, dict) else net(*inputs)


def example(inputs: tuple[Any, ...] | dict[str, Any]) -> Any:
    """As a user gives it."""
    return inputs[0] if len(inputs) == 1 and isinstance(inputs, tuple) else inputs


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:FDFA. the tangent of the output is zero")
@pytest.mark.filterwarnings("ignore:FDFA. no gradient of the output reaches parameter 'aux1")
@pytest.mark.filterwarnings("ignore:FDFA. the result of the model, a GoogLeNetOutputs, keeps")
def test_one_line_trains_models_as_they_come(name: str) -> None:
    torch.manual_seed(0)
    net, inputs, loss, options = ZOO[name]()
    plain = copy.deepcopy(net)
    model = FDFA(net, at="auto", example_input=example(inputs), **options)
    with torch.no_grad():
        mine, theirs = call(model.eval(), inputs), call(plain.eval(), inputs)
    tensors = [[t for t in tree_leaves(r) if isinstance(t, Tensor)] for r in (mine, theirs)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    loss(call(model.train(), inputs)).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
    assert all(matrix.isfinite().all() for matrix in model.feedback.values())
    plain.load_state_dict(net.state_dict())
    assert len(model.block_names) >= POINTS.get(name, 1)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.filterwarnings("ignore:FDFA")
def test_the_tangent_is_that_of_the_perturbed_model(name: str) -> None:
    """In float64 and eval mode. d = Σ J u by torch's reverse mode: for any g, g · d is the sum of
    (gᵀ J) · u over the points. Differences would cross kinks of relu: some of these nets shrink their
    input to 1e-24."""
    torch.manual_seed(0)
    net, inputs, _, options = ZOO[name]()
    net, inputs = net.double().eval(), tree_map(_in_double, inputs)
    model = FDFA(net, at="auto", example_input=example(inputs), backend="reference", **options)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    step = model._step(net, args, kwargs)
    dual, _, tangent = step.dry_run()
    assert tangent is not None
    noise = {
        r.name: r.of_user(step.perturbation(r.output, dual.noise_state, r.index)).double()
        for r in dual.records
    }
    outputs: list[Tensor] = []
    shifts: dict[str, Tensor] = {}
    uses: dict[str, list[str]] = {}
    for own in model.network.passes:
        uses.setdefault(own.module, []).append(own.name)

    def shift(point: str, result: Any) -> Any:
        y: Any = first_tensor(result)
        use = uses[point].pop(0)
        shifts[use] = torch.zeros_like(y, requires_grad=True)
        return with_first(result, y + shifts[use])

    hooks = []
    for point in uses:
        module, at_input = place_of(net, point)
        if at_input:
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, point=point: shift(point, args))
            )
        else:
            hooks.append(
                module.register_forward_hook(lambda _, __, out, point=point: shift(point, out))
            )
    end = net if model.network.output is None else net.get_submodule(model.network.output)
    hooks.append(end.register_forward_hook(lambda _, __, result: outputs.append(result)))
    with slow_attention():
        call(net, inputs)
    for hook in hooks:
        hook.remove()
    output, _ = step.rows(dual, outputs[0], None)
    for _ in range(3):
        g = torch.randn_like(tangent)
        gradients = torch.autograd.grad(output, shifts.values(), g, retain_graph=True)
        terms = [
            (gradient * noise[point].view_as(gradient)).sum()
            for point, gradient in zip(shifts, gradients, strict=True)
        ]
        torch.testing.assert_close((g * tangent).sum(), torch.stack(terms).sum(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lowest"), [("torchvision_resnet", 85), ("transformers_classifier", 78)]
)
def test_the_examples_of_other_libraries_learn(name: str, lowest: float, capsys: Any) -> None:
    library(name.partition("_")[0])
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert float(accuracy) > lowest  # 72 of a DistilBERT whose head alone is trained


def _in_double(value: Any) -> Any:
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_floating else value
