"""Sharded training on two processes (gloo), and on four that stand for two nodes, without Ray: the curve of DDP, and
checkpoints that know no worker count.
"""

import contextlib
import multiprocessing
import os
import shutil
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import (
    LocalSession,
    assert_same_weights,
    batches_of,
    eval_options,
    flip_bit,
    poisoned,
    small_config,
    train_locally,
)
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_lm.data.collate import join, to_device
from hrm_lm.data.registry import load_dataset
from hrm_lm.errors import UserError
from hrm_lm.inference.generate import generate
from hrm_lm.models.float8 import Float8Linear
from hrm_lm.training import loop, step
from hrm_lm.training.checkpoint import load_model, read_checkpoint
from hrm_lm.training.loop import train
from hrm_lm.training.optim import build_optimizer
from hrm_lm.training.step import Stats, build_state, train_step
from hrm_lm.training.validation import validate

HYBRID = {"train__val_every": 2, "train__grad_accum_steps": 2}
RECIPE = {
    "train__val_every": 2, "model__architecture": "prefix_lm", "optim__name": "adam_atan2", "train__ema_decay": 0.7,
    "train__sample_h_cycles": [1, 3], "model__hrm__backprop_steps": 4, "train__grad_clip": 0.5, "train__batch_size": 6,
}  # fmt: skip
SCORED = {
    "data__dataset": "reasoning_gym:syllogism", "data__val_samples": 9, "model__max_response_len": 5, "optim__lr": 0.03,
}  # fmt: skip
CARRIED = HYBRID | {
    "model__architecture": "puzzle", "model__hrm__inject": "gated", "train__segments": 2, "train__fixed_point": 0.1,
    "train__ema_decay": 0.7,
}  # fmt: skip
MUON = HYBRID | {"optim__name": "muon"}
NODES = {
    "train__steps": 4, "train__val_every": 2, "train__grad_accum_steps": 2, "model__architecture": "prefix_lm",
    "train__ema_decay": 0.7, "model__hrm__backprop_steps": 4, "train__grad_clip": 0.5,
}  # fmt: skip
HEALS = {"train__steps": 6, "train__val_every": 2, "train__ema_decay": 0.7, "train__spike": 7}
HEALED = [("ddp", "skip"), ("ddp", "rollback"), ("fsdp", "skip"), ("fsdp", "rollback"), ("fsdp", "skip", True)]
BAD = {"bad": [3], "bad_losses": [6]}
ELASTIC = {
    "ray__num_workers": "1:4", "train__steps": 6, "train__val_every": 2, "train__batch_size": 12,
    "model__architecture": "prefix_lm", "train__ema_decay": 0.7, "train__grad_clip": 0.5,
}  # fmt: skip
PACKED = {
    "train__batch_tokens": 1024, "train__length_window": 128, "train__packing": True, "model__max_prompt_len": 32,
    "model__max_response_len": 8,
}  # fmt: skip
TWO, FOUR = {"ray__num_workers": 2}, {"ray__num_workers": 4}
pytestmark = pytest.mark.slow


class OneOfMany(LocalSession):
    """All ranks write into one folder, as Ray makes one checkpoint of what several workers report."""

    def __init__(self, folder, stop_at):
        super().__init__(folder, stop_at)
        self.rank, self.world_size, self.progress = dist.get_rank(), dist.get_world_size(), "none"

    def report(self, metrics, snapshot):
        try:
            if snapshot:
                super().report(metrics, snapshot)
        finally:
            dist.barrier()
        if self.stop_at == metrics["step"]:
            raise KeyboardInterrupt


def trained(config, folder, stop_at=None):
    session = OneOfMany(folder, stop_at)
    with contextlib.suppress(KeyboardInterrupt):
        train(config, session)
    return session.reports


def damage_last(folder):
    """Changes a worker's part of the last checkpoint, which one of the workers reads at a resume."""
    if dist.get_rank() == 0:
        flip_bit(max(folder.glob("step_*")) / "optimizer/shard-00002-model-00001-of-00001.safetensors", -1)
    dist.barrier()


