from pathlib import Path

import pytest
from conftest import ROOT

from hrm_lm.config import Config, flatten, load_config, parse_set
from hrm_lm.errors import UserError


def test_default_yaml_spells_out_the_defaults():
    assert load_config(ROOT / "configs" / "default.yaml") == Config()
    import yaml

    written = flatten(yaml.safe_load((ROOT / "configs" / "default.yaml").read_text()))
    assert written.keys() == flatten(Config().to_dict()).keys()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_is_valid(file):
    if not file.name.startswith("sweep"):
        load_config(file)


def test_a_config_survives_yaml(tmp_path):
    config = load_config(overrides={"model.hrm.backprop_steps": 4, "optim.lr": 1e-3, "data.dataset": "synthetic"})
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("model.hrm.hcycles=2", "model.hrm.hcycles: no such field; did you mean h_cycles?"),
        ("modle.d_model=2", "modle: no such field; did you mean model?"),
        ("model.hrm.h_cycles=-1", "model.hrm.h_cycles: should be greater than or equal to 0 (got -1)"),
        ("optim.lr=fast", "optim.lr: should be a valid number"),
        (
            "model.hrm.backprop_steps=1",
            "model.hrm.backprop_steps: should be 'all' or should be greater than or equal to 2",
        ),
        ("model.d_model=63", "model.d_model (63) must be divisible by model.n_heads (4)"),
        ("train.batch_size=63", None),
        (
            "train.grad_accum_steps=5",
            "train.batch_size (64) must be divisible by ray.num_workers * train.grad_accum_steps (1 * 5)",
        ),
        ("train.mixed_precision=fp8", "train.mixed_precision: should be 'none', 'bf16' or 'fp16' (got 'fp8')"),
        ("train.steps.x=5", "train.steps"),
        ("train.sample_h_cycles=[4,1]", "train.sample_h_cycles ([4, 1]) must be [least, most]"),
        ("train.sample_h_cycles=4", "train.sample_h_cycles: should be a valid tuple (got 4)"),
        (
            "data.mixture={sums: {dataset: a, wieght: 2}}",
            "data.mixture.sums.wieght: no such field; did you mean weight?",
        ),
        ("data.mixture={sums: {dataset: a, weight: 0}}", "data.mixture.sums.weight: should be greater than 0 (got 0)"),
        ("data.mixture.sums=3", "data.mixture.sums: should be a section of fields (got 3)"),
        ("data.mixture={my sums: {dataset: a}}", "data.mixture.my sums: String should match pattern"),
        ("data={dataset: a, mixture: {b: {dataset: b}}}", "data.dataset and data.mixture exclude one another"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_path(assignment, message):
    if message is None:
        load_config(overrides=parse_set([assignment]))
        return
    with pytest.raises(UserError) as error:
        load_config(overrides=parse_set([assignment]))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_every_mistake_is_told_at_once():
    with pytest.raises(UserError) as error:
        load_config(overrides={"optim.lr": -1, "train.setps": 5})
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize(
    "text, message", [("a: [", "not valid YAML"), ("- 1", "must be a mapping"), (None, "No such file")]
)
def test_an_unusable_file_is_named(tmp_path: Path, text, message):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"c.yaml: .*{message}"):
        load_config(file)


def test_scientific_notation_without_a_dot_is_a_number():
    assert load_config(overrides=parse_set(["optim.lr=1e-3"])).optim.lr == 1e-3
