"""The scripts of `examples/` do what they say, in an empty folder."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def run(script: str, folder: Path, *arguments: str, **environment: str) -> str:
    command = ["bash", str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_release_is_imported_fine_tuned_asked_and_exported(tmp_path):
    pytest.importorskip("transformers")
    out = run("finetune.sh", tmp_path, STEPS="4")
    assert out.rstrip().endswith("finetuned/exported")
    assert (tmp_path / "finetuned/exported/model.safetensors").exists()
    assert "finished at step 4" in out and "Traceback" not in out


def test_a_sweep_ends_with_a_page_and_its_best_config_is_compared_with_a_plain_model(tmp_path):
    run("sweep.sh", tmp_path)
    page = (tmp_path / "swept/compared.html").read_text()
    assert "no_core" in page and "model.hrm.h_cycles" in page and (tmp_path / "swept/search/report.html").exists()


def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("STEPS", "40")
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = "".join(output.get("text", "") for output in outputs)
    assert "finished at step 40" in texts and "mean_h_cycles" in texts
    assert "application/vnd.plotly.v1+json" in outputs[-1]["data"]


def test_a_server_is_asked_through_openais_client(tmp_path):
    pytest.importorskip("openai")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = run("serve_and_ask.sh", tmp_path, str(port), STEPS="40")
    said = out[out.index("12 + 7: ") :].splitlines()
    assert [line.partition(":")[0] for line in said[:2]] == ["12 + 7", "30 + 11"]
    assert "30 + 11 with high effort: " in out and "too long a prompt: " in out
