"""Runs: they learn, repeat, continue exactly from a checkpoint; the command line end to end."""

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from marks import slow_but

import fdfa_ext
from fdfa_ext.__main__ import main
from fdfa_ext.arguments import UserError
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.models import build_net
from fdfa_ext.train.training import Config, Run, read_checkpoint

CONFIGS = {
    "bp": Config(method="bp"),
    "adam": Config(method="fdfa"),
    "ema": Config(method="fdfa", feedback="ema", feedback_lr=0.01, noise="rademacher"),
    "grad": Config(method="fdfa", feedback="grad"),
    "reference": Config(method="fdfa", backend="reference"),
}
FUSED = [config for config in CONFIGS.values() if config.backend == "fused"]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_rate_decays_and_the_feedbacks_does_not(digits: Dataset) -> None:
    run = Run(Config(feedback="grad", lr=1e-3, feedback_lr=2e-4), digits.head(64))
    for _ in range(2):
        run.train_epoch()
    assert [result.lr for result in run.history] == pytest.approx([1e-3, 0.95e-3])
    rates = [optimizer.param_groups[0]["lr"] for optimizer in run._optimizers]
    assert rates == pytest.approx([0.95**2 * 1e-3, 2e-4])


def test_local_heads_and_every_layer_below_them_learn(digits: Dataset) -> None:
    run = Run(Config(method="lg-fg-a", hidden=3), digits.head(64))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train_epoch()
    assert sum(name.startswith("heads.") for name in before) == 4
    for name, p in run.model.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(("method", "decay"), [("dkp", 1e-6), ("dfa", 0.0), ("fdfa", 0.0)])
def test_weights_decay_where_the_method_wants_it(method: str, decay: float, digits: Dataset) -> None:
    run = Run(Config(method=method), digits.head(64))
    assert run._optimizers[0].param_groups[0]["weight_decay"] == decay


def test_evaluation_neither_uses_nor_moves_batch_statistics() -> None:
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8)
    run = Run(Config(model="cnn"), Dataset(images, labels, images, labels))
    run.train_epoch()
    before = copy.deepcopy(run.model.state_dict())
    loss, _ = run.evaluate()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        expected = F.cross_entropy(run.model.module.eval()(images), labels)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_settings_reach_the_model() -> None:
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    settings = {"noise": "rademacher", "backend": "reference", "feedback_lr": 0.1}
    config = Config(dataset="cifar10", feedback="ema", **settings)
    model = Run(config, Dataset(images, labels, images, labels)).model
    assert {name: getattr(model, name) for name in settings} == settings
    assert model.rule == "ema"
    assert model.module[1].out_features == 1000


