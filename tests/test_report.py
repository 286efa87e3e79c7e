"""What a sweep shows: the table on a terminal, the lines in a log and the report. No Ray runs here."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pandas
import pyarrow.fs
import pytest
import yaml
from conftest import small_config, train_locally

from hrm_lm.tuning.progress import SweepProgress
from hrm_lm.tuning.report import render
from hrm_lm.tuning.results import Trial, best_trial, read_trials, trials_csv
from hrm_lm.tuning.space import Sweep


@pytest.fixture
def sweep(tmp_path):
    space = {"optim.lr": {"loguniform": [1e-4, 1e-1]}, "model.hrm.h_cycles": {"choice": [1, 2]}}
    base = {"train": {"steps": 20, "val_every": 10}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": base, "search_space": space}, sort_keys=False))
    return Sweep(tmp_path / "sweep.yaml")


# --- the terminal ------------------------------------------------------------------------------------------------


def trial(name, lr):
    return SimpleNamespace(trial_id=name, config={"optim.lr": lr})


def report(step, val_loss=math.nan, **fields):
    return {"step": step, "val_loss": val_loss, "val_exact_match": 0.25} | fields


@pytest.fixture
def shown(capsys):
    """Three trials to the end: `shown(live)` is what the terminal shows at last, with the callback."""

    def play(live):
        progress = SweepProgress(["optim.lr"], "val_loss", "min", live)
        good, poor, diverging = trial("a", 0.01), trial("b", 0.02), trial("c", 0.5)
        for each in (good, poor, diverging):
            progress.on_trial_start(0, [], each)
        progress.on_trial_result(0, [], good, report(10, 1.5))
        progress.on_trial_result(0, [], poor, report(10, 2.5))
        progress.on_trial_result(0, [], good, report(15))
        progress.on_trial_result(0, [], diverging, report(3, 1e9, status="diverged", error="not finite at step 3"))
        progress.on_trial_complete(0, [], diverging)
        progress.on_trial_complete(0, [], poor)
        progress.on_experiment_end([])
        return capsys.readouterr().out, progress

    return play


def test_the_live_table_shows_every_trial_and_the_best(shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    table, progress = shown(live=True)
    assert "3 trials; best val_loss 1.5, trial 0" in table
    rows = [re.split(r"[\s│]+", line.strip("│ ")) for line in table.splitlines() if line.startswith("│")]
    assert rows == [
        ["0", "0.01", "running", "15", "1.5", "0.25"],
        ["1", "0.02", "done", "10", "2.5", "0.25"],
        ["2", "0.5", "diverged"],
    ]
    assert progress._table().rows[0].style == "bold"


def test_a_log_has_a_line_for_each_event(shown):
    lines = shown(live=False)[0].splitlines()
    assert lines[0] == "trial 0: lr 0.01"
    assert "trial 0: step 10  val_loss 1.5  (best so far: 1.5, trial 0)" in lines
    assert "trial 1: step 10  val_loss 2.5  (best so far: 1.5, trial 0)" in lines
    assert "trial 0: step 15  checkpoint saved" in lines
    assert "trial 2: diverged: not finite at step 3" in lines
    assert lines[-1] == "trial 1: ended at step 10"


# --- results -----------------------------------------------------------------------------------------------------


def reported(step, val_loss=math.nan):
    return {"step": step, "val_loss": val_loss, "val_exact_match": val_loss, "seconds": step / 10, "tokens": step}


def tunes_result(folder, rows, **kept):
    """What Tune tells of a trial; `kept`: names of its checkpoints, each with its row."""
    fs = pyarrow.fs.LocalFileSystem()
    checkpoints = [(SimpleNamespace(path=f"{folder}/{name}", filesystem=fs), row) for name, row in kept.items()]
    return SimpleNamespace(
        config={"optim.lr": 0.1, "model.hrm.h_cycles": 1}, error=None, metrics=rows[-1], path=str(folder), filesystem=fs,
        metrics_dataframe=pandas.DataFrame(rows), best_checkpoints=checkpoints,
    )  # fmt: skip


def test_checkpoints_without_a_validation_are_no_results(sweep, tmp_path):
    rows = [reported(5), reported(10, 0.5), reported(15)]
    (tmp_path / "validated").mkdir()
    results = [tunes_result(tmp_path, rows, between=rows[2], validated=rows[1]), tunes_result(tmp_path, rows[:1])]
    found, unvalidated = read_trials(results, sweep)
    assert (found.score, found.best_step, found.steps) == (0.5, 10, 15) and found.checkpoint.path.endswith("validated")
    assert [row["step"] for row in found.history] == [10] and found.seconds == 1.5
    assert unvalidated.score is None and unvalidated.checkpoint is None
    assert best_trial([found, unvalidated], sweep) is found
    assert "nan" not in trials_csv([found, unvalidated], sweep)
    assert "nan" not in str(cells(render([found, unvalidated], found, sweep, "s"), 1))


def test_the_best_checkpoint_is_found_where_tune_noted_another_that_is_gone(sweep, tmp_path):
    run = train_locally(small_config(train__steps=2, train__val_every=1), tmp_path / "run")
    for step in (1, 2):
        (run.folder / f"step_00000{step}").rename(run.folder / f"checkpoint_00010{step}")
    rows = [reported(1, 0.5), reported(2, 0.75)]
    (trial,) = read_trials([tunes_result(run.folder, rows, checkpoint_000000=rows[0])], sweep)
    assert trial.checkpoint.path.endswith("checkpoint_000101")
    (trial,) = read_trials([tunes_result(tmp_path / "empty", rows, checkpoint_000000=rows[0])], sweep)
    assert trial.checkpoint is None and trial.score == 0.5


# --- the report --------------------------------------------------------------------------------------------------


def scored(number, lr, h_cycles, score, status="finished"):
    history = [{"step": step, "val_loss": score * 20 / step, "seconds": step, "tokens": step} for step in (10, 20)]
    return Trial(
        number, {"optim.lr": lr, "model.hrm.h_cycles": h_cycles}, status, steps=20, best_step=20, score=score,
        val_loss=score, val_exact_match=0.125, tokens_per_s=1234.5, seconds=20.0, history=history,
    )  # fmt: skip


@pytest.fixture
def trials():
    crashed = Trial(3, {"optim.lr": 0.5, "model.hrm.h_cycles": 2}, "failed", error="<script>alert('x')</script> & more")
    return [scored(0, 0.01, 1, 0.75), scored(1, 0.02, 2, 0.25), scored(2, 0.03, 2, 0.5, status="stopped"), crashed]


def cells(page, number):
    """The class of a trial's row, and what its cells show."""
    row = re.search(rf'<tr class="([^"]*)"><td data-v="{number}">(.*?)</tr>', page)
    return row[1], [str(number), *re.findall(r"<td[^>]*>([^<]*)</td>", row[2])]