class AllGathers(TorchDispatchMode):
    """Counts them for as long as it lasts."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.c10d._allgather_base_.default
        return op(*args, **(kwargs or {}))


def few_steps(config):
    """The loss of three optimisation steps, how many times weights were gathered in them, and of how many units."""
    splits, rank = load_dataset(config.data, config.model, 0), dist.get_rank()
    device = torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")
    state = build_state(config, splits.tokenizer.vocab_size, device, rank, dist.get_world_size())
    collate = state.model.collate
    batches = batches_of(splits, config, rank=rank, world_size=state.world_size, collate=collate)
    stats = Stats(state)
    with AllGathers() as gathered:
        for _ in range(3):
            train_step(state, [to_device(batch, device) for batch in next(batches)], stats)
    units = sum(isinstance(module, FSDPModule) for module in state.model.modules())
    return stats.read()["loss"], gathered.count, units


def multiplied_by(config):
    """The dtypes of what the matrices of a sharded model find as their weights in a step, and whether they have copies; and how
    many of the matrices are used.
    """
    splits, found, used = load_dataset(config.data, config.model, 0), set(), set()
    state = build_state(config, splits.tokenizer.vocab_size, None, dist.get_rank(), dist.get_world_size())

    def cast(linear, cast=Float8Linear.cast):
        found.add((str(linear.weight.dtype), linear.copies is None))
        used.add(linear)
        return cast(linear)

    batches = batches_of(splits, config, rank=state.rank, world_size=state.world_size, collate=state.model.collate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Float8Linear, "cast", cast)
        train_step(state, next(batches), Stats(state))
    return found, len(used) / sum(isinstance(module, Float8Linear) for module in state.model.modules())


def healed(config, folder, fused=False):
    """As `trained`, where only the last worker has losses that are not finite. fused: AdamW works as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned(**BAD, rank=dist.get_world_size() - 1))
        if fused:
            patch.setattr(
                step, "build_optimizer", lambda *arguments: build_optimizer(*arguments[:2], torch.device("cuda"))
            )
        return trained(config, folder)


def uneven_nodes(config):
    """What a user is told where three workers are on one node, and one on another."""
    os.environ["LOCAL_WORLD_SIZE"] = "3" if dist.get_rank() < 3 else "1"
    try:
        build_state(config, 64, None, dist.get_rank(), dist.get_world_size())
    except UserError as error:
        return str(error)
    return "nothing"


