"""Evaluation: tasks from files and suites, verdicts, results as lm-evaluation-harness has them, the page."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, small_config, train_locally

from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.generate import main as generate
from hrm_lm.config import Config
from hrm_lm.data.tokenizer import ByteTokenizer
from hrm_lm.errors import UserError
from hrm_lm.evaluation.records import Frame, RecordTask, questions, read_suite
from hrm_lm.evaluation.results import bootstrap
from hrm_lm.evaluation.tasks import binned, in_order, parsed, tasks_of
from hrm_lm.evaluation.verdicts import METRICS, Expected, alternatives, chosen

SUITE = ROOT / "configs" / "suites" / "hrm_text.yaml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Knows some sums of one digit: a part of its answers is right."""
    config = small_config(
        train__steps=250, train__batch_size=32, train__log_every=250, optim__lr=0.01, train__sample_h_cycles=[1, 3],
        model__architecture="prefix_lm", model__d_model=32, optim__warmup_steps=20,
    )  # fmt: skip
    return train_locally(config, tmp_path_factory.mktemp("run")).last_checkpoint


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Reads any text as bytes, and knows nothing."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "pairs.jsonl").write_text("".join(f'{{"prompt": "say {i}", "response": "{i}"}}\n' for i in range(10)))
    config = small_config(
        train__steps=1, data__dataset=str(folder / "pairs.jsonl"), data__tokenizer="bytes", model__max_prompt_len=2048,
        model__max_response_len=256, model__architecture="prefix_lm", model__hrm__l_cycles=1,
    )  # fmt: skip
    return train_locally(config, folder / "run").last_checkpoint


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, answer, expected, right",
    [
        ("exact_match", " New  York\n", "New York", 1), ("exact_match", "new york", "New York", 0),
        ("contains", "It is Paris.", "paris", 1), ("contains", "It is Rome.", "paris", 0),
        ("number", "So 3 + 4 = 7 apples. #### 7", "3 and 4 make 7\n#### 7", 1), ("number", "It makes $1,200.00.", "x #### 1200", 1),
        ("number", "\\boxed{12} of 13", "#### 12", 1), ("number", "7 of 12", "#### 7", 0), ("number", "none", "#### 7", 0),
        ("number", "10-3 = 7", "#### 7", 1), ("number", "it is -7", "#### -7", 1), ("number", "12-7", "#### -7", 0),
        ("boxed", "so $\\boxed{\\dfrac12}$.", "we get \\boxed{\\frac{1}{2}}", 1), ("boxed", "0.5", "\\boxed{\\frac{1}{2}}", 1),
        ("boxed", "\\boxed{x = 5\\text{ cm}}", "$\\boxed{5}$", 1), ("boxed", "\\boxed{\\text{Ann}}", "\\boxed{Ann}", 1),
        ("boxed", "\\boxed{\\left(2,-1\\right)}", "\\boxed{(2, -1)}", 1), ("boxed", "\\boxed{(2,1)}", "\\boxed{(2,-1)}", 0),
        ("boxed", "\\boxed{\\sqrt2", "\\boxed{\\sqrt{2}}", 0), ("boxed", "\\boxed {7}", "\\boxed 7", 1), ("boxed", "\\boxed{10,000}", "\\boxed{10000}", 1),
        ("f1", "the 3 yards", "3 yards", 1), ("f1", "4 yards", "3 yards", 0), ("f1", "red blue", "red", 0.67), ("f1", "", "red", 0),
        ("boxed", "9" * 5000, "9" * 5000, 1), ("boxed", "1/" + "9" * 5000, "9", 0),
    ],
)  # fmt: skip
def test_a_verdict_counts_what_its_benchmark_counts(metric, answer, expected, right):
    assert METRICS[metric](answer, Expected(((expected,),))) == right


@pytest.mark.parametrize(
    "answer, letter",
    [("B", "B"), (" (b)", "B"), ("C. blue", "C"), ("green", "B"), ("The answer is (C).", "C"), ("Not (A) but (C)", "C"),
     ("A dog", None), ("", None), ("D", None), ("\\boxed{A}", "A")],
)  # fmt: skip
def test_an_option_is_named_by_letter_or_text(answer, letter):
    assert chosen(answer, ("red", "green", "blue")) == letter


