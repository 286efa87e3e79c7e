"""The benchmarks that need a GPU for their figures run on CPU with tiny sizes, and the soak for as long as it must."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def benchmark_named(monkeypatch):
    """A benchmark as a module."""

    def load(name):
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # it would outlive the test
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.delitem(sys.modules, spec.name)
        return module

    return load


@pytest.fixture
def gpu_benchmark(benchmark_named):
    return benchmark_named("gpu")


def test_the_gpu_benchmark_prints_all_sides_and_merges_them_into_its_file(tmp_path, capsys, gpu_benchmark):
    pytest.importorskip("transformers")
    output = tmp_path / "cpu.json"
    kept = {"section": "small", "preset": "default", "arm": "bare", "rate": 44.0}
    output.write_text(json.dumps({"rows": [kept]}))
    gpu_benchmark.main(["--quick", "--only", "fixed", "--steps", "1", "--output", str(output)])
    printed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    sides = ["ours", "fp8", "transformers"]
    assert printed == [["fixed", "b", side] for side in sides]
    *compared, last = json.loads(output.read_text())["rows"]
    assert [row["arm"] for row in compared] == sorted(sides) and all(row["rate"] > 0 for row in compared)
    assert last == kept


def test_recurrence_trains_all_arms_and_scores_each_at_its_counts(capsys, benchmark_named):
    benchmark_named("recurrence").main(["parity", "--quick", "--arms", "plain_2,segments_4_of_2x1"])
    lines = capsys.readouterr().out.splitlines()
    head, plain, recurs = ([cell.strip() for cell in line.split("|")] for line in (lines[-4], *lines[-2:]))
    assert [row[2] for row in (plain, recurs)] == ["plain_2", "segments_4_of_2x1"]
    assert plain[head.index("no cycles")] and not plain[head.index("8 cycles")]
    assert recurs[head.index("8 cycles")] and not recurs[head.index("no cycles")]


def test_what_recurrence_found_is_in_the_file_at_once_and_other_runs_stay(tmp_path, capsys, benchmark_named):
    recurrence, file = benchmark_named("recurrence"), tmp_path / "new" / "found.json"
    row = {
        "study": "parity",
        "arm": "plain_2",
        "seed": 0,
        "steps": 70,
        "parameters": 1,
        "flops": 1e9,
        "diverged": False,
    }
    row |= {"exact": {"16 bits": {"0": 0.5}}, "halting": {}}
    results = recurrence.Results(file)
    for change in ({}, {"seed": 1, "exact": {"16 bits": {"0": 0.7}}}, {"steps": 90}, {"exact": {"8 bits": {"0": 0.9}}}):
        results.add(row | change)
        assert len(recurrence.read(file)) == len(results.rows)
    assert [(found["seed"], found["steps"]) for found in recurrence.Results(file).rows] == [(1, 70), (0, 90), (0, 70)]
    recurrence.main(["--table", str(file)])
    assert "| 70 | 2 | 70.0 |" in capsys.readouterr().out, "the level that one seed of the two has"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "name a study"),
        ("sudoko", "there is no study 'sudoko'"),
        ("parity sudoku --arms plain_2,hrm_1-8x1", "sudoku has no arm 'hrm_1-8x1'"),
        ("--table missing.json", "missing.json: "),
        ("parity --picture a b c", "goes with --table"),
        ("parity --steps 30", "at least 60"),
        ("parity --quick --output found.json", "leave out --output"),
        ("parity --output other.json", "does not hold results"),
    ],
)
def test_recurrence_refuses_what_it_could_not_do_before_it_trains(
    arguments, message, in_folder, capsys, benchmark_named
):
    (in_folder / "other.json").write_text('[{"key": ["synthetic"]}]')
    with pytest.raises(SystemExit) as ended:
        benchmark_named("recurrence").main(arguments.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_that_every_kind_of_death_has_met_has_the_weights_of_one_that_was_left_alone(tmp_path):
    pytest.importorskip("moto.server")
    output = tmp_path / "soak.json"
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--minutes", "0", "--seed", "1", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr[-10_000:]
    figures = json.loads(output.read_text())
    kinds = {"worker", "raylet", "node", "controller", "driver", "storage"}
    assert figures["seconds"].keys() == kinds and all(figures["seconds"].values()) and figures["wrong"] == []
