"""A learning rule of one's own beside direct feedback alignment, on scikit-learn's digits.

The rule projects the sign of the error instead of the error (sDFA; Frenkel et al., "Learning Without
Feedback", Frontiers in Neuroscience 15, 2021).
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fdfa_ext import FDFA, FDFALinear
from fdfa_ext.methods import BlockMethod, BlockStep, Method, kaiming_feedback


class ErrorSign(BlockMethod):
    """δ = sign(e) B / N with B random and fixed."""

    feedback = "fixed"

    def initialize(self, feedback: Tensor) -> None:
        kaiming_feedback(feedback)

    def delta(self, block: BlockStep) -> Tensor:
        return block.error.sign() / len(block.error) @ block.feedback


digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1  # [1797, 64]
y = torch.tensor(digits.target)
train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).split([1400, 397])


def accuracy_of(method: str | Method) -> float:
    """Test accuracy of one network after training it by this method."""
    torch.manual_seed(0)
    net = nn.Sequential(
        FDFALinear(64, 256, activation="tanh"),
        FDFALinear(256, 256, activation="tanh"),
        nn.Linear(256, 10),
    )
    model = FDFA(net, method=method, example_input=x[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(10):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return (model(x[test]).argmax(1) == y[test]).float().mean().item()


for name, method in {"dfa": "dfa", "sign of the error": ErrorSign(), "bp": "bp"}.items():
    print(f"{name}: test accuracy {accuracy_of(method):.1%}")