def test_drops_f1_is_that_of_lm_eval():
    drop = pytest.importorskip("lm_eval.tasks.drop.utils")
    spans = [
        "3",
        "3.0",
        "the 12 yards",
        "12-yard pass",
        "Lions",
        "the Lions and Bears",
        "$1,200",
        "A",
        "10 May 1990",
        "x,y",
    ]
    for answer in [*spans, "", "yards 12 pass", "bears"]:
        for gold in [(span,) for span in spans] + [("Lions", "Bears"), ("3", "12 yards", "x")]:
            theirs = drop.get_metrics([answer], gold)[1]
            assert METRICS["f1"](answer, Expected((gold,))) == pytest.approx(theirs, abs=0.0051), (answer, gold)


def test_every_answer_of_drops_files_counts():
    no_date = {"day": "", "month": "", "year": ""}
    assert alternatives({"number": "3", "date": no_date, "spans": []}) == [("3",)]
    asked = {"number": ["4", ""], "date": [no_date, no_date], "spans": [[], ["Bears", "Lions"]]}
    assert alternatives(asked) == [("4",), ("Bears", "Lions")]
    assert alternatives({"number": "", "date": no_date | {"year": "1990"}, "spans": []}) == [("1990",)]
    assert alternatives({"spans": ["two", "two"], "types": ["span", "span"]}) == [("two",)]


@pytest.mark.parametrize(
    "value", [{"number": ["4"]}, {"spans": 3}, {"spans": [True, None]}, {"date": "1990"}, {"number": {}}]
)
def test_what_is_malformed_in_drops_files_is_no_answer(value):
    assert alternatives(value) == []


# --- the suite -----------------------------------------------------------------------------------------------------------


