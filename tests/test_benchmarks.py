"""The benchmarks that need a GPU for their figures run on CPU with tiny sizes, and the soak for as long as it must."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def gpu_benchmark(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)  # it would outlive the test
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_benchmark_prints_both_sides_and_merges_them_into_its_file(tmp_path, capsys, gpu_benchmark):
    pytest.importorskip("transformers")
    output = tmp_path / "cpu.json"
    kept = {"section": "small", "preset": "default", "arm": "bare", "rate": 44.0}
    output.write_text(json.dumps({"rows": [kept]}))
    gpu_benchmark.main(["--quick", "--only", "fixed", "--steps", "1", "--output", str(output)])
    printed = [line.split()[:3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert printed == [["fixed", "b", "ours"], ["fixed", "b", "transformers"]]
    *compared, last = json.loads(output.read_text())["rows"]
    assert [row["arm"] for row in compared] == ["ours", "transformers"] and all(row["rate"] > 0 for row in compared)
    assert last == kept


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
