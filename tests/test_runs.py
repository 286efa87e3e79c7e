"""Pages on runs: what event files tell, sample answers, the page of a run, runs side by side."""

import html
import json
import math
import re

import pyarrow.fs
import pytest
from conftest import KEYS, LocalSession, assert_same_weights, eval_options, small_config, train_locally

from hrm_lm.cluster.run_folder import RunFolder
from hrm_lm.commands.report import main as report
from hrm_lm.config import Config
from hrm_lm.data.registry import load_dataset
from hrm_lm.inference.generate import generate
from hrm_lm.report.events import FILES, EventFiles, Written, scalars, written
from hrm_lm.report.figures import thinned
from hrm_lm.report.page import run_page
from hrm_lm.report.runs import Run, read_run
from hrm_lm.training.checkpoint import load_model
from hrm_lm.training.loop import train
from hrm_lm.training.metrics import MetricsLog
from hrm_lm.training.validation import sample_answers

HERE = pyarrow.fs.LocalFileSystem()


class Logging(LocalSession):
    """Leaves event files, and a config as the driver does, in its folder."""

    def __init__(self, folder, config: Config, stop_at: int | None = None):
        super().__init__(folder, stop_at)
        self.event_folder = folder
        (folder / "config.yaml").write_text(config.to_yaml())


def logged_run(folder, **overrides):
    config = small_config(**overrides)
    session = Logging(folder, config)
    session.outcome = train(config, session)
    return session


def read(folder) -> Written:
    return written(EventFiles(HERE, str(folder)).new())


def page_text(page: str) -> str:
    """What a reader sees of a page, without figures."""
    body = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"</?b>", "", body)))


# --- event files -------------------------------------------------------------------------------------------------