NO_DATE = {"day": "", "month": "", "year": ""}
FORMATS = {  # records as the benchmarks' files have them, a right answer, and a wrong one
    "gsm8k": ({"question": "Ann has 3, Bob 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"}, "They have 7.", "They have 8."),
    "math": (
        {"problem": "Half of $1$?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        "$\\boxed{\\frac12}$", "$\\boxed{2}$",
    ),
    "drop": (
        {"passage": "Bears won 3 to 2.", "question": "Who won?", "answer": {"number": "", "date": NO_DATE, "spans": ["Bears"]},
         "validated_answers": {"number": [""], "date": [NO_DATE], "spans": [["the Bears"]]}}, "Bears", "Lions",
    ),
    "mmlu": ({"question": "1 + 1?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 1}, "B", "A"),
    "arc_challenge": (
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}, "fire", "ice",
    ),
    "hellaswag": ({"ctx": "A man sits. He", "endings": ["flies", "eats", "is", "was"], "label": "1"}, "B.", "C."),
    "winogrande": ({"sentence": "The _ is big.", "option1": "cat", "option2": "ox", "answer": "2"}, "(B)", "(A)"),
    "boolq": ({"question": "is water wet", "passage": "Water is wet.", "answer": True}, "Yes", "No"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_suite_reads_each_benchmarks_files(tmp_path, name, ending):
    record, right, wrong = FORMATS[name]
    path = tmp_path / f"test{ending}"
    if ending == ".jsonl":
        write_jsonl(path, [record])
    else:
        pq.write_table(pyarrow.Table.from_pylist([record]), path)
    task, frame = read_suite(str(SUITE), {name: str(path)})[name]
    (question,), total = questions(task, frame)
    verdict = METRICS[task.metric or "choice"]
    assert total == 1 and (verdict(right, question.expected), verdict(wrong, question.expected)) == (1, 0)
    assert verdict(question.response, question.expected) == 1  # what val_loss is over
    for value in (record.get("question"), record.get("problem"), record.get("ctx"), record.get("passage")):
        assert not value or value in question.prompt
    assert ("\nB. " in question.prompt) == (task.options is not None)


def test_solved_examples_stand_before_a_question(tmp_path):
    def record(i, subject):
        return {"question": f"{subject} {i}?", "subject": subject, "choices": ["no", "yes"], "answer": i % 2}

    dev = write_jsonl(tmp_path / "dev.jsonl", [record(i, subject) for subject in ("art", "law") for i in range(7)])
    test = write_jsonl(tmp_path / "test.jsonl", [record(9, "law")])
    suite = read_suite(
        str(SUITE), {"mmlu": str(test), "mmlu_shots": str(dev), "prompt_template": "{condition}{prompt}"}
    )
    ((question,), _) = questions(*suite["mmlu"])
    shots = question.prompt.split("\n\n")
    assert (
        len(shots) == 6 and shots[0] == "<|direct|>law 0?\nA. no\nB. yes\nAnswer: A" and shots[-1].endswith("Answer:")
    )
    assert all("law" in shot for shot in shots) and question.facets == {"subject": "law"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give the data of its tasks"),
        ({"gsm9k": "x"}, "has no task 'gsm9k'; it has gsm8k"),
        ({"gsm8k": "missing.jsonl"}, "--tasks missing.jsonl: does not exist"),
        ({"gsm8k": "{file}", "limit": "none"}, "gsm8k: limit: should be a valid integer"),
        ({"math": "{file}"}, "file.jsonl:1: no field 'problem'; it has 'question', 'answer'"),
        ({"mmlu": "{file}"}, "file.jsonl:1: no field 'choices'"),
        ({"gsm8k": "{file}", "prompt_template": "x"}, "prompt_template has no {prompt}"),
    ],
)
def test_what_a_suite_cannot_use_is_told_in_a_line(tmp_path, in_folder, options, message):
    file = write_jsonl(tmp_path / "file.jsonl", [{"question": "1 + 1", "answer": "#### 2"}])
    with pytest.raises(UserError) as told:
        for task, frame in read_suite(
            str(SUITE), {k: v.replace("{file}", str(file)) for k, v in options.items()}
        ).values():
            questions(task, frame)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_an_answer_that_is_no_option_is_told(tmp_path):
    file = write_jsonl(tmp_path / "file.jsonl", [{"ctx": "He", "endings": ["a", "b"], "label": ""}])
    with pytest.raises(UserError, match="file.jsonl:1: the answer '' is none of the 2 options"):
        questions(*read_suite(str(SUITE), {"hellaswag": str(file)})["hellaswag"])


def test_the_whole_suite_is_scored_by_one_command(command, reader, tmp_path):
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", [record, record]) for name, (record, *_) in FORMATS.items()}
    given = ",".join([str(SUITE), *(f"{name}={path}" for name, path in paths.items())])
    code, out, err = command(evaluate, "--checkpoint", reader, "--tasks", given, "--output", tmp_path / "out")
    (document,) = json.loads(out)
    assert code == 0 and document["results"].keys() == FORMATS.keys(), err
    assert {"f1,none", "f1_stderr,none", "exact_match,none", "val_loss,none"} <= document["results"]["drop"].keys()
    assert "mmlu: asked without its 5 solved examples; mmlu_shots=PATH names them" in err
    assert "choice,none" in document["results"]["boolq"] and document["n-samples"]["mmlu"]["effective"] == 2


# --- tasks by name ---------------------------------------------------------------------------------------------------------


def test_options_belong_to_the_task_before_them():
    assert parsed("a.jsonl,limit=3,b.jsonl,reasoning_gym:x,ops=['+','-'],n=2") == [
        ("a.jsonl", {"limit": "3"}), ("b.jsonl", {}), ("reasoning_gym:x", {"ops": "['+','-']", "n": "2"}),
    ]  # fmt: skip
    assert parsed("s3://b/x.jsonl?region=eu,metric=f1") == [("s3://b/x.jsonl?region=eu", {"metric": "f1"})]


def test_a_limit_spreads_over_a_file(tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(10)])
    asked, total = questions(RecordTask(data=str(file), limit=3), Frame())
    assert [question.prompt for question in asked] == ["p0", "p3", "p6"] and total == 10


def test_many_numbers_of_a_facet_become_ranges_and_values_have_a_readers_order():
    assert set(binned([3, 1, None, 3])) == {"3", "1", ""}
    assert set(binned(["\ud800", "\0", "é"])) == {"'\\ud800'", "'\\x00'", "é"}, "which a file and a table can hold"
    for odd in (float("nan"), float("inf"), 10**400):
        assert str(odd) in binned([*range(20), odd])
    ranges = binned(list(range(1000)))
    assert (
        in_order(ranges)[0].startswith("0 to ") and len(set(ranges)) <= 7 and set(ranges[:10]) == {in_order(ranges)[0]}
    )
    assert in_order(["Level 10", "Level 9", "Level 1"]) == ["Level 1", "Level 9", "Level 10"]


def test_answers_that_memory_does_not_hold_are_told_of(reader, command, tmp_path, monkeypatch):
    for place in ("evaluation.scoring", "inference.generate"):
        monkeypatch.setattr(f"hrm_lm.{place}.generate_ids", lambda *_, **__: torch.empty(1 << 60))
    tasks = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "1", "response": "2"}])
    for main, arguments in ((generate, ["--prompt", "1"]), (evaluate, ["--tasks", tasks, "--output", "out"])):
        code, _, err = command(main, "--checkpoint", reader, *arguments)
        assert code == 2 and "more than the memory holds" in err