def test_the_report_counts_the_trials_by_how_they_ended(sweep, trials):
    page = render(trials, trials[1], sweep, "a <sweep>")
    tiles = re.findall(r'<div class="tile" title="([^"]*)"><b>(\d+)</b><span>([^<]*)</span>', page)
    assert [(n, status) for _, n, status in tiles] == [("2", "finished"), ("1", "stopped"), ("1", "failed")]
    assert tiles[2][0] == "crashed" and "<h1>a &lt;sweep&gt;</h1>" in page


def test_the_reports_table_has_a_row_for_each_trial_and_marks_the_best(sweep, trials):
    page = render(trials, trials[1], sweep, "s")
    assert cells(page, 0) == (
        "finished", ["0", "0.01", "1", "finished", "20", "0.75", "20", "0.125", "1,234", "20", ""]
    )  # fmt: skip
    assert [cells(page, number)[0] for number in range(4)] == ["finished", "best finished", "stopped", "failed"]
    assert "Best of 4 trials: <b>trial 1</b>, val_loss <b>0.2500</b> at step 20 (exact match 0.125)" in page
    assert "lr <b>0.02</b>, h_cycles <b>2</b>" in page


def test_an_error_is_text_in_the_report(sweep, trials):
    page = render(trials, trials[1], sweep, "s")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; more" in cells(page, 3)[1][-1]


def test_a_report_without_any_success_is_its_table(sweep, trials):
    failed = [replace(each, score=None, history=[], status="failed") for each in trials]
    page = render(failed, None, sweep, "s")
    assert "None of 4 trials succeeded" in page and "Learning curves" not in page and "best " not in cells(page, 1)[0]
