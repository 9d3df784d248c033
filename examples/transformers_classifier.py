"""A DistilBERT with the loss inside, trained by FDFA to tell Python from English. Needs transformers.

The lines of text are of Python's own modules and of its documentation, a token for each character. The
model takes keywords and returns logits and loss; `output` names the layer that makes the logits. They
depend on the first token alone, so each token has a feedback of its own, and texts have one length.
"""

import inspect
import pydoc_data.topics
import random
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from fdfa_ext import FDFA

LENGTH, VOCABULARY = 48, 128


def inputs(texts: list[str]) -> dict[str, Tensor]:
    """Characters as tokens [N, LENGTH], 0 where a text has ended."""
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        codes = [min(ord(character), VOCABULARY - 1) for character in text[:LENGTH]]
        row[: len(codes)] = torch.tensor(codes)
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long()}


def lines(texts: Iterable[str], n: int) -> list[str]:
    """Random lines of more than 20 characters."""
    long = [line.strip() for text in texts for line in text.splitlines() if len(line.strip()) > 20]
    return random.sample(long, n)


random.seed(0)
samples = [(line, 0) for line in lines(pydoc_data.topics.topics.values(), 1200)]
samples += [(line, 1) for line in lines(map(inspect.getsource, (inspect, random)), 1200)]
random.shuffle(samples)
train, test = samples[:2000], samples[2000:]

torch.manual_seed(0)
sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "dim": 64, "hidden_dim": 128}
net = DistilBertForSequenceClassification(
    DistilBertConfig(**sizes, n_layers=2, n_heads=4, num_labels=2)
)
example = inputs([text for text, _ in train[:2]])
model = FDFA(net, at="auto", output="classifier", feedback_lr=1e-3, example_input=example)
print(model.summary(**example))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
for _ in range(5):
    random.shuffle(train)
    for start in range(0, len(train), 32):
        batch = train[start : start + 32]
        labels = torch.tensor([label for _, label in batch])
        optimizer.zero_grad()
        model(**inputs([text for text, _ in batch]), labels=labels).loss.backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    logits = model(**inputs([text for text, _ in test])).logits
accuracy = (logits.argmax(1) == torch.tensor([label for _, label in test])).float().mean().item()
print(f"test accuracy {accuracy:.1%}")