def test_a_reasoning_tasks_verdict_and_difficulty_are_the_tasks_own(tmp_path):
    pytest.importorskip("reasoning_gym")
    config = Config().model_copy(update={"data": Config().data.model_copy(update={"val_samples": 20})})
    (tmp_path / "tokenizer.json").write_text(ByteTokenizer().to_json())
    name = "reasoning_gym:chain_sum,min_terms=2,max_terms=3,limit=8"
    (task,) = tasks_of([name], tmp_path, config, {}, ByteTokenizer())
    assert len(task.split) == 8 and task.original == 20 and set(task.facets["num_terms"]) == {"2", "3"}
    for i in range(8):
        answer = task.tokenizer.decode(task.split[i].response)
        assert task.split.verdict(i, answer) == 1 and task.split.verdict(i, "x") < 1
        terms = task.tokenizer.decode(task.split[i].prompt).count("+") + task.tokenizer.decode(
            task.split[i].prompt
        ).count(" - ")
        assert int(task.facets["num_terms"][i]) == terms + 1


# --- scores --------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_resampled_samples():
    rng = np.random.default_rng(1)
    right, labels = (rng.random(4000) < 0.7).astype(float), rng.integers(1, 9, 4000).astype(float)
    accuracy, loss = bootstrap(np.stack([right, np.ones(4000), labels * 2 + right, labels], axis=1))
    assert accuracy.value == right.mean() and accuracy.stderr == pytest.approx(right.std() / 4000**0.5, rel=0.1)
    assert accuracy.low == pytest.approx(accuracy.value - 1.96 * accuracy.stderr, abs=0.0015)
    assert accuracy.high == pytest.approx(accuracy.value + 1.96 * accuracy.stderr, abs=0.0015)
    assert loss.value == pytest.approx((labels * 2 + right).sum() / labels.sum()) and loss.low < loss.value < loss.high
    assert bootstrap(np.ones((1, 2)))[0].stderr == 0


def test_the_own_dataset_scores_as_training_validated(command, tmp_path):
    session = train_locally(
        small_config(train__mixed_precision="bf16", train__steps=30, optim__lr=0.01), tmp_path / "run"
    )
    code, out, err = command(evaluate, "--checkpoint", session.last_checkpoint, "--batch_size", 8)
    (document,), last = json.loads(out), session.reports[-1]
    scores = document["results"]["synthetic"]
    assert code == 0 and scores["val_loss,none"] == pytest.approx(last["val_loss"], rel=1e-6), err
    assert scores["exact_match,none"] == last["val_exact_match"]


def test_each_cycle_count_is_scored_with_difficulty_and_written(command, checkpoint, tmp_path):
    counts = [1, 2, 4]
    given = ["--h_cycles", "1,2,4", "--batch_size", 3, "--output", tmp_path / "out"]
    code, out, err = command(evaluate, "--checkpoint", checkpoint, *given)
    documents = json.loads(out)
    assert code == 0 and [document["h_cycles"] for document in documents] == counts, err
    assert len({document["results"]["synthetic"]["val_loss,none"] for document in documents}) == 3
    assert documents == [json.loads((tmp_path / "out" / f"results_h{count}.json").read_text()) for count in counts]
    low, high = documents[1]["intervals"]["synthetic"]["exact_match,none"]
    assert low <= documents[1]["results"]["synthetic"]["exact_match,none"] <= high
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * documents[0]["n-samples"]["synthetic"]["effective"]
    for document in documents:
        mine = [row for row in rows if row["h_cycles"] == document["h_cycles"]]
        assert np.mean([row["exact_match"] for row in mine]) == pytest.approx(
            document["results"]["synthetic"]["exact_match,none"]
        )
        assert all((row["answer"] == row["target"]) == row["exact_match"] for row in mine if row["answer"] is not None)
        assert {row["exact_match"] for row in mine} == {0, 1}
    assert "synthetic" in err and "[" in err  # the table


