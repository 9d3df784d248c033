"""Checkpoints of the train command: whole at every moment, read with care, continued exactly."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdfa_ext.__main__ import main
from fdfa_ext.arguments import UserError
from fdfa_ext.train import files
from fdfa_ext.train.data import Dataset, load_dataset
from fdfa_ext.train.files import replacing, write_rows
from fdfa_ext.train.training import Config, Run, read_checkpoint

CONFIG = Config(width=8, batch_size=16)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits").head(64)


def state(run: Run, folder: Path) -> dict[str, Any]:
    """All of it but the seconds."""
    run.save(folder / "state.pt")
    _, found = read_checkpoint(folder / "state.pt")
    for each in (*found["history"], found["epoch"] or {}):
        each.pop("seconds", None)
    return found


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_equal(one, two)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


class Killed(BaseException):
    """No handler of errors takes it."""


def write(file: Path, content: bytes) -> None:
    with replacing(file, previous=file.with_name("previous")) as stream:
        stream.write(content)


@pytest.mark.parametrize("links", [True, False])
def test_wherever_a_write_stops_the_file_has_its_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """It is stopped before each call to the system, and each time written again."""
    calls, stop_at = 0, 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop_at:
                raise Killed
            return call(*arguments, **more)

        return count

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    for name in ("fsync", "replace", "open", "close"):
        monkeypatch.setattr(files.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(files.os, "link", counted(os.link) if links else refuse)
    monkeypatch.setattr(files.shutil, "copyfile", counted(shutil.copyfile))
    file, previous = tmp_path / "file", tmp_path / "previous"
    file.write_bytes(b"0")
    stopped = 0
    for number in range(1, 20):
        old, new = file.read_bytes(), str(number).encode()
        calls, stop_at = 0, number
        try:
            write(file, new)
        except Killed:
            stopped += 1
            assert file.read_bytes() in (old, new)
            assert not previous.exists() or previous.read_bytes()
        else:
            assert file.read_bytes() == new
            assert previous.read_bytes() == old
        assert {path.name for path in tmp_path.iterdir()} <= {"file", "previous", "previous.part"}
    assert 5 <= stopped < 19
    stop_at = 0
    write(file, b"last")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "previous"}


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    write_rows([{"a": 1}], link)
    assert link.is_symlink()
    assert (tmp_path / "elsewhere" / "file").read_text() == "a\n1\n"


def train_and_stop(run: Run, steps: int) -> None:
    def stop() -> None:
        if run.steps == steps:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        while True:
            run.train_epoch(stop)


@pytest.mark.parametrize("method", ["fdfa", "bp", "lg-fg-a"])
def test_a_run_that_stops_within_an_epoch_goes_on_exactly(
    tmp_path: Path, digits: Dataset, method: str
) -> None:
    config = Config(method=method, width=8, batch_size=15)  # five steps, the last one smaller
    expected = Run(config, digits)
    for _ in range(2):
        expected.train_epoch()
    for stop_after in (1, 4, 6, 10):
        run = Run(config, digits)
        train_and_stop(run, stop_after)
        assert run.steps == stop_after
        run.save(tmp_path / "run.pt")
        again = Run(*read_checkpoint(tmp_path / "run.pt")[:1], digits)
        again.load(read_checkpoint(tmp_path / "run.pt")[1])
        assert again.steps == stop_after
        while len(again.history) < 2:
            again.train_epoch()
        assert_equal(state(again, tmp_path), state(expected, tmp_path))


@pytest.mark.parametrize("model", ["cnn", "cnn-pooled", "cnn-two-pool"])
@pytest.mark.parametrize("method", ["fdfa", "dkp", "fg-w", "lg-fg-a"])
def test_a_run_of_images_goes_on(tmp_path: Path, model: str, method: str) -> None:
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6)
    data = Dataset(images, labels, images, labels)
    config = Config(model=model, method=method, batch_size=2, feedback="grad", patch=2)
    run, again = Run(config, data), Run(config, data)
    train_and_stop(run, 4)
    run.save(tmp_path / "run.pt")
    again.load(read_checkpoint(tmp_path / "run.pt")[1])
    for each in (run, again):
        each.train_epoch()
    assert_equal(state(again, tmp_path), state(run, tmp_path))


def test_of_several_processes_one_has_the_sums_of_an_epoch_that_one_process_began(
    tmp_path: Path, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(CONFIG, digits)
    train_and_stop(run, 2)
    run.save(tmp_path / "run.pt")
    sums = []
    for first in (True, False):
        monkeypatch.setattr("fdfa_ext.train.training.is_first", lambda first=first: first)
        again = Run(CONFIG, digits)
        again.load(read_checkpoint(tmp_path / "run.pt")[1])
        sums.append(again._epoch.totals.sum() if again._epoch else None)
    assert sums[0] > 0
    assert sums[1] == 0


def test_the_checkpoint_before_is_kept(tmp_path: Path, digits: Dataset) -> None:
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    for done in range(3):
        run.save(file)
        assert len(read_checkpoint(file)[1]["history"]) == done
        run.train_epoch()
    assert len(read_checkpoint(tmp_path / "run.pt.previous")[1]["history"]) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_offered(
    tmp_path: Path, digits: Dataset
) -> None:
    """Any byte that changes something is found: what is read at all is what was written."""
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    run.train_epoch()
    run.save(file)
    _, expected = read_checkpoint(file)
    whole, rng = file.read_bytes(), random.Random(0)
    damaged = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for _ in range(60):
        at = rng.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
    errors = []
    for content in damaged:
        file.write_bytes(content)
        try:
            _, actual = read_checkpoint(file)
        except UserError as error:
            errors.append(str(error))
        else:
            assert_equal(actual, expected)
    assert len(errors) > len(damaged) / 2
    assert not any("\n" in error for error in errors)
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"run.pt is damaged: [^;]*$"):
        read_checkpoint(file)
    (tmp_path / "run.pt.previous").write_bytes(whole)
    with pytest.raises(
        UserError, match=r"run.pt is damaged: .*; the one before it is .*run.pt.previous$"
    ):
        read_checkpoint(file)
    file.unlink()
    with pytest.raises(UserError, match=r"cannot read .*run.pt: No such file.*; the one before it is"):
        read_checkpoint(file)


def test_a_checkpoint_of_another_format_or_of_unknown_settings_gets_a_sentence(
    tmp_path: Path, digits: Dataset
) -> None:
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    run.save(file)
    _, saved = read_checkpoint(file)
    config = saved["config"]
    for changed, message in (
        (
            {**saved, "format": 3, "fdfa_ext": "9.0"},
            r"is of format 3, and this fdfa_ext .* the one that wrote it \(9.0\)",
        ),
        (
            {k: v for k, v in saved.items() if k != "format"},
            "is of format 1, and this fdfa_ext .* format 2",
        ),
        (
            {**saved, "config": {**config, "depth": 3}},
            "settings that this fdfa_ext does not know: .*depth",
        ),
        ({**saved, "config": {**config, "method": "sgd"}}, "method is one of fdfa, .*; got 'sgd'"),
        ({**saved, "config": {**config, "batch_size": 0}}, "batch_size is a whole number from 1 to"),
        ({**saved, "config": {**config, "lr": "x"}}, "lr is a number above 0; got 'x'"),
        ({**saved, "config": 3}, "settings that this fdfa_ext does not know"),
        ({"weight": torch.ones(2)}, "is not a checkpoint of fdfa_ext train"),
        ([1, 2], "is not a checkpoint of fdfa_ext train"),
        (torch.nn.Linear(2, 2), "is not a checkpoint of fdfa_ext train"),  # objects are not loaded
    ):
        torch.save(changed, file)
        with pytest.raises(UserError, match=message):
            read_checkpoint(file)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model",), {}),
        (("optimizers",), []),
        (("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(1)),
        (("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(64, 8)),
        (("optimizers", 0, "state", 0, "exp_avg"), torch.zeros(1).expand(8, 64)),
        (("optimizers", 0, "state", 0), {}),
        (("optimizers", 0, "param_groups", 0, "lr"), "x"),
        (("optimizers", 0, "param_groups", 0, "amsgrad"), True),
        (("epoch", "totals"), torch.zeros(3)),
        (("epoch", "order"), torch.zeros(5, dtype=torch.uint8)),
        (("epoch", "steps"), 100),
        (("epoch", "steps"), -1),
        (("epoch", "seconds"), "x"),
        (("epoch",), {"x": 1}),
        (("history",), [{}]),
        (("history",), None),
        (("history", 0, "epoch"), 7),
        (("history", 0, "test_accuracy"), None),
    ],
)
def test_a_checkpoint_of_another_net_or_made_by_hand_is_refused(
    tmp_path: Path, digits: Dataset, place: tuple[Any, ...], value: Any
) -> None:
    """torch itself would read moments of another size as if they fitted."""
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    train_and_stop(run, 6)
    run.save(file)
    _, saved = read_checkpoint(file)
    Run(CONFIG, digits).load(saved)
    *way, last = place
    part = saved
    for key in way:
        part = part[key]
    part[last] = value
    with pytest.raises(UserError, match="the checkpoint does not fit the net that it names: "):
        Run(CONFIG, digits).load(saved)


def test_a_checkpoint_does_not_go_on_with_other_images(tmp_path: Path, digits: Dataset) -> None:
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    run.save(file)
    labels = digits.train_labels.clone()
    labels[0] = (labels[0] + 1) % 10
    for other in (replace(digits, train_labels=labels), digits.head(63)):
        with pytest.raises(
            UserError, match=r"is of other images than those of digits here: .*--data-d"
        ):
            Run(CONFIG, other).load(read_checkpoint(file)[1])
    _, state = read_checkpoint(file)
    del state["data"]  # as versions before had none
    Run(CONFIG, digits).load(state)


def test_a_checkpoint_that_cannot_be_written_again_is_said_before_an_epoch_is_lost(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(command(tmp_path, "--epochs", "1")) == 0
    trained: list[int] = []

    def refuse(file: Path, previous: Path | None = None) -> None:
        raise OSError("Device or resource busy")

    monkeypatch.setattr("fdfa_ext.train.training.replacing", refuse)
    monkeypatch.setattr(Run, "train_epoch", lambda *_: trained.append(1))
    assert main(command(tmp_path, "--epochs", "2")) == 2
    assert "cannot write the checkpoint" in capsys.readouterr().err
    assert not trained


@pytest.mark.parametrize("limit", [0, 1000])
def test_what_cannot_be_written_is_said_and_leaves_the_old_checkpoint(
    tmp_path: Path, digits: Dataset, limit: int
) -> None:
    """A limit on the size of files acts as a full disk does."""
    run, file = Run(CONFIG, digits), tmp_path / "run.pt"
    run.save(file)
    before = file.read_bytes()
    run.train_epoch()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write the checkpoint {file}: "):
            run.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def command(folder: Path, *flags: str) -> list[str]:
    arguments = ["train", "--batch-size", "8", "--threads", "1", "--output", str(folder)]
    return [*arguments, "--checkpoint", str(folder / "run.pt"), *flags]


def test_the_same_command_goes_on_where_it_was(tmp_path: Path, capsys) -> None:
    assert main(command(tmp_path / "a", "--epochs", "2")) == 0
    assert main(command(tmp_path / "b", "--epochs", "1")) == 0
    assert main(command(tmp_path / "b", "--epochs", "2")) == 0
    (tmp_path / "b" / "fdfa.csv").unlink()
    capsys.readouterr()
    assert main(command(tmp_path / "b", "--epochs", "2")) == 0  # nothing to do but to say so
    assert "epochs                     2" in capsys.readouterr().out
    rows = [(tmp_path / name / "fdfa.csv").read_text().split("\n") for name in "ab"]
    for one, two in zip(*rows, strict=True):
        assert one.split(",")[:-1] == two.split(",")[:-1]
    for flags, message in (
        (("--epochs", "1"), "run.pt holds 2 epochs, more than --epochs 1"),
        (("--lr", "0.1"), "run.pt was trained with another --lr, which cannot change"),
    ):
        assert main(command(tmp_path / "b", *flags)) == 2
        assert message in capsys.readouterr().err


def test_what_a_damaged_file_holds_is_quoted_on_one_line(tmp_path: Path, digits: Dataset) -> None:
    """Names in the archive come from whoever wrote it: line ends, and commands to the terminal."""
    file = tmp_path / "run.pt"
    Run(CONFIG, digits).save(file)
    with zipfile.ZipFile(file) as archive:
        content = archive.read("archive/data/0")
    whole = file.read_bytes().replace(b"archive/data/0", b"archive/\n\x1b[2J0")
    file.write_bytes(whole.replace(content, content[::-1]))
    with pytest.raises(UserError, match=r"is damaged: archive/\\n\\x1b\[2J0 has changed$"):
        read_checkpoint(file)


def test_what_takes_the_place_of_a_damaged_checkpoint_keeps_the_one_before(
    tmp_path: Path, capsys
) -> None:
    """At each moment one of the two is whole; and the command for that may be given again."""
    folder, file = tmp_path / "a", tmp_path / "a" / "run.pt"
    assert main(command(folder, "--epochs", "2")) == 0
    previous = folder / "run.pt.previous"
    before = previous.read_bytes()
    file.write_bytes(file.read_bytes()[:-9])
    recovery = command(folder, "--resume", str(previous), "--epochs", "2")
    assert main(command(folder, "--epochs", "2")) == 2
    assert (
        f"is damaged: File is not a zip file; the one before it is {previous}"
        in capsys.readouterr().err
    )
    assert main(recovery) == 0
    assert previous.read_bytes() == before
    assert len(read_checkpoint(file)[1]["history"]) == 2
    capsys.readouterr()
    whole = file.read_bytes()
    assert main(recovery) == 0
    assert file.read_bytes() == whole  # nothing was left to do
    file.write_text("of somebody else")
    assert main(recovery) == 2
    assert file.read_text() == "of somebody else"
    file.unlink()
    assert main(command(folder, "--epochs", "2")) == 2
    assert f"the one before it is {previous}" in capsys.readouterr().err


def test_two_processes_do_not_write_one_checkpoint(tmp_path: Path, capsys) -> None:
    with files.locked(tmp_path / "run.pt"):
        assert main(command(tmp_path, "--epochs", "1")) == 2
    assert f"another process trains into {tmp_path / 'run.pt'}" in capsys.readouterr().err
    assert main(command(tmp_path, "--epochs", "1")) == 0


def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="is a folder, a pipe or a device"), replacing(pipe):
        pass
    assert pipe.is_fifo()


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.pt")
    with pytest.raises(UserError, match=r"run.pt is a folder, a pipe or a device, and no file"):
        read_checkpoint(tmp_path / "run.pt")


def test_a_checkpoint_keeps_its_permissions_and_follows_no_link_beside_it(tmp_path: Path) -> None:
    file, other = tmp_path / "run.pt", tmp_path / "other"
    file.write_bytes(b"old")
    file.chmod(0o600)
    other.write_bytes(b"other")
    (tmp_path / "run.pt.part").symlink_to(other)
    write(file, b"new")
    assert other.read_bytes() == b"other"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_leaves_a_checkpoint_of_its_last_step(tmp_path: Path, number: int) -> None:
    arguments = command(tmp_path, "--epochs", "3")
    process = subprocess.Popen(
        [sys.executable, "-m", "fdfa_ext", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # Shells start what runs in the background with SIGINT ignored, these tests among it.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while not (tmp_path / "fdfa.csv").exists():  # after the first epoch
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "fdfa_ext: interrupted after step " in errors
    assert errors.count("\n") == 1
    config, checkpoint = read_checkpoint(tmp_path / "run.pt")
    run = Run(config, load_dataset("digits"))
    run.load(checkpoint)
    assert f"after step {run.steps} of 540, in {tmp_path / 'run.pt'}" in errors
    while len(run.history) < 3:
        run.train_epoch()
    uninterrupted = Run(config, load_dataset("digits"))
    for _ in range(3):
        uninterrupted.train_epoch()
    assert_equal(state(run, tmp_path), state(uninterrupted, tmp_path))


@pytest.mark.slow
def test_killed_runs_lose_nothing() -> None:
    script = Path(__file__).parents[1] / "scripts" / "kill_and_resume.py"
    env = os.environ | {"PYTHONPATH": str(script.parents[1])}
    done = subprocess.run([sys.executable, script, "1"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing lost" in done.stdout
