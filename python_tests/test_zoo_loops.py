"""The loops of Lightning, transformers and Accelerate, and TensorBoard, with models as they come.

Skipped where the package is missing: `make test-zoo`.
"""

import copy
import importlib
import re
import runpy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from libraries import library
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fdfa_ext import FDFA
from fdfa_ext.monitor import scalars, write_tensorboard

EXAMPLES = Path(__file__).parents[1] / "examples"
X, Y = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
TEXT = torch.randint(1, 30, (32, 12))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("loop", "needs"),
    [
        ("lightning", ["lightning"]),
        ("transformers", ["transformers", "accelerate"]),
        ("accelerate", ["accelerate"]),
        ("torch", ["tensorboard"]),
    ],
)
def test_the_example_of_a_loop_learns(
    loop: str, needs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for package in needs:
        library(package)
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"loop_{loop}.py"), run_name="__main__")
    accuracy = re.search(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 85  # ten classes
    if loop == "torch":
        assert [*Path("runs").iterdir()]


def image_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    )


def image_classifier() -> nn.Module:
    transformers = library("transformers")
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    net: nn.Module = transformers.ResNetForImageClassification(config)
    return net


def language_model() -> nn.Module:
    """With an embedding that is the output layer's weight too."""
    transformers = library("transformers")
    net: nn.Module = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=30,
            n_positions=12,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    assert net.lm_head.weight is net.transformer.wte.weight
    return net


IMAGES = [{"pixel_values": x, "labels": int(y)} for x, y in zip(X, Y, strict=True)]
SENTENCES = [{"input_ids": t, "labels": t} for t in TEXT]