def test_the_results_are_read_by_lm_eval(command, checkpoint, tmp_path):
    utils = pytest.importorskip("lm_eval.utils")
    file = write_jsonl(
        tmp_path / "sums.jsonl",
        [{"prompt": f"What is {i} + 1?", "response": str(i + 1), "difficulty": i % 2} for i in range(8)],
    )
    code, out, err = command(evaluate, "--checkpoint", checkpoint, "--tasks", f"{file},metric=number")
    (document,) = json.loads(out)
    assert code == 0 and document["group_subtasks"] == {
        "sums.jsonl": ["sums.jsonl/difficulty=0", "sums.jsonl/difficulty=1"]
    }, err
    table = utils.make_table(document)
    assert "sums.jsonl" in table and "difficulty=1" in table and "number" in table and "exact_match" in table
    whole, parts = (
        document["results"]["sums.jsonl"],
        [document["results"][f"sums.jsonl/difficulty={i}"] for i in (0, 1)],
    )
    assert whole["number,none"] == pytest.approx(np.mean([part["number,none"] for part in parts]))
    assert document["higher_is_better"]["sums.jsonl"] == {"exact_match": True, "val_loss": False, "number": True}


def test_a_mixtures_members_are_tasks_and_the_mixture_is_their_group(command, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": f"say {i}", "response": str(i)} for i in range(30)])
    mixture = {"sums": {"dataset": "synthetic"}, "said": {"dataset": str(pairs)}}
    config = small_config(train__steps=4, data__dataset=None, data__mixture=mixture, data__tokenizer="bytes")
    session = train_locally(config, tmp_path / "run")
    code, out, err = command(evaluate, "--checkpoint", session.last_checkpoint)
    (document,), last = json.loads(out), session.reports[-1]
    assert code == 0 and document["group_subtasks"]["mixture"] == ["said", "sums"], err
    for name, reported in (("mixture", "val_loss"), ("sums", "val_loss/sums"), ("said", "val_loss/said")):
        assert document["results"][name]["val_loss,none"] == pytest.approx(last[reported], rel=1e-5)
    assert document["groups"]["mixture"] == document["results"]["mixture"]


def test_only_answers_that_a_verdict_wants_are_all_generated(command, reader, tmp_path, monkeypatch):
    monkeypatch.setattr("hrm_lm.evaluation.scoring.SHOWN_ANSWERS", 4)
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(12)])
    for options, generated in (("", 4), (",metric=contains", 12)):
        out = tmp_path / f"out{generated}"
        command(evaluate, "--checkpoint", reader, "--tasks", f"{file}{options},max_new_tokens=3", "--output", out)
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert sum(row["answer"] is not None for row in rows) == generated


# --- the page, the files, what is refused ------------------------------------------------------------------------------


def test_the_page_shows_texts_as_they_are_and_loads_nothing(command, reader, tmp_path):
    evil = "<script>alert(1)</script> & {braces}"
    file = write_jsonl(
        tmp_path / "q.jsonl",
        [{"prompt": f"{evil} {i}", "response": f"{evil}", "difficulty": evil + "x" * (i % 2)} for i in range(4)],
    )
    code, _, err = command(
        evaluate, "--checkpoint", reader, "--tasks", file, "--h_cycles", "1,2", "--output", tmp_path / "out"
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        code == 0 and "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {braces} 3" in page
    ), err
    assert "Accuracy against cycles" in page and 'src="http' not in page and "<link" not in page


def test_a_runs_evaluation_lies_in_the_runs_folder(command, checkpoint, monkeypatch, tmp_path):
    from hrm_lm.commands import evaluate as module

    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / checkpoint.name).symlink_to(checkpoint)
    real = module.find_checkpoint
    monkeypatch.setattr(module, "find_checkpoint", lambda *_: real(str(run / checkpoint.name), None, None))
    assert command(evaluate, "--run_name", "mine")[0] == 0
    (written,) = (run / "evaluation").iterdir()
    assert {file.name for file in written.iterdir()} == {"results_h2.json", "samples.jsonl", "report.html"}


