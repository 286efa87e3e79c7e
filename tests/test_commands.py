"""The commands, run as a user runs them but in this process; none of these starts Ray."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import types

import pytest
from conftest import ROOT, small_config, train_locally, without_checksums

from hrm_lm.cluster import run_folder
from hrm_lm.cluster.ray_private import SNAPSHOT
from hrm_lm.commands.evaluate import main as evaluate
from hrm_lm.commands.generate import main as generate
from hrm_lm.commands.main import COMMANDS
from hrm_lm.commands.main import main as hrm_lm
from hrm_lm.commands.train import main as train
from hrm_lm.commands.tune import main as tune
from hrm_lm.config import Config
from hrm_lm.errors import UserError

SMALL = ["--set", "model.d_model=16", "--set", "model.n_heads=2", "--set", "train.batch_size=8"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_locally(small_config(train__steps=40, optim__lr=0.01), tmp_path_factory.mktemp("run")).last_checkpoint


@pytest.fixture
def checkpoint(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run" / trained.name)


@pytest.mark.slow
def test_the_guides_command_is_a_dry_run_without_ray():
    code = """
import runpy, sys
try:
    runpy.run_module("hrm_lm.training.train", run_name="__main__")
except SystemExit as exit:
    assert not exit.code and "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loss ")


@pytest.mark.parametrize("name", COMMANDS)
def test_hrm_lm_finds_every_command(capsys, name):
    with pytest.raises(SystemExit) as exit:
        hrm_lm([name, "--help"])
    assert exit.value.code == 0 and f"usage: hrm-lm {name}" in capsys.readouterr().out