@pytest.mark.parametrize("options", [{}, {"feedback": "grad"}, {"patch": 2}], ids=str)
@pytest.mark.parametrize(
    ("make_net", "data"), [(image_classifier, IMAGES), (language_model, SENTENCES)]
)
@pytest.mark.filterwarnings("ignore:FDFA. patch=2 has no effect")
def test_a_trainer_evaluates_and_resumes_from_its_checkpoint(
    make_net: Any, data: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    library("accelerate")
    transformers = library("transformers")
    seen: list[Any] = []

    def metric(found: Any) -> dict[str, float]:
        seen.append(found)
        return {"rows": float(len(found.label_ids))}

    def trainer() -> Any:
        torch.manual_seed(0)
        inputs = {name: torch.stack([torch.as_tensor(d[name]) for d in data[:2]]) for name in data[0]}
        del inputs["labels"]
        model = FDFA(make_net(), at="auto", feedback_lr=1e-2, example_input=inputs, **options)
        arguments = transformers.TrainingArguments(
            output_dir="checkpoints",
            num_train_epochs=2,
            per_device_train_batch_size=8,
            save_strategy="epoch",
            eval_strategy="epoch",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        return transformers.Trainer(
            model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metric
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    evaluated = whole.evaluate()
    assert evaluated["eval_rows"] == len(data)
    assert evaluated["eval_loss"] > 0
    first = min(Path("checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert (first / "model.safetensors").exists()
    resumed.train(resume_from_checkpoint=str(first))
    assert_same_state(resumed.model, whole.model)


@pytest.mark.parametrize("make_net", [image_classifier, language_model])
def test_a_trainer_smooths_labels_as_those_of_the_net_lie(make_net: Any) -> None:
    """It shifts those of a language model, whose class it knows by name."""
    library("accelerate")
    transformers = library("transformers")
    data = IMAGES if make_net is image_classifier else SENTENCES
    inputs = {name: torch.stack([torch.as_tensor(d[name]) for d in data[:4]]) for name in data[0]}
    example = {name: value for name, value in inputs.items() if name != "labels"}
    arguments = transformers.TrainingArguments(
        output_dir="smoothed", label_smoothing_factor=0.1, report_to="none", use_cpu=True
    )
    net = make_net().eval()
    model = FDFA(copy.deepcopy(net), at="auto", example_input=example).eval()
    losses = [transformers.Trainer(m, arguments).compute_loss(m, dict(inputs)) for m in (net, model)]
    torch.testing.assert_close(losses[1], losses[0])


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


def lightning_module(**options: Any) -> Any:
    lightning = library("lightning")

    class Images(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = FDFA(image_net(), at="auto", feedback_lr=1e-2, example_input=X[:2], **options)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Images()


def feedback_monitor(every_n_steps: int) -> Any:
    library("lightning")
    return importlib.import_module("fdfa_ext.lightning").FeedbackMonitor(every_n_steps)


def fit(module: Any, epochs: int = 2, callbacks: Any = (), **kwargs: Any) -> Any:
    trainer = library("lightning").Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        gradient_clip_val=0.1,
        callbacks=[*callbacks],
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), 16), **kwargs)
    return trainer


@pytest.mark.parametrize("options", [{}, {"feedback": "grad"}, {"method": "dkp"}], ids=str)
def test_lightning_resumes_from_its_checkpoint(options: dict[str, Any]) -> None:
    whole, half, resumed = (lightning_module(**options) for _ in range(3))
    fit(whole)
    trainer = fit(half, epochs=1)
    fit(resumed, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("method", ["fdfa", "dfa", "fg-w", "bp"])
def test_a_monitor_in_lightning_leaves_training_as_it_is(method: str) -> None:
    monitor = feedback_monitor(every_n_steps=4)
    alone, watched = (lightning_module(method=method) for _ in range(2))
    fit(alone)
    trainer = fit(watched, callbacks=[monitor])
    assert_same_state(watched, alone)
    shown = trainer.callback_metrics
    assert ("feedback_norm" in shown) == (method in ("fdfa", "dfa"))
    if method == "bp":
        assert "gradient_angle" not in shown
        assert shown["gradient_angle/0.weight"] < 0.01
    else:
        assert 1 < shown["gradient_angle"] < 180


def test_a_monitor_has_no_angles_of_local_heads() -> None:
    module = lightning_module(method="lg-fg-a")
    trainer = fit(module, callbacks=[feedback_monitor(2)])
    assert "gradient_angle" not in trainer.callback_metrics


def test_a_monitor_waits_for_a_training_forward() -> None:
    module = lightning_module()
    step = module.training_step

    def teaching(_: Any, batch: list[Tensor], index: int) -> Tensor:
        with torch.no_grad():
            module.model(batch[0])
        return step(batch, index)

    module.training_step = types.MethodType(teaching, module)
    trainer = fit(module, callbacks=[feedback_monitor(8)])
    assert 1 < trainer.callback_metrics["gradient_angle"] < 180


def test_a_monitor_wants_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be 1 or more; got 0"):
        feedback_monitor(0)


@pytest.mark.parametrize("feedback", ["adam", "grad"])
def test_accelerate_resumes_from_its_checkpoint(feedback: str) -> None:
    def run(resumes: bool) -> nn.Module:
        accelerator = library("accelerate").Accelerator(cpu=True)
        torch.manual_seed(0)
        net = FDFA(image_net(), at="auto", feedback=feedback, feedback_lr=1e-2, example_input=X[:2])
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        data = DataLoader(TensorDataset(X, Y), 16)
        model, optimizer, data = accelerator.prepare(net, optimizer, data)
        if resumes:
            accelerator.load_state("checkpoint")
        for epoch in range(1 if resumes else 2):
            for images, labels in data:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            if epoch == 0 and not resumes:
                accelerator.save_state("checkpoint")
        return net

    whole = run(resumes=False)
    assert_same_state(run(resumes=True), whole)


def test_tensorboard_has_what_scalars_tells() -> None:
    library("tensorboard")
    loader = library("tensorboard.backend.event_processing.event_accumulator")
    model = FDFA(image_net(), at="auto", example_input=X[:2])
    writer = library("torch.utils.tensorboard").SummaryWriter("runs")
    F.cross_entropy(model(X), Y).backward()
    expected = scalars(model, (X, Y))
    write_tensorboard(writer, model, 7, (X, Y))
    writer.close()
    events = loader.EventAccumulator("runs").Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(expected)
    for tag, value in expected.items():
        assert events.Scalars(tag)[0].value == pytest.approx(value, rel=1e-6), tag
        assert events.Scalars(tag)[0].step == 7
    assert events.Tags()["histograms"] == ["feedback/2"]
