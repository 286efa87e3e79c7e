"""The config: its files and their bases, its mistakes, its help texts."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from hrm_lm.commands.reference import fields_of, reference
from hrm_lm.config import Config, Section, flatten, load_config, parse_set
from hrm_lm.errors import UserError
from hrm_lm.tuning.space import Sweep, SweepFile


def test_default_yaml_spells_out_the_defaults():
    assert load_config(ROOT / "configs" / "default.yaml") == Config()
    written = flatten(yaml.safe_load((ROOT / "configs" / "default.yaml").read_text()))
    assert written.keys() == flatten(Config().to_dict()).keys()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_config_is_taken_as_it_is_written(file):
    written = yaml.safe_load(file.read_text())
    if file.name.startswith("sweep"):
        assert Sweep(str(file)).space.keys() == written["search_space"].keys()
    else:
        written.pop("base", None)
        taken = flatten(load_config(file).to_dict())
        assert {path: taken[path] for path in flatten(written)} == flatten(written)


def test_a_batch_size_that_the_default_workers_divide_may_be_odd():
    assert load_config(overrides=parse_set(["train.batch_size=63"])).micro_batch_size == 63


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
        ("ray.num_workers=4:1", "ray.num_workers: '4:1' should be a number from 1 up, or a range such as 1:4"),
        ("ray.num_workers=0:4", "ray.num_workers: '0:4' should be"),
        ("ray.num_workers=a:b", "ray.num_workers: 'a:b' should be"),
        ("ray.num_workers=0", "ray.num_workers: 0 should be"),
        ("model.d_model=63", "model.d_model (63) must be divisible by model.n_heads (4)"),
        (
            "train.grad_accum_steps=5",
            "train.batch_size (64) must be divisible by ray.num_workers * train.grad_accum_steps (1 * 5)",
        ),
        ("train.mixed_precision=fp4", "train.mixed_precision: should be 'none', 'bf16', 'fp16' or 'fp8' (got 'fp4')"),
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
        ("optim.lr=.inf", "optim.lr: should be a finite number (got inf)"),
        ("train.grad_clip=.nan", "train.grad_clip: should be a finite number (got nan)"),
        ("train.steps=true", "train.steps: should be a number (got True)"),
        ("optim.betas=[true, 0.9]", "optim.betas: should be a number (got [True, 0.9])"),
        ("train.seed=9223372036854775808", "train.seed: should be less than 2^63"),
        ("model.hrm.h_layers=1000000", "model.hrm.h_layers: should be less than or equal to 1000"),
        ("train.init_from=[" + "a" * 100_000 + "]", "train.init_from: should be a valid string (got ['aaa"),
        ("train=" + "[" * 40 + "]" * 40, "train: should be a section of fields (got [[[[...]]]])"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_path(assignment, message):
    with pytest.raises(UserError) as error:
        load_config(overrides=parse_set([assignment]))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_fp16_does_not_go_with_a_sharded_model(parallel):
    with pytest.raises(UserError, match=f"fp16 does not go with ray.parallel {parallel}"):
        load_config(overrides={"ray.parallel": parallel, "train.mixed_precision": "fp16"})


def test_a_range_of_workers_is_a_text_in_yaml_too_and_comes_back_from_a_checkpoint(tmp_path):
    (tmp_path / "c.yaml").write_text("ray:\n  num_workers: 1:4\n")  # for YAML 1.1 that is 64
    for config in (load_config(tmp_path / "c.yaml"), load_config(overrides=parse_set(["ray.num_workers=1:4"]))):
        assert config.ray.num_workers == "1:4" and config.ray.workers == (1, 4)
        (tmp_path / "again.yaml").write_text(config.to_yaml())
        assert load_config(tmp_path / "again.yaml") == config
    for text, number in (("2:2", 2), ("3", 3)):
        assert load_config(overrides={"ray.num_workers": text, "train.batch_size": 6}).ray.num_workers == number


def test_hsdp_does_not_go_with_a_range_of_workers():
    with pytest.raises(UserError, match="equally many workers on every node, which a range does not promise"):
        load_config(overrides={"ray.parallel": "hsdp", "ray.num_workers": "2:4"})


@pytest.mark.parametrize(
    "text, message",
    [
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)), "10,000 values"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)), "10,000 values"),
        ("model: &a {hrm: *a}", "an alias stands in what it stands for (line 1, column 8)"),
        ("model: " + "[" * 100_000, "50 levels"),
        ("model: [" + "1, " * 20_000 + "]", "10,000 values"),
        ("model: !!python/object/apply:os.system ['touch x']", "could not determine a constructor"),
        ("model: !!timestamp x", "could not determine a constructor"),
        ("model: !!bool maybe", "not a value of tag:yaml.org,2002:bool"),
        ("model: !!int ''", "not a value of tag:yaml.org,2002:int"),
        ("train: {seed: 0x" + "f" * 5000 + "}", "more than 64 bits"),
        ("train: {seed: " + "9" * 5000 + "}", "not a value of tag:yaml.org,2002:int"),
        ("data: {1: 2}", "the key 1 is no text"),
        ('data: {dataset: "\\ud800"}', "half a character"),
        ('data: {dataset: "a\\0"}', "zero byte"),
    ],
)  # fmt: skip
def test_yaml_that_explodes_or_says_what_no_field_takes_is_refused_in_a_line(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert "c.yaml: not valid YAML: " in str(error.value) and message in str(error.value)
    assert len(str(error.value)) < 500 and len(str(error.value).splitlines()) == 1


def test_yaml_keeps_dates_as_text_and_takes_aliases_and_merged_keys(tmp_path):
    text = "model: {d_model: &width 32, max_prompt_len: *width}\noptim: {<<: {lr: 0.1, eps: 0.1}, eps: 0.2}\n"
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"ray: {run_name: 2024-05-01}\n")
    config = load_config(tmp_path / "c.yaml")
    assert (config.model.max_prompt_len, config.optim.lr, config.optim.eps) == (32, 0.1, 0.2)
    assert config.ray.run_name == "2024-05-01"


def test_a_file_without_end_is_no_config():
    with pytest.raises(UserError, match="/dev/zero: has more than 1,048,576 bytes"):
        load_config("/dev/zero")


def test_of_a_thousand_mistakes_some_are_told():
    with pytest.raises(UserError) as error:
        load_config(overrides={f"train.x{i}": 1 for i in range(1000)})
    assert len(str(error.value).splitlines()) == 11 and str(error.value).endswith("and more mistakes")


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


# --- base --------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_wins_over_its_base_field_by_field_and_a_base_may_have_a_base(tmp_path):
    write(
        tmp_path / "shared",
        bottom="{model: {d_model: 32, hrm: {h_cycles: 3, l_cycles: 3}}, optim: {lr: 0.1, betas: [0.5, 0.5]}}",
        middle="{base: bottom.yaml, model: {hrm: {h_cycles: 4}}, optim: {betas: [0.6, 0.7]}}",
    )
    write(tmp_path, top="{base: shared/middle.yaml, optim: {lr: 0.2}}")
    config = load_config(tmp_path / "top.yaml", {"model.hrm.l_layers": 2})
    assert (config.model.d_model, config.model.hrm.h_cycles, config.model.hrm.l_cycles) == (32, 4, 3)
    assert (config.optim.lr, config.optim.betas, config.model.hrm.l_layers) == (0.2, (0.6, 0.7), 2)
    assert "base" not in yaml.safe_load(config.to_yaml())


def test_a_sweeps_base_may_have_a_base_and_the_sweep_is_written_whole(tmp_path):
    write(
        tmp_path / "shared", bottom="train: {steps: 40, val_every: 7}", middle="{base: bottom.yaml, train: {steps: 50}}"
    )
    for base in ("shared/middle.yaml", "{base: shared/middle.yaml}"):
        write(tmp_path, sweep=f"{{base: {base}, search_space: {{optim.lr: {{choice: [0.1, 0.2]}}}}}}")
        sweep = Sweep(str(tmp_path / "sweep.yaml"))
        assert (sweep.config.train.steps, sweep.config.train.val_every) == (50, 7)
        assert (
            sweep.to_dict()["base"]["train"] == {"steps": 50, "val_every": 7} and "base" not in sweep.to_dict()["base"]
        )


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"top": "base: b.yaml", "b": "base: c.yaml"},
            "top.yaml -> {0}/b.yaml -> {0}/c.yaml: cannot be read: No such file",
        ),
        ({"top": "base: b.yaml", "b": "base: sub/../top.yaml"}, "/sub/../top.yaml: the bases go round in a circle"),
        ({"top": "base: top.yaml"}, "{0}/top.yaml -> {0}/top.yaml: the bases go round in a circle"),
        ({"top": "base: {train: {steps: 1}}"}, "top.yaml: base must be the path or URI of a config"),
        ({"top": "base: b.yaml", "b": "modle: {}"}, "top.yaml (base: {0}/b.yaml): modle: no such field"),
        ({"top": "base: s4://a/b.yaml"}, "s4://a/b.yaml"),
    ],
)
def test_a_base_that_cannot_be_taken_is_told_with_the_files_on_the_way(tmp_path, files, message):
    (tmp_path / "sub").mkdir()
    write(tmp_path, **files)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "top.yaml")
    assert message.format(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_base_and_a_config_may_be_a_uri(tmp_path):
    write(tmp_path, base="train: {steps: 5}", top="base: base.yaml")
    write(tmp_path / "here", top=f"base: file://{tmp_path}/base.yaml")
    assert load_config(tmp_path / "here" / "top.yaml").train.steps == 5
    write(tmp_path / "here", near="base: ../base.yaml")
    assert load_config(f"file://{tmp_path}/top.yaml").train.steps == 5
    assert load_config(f"file://{tmp_path}/here/near.yaml").train.steps == 5


HRM_TEXT = {
    "model.architecture": "prefix_lm", "model.max_prompt_len": 2048, "model.max_response_len": 2048,
    "model.hrm.l_cycles": 3, "model.hrm.backprop_steps": 5, "model.hrm.backprop_warmup_steps": 40000,
    "optim.name": "adam_atan2", "optim.schedule": "constant", "optim.warmup_steps": 2000, "train.steps": 200000,
    "train.batch_tokens": 172_032, "train.packing": True, "train.length_window": 65_536, "train.mixed_precision": "bf16", "train.compile": True, "train.ema_decay": 0.9999,
    "train.val_every": 2000, "train.log_every": 50,
}  # fmt: skip


@pytest.mark.parametrize(
    "size, d_model, n_heads, layers, lr, parallel, parts, memory",
    [
        ("b", 1024, 8, 6, 3e-4, "ddp", 6, 1.0),
        ("l", 1280, 10, 12, 2.5e-4, "fsdp", 1, 0.55),
        ("xl", 1536, 12, 16, 2.2e-4, "fsdp", 1, 0.35),
    ],
)
def test_the_hrm_text_presets_differ_in_size_and_share_the_recipe(
    size, d_model, n_heads, layers, lr, parallel, parts, memory
):
    sizes = {"model.d_model": d_model, "model.n_heads": n_heads, "optim.lr": lr, "ray.parallel": parallel}
    sizes |= {"train.grad_accum_steps": parts, "train.activation_memory": memory}
    sizes |= {"model.hrm.h_layers": layers, "model.hrm.l_layers": layers}
    assert load_config(ROOT / "configs" / f"hrm_text_{size}.yaml") == load_config(overrides=HRM_TEXT | sizes)


# --- help texts --------------------------------------------------------------------------------------------------


def test_every_field_has_a_help_text():
    def sections(of: type[Section]) -> list[type[Section]]:
        return [of, *(kind for cls in of.__subclasses__() for kind in sections(cls))]

    missing = [
        f"{section.__name__}.{name}"
        for section in sections(Section)[1:]
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert not missing


def test_the_configuration_reference_is_what_the_code_says():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference(), (
        "run: python -m hrm_lm.commands reference > docs/configuration.md"
    )


def test_the_configuration_reference_has_every_field():
    text = reference()
    known = set(flatten(Config().to_dict())) | {
        path for path, _ in fields_of(SweepFile.model_fields["tune"].annotation, "tune")
    }
    assert len(known) > 60 and not [path for path in known if f"| `{path}` |" not in text]