def test_event_files_are_read_as_they_grow_and_a_torn_end_is_waited_for(tmp_path):
    log = MetricsLog(tmp_path / "whole", "none", 0, 10)
    log.record(1, {"loss": 0.5, "lr": 0.25})
    log.text(1, "answers", [{"prompt": "ä: 'x'\n- y\u2028z\x0b", "answer": ""}])
    log.record(2, {"loss": 0.125})
    log.close()
    (whole,) = (tmp_path / "whole").iterdir()
    data, files = whole.read_bytes(), EventFiles(HERE, str(tmp_path))
    events = []
    for end in (0, 5, len(data) // 2, len(data) - 1, len(data)):
        (tmp_path / whole.name).write_bytes(data[:end])
        events += files.new()
    assert files.new() == [] and EventFiles(HERE, str(tmp_path), files.read).new() == []
    run = written(events)
    assert run.curves == {"loss": {1: 0.5, 2: 0.125}, "lr": {1: 0.25}} and run.step == 2
    assert run.texts == {"answers": {1: [{"prompt": "ä: 'x'\n- y\u2028z\x0b", "answer": ""}]}}


def test_what_a_killed_attempt_wrote_beyond_its_checkpoint_is_hidden_and_its_last_validation_stays(tmp_path):
    killed = MetricsLog(tmp_path, "none", 0, 10)
    killed.text(0, "environment", {"workers": 2})
    for step in range(1, 6):
        killed.record(step, {"loss": step})
    killed.record(3, {"val_loss": 3})
    killed.record(5, {"val_loss": 5})
    killed.close()
    (file,) = tmp_path.iterdir()
    file.rename(f"{file}.killed")  # files of one second have one name
    again = MetricsLog(tmp_path, "none", 3, 10)
    again.text(3, "environment", {"workers": 1})
    again.record(4, {"loss": 40})
    again.record(5, {"loss": 50})
    again.rewind(4)
    again.record(5, {"loss": 500})
    again.close()
    run = read(tmp_path)
    assert run.curves == {"loss": {1: 1, 2: 2, 3: 3, 4: 40, 5: 500}, "val_loss": {3: 3}}
    assert [(attempt["step"], attempt["workers"]) for attempt in run.attempts] == [(0, 2), (3, 1)]
    assert run.rollbacks == [4] and run.step == 5


def test_a_thinned_curve_keeps_its_ends_and_its_spikes():
    points = dict.fromkeys(range(100000), 1.0) | {777: 9.0, 88_888: -9.0, 5: float("nan")}
    kept = thinned(points)
    assert len(kept) <= 1003 and {(777, 9.0), (88_888, -9.0), (0, 1.0), (99_999, 1.0)} <= set(kept)
    assert thinned({2: 1.0, 1: 3.0}) == [(1, 3.0), (2, 1.0)]


# --- sample answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_sample_answers_change_no_weight_and_no_number(tmp_path, architecture):
    options = {"train__val_every": 3, "model__dropout": 0.1, "model__architecture": architecture}
    asked = logged_run(tmp_path / "asked", **options)
    plain = train_locally(small_config(**options, train__sample_answers=0), tmp_path / "plain")
    assert_same_weights(asked.last_weights(), plain.last_weights())
    for name in ("loss", "val_loss", "grad_norm"):
        assert [metrics[name] for metrics in asked.reports] == [metrics[name] for metrics in plain.reports]
    answers = read(tmp_path / "asked").texts["answers"]
    assert list(answers) == [3, 6, 9, 12] and [len(some) for some in answers.values()] == [4] * 4
    assert len({tuple(sample["prompt"] for sample in some) for some in answers.values()}) == 1


def test_sample_answers_are_those_of_generate_and_say_what_was_expected(tmp_path):
    session = logged_run(tmp_path, train__steps=40, optim__lr=0.01)
    model, tokenizer, checkpoint = load_model(session.last_checkpoint)
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    held_out = {tokenizer.decode(s.prompt): tokenizer.decode(s.response) for s in splits.val}
    answers = read(tmp_path).texts["answers"][40]
    assert len({sample["prompt"] for sample in answers}) == 4
    for sample in answers:
        assert held_out[sample["prompt"]] == sample["expected"]
        (full,) = generate(model, tokenizer, [sample["prompt"]])
        assert full.startswith(sample["answer"]) and sample["right"] == (sample["answer"] == sample["expected"])


def test_sample_answers_are_spread_over_a_mixture_and_judged_by_the_tasks_verdict(tmp_path):
    mixture = {"sums": {"dataset": "synthetic"}, "logic": {"dataset": "reasoning_gym:syllogism"}}
    options = {"data__dataset": None, "data__mixture": mixture, "data__val_samples": 9}
    session = train_locally(small_config(**options, train__steps=1), tmp_path)
    model, _, checkpoint = load_model(session.last_checkpoint)
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    splits.members["logic"].val.verdict = lambda i, answer: 1.0
    answers = sample_answers(model, splits, eval_options(2), 5)
    assert [sample["dataset"] for sample in answers] == ["logic", "sums", "logic", "sums", "logic"]
    assert [sample["right"] for sample in answers] == [sample["dataset"] == "logic" for sample in answers]
    assert len(sample_answers(model, splits, eval_options(2), 10_000)) == len(splits.val)


# --- the page of a run -------------------------------------------------------------------------------------------


def test_a_runs_page_has_its_curves_answers_config_and_machine(tmp_path):
    logged_run(tmp_path / "r", train__val_every=4, optim__lr=0.01)
    run = read_run(HERE, str(tmp_path / "r"))
    page = run_page(run)
    text = " ".join(page_text(page).split())
    assert "Not finished: at step 12. Best val_loss" in text, "there is no result.json yet"
    for expected in (
        "Sample answers",
        "What is",
        "optim.lr 0.01 0.002",
        "data.dataset synthetic null",
        "torch 2.",
        "python 3.",
    ):
        assert expected in text, expected
    assert "optim.warmup_steps 3 20" in text and "optim.betas" not in text.partition("All")[0], "a default"
    for title in ("Loss", "Right answers", "Learning rate", "Gradient norm", "Tokens per second", "Padding"):
        assert f'"text":"{title}"' in page, title
    assert str(tmp_path) not in page and "http" not in page_text(page)
    (tmp_path / "r/result.json").write_text(json.dumps({"status": "diverged", "step": 8, "error": "lower <optim.lr>"}))
    text = page_text(run_page(read_run(HERE, str(tmp_path / "r"))))
    assert "Diverged at step 12" in text and "lower <optim.lr>" in text


def test_a_run_without_event_files_still_has_a_page(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.yaml").write_text("train: {steps: 9}\nmodel: {gone: 1}\n")
    text = page_text(run_page(read_run(HERE, str(tmp_path / "old"))))
    assert "has not logged any numbers yet" in text and "nor do runs of earlier versions" in text
    assert "model.gone" in text


def test_a_trial_of_a_sweep_has_a_page_from_what_tune_was_told(tmp_path):
    trial = tmp_path / "trials/e3c1b_00000"
    for step, lr in ((10, 0.5), (20, 0.25)):
        (trial / f"checkpoint_{step:08d}_bebb4942").mkdir(parents=True)
        (trial / f"checkpoint_{step:08d}_bebb4942/config.yaml").write_text(small_config(optim__lr=lr).to_yaml())
    (trial / "params.json").write_text('{"optim.lr": 0.5}')
    row = {"timestamp": 1e9, "seconds": 2.0, "tokens": 10, "hostname": "secret_host", "pid": 9}
    rows = [row | {"step": 5, "loss": 2.0, "val_loss": math.nan}, row | {"step": 10, "loss": 1.5, "val_loss": 1.75}]
    rows += [{"step": 11, "val_loss": 1e9, "timestamp": 1e9, "status": "diverged", "error": "not finite"}]
    (trial / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(HERE, str(trial))
    assert run.curve("loss") == {5: 2.0, 10: 1.5} and run.curve("val_loss") == {10: 1.75}
    assert run.config["optim.lr"] == 0.25 and run.status == "diverged" and run.name == "e3c1b_00000"
    page = run_page(run)
    assert "Diverged at step 11" in page_text(page) and "secret_host" not in page


def test_a_page_shows_restarts_and_rollbacks(tmp_path):
    attempts = [{"step": 0, "time": 0.0, "workers": 4}, {"step": 30, "time": 1e9, "workers": 3}]
    losses = dict.fromkeys(range(60), 1.0)
    run = Run("r", {}, {}, Written({"loss": losses}, {}, attempts, [50], 59, 1e9))
    page = run_page(run)
    text = " ".join(page_text(page).split())
    assert "1 restart, at" in text and "1 rollback, at" in text and "2 2001-09-09 01:46 UTC 30 3" in text
    assert {30, 50} <= {float(x) for x in re.findall(r'"x0":([\d.]+)', page)}


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    for name, options in {"a": {}, "b": {"optim__lr": 0.02}, "c": {"model__architecture": "prefix_lm"}}.items():
        logged_run(storage / "runs" / name, train__val_every=4, ray__run_name=name, **options)
    return storage


def test_report_makes_the_page_of_a_run_in_its_folder(command, three_runs, monkeypatch):
    monkeypatch.chdir(three_runs)
    code, out, err = command(report, "a")
    assert code == 0 and out == f"{three_runs}/runs/a/report.html\n" and not err
    assert (three_runs / "runs/a/report.html").read_text().startswith("<!doctype html>")
    code, out, _ = command(report, "runs/a", "--output", "new/page.html")
    assert code == 0 and (three_runs / "new/page.html").exists()


def test_several_runs_are_laid_side_by_side_with_what_differs_alone(command, three_runs, monkeypatch):
    monkeypatch.chdir(three_runs)
    code, out, err = command(report, "a", "runs/b", three_runs / "runs/c")
    assert code == 0 and out == f"{three_runs}/comparison.html\n", err
    page = (three_runs / "comparison.html").read_text()
    text = " ".join(page_text(page).split())
    differs = text.partition("What differs")[2].partition("Curves")[0]
    assert "optim.lr 0.002 0.02 0.002" in differs
    assert "model.architecture encoder_decoder encoder_decoder prefix_lm" in differs
    assert "run_name" not in differs and "train.steps" not in differs
    for axis in ("step", "tokens", "seconds of training"):
        assert f'"text":"Validation loss by {axis}"' in page


def test_runs_of_one_name_are_told_apart_and_a_run_named_twice_is_refused(command, three_runs, monkeypatch):
    monkeypatch.chdir(three_runs)
    logged_run(three_runs / "others/a", train__steps=2)
    code, _, err = command(report, "runs/a", "others/a", "b")
    assert code == 0, err
    head = page_text((three_runs / "comparison.html").read_text())[:400]
    assert "runs/a" in head and "others/a" in head and "runs/b" not in head
    code, _, err = command(report, "a", "a")
    assert code == 2 and "named twice" in err


@pytest.mark.parametrize(
    "run, message",
    [
        ("nope", "no run 'nope' in"),
        ("./nope", "no run is there"),
        ("s", "a sweep, which has a report of its own"),
        ("runs/a/step_000004", "a checkpoint; give the folder of its run"),
        ("torn", "torn or foreign"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(command, three_runs, monkeypatch, run, message):
    monkeypatch.chdir(three_runs)
    for name, file in (("s", "sweep.yaml"), ("torn", "config.yaml")):
        (three_runs / "runs" / name).mkdir(exist_ok=True)
        (three_runs / "runs" / name / file).write_text("[1]")
    code, out, err = command(report, run)
    assert code == 2 and message in err and not out and len(err.splitlines()) == 1, err


def test_a_run_in_object_storage_has_its_page_there_without_keys(command, three_runs, bucket, tmp_path):
    pyarrow.fs.copy_files(
        str(three_runs / "runs/a"), "bucket/pages/a", source_filesystem=HERE, destination_filesystem=bucket.fs
    )
    # Of an earlier version, which kept keys.
    config = small_config(data__dataset=bucket("corpus")).to_dict()
    with bucket.fs.open_output_stream("bucket/pages/a/config.yaml") as file:
        file.write(json.dumps(config).encode())
    code, out, err = command(report, bucket("pages/a"))
    assert code == 0 and out == "s3://bucket/pages/a/report.html\n", err
    page = RunFolder(bucket("pages"), "a").read("report.html")
    assert "s3://bucket/corpus" in page and "topsecret" not in page and KEYS not in page
    code, _, err = command(report, "a", "--save_dir", bucket("pages"), "--output", tmp_path / "a.html")
    assert code == 0 and (tmp_path / "a.html").exists(), err


def test_event_files_in_object_storage_are_read_from_where_the_last_look_ended(three_runs, bucket):
    (file,) = (three_runs / "runs/a").glob(f"{FILES}*")
    data = file.read_bytes()
    files, events = EventFiles(bucket.fs, "bucket/grows"), []
    for end in (len(data) // 2, len(data)):
        with bucket.fs.open_output_stream(f"bucket/grows/{file.name}", compression=None) as stream:
            stream.write(data[:end])
        events += files.new()
    assert [s for s in map(scalars, events) if s] == [
        s for s in map(scalars, EventFiles(HERE, str(file.parent)).new()) if s
    ]