@pytest.mark.parametrize("config", slow_but(CONFIGS.values(), *FUSED), ids=CONFIGS)
def test_two_epochs_and_two_resumed_equal_four(config, digits, tmp_path):
    whole = Run(config, digits)
    for _ in range(4):
        whole.train_epoch()

    first = Run(config, digits)
    for _ in range(2):
        first.train_epoch()
    first.save(tmp_path / "run.pt")
    torch.manual_seed(123)  # as another process would have it

    saved_config, checkpoint = read_checkpoint(tmp_path / "run.pt")
    second = Run(saved_config, digits)
    second.load(checkpoint)
    assert second.train_epoch().epoch == 3
    second.train_epoch()

    assert same(weights(whole), weights(second))
    for a, b in zip(whole.history, second.history, strict=True):
        assert (a.lr, a.train_loss, a.test_loss, a.test_accuracy) == (
            b.lr,
            b.train_loss,
            b.test_loss,
            b.test_accuracy,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("config", slow_but(CONFIGS.values(), *FUSED), ids=CONFIGS)
def test_a_run_learns_and_its_seed_repeats_it(config, digits):
    run, again = Run(config, digits), Run(config, digits)
    for _ in range(5):
        run.train_epoch()
        again.train_epoch()
    assert run.history[-1].test_accuracy > 0.6
    assert run.history[-1].train_loss < 0.7 * run.history[0].train_loss
    assert same(weights(run), weights(again))


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn-pooled", "cnn-unnormalised", "cnn-two-pool"])
def test_both_methods_start_from_the_same_weights(model):
    images, labels = torch.rand(4, 1, 16, 16), torch.arange(4)
    data = Dataset(images, labels, images, labels)
    runs = [Run(Config(model=model, method=method), data) for method in ("bp", "fdfa")]
    bp, fdfa = ([p.detach() for p in run._optimizers[0].param_groups[0]["params"]] for run in runs)
    assert [p.shape for p in bp] == [p.shape for p in fdfa]
    assert all(torch.equal(a, b) for a, b in zip(bp, fdfa, strict=True))


@pytest.mark.parametrize(
    ("model", "dense_inputs"),
    [
        ("mlp", 784),
        ("cnn", 4000),
        ("cnn-pooled", 4000),
        ("cnn-unnormalised", 4000),
        ("cnn-two-pool", 640),
    ],
)
def test_nets_have_the_papers_shapes_and_initialisation(model, dense_inputs):
    net = build_net(model, (1, 28, 28), 10, hidden=3, width=50)
    assert net(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    linear = [p for p in net.parameters() if p.dim() == 2]
    assert len(linear) == (4 if model == "mlp" else 2)
    assert linear[0].shape[1] == dense_inputs
    bound = dense_inputs**-0.5  # the published code leaves torch.nn's uniform start
    assert 0.99 * bound < linear[0].abs().max() <= bound


@pytest.mark.parametrize("model", ["mlp", "cnn-two-pool"])
def test_random_feedback_moves_every_layer_from_zero_weights(model):
    images, labels = torch.rand(8, 1, 16, 16), torch.arange(8)
    run = Run(
        Config(model=model, method="dfa", weights="zero"), Dataset(images, labels, images, labels)
    )
    matrices = [p for p in run.model.module.parameters() if p.dim() > 1]
    assert not any(w.any() for w in matrices)
    run.train_epoch()
    assert all(w.any() for w in matrices)


@pytest.mark.parametrize(
    ("model", "least"),
    [("cnn", 10), ("cnn-pooled", 10), ("cnn-unnormalised", 10), ("cnn-two-pool", 16)],
)
def test_images_too_small_for_the_kernels_are_refused(model, least):
    build_net(model, (3, least, least), 10)
    with pytest.raises(UserError, match=f"{least} x {least} pixels or more, got a side of {least - 1}"):
        build_net(model, (3, least, least - 1), 10)


@pytest.mark.parametrize(("model", "side"), [("cnn", 10), ("alexnet", 63)])
def test_convolutions_alone_are_normalised_so_that_one_image_will_do(model, side):
    net = build_net(model, (1, side, side), 10).train()
    kinds = [type(module).__name__ for module in net.modules()]
    assert kinds.count("BatchNorm2d") == kinds.count("Conv2d") > 0
    assert "BatchNorm1d" not in kinds
    assert net(torch.rand(1, 1, side, side)).isfinite().all()


def test_alexnet_trains_on_enlarged_images_of_any_number_of_classes():
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor([3, 99])
    run = Run(
        Config(model="alexnet", method="bp", epochs=1), Dataset(images, labels, images, labels, 100)
    )
    assert run._prepared(images).shape == (2, 3, 224, 224)
    result = run.train_epoch()
    assert result.train_loss == pytest.approx(4.6, abs=1)  # ln 100
    assert run.model.module[-1].out_features == 100


@pytest.mark.slow
def test_the_command_line_compares_both_methods(tmp_path):
    flags = ["--method", "fdfa,bp", "--epochs", "1", "--threads", "1"]
    command = [sys.executable, "-m", "fdfa_ext", "train", *flags]
    # The package may be built in place and not installed.
    env = {**os.environ, "PYTHONPATH": str(Path(fdfa_ext.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar into a pipe
    header, *rows = done.stdout.splitlines()[-10:-2]  # the table, above an empty line and the folder
    assert header.split() == ["fdfa", "bp"]
    assert {row[:18].strip() for row in rows} >= {"epochs", "train loss", "test accuracy"}
    output = tmp_path / "runs" / "digits-mlp-fdfa-bp-seed0"
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    for method in ("fdfa", "bp"):
        (row,) = csv.DictReader((output / f"{method}.csv").open())
        assert row["epoch"] == "1"
        assert 0 < float(row["test_accuracy"]) <= 1


def test_processes_train_as_one_and_the_first_one_writes(tmp_path: Path) -> None:
    methods = ("fdfa", "dkp", "bp", "lg-fg-a")
    command = [
        "fdfa_ext",
        "train",
        "--method",
        ",".join(methods),
        "--epochs",
        "2",
        "--batch-size",
        "63",
    ]
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    printed = []
    for folder, how in (("one", []), ("two", several)):
        done = subprocess.run(
            [sys.executable, "-m", *how, *command, "--output", str(tmp_path / folder)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.count("\n"))
    assert printed[0] == printed[1]
    for method in methods:
        one, two = (
            list(csv.DictReader((tmp_path / folder / f"{method}.csv").open()))
            for folder in ("one", "two")
        )
        assert len(one) == len(two) == 2
        for expected, row in zip(one, two, strict=True):
            for name in expected.keys() - {"seconds"}:
                assert float(row[name]) == pytest.approx(float(expected[name]), abs=4e-3), name


def test_the_command_line_resumes(tmp_path, capsys):
    def train(*flags: str) -> list[dict[str, str]]:
        output = tmp_path / "-".join(flags).replace("/", "_")
        code = main(["train", *flags, "--method", "bp", "--output", str(output)])
        assert code == 0, capsys.readouterr().err
        return [{**row, "seconds": ""} for row in csv.DictReader((output / "bp.csv").open())]

    checkpoint = str(tmp_path / "run.pt")
    train("--lr", "0.001", "--epochs", "1", "--checkpoint", checkpoint)
    assert train("--resume", checkpoint, "--epochs", "2") == train("--lr", "0.001", "--epochs", "2")

    assert main(["train", "--resume", checkpoint, "--lr", "0.01", "--seed", "1"]) == 2
    assert "was trained with another --lr, --seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model cnn", "needs images of 10 x 10 pixels or more, got a side of 8"),
        ("--model cnn --width 5", "--hidden and --width are for --model mlp"),
        ("--model cnn --method dfa --weights zero", "--weights zero cannot train cnn: what batch norm"),
        ("--method lg-fg-a --weights zero", "--weights zero is not for lg-fg-a: no tangent passes"),
        ("--feedback ema --feedback-lr 2", "--feedback ema needs a --feedback-lr below 1; got 2"),
        ("--feedback grad --feedback-every 2", "--feedback-every is not for --feedback grad, whose B"),
        ("--feedback-every 0", "'0' is not a whole number from 1"),
        ("--device meta", "there is no device 'meta' here"),
        ("--checkpoint {tmp}", "--checkpoint {tmp} is a folder: give a file"),
        ("--output {tmp}/bad.pt", "File exists: '{tmp}/bad.pt'"),
        ("--method bp,sgd", "'bp,sgd' is not some of fdfa, dfa, dkp, fg-a, lg-fg-a, fg-w, bp"),
        ("--epochs 0", "'0' is not a whole number from 1 to 2^63 - 1"),
        ("--lr nan", "'nan' is not a number above 0"),
        ("--lr fast", "'fast' is not a number above 0"),
        ("--seed -1", "'-1' is not a whole number from 0"),
        ("--device nowhere", "there is no device 'nowhere' here"),
        ("--dataset cifar10 --data-dir {tmp}", "cifar10 is not in {tmp}: put data_batch_1"),
        ("--width 1000000000000", "out of memory: train needs more than there is; take a smaller net"),
        ("--resume {tmp}/none.pt", "cannot read the checkpoint {tmp}/none.pt: No such file"),
        ("--resume {tmp}/bad.pt", "{tmp}/bad.pt is not a checkpoint"),
        (
            "--method fdfa,bp --checkpoint {tmp}/c.pt",
            "--checkpoint and --resume are for one run: give one --method",
        ),
    ],
)
def test_what_the_user_gets_wrong_is_one_sentence(tmp_path: Path, monkeypatch, capsys, flags, message):
    monkeypatch.setattr("fdfa_ext.train.data._download", lambda *_: False)
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    try:
        code = main(["train", *flags.format(tmp=tmp_path).split()])
    except SystemExit as error:  # argparse's way out
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert message.format(tmp=tmp_path) in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "package", "message"),
    [
        ("train", "sklearn", "digits comes with scikit-learn: pip install scikit-learn"),
        ("train", "matplotlib", "the train command needs matplotlib: pip install matplotlib"),
        ("experiment figure-5", "tqdm", "experiments need tqdm: pip install tqdm"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(
    monkeypatch, capsys, command: str, package: str, message: str
) -> None:
    class Absent:
        def find_spec(self, name: str, *_: object) -> None:
            if name == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for loaded in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "fdfa_ext.train.report", raising=False)
    monkeypatch.delattr(fdfa_ext.train, "report", raising=False)
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_command_ends_as_a_shell_expects(monkeypatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fdfa_ext.train.command.train", interrupted)
    assert main(["train"]) == 130


def test_an_unknown_net_or_data_set_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UserError, match="unknown model 'vgg': choose one of mlp, cnn"):
        build_net("vgg", (1, 28, 28), 10)
    with pytest.raises(UserError, match="unknown data set 'svhn': choose one of digits, mnist"):
        load_dataset("svhn")