def worker(rank, root, jobs, results, backend="gloo", workers_of_a_node=2):
    """Runs `{number of workers: [(name of the result, function, *arguments)]}`, in groups of so many."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"], os.environ["LOCAL_RANK"] = str(workers_of_a_node), str(rank % workers_of_a_node)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    for world_size, some in jobs.items():
        if rank >= world_size:
            continue
        store = dist.FileStore(f"{root}/store_of_{world_size}", world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        for name, function, *arguments in some:
            result = function(*arguments)
            if rank == 0:
                results[name] = result
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of several processes, in one set of them: their results by name, and the folder they are in."""
    root = tmp_path_factory.mktemp("runs")
    train_locally(small_config(**RECIPE), root / "one_then_two", stop_at=6)
    both = {
        "hybrid": HYBRID, "recipe": RECIPE, "bf16": RECIPE | {"train__mixed_precision": "bf16"}, "scored": SCORED,
        "muon": MUON, "carried": CARRIED, "lora": RECIPE | {"train__init_from": str(root / "one_then_two/step_000006"), "train__lora__rank": 2},
    }  # fmt: skip
    two = [
        (name, trained, small_config(**fields, **TWO, ray__parallel=parallel), root / name)
        for kind, fields in both.items()
        for parallel in ("ddp", "fsdp")
        for name in [f"{kind}_{parallel}"]
    ]
    for parallel in ("ddp", "fsdp"):
        float8 = small_config(**RECIPE, **TWO, train__mixed_precision="fp8", ray__parallel=parallel)
        two.append((f"fp8_{parallel}", trained, float8, root / f"fp8_{parallel}"))
    two.append(("fp8_weights", multiplied_by, float8))
    sharded = small_config(**RECIPE, **TWO, ray__parallel="fsdp")
    two.append(("two_then_one", trained, sharded, root / "two_then_one", 6))
    two.append(("one_then_two", trained, sharded, root / "one_then_two"))
    two.append(("damaged", trained, sharded, root / "damaged", 8))
    two.append(("damaged", damage_last, root / "damaged"))
    two.append(("damaged", trained, sharded, root / "damaged"))
    for kind, fields in {"hybrid": HYBRID, "recipe": RECIPE}.items():
        two.append((f"{kind}_gathers", few_steps, small_config(**fields, **TWO, ray__parallel="fsdp")))

    for parallel, mode, *fused in HEALED:
        config = small_config(**HEALS, **TWO, ray__parallel=parallel, train__on_nonfinite=mode)
        name = "_".join(["healed", parallel, mode, *map(str, fused)])
        two.append((name, healed, config, root / name, *fused))

    hsdp, fsdp, ddp = (small_config(**NODES, **FOUR, ray__parallel=parallel) for parallel in ("hsdp", "fsdp", "ddp"))
    train_locally(small_config(**NODES), root / "one_then_hsdp", stop_at=2)
    four = [("hsdp", trained, hsdp, root / "hsdp")]
    in_float8 = small_config(**NODES, **FOUR, ray__parallel="hsdp", train__mixed_precision="fp8")
    four.append(("fp8_hsdp", trained, in_float8, root / "fp8_hsdp"))
    four.append(("one_then_hsdp", trained, hsdp, root / "one_then_hsdp"))
    four.append(("hsdp_then_fsdp", trained, hsdp, root / "hsdp_then_fsdp", 2))
    four.append(("hsdp_then_fsdp", trained, fsdp, root / "hsdp_then_fsdp"))
    four.append(("hsdp_then_ddp", trained, hsdp, root / "hsdp_then_ddp", 2))
    four.append(("hsdp_then_ddp", trained, ddp, root / "hsdp_then_ddp"))
    four.append(
        (
            "healed_hsdp",
            healed,
            small_config(**HEALS, **FOUR, ray__parallel="hsdp", train__on_nonfinite="skip"),
            root / "healed_hsdp",
        )
    )
    four.append(("uneven_nodes", uneven_nodes, hsdp))

    three = []
    for name, fields in {"elastic": {}, "elastic_packed": PACKED, "elastic_fsdp": {"ray__parallel": "fsdp"}}.items():
        config = small_config(**ELASTIC | fields)
        for some, workers, stop_at in (two, 2, 2), (three, 3, 4), (four, 4, None):
            some.append((f"{name}_of_{workers}", trained, config, root / name, stop_at))

    return in_processes(4, root, {2: two, 3: three, 4: four}), root


def in_processes(count, root, jobs, *options):
    """What `worker` makes of the jobs, by name."""
    multiprocessing.set_forkserver_preload(["hrm_lm.training.loop"])  # PyTorch is imported once for all
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, (str(root), jobs, results, *options), nprocs=count, start_method="forkserver")
        return dict(results)


def column(reports, name):
    return [metrics[name] for metrics in reports]


@pytest.mark.parametrize("kind", ["hybrid", "recipe", "muon", "carried", "lora"])
def test_fsdp_has_the_curve_of_ddp(runs, kind):
    ddp, fsdp = (runs[0][f"{kind}_{parallel}"] for parallel in ("ddp", "fsdp"))
    assert len(ddp) == 6
    for name in ("loss", "val_loss", "grad_norm"):
        assert column(fsdp, name) == pytest.approx(column(ddp, name), rel=1e-5)


