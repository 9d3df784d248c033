"""Tables and figures of the paper come out whole, and with the properties that the paper states."""

import contextlib
import csv
from dataclasses import replace
from pathlib import Path

import pytest
from marks import slow_but

import fdfa_ext.experiments.runs as runs
from fdfa_ext.__main__ import main
from fdfa_ext.arguments import UserError
from fdfa_ext.experiments.noise import rank_correlation
from fdfa_ext.experiments.runs import Job, Options, paper_config, read_record, run_all, way_name, ways
from fdfa_ext.experiments.tables import TABLES, Cell, markdown, paper_accuracies
from fdfa_ext.experiments.variance import FIGURES
from fdfa_ext.methods import METHODS
from fdfa_ext.train.training import Config, Run

FILES = {"figure.png", "table.md"}
OPTIONS = Options(jobs=1)
CONFIG = Config(method="fdfa", epochs=3)


def experiment(name: str, folder: Path, *flags: str) -> list[list[str]]:
    """Runs it on digits; the cells of its Markdown table below the head."""
    general = ["--datasets", "digits", "--quick", "--output", str(folder), "--jobs", "1"]
    assert main(["experiment", name, *general, *flags]) == 0
    assert {file.name for file in (folder / name).iterdir()} - {"records"} > FILES
    lines = (folder / name / "table.md").read_text().splitlines()
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines[2:] if line.startswith("|")]


@pytest.mark.parametrize("figure", slow_but(FIGURES, "figure-5"))
def test_variances_grow_as_the_propositions_say(figure: str, tmp_path: Path, capsys) -> None:
    rows = experiment(figure, tmp_path)
    assert rows
    printed = capsys.readouterr().out
    for method, slope, theory in rows:
        found = float(slope.split(" ± ")[0])
        assert found == pytest.approx(float(theory), abs=0.25)  # of a few images and draws
        assert f"| {method} | {slope} |" in printed


def test_a_table_has_every_method_beside_the_papers(tmp_path: Path) -> None:
    rows = experiment("table-b6", tmp_path, "--epochs", "1", "--methods", "fdfa,dkp,lg-fg-a")
    assert [row[:2] for row in rows] == [
        ["mlp-2", "fdfa"],
        ["mlp-2", "dkp"],
        *[[net, method] for net in ("mlp-3", "mlp-4") for method in ("fdfa", "dkp", "lg-fg-a")],
    ]
    for _, _, here, paper in rows:
        mean, deviation = map(float, here.split(" ± "))
        assert 5 < mean < 100
        assert deviation > 0
        assert paper == ""  # which has no digits


def test_the_papers_numbers_cover_its_tables() -> None:
    paper = paper_accuracies()
    for nets, datasets in TABLES.values():
        for net in set(nets) - {"cnn-unnormalised"}:  # which stands beside the paper's cnn
            methods = [m for m in METHODS if (net, m) != ("mlp-2", "lg-fg-a")]
            assert {(net, m, d) for m in methods for d in datasets} <= paper.keys()
    assert paper["mlp-4", "fg-a", "mnist"] == (83.40, 1.33)
    assert paper["alexnet", "fdfa", "tiny-imagenet"] == (36.47, 0.40)


@pytest.mark.parametrize(
    ("model", "fast"), [("mlp", {"fg-w"}), ("cnn", {"fg-w", "fg-a", "bp"}), ("alexnet", {"fg-w"})]
)
def test_the_rate_is_the_stated_one_or_ten_times_that(model: str, fast: set[str]) -> None:
    rates = {method: paper_config(method, model=model).lr for method in METHODS}
    assert rates == {method: 1e-3 if method in fast else 1e-4 for method in METHODS}


