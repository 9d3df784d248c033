"""A transformer that predicts the next character of Python's documentation: its head alone,
backpropagation and FDFA.

Each token counts as a sample, and B is the same for all. `at="auto"` puts the points behind the norms
that each token reads for itself: the error goes through attention and along the skip connections.
"""

import copy
import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdfa_ext import FDFA

LENGTH, WIDTH, STEPS = 32, 64, 400


class LanguageModel(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
        norm = nn.LayerNorm(WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, characters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:  # [N, LENGTH] to [N, LENGTH, characters]
        return self.head(self.layers(self.embedding(tokens) + self.positions, self.mask))


text = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
characters = sorted(set(text))
tokens = torch.tensor([characters.index(character) for character in text])
train, test = tokens.split(9 * len(tokens) // 10)[:2]


def windows(tokens: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Random pieces of the text [n, LENGTH], and the character that follows each of theirs."""
    start = torch.randint(len(tokens) - LENGTH, (n, 1))
    piece = tokens[start + torch.arange(LENGTH + 1)]
    return piece[:, :-1], piece[:, 1:]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


torch.manual_seed(0)
start = LanguageModel(len(characters))
held_out = windows(test, 256)
for name in ("head alone", "backpropagation", "FDFA"):
    torch.manual_seed(1)
    net = copy.deepcopy(start)
    if name == "head alone":
        net.requires_grad_(False).head.requires_grad_(True)
    model: nn.Module = net
    if name == "FDFA":
        model = FDFA(net, at="auto", feedback_lr=1e-3, example_input=held_out[0][:2])
        print(model.summary(held_out[0][:2]))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, *windows(train, 32)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        print(f"{name}: loss on other text {loss_of(model, *held_out):.3f}")