def test_two_workers_carry_states_from_segment_to_segment_as_one_does(runs, tmp_path):
    one, two = train_locally(small_config(**CARRIED), tmp_path / "one").reports, runs[0]["carried_ddp"]
    for name in ("loss", "val_loss", "grad_norm"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_that_multiply_in_float8_have_the_curve_of_bf16(runs, parallel):
    bf16, float8 = (runs[0][f"{precision}_{parallel}"] for precision in ("bf16", "fp8"))
    assert column(float8, "loss") != column(bf16, "loss")
    assert column(float8, "loss") == pytest.approx(column(bf16, "loss"), abs=0.05)


def test_nodes_that_multiply_in_float8_have_the_curve_of_float32(runs):
    float32, float8 = (column(runs[0][name], "loss") for name in ("hsdp", "fp8_hsdp"))
    assert float8 != float32 and float8 == pytest.approx(float32, abs=0.05)


def test_sharded_weights_in_float8_are_cast_from_what_was_gathered_in_bf16(runs):
    assert runs[0]["fp8_weights"] == ({("torch.bfloat16", True)}, 1)


def test_sharded_muon_has_the_weights_and_the_momentum_of_one_worker(runs, tmp_path):
    train_locally(small_config(**MUON), tmp_path / "one")
    shutil.copytree(runs[1] / "muon_fsdp", tmp_path / "two")
    one, two = (train_locally(small_config(**MUON, train__steps=14), tmp_path / folder) for folder in ("one", "two"))
    assert column(one.reports, "step") == column(two.reports, "step") == [14]
    assert_same_weights(one.last_weights(), two.last_weights(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["hybrid", "recipe"])
def test_weights_are_gathered_once_in_an_optimisation_step(runs, kind):
    """Over all applications of a block, with gradient and without, the backward pass, and all micro-batches."""
    _, gathered, units = runs[0][f"{kind}_gathers"]
    assert gathered == 3 * units > 9


def test_workers_answer_for_the_verifier_together_sharded_or_not(runs):
    ddp, fsdp = (runs[0][f"scored_{parallel}"] for parallel in ("ddp", "fsdp"))
    model, _, checkpoint = load_model(max((runs[1] / "scored_fsdp").glob("step_*")))
    alone = validate(model, load_dataset(checkpoint.config.data, checkpoint.config.model, 0), eval_options(3))
    for name in ("val_loss", "val_exact_match", "val_score"):
        assert column(fsdp, name) == pytest.approx(column(ddp, name), rel=1e-5)
        assert fsdp[-1][name] == pytest.approx(alone[name], rel=1e-5)
    assert fsdp[-1]["val_score"] > 0, "it has learned to say Yes or No"


def test_fsdp_in_bf16_has_the_curve_of_ddp_as_far_as_bf16_goes(runs):
    ddp, fsdp = (runs[0][f"bf16_{parallel}"] for parallel in ("ddp", "fsdp"))
    assert column(fsdp, "val_loss") == pytest.approx(column(ddp, "val_loss"), rel=0.02)
    (file, *_) = (max((runs[1] / "bf16_fsdp").glob("step_*")) / "model").iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}, "master weights"


def test_every_worker_writes_its_part_and_nothing_else_is_in_a_checkpoint(runs):
    checkpoint = max((runs[1] / "recipe_fsdp").glob("step_*"))
    files = sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())
    assert [file for file in files if not file.endswith((".safetensors", ".json", ".yaml"))] == []
    for kind in ("model", "average", "optimizer"):
        parts = [load_file(checkpoint / file) for file in files if file.startswith(kind + "/")]
        assert len(parts) == 2
        sizes = [sum(tensor.numel() for tensor in part.values()) for part in parts]
        assert min(sizes) > 0.4 * sum(sizes)


def test_two_workers_checkpoint_resumes_on_one(runs, tmp_path):
    shutil.copytree(runs[1] / "two_then_one", tmp_path / "run")
    rest = train_locally(small_config(**RECIPE), tmp_path / "run").reports
    assert column(rest, "step") == [8, 10, 12]
    for name in ("loss", "val_loss"):
        assert column(rest, name) == pytest.approx(column(runs[0]["recipe_ddp"], name)[3:], rel=1e-5)