@pytest.mark.slow
def test_help_and_the_mistakes_of_a_command_line_come_without_waiting_for_pytorch_or_ray(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"prompt": "1 + 1"}\n')
    lines = [[name, "--help"] for name in COMMANDS] + [
        ["train", "--config", "nope.yaml"],
        ["tune", "--config", "nope.yaml"],
        ["prepare", "--input", "nope", "--output", "data"],
        ["generate", "--prompt", "1 + 1", "--run_name", "nope"],
        ["predict", "--input", "questions.jsonl", "--output", "answers", "--run_name", "nope"],
        ["evaluate", "--run_name", "nope"],
        ["serve", "--run_name", "nope"],
        ["report", "nope"],
        ["import", "--input", "nope", "--output", "checkpoint"],
        ["export", "--checkpoint", "questions.jsonl", "--output", "m.gguf", "--results", "results.json"],
    ]
    lines += [
        [*line, "--checkpoint", "nope"]
        for line in (
            ["generate", "--prompt", "1 + 1"],
            ["predict", "--input", "questions.jsonl", "--output", "answers"],
            ["evaluate"],
            ["serve"],
            ["export", "--output", "folder"],
        )
    ]
    code = f"""
import sys
from hrm_lm.commands.main import main
for line in {lines}:
    try:
        code = main(line)
    except SystemExit as exit:
        code = exit.code
    assert code == (0 if "--help" in line else 2), (line, code)
    slow = sys.modules.keys() & {{"torch", "ray"}}
    assert not slow, (line, slow)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_hrm_lm_lists_its_commands_and_refuses_others(capsys):
    assert hrm_lm(["--help"]) == 0 and set(COMMANDS) <= set(capsys.readouterr().out.split())
    assert hrm_lm([]) == 2 and set(COMMANDS) <= set(capsys.readouterr().err.split())
    assert hrm_lm(["trian"]) == 2 and "error: there is no command 'trian'" in capsys.readouterr().err


def test_hrm_lm_tells_errors_as_every_command_does(capsys):
    assert hrm_lm(["train", "--config", "nope.yaml"]) == 2
    assert capsys.readouterr().err == "error: nope.yaml: cannot be read: No such file or directory\n"


@pytest.mark.slow
def test_the_list_of_commands_needs_no_heavy_import():
    code = "import sys; from hrm_lm.commands.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr.split()
    assert "hrm_lm.commands.main" in loaded and not {"torch", "ray", "numpy", "pydantic", "yaml"} & set(loaded)


@pytest.mark.parametrize(
    "module",
    ["hrm_lm.training.train", "hrm_lm.inference.generate", "hrm_lm.inference.evaluate", "hrm_lm.interop.export",
     "hrm_lm.interop.import_", "ray_jobs.train", "ray_jobs.tune", "ray_jobs.evaluate", "ray_jobs.predict"],
)  # fmt: skip
def test_the_python_m_forms_still_run(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    assert exit.value.code == 0 and "usage: hrm-lm" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "tune", "prepare", "predict", "serve", "evaluate"])
def test_ctrl_c_while_a_job_still_imports_ends_in_a_line(name, tmp_path):
    (tmp_path / "pydantic.py").write_text("raise KeyboardInterrupt")
    job = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{name}"], env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert job.returncode == 130 and job.stderr.startswith("interrupted") and "Traceback" not in job.stderr


def test_the_help_of_train_has_the_fields_docstrings(command):
    code, out, _ = command(train, "--help")
    words = " ".join(out.split())
    for section, name in (("data", "dataset"), ("train", "grad_clip"), ("ray", "run_name"), ("ray", "storage_path")):
        text = Config.model_fields[section].annotation.model_fields[name].description
        assert f"{' '.join(text.split())} [{section}.{name}]" in words
    assert code == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config", "nope.yaml"], "nope.yaml: cannot be read"),
        (["--set", "model.hrm.hcycles=2"], "did you mean h_cycles?"),
        (["--set", "oops"], "expected PATH=VALUE"),
        (["--steps", "many"], "train.steps: should be a valid integer"),
        (["--num_workers", "3"], "must be divisible by ray.num_workers"),
        ([], "no dataset: give --dataset"),
        (["--dataset", "missing.jsonl"], "missing.jsonl: cannot be read: No such file"),
        (
            ["--dataset", "synthetic", "--mixed_precision", "fp16", "--use_gpu", "false"],
            "fp16 needs a CUDA GPU",
        ),
        (["--dry_run", "1", "--mixed_precision", "fp16", "--use_gpu", "false"], "fp16 needs a CUDA GPU"),
        (["--dataset", "synthetic", "--init_from", "nowhere"], "no such checkpoint folder"),
        (["--dataset", "synthetic", "--run_name", "a/b"], "cannot name a folder"),
        (["--dataset", "synthetic", "--save_dir", "s4://x"], "s4://x"),
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
        train, "--dataset", "synthetic", "--steps", 7, "--val_every", 3, "--save_dir", "s", "--mixed_precision",
        "bf16", "--grad_clip", 1.5, "--run_name", "n", "--num_workers", 2, "--use_gpu", "true", "--resume", "never", "--profile",
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
    assert config.train.profile


def test_what_a_message_quotes_neither_steers_the_terminal_nor_floods_it(command, tmp_path):
    (tmp_path / "c.yaml").write_text('"\\e[2J": 1\n')
    code, _, err = command(train, "--config", "c.yaml")
    assert code == 2 and err.startswith(r"error: c.yaml: \x1b[2J: no such field")
    code, _, err = command(train, "--config", "x" * 100_000 + ".yaml")
    assert code == 2 and len(err) < 1100 and err.endswith("xxx.yaml: cannot be read: File name too long\n")


@pytest.mark.parametrize(
    "how, message",
    [
        (lambda raw: raw[: len(raw) // 2], "its list of checkpoints cannot be read: Unterminated string"),
        (lambda raw: b"{}", "its list of checkpoints cannot be read"),
        (lambda raw: raw.replace(b"checkpoint_a", b"checkpoint_b"), "does not exist anymore"),
        (lambda raw: raw.replace(b"checkpoint_a", b"../../run"), "is not in the run's folder"),
        (lambda raw: raw.replace(b'"val_loss"', b'"val_los"'), "val_loss of checkpoint_a is missing"),
        (lambda raw: raw.replace(b'"step": 2', b'"step": 2.5'), "the step of checkpoint_a is 2.5"),
        (lambda raw: raw.replace(b'"seconds": 1.0', b'"seconds": "x"'), "seconds: Input should be a valid number"),
    ],
)
def test_a_damaged_list_of_checkpoints_is_told_in_a_line(command, tmp_path, checkpoint, how, message):
    run = tmp_path / "runs" / "r"
    shutil.copytree(checkpoint, run / "checkpoint_a")
    shutil.copytree(checkpoint, tmp_path / "run", dirs_exist_ok=True)
    metrics = {"step": 2, "val_loss": 1.0, "seconds": 1.0, "tokens": 10}
    saved = {"version": 0, "checkpoint_dir_name": "checkpoint_a", "metrics": metrics}
    lists = ("pending_training_results", "pending_validation_specs", "validated_checkpoint_dir_names",
             "timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")  # fmt: skip
    state = {"checkpoint_results": [saved], "latest_checkpoint_result": saved, "checkpoint_report_indices": [0],
             "current_report_index": 1} | {name: [] for name in lists}  # fmt: skip
    ask = lambda: command(generate, "--run_name", "r", "--prompt", "What is 1 + 1?")  # noqa: E731
    (run / SNAPSHOT).write_text(json.dumps(state))
    assert ask()[0] == 0
    (run / SNAPSHOT).write_bytes(how(json.dumps(state).encode()))
    code, out, err = ask()
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


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


def test_a_line_separator_of_unicode_is_part_of_a_prompt(command, tmp_path):
    samples = [{"prompt": f"1\u2028+\u0085 2{' ' * i}", "response": "3"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, samples)))
    config = small_config(train__steps=1, data__dataset=str(tmp_path / "pairs.jsonl"))
    train_locally(config, tmp_path / "run")
    checkpoint = max((tmp_path / "run").glob("step_*"))
    (tmp_path / "prompts.txt").write_bytes("1\u2028+\r\n+ 2\u0085\n".encode())
    ask = lambda *more: command(generate, "--checkpoint", checkpoint, "--max_new_tokens", 3, *more)  # noqa: E731
    code, out, err = ask("--prompts_file", tmp_path / "prompts.txt")
    assert code == 0 and out == ask("--prompt", "1\u2028+")[1] + ask("--prompt", "+ 2\u0085")[1], err
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1\u2028+"}\n', encoding="utf-8")
    code, out, err = ask("--prompts_file", tmp_path / "prompts.jsonl")
    assert code == 0 and json.loads(out) == ask("--prompt", "1\u2028+")[1].rstrip("\n"), err


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
@pytest.mark.parametrize(
    "program, more", [(generate, ["--prompt", "1 + 1"]), (evaluate, [])], ids=["generate", "evaluate"]
)
def test_a_model_with_a_core_refuses_zero_cycles(command, tmp_path, architecture, program, more):
    train_locally(small_config(train__steps=1, model__architecture=architecture), tmp_path / "run")
    checkpoint = max((tmp_path / "run").glob("step_*"))
    code, out, err = command(program, "--checkpoint", checkpoint, "--h_cycles", 0, *more)
    assert code == 2 and "--h_cycles must be at least 1, not 0: this model has an HRM core" in err and not out


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_a_model_without_a_core_takes_zero_cycles_and_no_others(command, tmp_path, architecture):
    config = small_config(train__steps=1, model__architecture=architecture, model__hrm__h_cycles=0)
    train_locally(config, tmp_path / "run")
    ask = ["--checkpoint", max((tmp_path / "run").glob("step_*")), "--prompt", "1 + 1", "--h_cycles"]
    assert command(generate, *ask, 0)[0] == 0
    code, _, err = command(generate, *ask, 1)
    assert code == 2 and "it has no HRM core to cycle" in err


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
        (["--prompt", "1", "--h_cycles", 2**70], "--h_cycles must be at least 0 and at most 256"),
        (["--prompt", "1", "--max_new_tokens", 2**70], "--max_new_tokens must be at least 1 and at most 10,000,000"),
        (["--prompt", "\udcff"], r"prompt '\udcff' has half a character"),
        (["--prompt", "1", "--temperature", "-1"], "--temperature must be at least 0"),
        (["--prompts_file", "nope"], "nope cannot be read"),
    ],
)
def test_generate_refuses_bad_input_in_a_line(command, checkpoint, arguments, message):
    code, out, err = command(generate, "--checkpoint", checkpoint, *arguments)
    assert code == 2 and message in err and not out and len(err.splitlines()) == 1


def test_generate_without_any_run_says_where_it_looked(command, monkeypatch, tmp_path):
    monkeypatch.setattr(run_folder, "JOB_STORAGE", tmp_path / "jobs")
    code, _, err = command(generate, "--prompt", "1")
    assert code == 2 and f"no run with a checkpoint in {tmp_path / 'runs'} or {tmp_path / 'jobs'}" in err
    code, _, err = command(generate, "--prompt", "1", "--run_name", "x")
    assert code == 2 and "no run 'x'" in err


def test_evaluate_scores_with_more_cycles_than_trained(command, checkpoint):
    trained, longer = (
        json.loads(command(evaluate, "--checkpoint", checkpoint, *more)[1])[0] for more in ([], ["--h_cycles", 4])
    )
    assert trained["step"] == 40 and (trained["h_cycles"], longer["h_cycles"]) == (2, 4)
    assert trained["results"]["synthetic"]["val_loss,none"] != longer["results"]["synthetic"]["val_loss,none"]


def test_evaluate_reads_another_dataset_with_the_checkpoints_tokenizer(command, checkpoint, tmp_path):
    (tmp_path / "other.jsonl").write_text(
        '{"prompt": "1 + 2", "response": "3"}\n{"prompt": "2 + 2", "response": "4"}\n'
    )
    code, out, err = command(evaluate, "--checkpoint", checkpoint, "--dataset", tmp_path / "other.jsonl")
    assert code == 0 and json.loads(out)[0]["results"][str(tmp_path / "other.jsonl")]["val_loss,none"] > 0, err
    code, out, err = command(evaluate, "--checkpoint", checkpoint, "--set", "data.tokenizer=bytes")
    assert (
        code == 2
        and not out
        and err == "error: data.tokenizer: a checkpoint is scored with its own tokenizer; leave it out\n"
    )


# --- code that a stranger's config names ----------------------------------------------------------------------------


@pytest.fixture
def strangers(checkpoint, monkeypatch):
    """A checkpoint whose config names the dataset `strangers_module:build`; `strangers.ran` says whether it was called."""
    module = types.ModuleType("strangers_module")
    module.ran = False

    def build(config, seed):
        module.ran = True
        raise UserError("the stranger's code has run")

    module.build, module.checkpoint = build, checkpoint
    monkeypatch.setitem(sys.modules, "strangers_module", module)
    without_checksums(checkpoint)
    file = checkpoint / "config.yaml"
    file.write_text(file.read_text().replace("dataset: synthetic", "dataset: strangers_module:build"))
    return module


CODE = "strangers_module:build"


def test_evaluate_runs_no_code_that_a_checkpoint_names(command, strangers):
    code, _, err = command(evaluate, "--checkpoint", strangers.checkpoint)
    assert (
        code == 2 and f"data.dataset is code, {CODE}" in err and f"give --dataset {CODE}" in err and not strangers.ran
    )
    for flags in (["--dataset", CODE], ["--set", f"data.dataset={CODE}"]):
        code, _, err = command(evaluate, "--checkpoint", strangers.checkpoint, *flags)
        assert code == 2 and strangers.ran
        strangers.ran = False


def test_train_runs_no_code_that_a_checkpoints_config_names(command, strangers, tmp_path):
    config = strangers.checkpoint / "config.yaml"
    (tmp_path / "link.yaml").symlink_to(config)
    (tmp_path / "mine.yaml").write_text(f"{{base: {config}, train: {{steps: 2}}}}")
    (tmp_path / "code.yaml").write_text(f"data: {{dataset: {CODE}}}")
    (tmp_path / "above.yaml").write_text(f"{{base: {config}, data: {{dataset: {CODE}}}}}")
    for place in (config, tmp_path / "link.yaml", tmp_path / "mine.yaml", f"file://{tmp_path}/code.yaml"):
        code, _, err = command(train, "--config", place)
        assert code == 2 and f"data.dataset is code, {CODE}" in err and not strangers.ran, place
        assert f"give --dataset {CODE} to run it" in err
    for arguments in (["--config", config, "--dataset", CODE], ["--config", tmp_path / "code.yaml"],
                      ["--config", tmp_path / "above.yaml"], ["--config", config, "--set", f"data.dataset={CODE}"]):  # fmt: skip
        strangers.ran = False
        code, _, err = command(train, *arguments)
        assert code == 2 and strangers.ran, err


def test_a_strangers_config_cannot_make_its_base_the_users_own(command, strangers, tmp_path):
    (tmp_path / "code.yaml").write_text(f"data: {{dataset: {CODE}}}")
    (strangers.checkpoint / "config.yaml").write_text(f"base: {tmp_path / 'code.yaml'}")
    code, _, err = command(train, "--config", strangers.checkpoint / "config.yaml")
    assert code == 2 and f"data.dataset is code, {CODE}" in err and not strangers.ran


def test_code_in_a_mixture_of_a_stranger_is_named_by_its_path(command, strangers):
    mixture = f"data: {{mixture: {{sums: {{dataset: synthetic}}, more: {{dataset: '{CODE}'}}}}}}"
    (strangers.checkpoint / "config.yaml").write_text(mixture)
    code, _, err = command(train, "--config", strangers.checkpoint / "config.yaml")
    flag = f"--set data.mixture.more.dataset={CODE}"
    assert code == 2 and f"give {flag} to run it" in err and not strangers.ran
    command(train, "--config", strangers.checkpoint / "config.yaml", *flag.split())
    assert strangers.ran


def test_tune_runs_no_code_that_a_base_in_a_checkpoint_or_a_sweep_from_a_uri_names(command, strangers, tmp_path):
    space = "search_space: {optim.lr: {choice: [0.1, 0.2]}}, tune: {scheduler: fifo}"
    (tmp_path / "sweep.yaml").write_text(f"{{base: {strangers.checkpoint}/config.yaml, {space}}}")
    code, _, err = command(tune, "--config", tmp_path / "sweep.yaml")
    assert code == 2 and f"data.dataset is code, {CODE}" in err and not strangers.ran
    options = f"search_space: {{data.dataset: {{choice: [synthetic, '{CODE}']}}}}, tune: {{scheduler: fifo}}"
    (tmp_path / "sweep.yaml").write_text(f"{{base: {{data: {{dataset: synthetic}}}}, {options}}}")
    code, _, err = command(tune, "--config", f"file://{tmp_path}/sweep.yaml")
    assert code == 2 and f"data.dataset is code, {CODE}" in err and not strangers.ran


# --- storage and cluster -----------------------------------------------------------------------------------------


def test_the_default_storage_outlives_a_job(in_folder, monkeypatch):
    assert run_folder.default_storage() == str(in_folder / "runs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run_folder.default_storage() == str(run_folder.JOB_STORAGE)


def test_a_runs_name_is_a_text_whatever_yaml_would_make_of_it(in_folder, monkeypatch):
    from hrm_lm.cluster import run as cluster_run

    seen = []
    monkeypatch.setattr(cluster_run, "run", lambda config, resume: seen.append(config) or sys.exit(0))
    with pytest.raises(SystemExit):
        train(["--dataset", "synthetic", "--run_name", "2024", "--save_dir", "on"])
    assert (seen[0].ray.run_name, seen[0].ray.storage_path) == ("2024", "on")


def test_a_function_of_ones_own_is_found_beside_the_command(in_folder):
    (in_folder / "mine.py").write_text(
        "from hrm_lm.data.registry import Splits\nfrom hrm_lm.data.tokenizer import ByteTokenizer\n"
        "def build(config, seed):\n    return Splits([('a', 'b')], [], ByteTokenizer())\n"
    )
    code = "import sys; sys.path.remove(''); from hrm_lm.commands.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", "--dataset", "mine:build"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2 and "mine:build has no val samples" in done.stderr