def test_fdfa_in_patches_stands_beside_fdfa_on_convolutional_nets() -> None:
    in_patches = {"method": "fdfa", "patch": 4}
    assert ways("cnn", ["fdfa", "bp"], 4) == [{"method": "fdfa"}, in_patches, {"method": "bp"}]
    others = ways("cnn", ["fdfa"], None) + ways("cnn", ["dfa", "bp"], 4) + ways("mlp", ["fdfa"], 4)
    assert in_patches not in others
    assert way_name(paper_config(model="cnn", **in_patches)) == "fdfa-patch4"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table-2", "--patch", "1"], "a side of 2 or more"),
        (["table-1", "--patch", "4"], "table-1 has none"),
        (["table-2", "--patch", "4", "--methods", "bp"], "table-2 has none"),
    ],
)
def test_patches_that_no_run_would_have_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["experiment", *arguments, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_cell_of_one_seed_claims_no_deviation() -> None:
    text = markdown([Cell("cnn", "bp", "mnist", 1, 99.0, 0.0, 99.32, 0.03)])
    assert "| cnn | bp | 99.00 | 99.32 ± 0.03 |" in text
    assert "One seed" in text


@pytest.mark.parametrize(
    ("name", "nets"), [("figure-3", ["mlp-2", "mlp-3"]), *slow_but([("figure-4", ["mlp-3"])])]
)
def test_convergence_has_a_point_for_each_epoch(
    name: str, nets: list[str], tmp_path: Path, monkeypatch
) -> None:
    # Digits are too small for the convolutional net; an mlp of three layers stands in.
    monkeypatch.setattr("fdfa_ext.experiments.convergence.paper_config", _mlp_for_cnn)
    rows = experiment(name, tmp_path, "--methods", "bp,fdfa", "--patch", "4")
    # Patches are for the convolutional net alone.
    methods = {"mlp-2": ("fdfa", "bp"), "mlp-3": ("fdfa", "fdfa-patch4", "bp")}
    assert [row[:2] for row in rows] == [[net, method] for net in nets for method in methods[net]]
    points = list(csv.DictReader((tmp_path / name / "points.csv").open()))
    assert [p["epoch"] for p in points] == ["1", "2"] * len(rows)
    for first, second in zip(points[::2], points[1::2], strict=True):
        assert 0 < float(first["seconds"]) < float(second["seconds"])
        assert float(first["train_loss"]) > float(second["train_loss"])
    # Times that other runs may have disturbed are of no use to figure 4.
    assert (tmp_path / "records").exists() == (name == "figure-3")


def _mlp_for_cnn(method: str, *, model: str, **settings) -> Config:
    return paper_config(method, model="mlp", hidden=2 if model == "cnn" else None, **settings)


@pytest.mark.slow
def test_the_variance_of_estimates_in_patches_is_the_formulas(tmp_path: Path) -> None:
    rows = experiment("patch-variance", tmp_path, "--seeds", "1")
    assert [row[:2] for row in rows] == [
        [block, patch] for patch in ("1", "2", "4") for block in ("conv 1", "conv 2", "dense")
    ]
    for _, _, *numbers in rows:
        of_small, small, of_large, large = map(float, numbers)
        assert small == pytest.approx(1, abs=0.1)
        assert large == pytest.approx(1, abs=0.1)
        assert of_small > 2 * of_large  # four times the batch
    by_patch = [float(row[2]) for row in rows if row[0] == "conv 2"]
    assert by_patch[0] > 4 * by_patch[1] > 16 * by_patch[2]


@pytest.mark.slow
def test_loss_after_an_epoch_rises_with_the_variance(tmp_path: Path) -> None:
    rows = experiment("figure-7", tmp_path, "--seeds", "1")
    variance = {(row[0], row[1]): float(row[2]) for row in rows}
    loss = {(row[0], row[1]): float(row[3]) for row in rows}
    for noise in ("0.3", "1", "3", "10", "100"):
        expected = float(noise) ** 2 / (1 + float(noise) ** 2)
        assert variance["bp", noise] == pytest.approx(expected, rel=0.05)
    assert variance["bp", "0"] == 0
    assert variance["fdfa", "0"] < 0.1 < variance["fg-a", "0"] < variance["fg-w", "0"]
    assert loss["bp", "0"] < loss["bp", "10"] < loss["bp", "100"]
    assert loss["fdfa", "0"] < loss["fg-a", "0"] < loss["fg-w", "0"]


def test_rank_correlation_sees_order_alone() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1e6]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


@pytest.mark.parametrize("flags", ["--methods fdfa --seeds 1", *slow_but([""])])
def test_angles_are_of_every_hidden_layer(tmp_path: Path, flags: str) -> None:
    rows = experiment("figure-8", tmp_path, "--epochs", "4", *flags.split())
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    last = [float(row[-1].split(" ± ")[0]) for row in rows]  # of fdfa, after the last epoch
    assert all(0 < angle < 90 for angle in last)
    assert last[3] < last[0]  # the layer below the output has the best feedback