def test_one_workers_checkpoint_resumes_on_two(runs):
    rest = runs[0]["one_then_two"]
    assert column(rest, "step") == [8, 10, 12]
    for name in ("loss", "val_loss"):
        assert column(rest, name) == pytest.approx(column(runs[0]["recipe_ddp"], name)[3:], rel=1e-5)


@pytest.mark.parametrize("kind", ["hybrid", "recipe", "lora"])
def test_a_sharded_checkpoint_generates_and_evaluates_on_one_machine(runs, kind):
    model, tokenizer, checkpoint = load_model(max((runs[1] / f"{kind}_fsdp").glob("step_*")))
    splits = load_dataset(checkpoint.config.data, checkpoint.config.model, 0)
    val_loss = validate(model, splits, eval_options(8, cycles=checkpoint.config.model.hrm.cycles))["val_loss"]
    assert val_loss == pytest.approx(runs[0][f"{kind}_fsdp"][-1]["val_loss"], rel=1e-5)
    whole, *_ = load_model(max((runs[1] / f"{kind}_ddp").glob("step_*")))
    prompts = ["What is 1 + 2?", "What is 8 + 7?"]
    assert generate(model, tokenizer, prompts) == generate(whole, tokenizer, prompts)


def test_all_workers_go_back_behind_a_checkpoint_that_one_of_them_finds_damaged(runs):
    assert column(runs[0]["damaged"], "step") == [8, 10, 12]
    whole, again = (load_model(runs[1] / run / "step_000012")[0].state_dict() for run in ("recipe_fsdp", "damaged"))
    assert_same_weights(whole, again)