def test_tasks_and_results_may_be_in_a_bucket_and_keys_reach_no_file(command, checkpoint, bucket):
    with bucket.fs.open_output_stream("bucket/sums.jsonl") as file:
        file.write(b'{"prompt": "What is 1 + 2?", "response": "3"}\n')
    code, out, err = command(
        evaluate, "--checkpoint", checkpoint, "--tasks", bucket("sums.jsonl"), "--output", bucket("out")
    )
    written = {}
    for info in bucket.fs.get_file_info(pyarrow.fs.FileSelector("bucket/out")):
        with bucket.fs.open_input_file(info.path) as file:
            written[info.base_name] = file.read().decode()
    assert code == 0 and [json.loads(written["results_h2.json"])] == json.loads(out), err
    assert "s3://bucket/out" in err and not [text for text in [*written.values(), out, err] if "topsecret" in text]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--h_cycles", "auto:x"], "--h_cycles auto:x: expected a count, such as 4, or auto"),
        (["--h_cycles", "2,auto:-1"], "--h_cycles auto:-1: expected a count, such as 4, or auto"),
        (["--h_cycles", "auto:0.1:300"], "--h_cycles must be at least 0 and at most 256, not 300"),
        (["--h_cycles", "1,x"], "--h_cycles x: expected a count, such as 4, or auto"),
        (["--h_cycles", "2,0"], "--h_cycles must be at least 1, not 0"),
        (["--tasks", "nothing"], "'nothing' is neither a known name"),
        (["--tasks", "missing.jsonl"], "--tasks missing.jsonl: does not exist"),
        (["--tasks", "reasoning_gym:chain_summ"], "no such task; did you mean chain_sum"),
        (["--tasks", "synthetic", "--dataset", "synthetic"], "give one of them"),
        (["--num_workers", "-1"], "--num_workers must be at least 0"),
        (["--output", "full"], "full: is not empty; give another --output"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_line_and_leaves_nothing(
    command, checkpoint, tmp_path, arguments, message
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, out, err = command(evaluate, "--checkpoint", checkpoint, *arguments)
    assert code == 2 and message in err and not out and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("evaluations/*"))


# --- over a cluster --------------------------------------------------------------------------------------------------------


def test_a_cluster_gives_the_same_scores_though_a_worker_is_killed(command, cluster, reader, tmp_path, monkeypatch):
    from hrm_lm.inference import evaluate as module

    file = write_jsonl(
        tmp_path / "q.jsonl", [{"prompt": f"p{i}", "response": "ab"[: i % 3], "difficulty": i % 2} for i in range(70)]
    )
    ask = [
        "--checkpoint",
        reader,
        "--tasks",
        f"{file},metric=contains,max_new_tokens=4",
        "--h_cycles",
        "1,2",
        "--batch_size",
        16,
    ]
    alone = command(evaluate, *ask, "--output", tmp_path / "alone")
    load, died, driver = module.load_model, tmp_path / "died", os.getpid()

    def deadly(*arguments):
        model, *rest = load(*arguments)

        class Deadly(type(model)):  # a class of a function goes to the workers as it stands
            def forward(self, *arguments):
                if os.getpid() != driver and not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().forward(*arguments)

        model.__class__ = Deadly
        return model, *rest

    monkeypatch.setattr(module, "load_model", deadly)
    spread = command(evaluate, *ask, "--num_workers", 0, "--output", tmp_path / "spread")
    assert (alone[0], spread[0]) == (0, 0) and died.exists() and "2 worker(s)" in spread[2], spread[2]
    for one, other in zip(json.loads(alone[1]), json.loads(spread[1]), strict=True):
        assert one["n-samples"] == other["n-samples"]
        for name, scores in one["results"].items():
            numbers = {key: value for key, value in scores.items() if key not in ("alias", "name")}
            assert {key: other["results"][name][key] for key in numbers} == pytest.approx(numbers, rel=1e-5)
    rows = [
        [json.loads(line)["answer"] for line in (tmp_path / place / "samples.jsonl").open()]
        for place in ("alone", "spread")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 140
    code, _, err = command(evaluate, *ask, "--num_workers", 99)
    assert code == 2 and "--num_workers 99: the cluster has room for 2 workers of 1 CPU each" in err