def untimed(record: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{**row, "seconds": 0.0} for row in record]


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    calls = []

    def stop(run: Run) -> dict[str, float]:
        calls.append(len(run.history))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"watched": float(len(run.history))}

    (whole,) = run_all([Job(CONFIG)], replace(OPTIONS, output=tmp_path / "whole"))
    options = replace(OPTIONS, output=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        run_all([Job(CONFIG, watch=stop)], options)
    (continued,) = run_all([Job(CONFIG, watch=stop)], options)
    assert calls == [1, 2, 3, 3]  # the third epoch alone is done again
    assert untimed(continued) == [{**row, "watched": i + 1.0} for i, row in enumerate(untimed(whole))]
    assert [file.suffix for file in (tmp_path / "stopped" / "records").iterdir()] == [".csv"]


def test_a_checkpoint_of_other_settings_is_not_continued(tmp_path: Path) -> None:
    def stop(run: Run) -> dict[str, float]:
        if len(run.history) == 2:
            raise KeyboardInterrupt
        return {}

    other = replace(CONFIG, feedback_lr=0.01)
    with pytest.raises(KeyboardInterrupt):
        run_all([Job(other, watch=stop)], replace(OPTIONS, output=tmp_path / "stopped"))
    (checkpoint,) = (tmp_path / "stopped" / "records").glob("*.pt")
    (fresh,) = run_all([Job(CONFIG)], replace(OPTIONS, output=tmp_path / "fresh"))
    for suffix in (".pt", ".csv"):  # whose names have that of what is watched
        file = checkpoint.with_suffix(suffix)
        file.rename(file.with_stem(file.stem.replace("-stop", "")))
    (run,) = run_all([Job(CONFIG)], replace(OPTIONS, output=tmp_path / "stopped"))
    assert untimed(run) == untimed(fresh)


def test_quick_runs_take_a_part_of_the_images(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runs, "_QUICK_IMAGES_OTHERWISE", 2 * CONFIG.batch_size)
    seen = []
    job = Job(replace(CONFIG, epochs=1), prepare=lambda run: seen.append(run.steps_per_epoch))
    for quick in (True, False):
        run_all([job], replace(OPTIONS, output=tmp_path, quick=quick))
    assert seen[0] == 2 < seen[1]


def test_what_is_on_file_is_not_run_again(tmp_path: Path, monkeypatch) -> None:
    options = replace(OPTIONS, output=tmp_path)
    (record,) = run_all([Job(CONFIG)], options)
    monkeypatch.setattr(runs, "Run", None)  # whose call would fail
    assert run_all([Job(CONFIG)], options) == [record]
    assert run_all([Job(replace(CONFIG, epochs=2))], options) == [record[:2]]
    with pytest.raises(TypeError):
        run_all([Job(replace(CONFIG, epochs=4))], options)


def test_a_record_that_is_begun_again_is_said(tmp_path: Path, capsys) -> None:
    options = replace(OPTIONS, output=tmp_path)
    (record,) = run_all([Job(CONFIG)], options)  # which needs no checkpoint any more
    capsys.readouterr()
    (again,) = run_all([Job(replace(CONFIG, epochs=4))], options)
    assert [row["train_loss"] for row in again[:3]] == [row["train_loss"] for row in record]
    assert ".csv has 3 of 4 epochs, and" in capsys.readouterr().err


def test_a_record_of_another_rate_is_refused(tmp_path: Path) -> None:
    options = replace(OPTIONS, output=tmp_path)
    (record,) = run_all([Job(CONFIG)], options)
    with pytest.raises(UserError, match=r"\.csv is of a run at rate 0.0001, where this one has 0.01"):
        run_all([Job(replace(CONFIG, lr=0.01))], options)
    assert run_all([Job(CONFIG)], options) == [record]


@pytest.mark.slow
def test_processes_do_what_one_would(tmp_path: Path) -> None:
    jobs = [Job(replace(CONFIG, seed=seed)) for seed in range(3)]
    one = run_all(jobs, replace(OPTIONS, output=tmp_path / "one"))
    two = run_all(jobs, replace(OPTIONS, output=tmp_path / "two", jobs=2))
    for a, b in zip(one, two, strict=True):
        assert a[-1]["train_loss"] == pytest.approx(b[-1]["train_loss"], rel=1e-4)
    assert one[0][-1]["train_loss"] != pytest.approx(one[1][-1]["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "content",
    [
        "epoch,test_accuracy\n1,0.5\n",
        "{head}1,0,0,0,0,0,0\n2,",
        "{head}2,0,0,0,0,0,0\n",
        "{head}1,0,0,0,0,0,x\n",
        "{head}1,0,0,0,0,0,0,0\n",
        "\x00",
        "\udcff",
    ],
)
def test_what_is_no_record_is_neither_used_nor_overwritten(tmp_path: Path, content: str) -> None:
    file = tmp_path / "record.csv"
    assert read_record(file) == []
    head = "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,seconds\n"
    file.write_bytes(content.format(head=head).encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"record.csv is not the record of a run: move it away"):
        read_record(file)


def test_a_figure_of_two_data_sets_is_refused(tmp_path: Path, capsys) -> None:
    flags = ["--datasets", "digits,mnist", "--output", str(tmp_path)]
    assert main(["experiment", "figure-5", *flags]) == 2
    assert "figure-5 is of one data set; got digits, mnist" in capsys.readouterr().err


def test_a_figure_without_any_of_its_methods_is_refused(tmp_path: Path, capsys) -> None:
    flags = ["--methods", "bp", "--datasets", "digits", "--output", str(tmp_path)]
    assert main(["experiment", "figure-8", *flags]) == 2
    assert "figure-8 is of the methods dfa, dkp, fdfa: give some of them" in capsys.readouterr().err


def test_missing_data_are_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fdfa_ext.train.data._download", lambda *_: False)
    flags = ["--data-dir", str(tmp_path), "--output", str(tmp_path)]
    assert main(["experiment", "table-3", *flags]) == 2
    error = capsys.readouterr().err
    assert f"cifar100 is not in {tmp_path}: put train, test into {tmp_path / 'cifar100'}" in error
    assert error.count("\n") == 1