@pytest.mark.parametrize("damage", ["missing", "torn", "flipped"])
def test_a_sharded_checkpoint_with_a_part_missing_or_damaged_is_refused(runs, tmp_path, damage):
    shutil.copytree(max((runs[1] / "recipe_fsdp").glob("step_*")), tmp_path / "c")
    files = sorted((tmp_path / "c" / "model").iterdir())
    assert len(files) == 2
    for file in [*files, tmp_path / "c/files-00001.json"]:
        copy = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(copy[: len(copy) // 2] if damage == "torn" else copy)
        if damage == "flipped":
            flip_bit(file, len(copy) // 2)
        with pytest.raises(UserError, match=file.name):
            load_model(tmp_path / "c")
        file.write_bytes(copy)
    load_model(tmp_path / "c")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that four workers on two nodes share, on one worker."""
    return train_locally(small_config(**NODES), tmp_path_factory.mktemp("alone"))


def test_sharded_within_nodes_and_replicated_over_them_trains_as_one_worker(runs, alone):
    for name in ("loss", "val_loss", "grad_norm"):
        assert column(runs[0]["hsdp"], name) == pytest.approx(column(alone.reports, name), rel=1e-5)
    last = max((runs[1] / "hsdp").glob("step_*"))
    averaged = load_model(last)[0].state_dict()
    assert_same_weights(averaged, alone.last_weights(), atol=1e-5, rtol=1e-4)
    saved = [part for file in (last / "model").glob("*.safetensors") for part in load_file(file).items()]
    assert sum(part.numel() for _, part in saved) == sum(map(torch.numel, averaged.values())), "each part is saved once"
    assert Counter(name for name, _ in saved)["head.weight"] == 2, "a part for each worker of a node"


@pytest.mark.parametrize("name", ["one_then_hsdp", "hsdp_then_fsdp", "hsdp_then_ddp"])
def test_a_run_goes_on_however_it_was_spread_before(runs, alone, name):
    rest = runs[0][name]
    assert column(rest, "step") == [4]
    assert column(rest, "loss") == pytest.approx(column(alone.reports, "loss")[1:], rel=1e-5)
    assert column(rest, "val_loss") == pytest.approx(column(alone.reports, "val_loss")[1:], rel=1e-5)


def test_a_checkpoint_of_several_nodes_resumes_on_one_worker(runs, alone, tmp_path):
    shutil.copytree(min((runs[1] / "hsdp").glob("step_*")), tmp_path / "run/step_000002")
    rest = train_locally(small_config(**NODES), tmp_path / "run")
    assert column(rest.reports, "val_loss") == pytest.approx(column(alone.reports, "val_loss")[1:], rel=1e-5)
    assert_same_weights(rest.last_weights(), alone.last_weights(), atol=1e-5, rtol=1e-4)


def test_workers_heal_alike_where_the_numbers_of_a_single_worker_are_not_finite(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", poisoned(**BAD))
    alone = train_locally(small_config(**HEALS, train__on_nonfinite="skip"), tmp_path)
    assert column(alone.reports, "skipped") == [0, 1, 2]
    for name in [name for name in runs[0] if name.startswith("healed")]:
        reports = runs[0][name]
        assert column(reports, "skipped") == [0, 1, 2], name
        for number in ("loss", "val_loss"):
            assert column(reports, number) == pytest.approx(column(alone.reports, number), rel=1e-5, nan_ok=True), name
        watched, expected = (
            read_checkpoint(max(folder.glob("step_*"))).progress.watched for folder in (runs[1] / name, tmp_path)
        )
        assert "rollback" in name or watched == pytest.approx(expected, rel=1e-5), name
        weights = load_model(max((runs[1] / name).glob("step_*")))[0].state_dict()
        assert_same_weights(weights, alone.last_weights(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["elastic", "elastic_packed", "elastic_fsdp"])
def test_a_run_of_two_then_three_then_four_workers_trains_as_one_worker(runs, kind, tmp_path):
    alone = train_locally(small_config(**ELASTIC | (PACKED if kind == "elastic_packed" else {})), tmp_path / "alone")
    reports = [report for name, some in runs[0].items() if name.startswith(f"{kind}_of") for report in some]
    assert column(reports, "step") == [2, 4, 6]
    for name in ("loss", "val_loss", "grad_norm"):
        assert column(reports, name) == pytest.approx(column(alone.reports, name), rel=1e-5)
    averaged = load_model(max((runs[1] / kind).glob("step_*")))[0].state_dict()
    assert_same_weights(averaged, alone.last_weights(), atol=1e-5, rtol=1e-4)


def test_nodes_with_unequally_many_workers_are_refused(runs):
    assert "some have 1 and others 3" in runs[0]["uneven_nodes"]


def test_ddp_does_not_cut_compiled_blocks(monkeypatch):
    graphs = []

    def compile_fx(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    config = small_config(model__architecture="prefix_lm", model__d_model=256, train__compile=True)
    splits = load_dataset(config.data, config.model, 0)
    counts = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for world_size in (1, 2):  # alone, and in DDP
            torch._dynamo.reset()
            graphs.clear()
            state = build_state(config, splits.tokenizer.vocab_size, world_size=world_size)
            train_step(state, next(batches_of(splits, config, collate=join)), Stats(state))
            counts.append(len(graphs))
    finally:
        dist.destroy_process_group()
    assert counts[0] == counts[1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_alike_however_the_model_is_spread(tmp_path):
    """In bf16; for `hsdp` each GPU is a node."""
    fields = NODES | {"train__mixed_precision": "bf16", "model__d_model": 64}
    modes = ("ddp", "fsdp", "hsdp")
    jobs = [(mode, few_steps, small_config(**fields, **TWO, ray__parallel=mode)) for mode in modes]
    results = in_processes(2, tmp_path, {2: jobs}, "nccl", 1)
    print(results)
    ddp, fsdp, hsdp = (results[mode][0] for mode in modes)
    assert [fsdp, hsdp] == pytest.approx([ddp, ddp], rel=0.01)
    _, gathered, units = results["fsdp"]
    assert gathered == 3 * units > 9
