"""Steps of models as they come, by FDFA and by backpropagation: times in turns, and peaks of memory.

Needs requirements-zoo.txt. Backpropagation is the faster of row-major and channels_last memory; the
peak is that of what torch allocates in a step, beyond weights and the optimizer's state.

    PYTHONPATH=.:python_tests python scripts/converted_nets.py [NAME ...]
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from libraries import library
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fdfa_ext import FDFA

TURNS = 12


def _torchvision(name: str, samples: int, side: int, **options: Any) -> tuple[nn.Module, Tensor]:
    models = library("torchvision.models")
    if name == "vit":
        net = models.VisionTransformer(32, 4, 4, 4, 128, 256, num_classes=10)
    else:
        net = getattr(models, name)(num_classes=10, **options)
    return net, torch.randn(samples, 3, side, side)


def _transformers(name: str, kind: str, samples: int, **options: Any) -> tuple[nn.Module, Tensor]:
    """Four layers of width 128, a vocabulary of 1000 and pieces of 64 tokens."""
    library_of_models = library("transformers")
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    if name != "GPT2":
        sizes["intermediate_size"] = 512
    tokens = dict(vocab_size=1000, bos_token_id=0, eos_token_id=0)
    config = getattr(library_of_models, f"{name}Config")(**sizes, **tokens, **options)
    joined = "" if name == "GPT2" else "For"
    net = getattr(library_of_models, f"{name}{joined}{kind}")(config)
    return net, torch.randint(1000, (samples, 64))


def _cnn() -> tuple[nn.Module, Tensor]:
    """The paper's, of torch's modules."""
    layers = [nn.Conv2d(3, 15, 5, bias=False), nn.BatchNorm2d(15), nn.ReLU()]
    layers += [nn.Conv2d(15, 40, 5, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(5760, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), torch.randn(64, 3, 32, 32)


class _LanguageModel(nn.Module):
    """Of 100 characters, with an output for each of 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(128), enable_nested_tensor=False)
        self.head = nn.Linear(128, 100)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(tokens), self.mask))


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cnn": _cnn,
    "resnet18": lambda: _torchvision("resnet18", 32, 64),
    "vgg11_bn": lambda: _torchvision("vgg11_bn", 16, 64),
    "vit": lambda: _torchvision("vit", 32, 32),
    "language model": lambda: (_LanguageModel(), torch.randint(100, (32, 64))),
    "resnet50": lambda: _torchvision("resnet50", 16, 64),
    "mobilenet_v2": lambda: _torchvision("mobilenet_v2", 16, 64),
    "densenet121": lambda: _torchvision("densenet121", 16, 64),
    "convnext_tiny": lambda: _torchvision("convnext_tiny", 8, 64),
    "bert": lambda: _transformers("Bert", "SequenceClassification", 32, num_labels=10),
    "gpt2": lambda: _transformers("GPT2", "LMHeadModel", 16),
    "llama": lambda: _transformers("Llama", "CausalLM", 16, num_key_value_heads=4),
}


class Trained:
    """A model with its optimizer and input."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step(self) -> None:
        self.optimizer.zero_grad()
        result = self.model(self.x)
        output = (result if isinstance(result, Tensor) else result.logits).flatten(0, -2)
        F.cross_entropy(output, torch.arange(len(output)) % 10).backward()
        self.optimizer.step()

    def time(self) -> float:
        start = time.perf_counter()
        self.step()
        return 1e3 * (time.perf_counter() - start)

    def peak(self) -> float:
        """In MiB."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            self.step()
        recorded: Any = profiled.profiler
        events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
        size = largest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            size += event.nbytes()
            largest = max(largest, size)
        return largest / 2**20


def measure(name: str) -> str:
    torch.manual_seed(0)
    net, x = NETS[name]()
    order = torch.channels_last
    ways = {
        "BP": Trained(copy.deepcopy(net), x),
        "BP, channels_last": Trained(
            copy.deepcopy(net).to(memory_format=order),
            x.contiguous(memory_format=order) if x.dim() == 4 else x,
        ),
        "FDFA": Trained(FDFA(copy.deepcopy(net), at="auto", example_input=x), x),
        "DFA": Trained(FDFA(net, at="auto", method="dfa", example_input=x), x),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(2):
        for trained in ways.values():
            trained.step()
    for _ in range(TURNS):
        for way, trained in ways.items():
            times[way].append(trained.time())
    medians = {way: statistics.median(measured) for way, measured in times.items()}
    fastest = min(("BP", "BP, channels_last"), key=medians.__getitem__)
    fdfa, dfa, bp = medians["FDFA"], medians["DFA"], medians[fastest]
    memory = ways["FDFA"].peak() / ways[fastest].peak()
    figures = f"{fdfa:.1f} | {bp:.1f} | {fdfa / bp:.2f} | {dfa / bp:.2f} | {memory:.2f}"
    return f"| {name} | {len(x)}×{'×'.join(map(str, x.shape[1:]))} | {figures} |"


if __name__ == "__main__":
    print("| net | input | FDFA, ms | backpropagation, ms | FDFA / BP | DFA / BP | memory, FDFA / BP |")
    print("|---|---|---|---|---|---|---|")
    for chosen in sys.argv[1:] or NETS:
        print(measure(chosen), flush=True)
