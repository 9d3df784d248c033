"""Digits by the Trainer of transformers: it clips gradients, evaluates, and saves checkpoints.

The last line of the loop loads the weights alone into the net, without what FDFA keeps for training.
Needs transformers and accelerate.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import (
    EvalPrediction,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from fdfa_ext import FDFA

digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
samples: list[dict[str, Tensor | int]] = [
    {"pixel_values": image, "labels": int(label)} for image, label in zip(x, digits.target, strict=True)
]


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())}


torch.manual_seed(0)
config = ResNetConfig(
    num_channels=1,
    embedding_size=16,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    layer_type="basic",
    num_labels=10,
)
model = FDFA(
    ResNetForImageClassification(config),
    at="auto",
    output="classifier",
    feedback_lr=1e-3,
    patch=2,
    example_input={"pixel_values": x[:2]},
)
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir="checkpoints",
        num_train_epochs=12,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=samples[:1400],
    eval_dataset=samples[1400:],
    compute_metrics=accuracy,
)
trainer.train()
print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")

model.module.save_pretrained("net")  # the plain net, for from_pretrained
