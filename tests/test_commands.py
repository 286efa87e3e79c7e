"""The commands, run as a user runs them but in this process; none of these starts Ray."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, small_config, train_locally

from hrm_lm.cluster import run_folder
from hrm_lm.inference.evaluate import main as evaluate
from hrm_lm.inference.generate import main as generate
from hrm_lm.training.train import main as train

SMALL = ["--set", "model.d_model=16", "--set", "model.n_heads=2", "--set", "train.batch_size=8"]


@pytest.fixture
def checkpoint(tmp_path):
    train_locally(small_config(train__steps=40, optim__lr=0.01), tmp_path / "run")
    return max((tmp_path / "run").glob("step_*"))


def test_a_dry_run_prints_a_loss_without_starting_ray():
    code = "import sys; from hrm_lm.training.train import main; main([]); assert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "nope.yaml"], "nope.yaml: cannot be read"),
        (["--set", "model.hrm.hcycles=2"], "did you mean h_cycles?"),
        (["--set", "oops"], "expected PATH=VALUE"),
        (["--steps", "many"], "train.steps: should be a valid integer"),
        (["--num_workers", "3"], "must be divisible by ray.num_workers"),
        (["--dry_run", "0"], "no dataset: give --dataset"),
        (["--dry_run", "0", "--dataset", "missing.jsonl"], "missing.jsonl: cannot be read: No such file"),
        (
            ["--dry_run", "0", "--dataset", "synthetic", "--mixed_precision", "fp16", "--use_gpu", "false"],
            "fp16 needs a CUDA GPU",
        ),
        (["--mixed_precision", "fp16", "--use_gpu", "false"], "fp16 needs a CUDA GPU"),
        (["--dry_run", "0", "--dataset", "synthetic", "--init_from", "nowhere"], "no such checkpoint folder"),
        (["--dry_run", "0", "--dataset", "synthetic", "--run_name", "a/b"], "cannot name a folder"),
        (["--dry_run", "0", "--dataset", "synthetic", "--save_dir", "s4://x"], "s4://x"),
    ],
)
def test_bad_input_is_a_message_of_a_line_and_exit_code_2(command, arguments, message):
    code, out, err = command(train, *arguments)
    assert code == 2 and message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error:")]) == 1 and not out


def test_the_flags_of_the_guide_reach_the_config(monkeypatch, command):
    from hrm_lm.cluster import run as driver

    seen = []
    monkeypatch.setattr(
        driver,
        "run",
        lambda config, resume: (
            seen.append((config, resume))
            or dict(
                status="finished",
                step=1,
                val_loss=1.0,
                val_exact_match=0.0,
                best_step=1,
                seconds=1.0,
                tokens_per_s=1.0,
                best_checkpoint="x",
            )
        ),
    )
    code, out, err = command(
        train, "--dry_run", 0, "--dataset", "synthetic", "--steps", 7, "--val_every", 3, "--save_dir", "s", "--mixed_precision",
        "bf16", "--grad_clip", 1.5, "--run_name", "n", "--num_workers", 2, "--use_gpu", "true", "--resume", "never",
        "--set", "model.hrm.h_cycles=4",
    )  # fmt: skip
    ((config, resume),) = seen
    assert (config.data.dataset, config.train.steps, config.train.val_every, config.ray.storage_path) == (
        "synthetic",
        7,
        3,
        "s",
    )
    assert (config.train.mixed_precision, config.train.grad_clip, config.ray.run_name) == ("bf16", 1.5, "n")
    assert (config.ray.num_workers, config.ray.use_gpu, config.model.hrm.h_cycles, resume) == (2, True, 4, "never")


# --- generate ----------------------------------------------------------------------------------------------------


def test_generate_prints_the_answers_in_order_and_nothing_else(command, checkpoint, tmp_path):
    (tmp_path / "prompts.txt").write_text("What is 3 + 4?\n\nWhat is 0 + 1?\n")
    arguments = ["--checkpoint", checkpoint, "--dataset", "synthetic"]
    code, out, err = command(
        generate, *arguments, "--prompt", "What is 2 + 2?", "--prompts_file", tmp_path / "prompts.txt"
    )
    singly = [command(generate, *arguments, "--prompt", f"What is {sum}?")[1] for sum in ("2 + 2", "3 + 4", "0 + 1")]
    assert code == 0 and out.splitlines() == [line.strip() for line in singly] and len(out.splitlines()) == 3


def test_prompts_of_several_lines_come_from_jsonl_and_the_answers_are_json(command, checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "What is 2 + 2?", "response": "4"}\n\n{"prompt": "What is 0 + 1?"}\n')
    code, out, _ = command(generate, "--checkpoint", checkpoint, "--prompts_file", file)
    singly = [
        command(generate, "--checkpoint", checkpoint, "--prompt", f"What is {sum}?")[1] for sum in ("2 + 2", "0 + 1")
    ]
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == [line.rstrip("\n") for line in singly]
    file.write_text('{"prompt": "What is 2 + 2?"}\n"What is 1 + 1?"\n')
    code, _, err = command(generate, "--checkpoint", checkpoint, "--prompts_file", file)
    assert code == 2 and "prompts.jsonl:2: not a JSON object with a field 'prompt'" in err


def test_sampling_is_repeatable_and_top_1_is_greedy(command, checkpoint):
    ask = lambda *more: command(generate, "--checkpoint", checkpoint, "--prompt", "What is 2 + 2?", *more)[1]  # noqa: E731
    hot = ["--temperature", 5, "--max_new_tokens", 12]
    assert ask(*hot, "--seed", 1) == ask(*hot, "--seed", 1) != ask(*hot, "--seed", 2)
    assert ask(*hot, "--top_k", 1) == ask("--max_new_tokens", 12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to answer"),
        (["--prompt", "What is x?"], "character 'x'"),
        (["--prompt", ""], "has 0 tokens"),
        (["--prompt", "1", "--h_cycles", "-1"], "--h_cycles must be at least 0"),
        (["--prompt", "1", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompts_file", "nope"], "nope cannot be read"),
    ],
)
def test_generate_refuses_bad_input_in_a_line(command, checkpoint, arguments, message):
    code, out, err = command(generate, "--checkpoint", checkpoint, *arguments)
    assert code == 2 and message in err and not out and len(err.splitlines()) == 1


def test_generate_without_any_run_says_where_it_looked(command, monkeypatch, tmp_path):
    from hrm_lm.inference import generate as module

    monkeypatch.setattr(module, "JOB_STORAGE", tmp_path / "jobs")
    code, _, err = command(generate, "--prompt", "1")
    assert code == 2 and f"no run with a checkpoint in {tmp_path / 'runs'} or {tmp_path / 'jobs'}" in err
    code, _, err = command(generate, "--prompt", "1", "--run_name", "x")
    assert code == 2 and "no run 'x'" in err


def test_evaluate_scores_with_more_cycles_than_trained(command, checkpoint):
    trained, longer = (
        json.loads(command(evaluate, "--checkpoint", checkpoint, *more)[1]) for more in ([], ["--h_cycles", 4])
    )
    assert trained["step"] == 40 and trained["val_loss"] != longer["val_loss"]


def test_evaluate_reads_another_dataset_with_the_checkpoints_tokenizer(command, checkpoint, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        '{"prompt": "1 + 2", "response": "3"}\n{"prompt": "2 + 2", "response": "4"}\n'
    )
    code, out, err = command(evaluate, "--checkpoint", checkpoint, "--dataset", tmp_path / "other.jsonl")
    assert code == 0 and json.loads(out)["val_loss"] > 0, err


def test_evaluate_runs_no_code_that_a_checkpoint_names(command, checkpoint):
    file = checkpoint / "config.yaml"
    file.write_text(file.read_text().replace("dataset: synthetic", "dataset: strangers_module:build"))
    code, _, err = command(evaluate, "--checkpoint", checkpoint)
    assert code == 2 and "the checkpoint's dataset is code, strangers_module:build" in err
    code, _, err = command(evaluate, "--checkpoint", checkpoint, "--dataset", "strangers_module:build")
    assert code == 2 and "no module 'strangers_module'" in err


# --- storage and cluster -----------------------------------------------------------------------------------------


def test_the_default_storage_outlives_a_job(in_folder, monkeypatch):
    assert run_folder.default_storage() == str(in_folder / "runs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run_folder.default_storage() == str(run_folder.JOB_STORAGE)


def test_cluster_yaml_passes_rays_validator_and_scales_from_zero():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))
    (worker,) = (kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"])
    assert worker["min_workers"] == 0 and worker["resources"]["GPU"] >= 1
