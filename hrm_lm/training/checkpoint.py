"""A training state as a directory, and back. Nothing in it is unpickled: a stranger's checkpoint cannot run code.

    model.safetensors       weights
    average.safetensors     their moving average, where train.ema_decay is on; what generates
    optimizer.safetensors   Adam's moments, `exp_avg/<parameter name>`; Muon's, `momentum_buffer/<parameter name>`
    config.yaml             the run's config
    tokenizer.json
    trainer_state.json      step, progress, scaler, format version, each file's size and checksum; written last

A run whose model is sharded over its workers (`ray.parallel: fsdp` or `hsdp`) has folders `model/`, `average/` and
`optimizer/` in place of the first three, with a file of each worker's parts, also safetensors
(torch.distributed.checkpoint's Hugging Face format). A part that several workers hold is saved by one of them. The other
workers' files have their checksums in `files-<rank>.json`. Both kinds load into any number of workers, sharded or not.
torch.distributed takes most of a second to import, so the functions that need it import it.

Training waits only for a copy of its state to host memory (`Snapshot`). Every file is checked against its checksum before
it is loaded; checkpoints of earlier versions have none.
"""

import json
import math
import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import torch
from pydantic import ConfigDict, TypeAdapter, with_config
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hrm_lm.config import Config, Count, flatten, parse_config
from hrm_lm.data.tokenizer import Tokenizer, model_vocab_size, tokenizer_from_json
from hrm_lm.errors import DamagedCheckpoint, UserError
from hrm_lm.filesystem import read_bytes, retrying, shown, storage_error, without_keys
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.lora import add_lora, is_factor, merge_lora
from hrm_lm.parsing import one_line, parse_json, parse_yaml, short
from hrm_lm.training.checkpoint_files import (
    SIZES,
    check_bytes,
    check_file,
    empty_folder,
    records,
    safetensors_pieces,
    sealed,
    unsealed,
    write_file,
)

if TYPE_CHECKING:
    from hrm_lm.training.step import TrainState

FORMAT_VERSION = 1

# A change of any of these fields changes the model's shape or the order of samples, so no run goes on across it.
FIXED = (
    *("data.", "train.seed", "train.batch_size", "train.batch_tokens", "train.length_window", "train.packing"),
    *("train.lora.", "model.architecture", "model.mask", "model.places", "model.d_model", "model.n_heads"),
    *("model.encoder_layers", "model.decoder_layers", "model.expansion", "model.hrm.h_layers", "model.hrm.l_layers"),
    *("model.hrm.inject", "model.hrm.shared", "model.bridge.type", "model.bridge.prefix_len"),
)


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # a file's fields are checked, see FIELDS
@dataclass
class Progress:
    """What a run knows besides its weights."""

    step: Count = 0
    val_loss: float | None = None
    val_exact_match: float | None = None
    best_val_loss: float | None = None
    best_step: Count | None = None
    stale_validations: Count = 0
    """Validations since the best validation."""
    seconds: float = 0.0
    """Spent training, over all restarts up to here; validation and checkpoints not counted."""
    tokens: Count = 0
    num_train_samples: Count = 0
    window: Count = 0
    """The window that the last trained batch came from (`hrm_lm.data.sampler`)."""
    window_step: Count = 0
    """The number of that window's first batch. Without both fields a resume counts from the first window."""
    rollbacks: Count = 0
    left_out: list[tuple[Count, Count]] = field(default_factory=list)
    """The first and the last of the steps (from 1) that each rollback made the run leave out."""
    watched: dict[str, float] = field(default_factory=dict)
    """Counts and the running statistics of the loss (`hrm_lm.training.stability.WATCHED`)."""

    def update(self, step: int, val_loss: float, val_exact_match: float) -> None:
        """Counts a validation."""
        self.step, self.val_loss, self.val_exact_match = step, val_loss, val_exact_match
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.stale_validations = val_loss, step, 0
        else:
            self.stale_validations += 1


FIELDS = TypeAdapter(Progress)
SCALER = TypeAdapter(dict[str, int | float], config=ConfigDict(strict=True, allow_inf_nan=False))


@dataclass
class Checkpoint:
    """What a checkpoint says of itself, without its tensors."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    progress: Progress
    scaler: dict
    files: dict[str, dict[str, int]] = field(default_factory=dict)
    """Sizes and checksums of the files with the tensors that were asked for; of older checkpoints nothing."""
    shapes: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Of these tensors, by kind and name."""


class Snapshot:
    """A copy of a training state in host memory, from which its checkpoint is written while training goes on.

    All workers of a sharded state need a snapshot, each of its own parts, and rank 0 of any other. The memory is taken
    once and used for each checkpoint; on CUDA it is pinned. Raises UserError where there is not enough of it.
    """

    def __init__(self, state: "TrainState", tokenizer: Tokenizer):
        self.state = state
        self.is_sharded = any(map(_is_sharded, state.model.state_dict().values()))
        self.texts = {"config.yaml": state.config.to_yaml(), "tokenizer.json": tokenizer.to_json()}
        self.fields: dict[str, Any] = {}
        self.copies: dict[str, dict[str, Tensor]] = {}
        self.offsets: dict[str, dict[str, list[int]]] = {}
        for kind, parts in self._parts().items():
            self.copies[kind] = {name: _host_memory(tensor) for name, (tensor, _) in parts.items()}
            self.offsets[kind] = {name: offsets for name, (_, offsets) in parts.items()}
        self._is_written = threading.Event()
        self._is_written.set()
        self._failure: Exception | None = None

    @torch.no_grad()
    def take(self, progress: Progress) -> None:
        """Copies the state as it is now. Waits until the last copy is written; raises what its writing ended with."""
        self._is_written.wait()
        if self._failure:
            raise self._failure
        self._is_written.clear()
        for kind, parts in self._parts().items():
            for name, (tensor, _) in parts.items():
                self.copies[kind][name].copy_(tensor, non_blocking=True)
        self.fields = {"scaler": self.state.scaler.state_dict(), **asdict(progress)}
        if self.state.device.type == "cuda":
            torch.cuda.current_stream(self.state.device).synchronize()

    def write(self, fs: pyarrow.fs.FileSystem, path: str) -> None:
        """Writes what was taken into the folder `path`, in any thread; then the next copy may be taken. Of a sharded state
        all workers' files go there, so somebody empties it before.

        Raises UserError where storage does not take it, StorageError where that may pass; then, too, when called again.
        """
        if self._failure:
            raise self._failure
        try:
            rank, world_size = self.state.rank, self.state.world_size
            if self.is_sharded:
                _write(fs, path, self.copies, self.texts, self.fields, self.offsets, rank, world_size)
            else:
                empty_folder(fs, path)
                _write(fs, path, self.copies, self.texts, self.fields)
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._is_written.set()

    def _parts(self) -> dict[str, dict[str, tuple[Tensor, list[int]]]]:
        """By kind and name what this worker saves of each tensor, and where that begins in the tensor."""
        state = self.state
        kinds = {"optimizer": _optimizer_tensors(state), "model": state.model.state_dict()}
        if state.average:
            kinds["average"] = state.average.tensors
        return {kind: dict(self._own_parts(tensors)) for kind, tensors in kinds.items()}

    def _own_parts(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, list[int]]]]:
        for i, (name, tensor) in enumerate(tensors.items()):
            tensor = tensor.detach()
            if not _is_sharded(tensor):
                if self.state.rank == 0:
                    yield name, (tensor, [0] * tensor.dim())
                continue
            # Of workers that hold the same part, the tensor's number says which of them saves it.
            mesh, own = tensor.device_mesh, tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
            copies = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]  # type: ignore[attr-defined]
            part = tensor.to_local()  # type: ignore[operator]
            if part.numel() and all(own[dim] == i % mesh.size(dim) for dim in copies):
                (chunk,) = tensor.__create_chunk_list__()  # type: ignore[operator]
                yield name, (part, list(chunk.offsets))


def _host_memory(tensor: Tensor) -> Tensor:
    """Memory for a contiguous copy of `tensor`, pinned if that is on a GPU and there is enough to pin."""
    if tensor.device.type == "cuda":
        try:
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        except RuntimeError:
            pass  # copies to other memory take longer, and are waited for as well
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    except RuntimeError as error:
        raise UserError(f"no memory on the host for a copy of the training state: {one_line(error)}") from None


def save_model(path: Path, model: LanguageModel, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes a checkpoint without optimizer state: enough to generate and for `train.init_from`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    texts = {"config.yaml": config.to_yaml(), "tokenizer.json": tokenizer.to_json()}
    fs = pyarrow.fs.LocalFileSystem()
    _write(fs, str(path.absolute()), {"model": tensors}, texts, {"scaler": {}, **asdict(progress)})


def _write(
    fs: pyarrow.fs.FileSystem,
    path: str,
    kinds: dict[str, dict[str, Tensor]],
    texts: dict[str, str],
    fields: dict[str, Any],
    offsets: dict[str, dict[str, list[int]]] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Writes a worker's files into the folder `path`, those of rank 0 with the checkpoint's description.

    offsets: where the tensors are parts, each part's begin, by kind and name.
    """
    files = {}
    for kind, tensors in kinds.items():
        if tensors:
            # The second name is that of torch.distributed.checkpoint's HuggingFaceStorageWriter.
            part = "" if offsets is None else f"/shard-{rank + 1:05d}-model-00001-of-00001"
            pieces = safetensors_pieces(tensors, None if offsets is None else offsets[kind])
            files[f"{kind}{part}.safetensors"] = write_file(fs, f"{path}/{kind}{part}.safetensors", pieces)
    if rank:
        write_file(fs, f"{path}/files-{rank:05d}.json", [sealed({"files": files}).encode()])
        return
    for name, text in texts.items():
        files[name] = write_file(fs, f"{path}/{name}", [text.encode()])
    state = {"format_version": FORMAT_VERSION, "workers": world_size, "files": files, **fields}
    write_file(fs, f"{path}/trainer_state.json", [sealed(state).encode()])


def read_checkpoint(path: str | Path, fs: pyarrow.fs.FileSystem | None = None, for_resume: bool = False) -> Checkpoint:
    """Reads what a checkpoint says of itself, and of its tensors the headers, from a local folder or from storage.

    fs: the file system that `path` is in. for_resume: the optimizer's state must be there, too. Raises UserError,
    naming the file and the reason, where the folder is not a checkpoint, and DamagedCheckpoint where it is torn.
    `check_contents` finds what the headers do not tell.
    """
    if fs is None:
        fs, path = pyarrow.fs.LocalFileSystem(), Path(path).absolute()
    name = shown(fs, str(path))

    def read(what: str, action: Callable[[], Any]) -> Any:
        try:
            return retrying(f"{what}: cannot be read", action)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise storage_error(f"{what}: cannot be read", error) from None

    if read(name, lambda: fs.get_file_info(str(path))).type != pyarrow.fs.FileType.Directory:
        raise DamagedCheckpoint(f"{name}: no such checkpoint folder")

    def text(file: str) -> str:
        try:
            data = read(f"{name}/{file}", lambda: read_bytes(fs, f"{path}/{file}"))
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{name}: not a whole checkpoint: {file} is missing") from None
        check_bytes(f"{name}/{file}", files.get(file), [data])
        return data.decode("utf-8")

    files: dict[str, dict[str, int]] = {}
    file = "trainer_state.json"
    try:
        fields = unsealed(text(file))
        version, scaler = fields.pop("format_version"), SCALER.validate_python(fields.pop("scaler"))
        if version != FORMAT_VERSION:
            raise UserError(
                f"{name}/trainer_state.json: format version {short(version)}, this program reads {FORMAT_VERSION}"
            )
        workers, files = fields.pop("workers", 1), records(fields.pop("files", {}))
        progress = FIELDS.validate_json(json.dumps(fields))
        if scaler and scaler.keys() != torch.amp.GradScaler("cpu").state_dict().keys():
            raise ValueError("its scaler is not whole")
        if not progress.window <= progress.window_step <= progress.step:
            raise ValueError("its window begins after its step")
        for rank in range(1, workers):
            file = f"files-{rank:05d}.json"
            files |= records(unsealed(text(file))["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{name}/{file}: torn or foreign: {one_line(error)}") from None
    try:
        raw = parse_yaml(text("config.yaml"))
    except ValueError as error:
        raise DamagedCheckpoint(f"{name}/config.yaml: torn or foreign: {error}") from None
    config = parse_config(raw or {}, source=f"{name}/config.yaml")
    try:
        tokenizer = tokenizer_from_json(text("tokenizer.json"))
    except ValueError as error:
        raise DamagedCheckpoint(f"{name}/tokenizer.json: torn or foreign: {one_line(error)}") from None
    needed, shapes = {}, {}
    for kind in ["model"] + ["average"] * bool(config.train.ema_decay) + ["optimizer"] * for_resume:
        saved = {file: record for file, record in files.items() if file.split("/")[0].split(".")[0] == kind}
        found = read(name, partial(_tensor_files, fs, f"{path}/{kind}"))
        sizes = {info.path.removeprefix(f"{path}/"): info.size for info in found}
        if missing := sorted(saved.keys() - sizes.keys()) or ([] if found else [f"{kind}.safetensors"]):
            raise DamagedCheckpoint(f"{name}: not a whole checkpoint: {missing[0]} is missing")
        shapes[kind] = _check_tensors(fs, found, f"{name}/{kind}")
        if files and (strange := sorted(sizes.keys() - saved.keys())):
            raise DamagedCheckpoint(f"{name}/{strange[0]}: torn or foreign: this checkpoint was written without it")
        needed |= saved
    return Checkpoint(Path(path), config, tokenizer, progress, scaler, needed, shapes)


def check_contents(
    checkpoint: Checkpoint, fs: pyarrow.fs.FileSystem | None = None, share: tuple[int, int] = (0, 1)
) -> None:
    """Reads the files with the tensors that `read_checkpoint` was asked for, and raises DamagedCheckpoint where one is
    not what was written.

    fs: the file system that the checkpoint is in, if that is not the local one. share: (i, n) reads every n-th file from
    the i-th on, where n workers read for one another.
    """
    for name in sorted(checkpoint.files)[share[0] :: share[1]]:
        check_file(fs or pyarrow.fs.LocalFileSystem(), f"{checkpoint.path}/{name}", checkpoint.files[name])


def whole_checkpoint(folder: Path, name: str, device: torch.device, world_size: int) -> Checkpoint:
    """The checkpoint in a local folder, to go on from. Raises DamagedCheckpoint, and tells it on standard error.

    All workers of a run must call it, and for all of them it ends alike. The workers of a node read its files for one
    another. name: of the checkpoint in messages, as the folder may be a copy.
    """
    damage, share = None, (0, 1)
    if world_size > 1 and "LOCAL_RANK" in os.environ:  # torchrun and Ray Train set both
        share = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    try:
        checkpoint = read_checkpoint(folder, for_resume=True)
        check_contents(checkpoint, share=share)
    except DamagedCheckpoint as error:
        damage = DamagedCheckpoint(str(error).replace(str(folder), name))
        print(f"{damage}\nlooking for the checkpoint before it", file=sys.stderr, flush=True)
    if world_size > 1:
        import torch.distributed as dist

        is_damaged = torch.tensor(damage is not None, dtype=torch.int32, device=device)
        dist.all_reduce(is_damaged, op=dist.ReduceOp.MAX)
        if is_damaged.item() and damage is None:
            damage = DamagedCheckpoint(f"{name}: damaged, as another worker has found")
    if damage:
        raise damage
    return checkpoint


def differences(saved: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved value, present value) of all fields that differ, without those that say where to run.

    URIs are compared without their keys, which a checkpoint does not hold.
    """
    before, after = (flatten(without_keys(config.to_dict())) for config in (saved, now))
    paths = [path for path in before | after if not path.startswith("ray.")]
    return {path: (before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path)}


def obstacles(saved: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The differences across which a run that was saved under `saved` cannot go on under `now`; empty where it may."""

    def is_obstacle(path: str, values: tuple[Any, Any]) -> bool:
        if path == "model.hrm.h_cycles":
            return 0 in values  # zero H-cycles mean that there is no core: another shape
        if path == "optim.name":
            return "muon" in values  # the Adams have the same moments, Muon has others
        if path == "model.vocab_size":
            return None not in values  # left out it may be the same number
        if path == "data.cache_gb":  # the order goes by it where data are remote
            named = [now.data.dataset or "", *(member.dataset for member in now.data.mixture.values())]
            return any("://" in name for name in named)
        if path in ("model.max_prompt_len", "model.max_response_len"):
            if path == "model.max_prompt_len" and now.model.architecture == "puzzle" and now.model.places:
                return True  # there is a vector for each place
            return now.data.truncate  # where samples are cut there, their lengths decide on the batches
        return path.startswith(FIXED)

    return {path: values for path, values in differences(saved, now).items() if is_obstacle(path, values)}


def load_weights(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Fills `model` for use, with averaged weights where there are any.

    What LoRA changed is merged into its matrices. Factors that `model` itself has stay as they are. Raises UserError where
    the two do not fit, and where a file is not what was written.
    """
    check_contents(checkpoint)
    own = {name: tensor for name, tensor in model.state_dict().items() if not is_factor(name)}
    if checkpoint.config.train.lora.rank:
        _copy(own, _merged_model(checkpoint).state_dict(), checkpoint.path / "model")
        return
    _fill(own, checkpoint.path / "model")
    if checkpoint.config.train.ema_decay:
        parameters = {name: p for name, p in model.named_parameters() if not is_factor(name)}
        _fill(parameters, checkpoint.path / "average")


def _merged_model(checkpoint: Checkpoint) -> LanguageModel:
    """The model of a checkpoint that LoRA has trained."""
    config = checkpoint.config
    model = build_model(config.model, model_vocab_size(config.model, checkpoint.tokenizer))
    add_lora(model, config.train.lora)
    _fill(model.state_dict(), checkpoint.path / "model")
    if config.train.ema_decay:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _fill(trained, checkpoint.path / "average")
    merge_lora(model)
    return model


def load_state(checkpoint: Checkpoint, state: "TrainState") -> None:
    """Continues a run exactly: weights, their average, optimizer, scaler and step. The files are taken as they are; see
    `whole_checkpoint`.
    """
    _fill(state.model.state_dict(), checkpoint.path / "model")
    if state.average and checkpoint.config.train.ema_decay:
        _fill(state.average.tensors, checkpoint.path / "average")
    elif state.average:  # switched on in mid-run
        state.average.restart()
    _fill(_optimizer_tensors(state), checkpoint.path / "optimizer")
    if checkpoint.scaler and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint.scaler)
    state.step = checkpoint.progress.step


def state_tensors(state: "TrainState") -> list[Tensor]:
    """All tensors that a checkpoint of `state` holds, always in the same order."""
    average = state.average.tensors if state.average else {}
    return [*state.model.state_dict().values(), *average.values(), *_optimizer_tensors(state).values()]


def load_model(path: str | Path, device: torch.device | None = None) -> tuple[LanguageModel, Tokenizer, Checkpoint]:
    """A checkpoint's model, ready for inference; with averaged weights where there is an average."""
    checkpoint = read_checkpoint(path)
    sizes = checkpoint.config.model, model_vocab_size(checkpoint.config.model, checkpoint.tokenizer)
    with torch.device("meta"):  # the config may ask for more memory than there is, and than there are weights
        shell = build_model(*sizes)
        add_lora(shell, checkpoint.config.train.lora)
        _check_fit(shell.state_dict(), checkpoint.shapes["model"], checkpoint.path / "model")
    model = build_model(*sizes)
    load_weights(checkpoint, model)
    return model.to(device or torch.device("cpu")).eval(), checkpoint.tokenizer, checkpoint


def _optimizer_tensors(state: "TrainState") -> dict[str, Tensor]:
    """The optimizer's own tensors as `<slot>/<parameter name>`, made where it has not taken a step yet."""
    from hrm_lm.training.optim import new_slots

    tensors, names = {}, {p: name for name, p in state.model.named_parameters()}
    for group in state.optimizer.param_groups:
        for p in group["params"]:
            slots = state.optimizer.state[p] = state.optimizer.state[p] or new_slots(group, p)
            tensors |= {f"{slot}/{names[p]}": tensor for slot, tensor in slots.items()}
    return tensors


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which is the only other class that a state's tensors have."""
    return type(tensor) not in (Tensor, nn.Parameter)


@torch.no_grad()
def _fill(own: dict[str, Tensor], path: Path) -> None:
    """Copies what `_write` wrote into `own`, sharded or not, however many workers wrote it.

    Raises UserError where names or shapes differ, or where a part is missing.
    """
    if not path.is_dir():
        file = path.with_suffix(".safetensors")
        _copy(own, _read_tensors(file), file)
        return
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        saved = reader.read_metadata()
        reader.read_metadata = lambda: saved  # else `dcp.load` reads the headers of all files again
        _check_fit(own, {name: list(parts.size) for name, parts in saved.state_dict_metadata.items()}, path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(own, storage_reader=reader, no_dist=True)  # each worker reads what it needs
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: torn or foreign: {one_line(error)}") from None


@torch.no_grad()
def _copy(own: dict[str, Tensor], saved: dict[str, Tensor], source: Path) -> None:
    """Copies whole tensors into `own`, sharded or not. Raises UserError where names or shapes differ."""
    _check_fit(own, {name: list(tensor.shape) for name, tensor in saved.items()}, source)
    for name, tensor in own.items():
        value = saved[name].to(tensor.device)
        if _is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)


def _check_fit(own: dict[str, Tensor], saved: dict[str, list[int]], source: Path) -> None:
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            where = "is missing in it" if name not in saved else "is not in this model"
            raise UserError(f"{source}: {one_line(name)} {where}; the model's config differs from the checkpoint's")
        if saved[name] != list(own[name].shape):
            shapes = f"has shape {short(tuple(saved[name]))}, this model's has {tuple(own[name].shape)}"
            raise UserError(f"{source}: {name} {shapes}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{file.parent}: not a whole checkpoint: {file.name} is missing") from None
    except (SafetensorError, OSError) as error:
        raise DamagedCheckpoint(f"{file}: torn or foreign: {one_line(error)}") from None


def _tensor_files(fs: pyarrow.fs.FileSystem, path: str) -> list[pyarrow.fs.FileInfo]:
    """The files that `_write` made of `path`."""
    folder, file = fs.get_file_info([path, f"{path}.safetensors"])
    if folder.type != pyarrow.fs.FileType.Directory:
        return [file] if file.is_file else []
    return [
        part
        for part in fs.get_file_info(pyarrow.fs.FileSelector(path))
        if part.is_file and part.extension == "safetensors"
    ]


def _check_tensors(fs: pyarrow.fs.FileSystem, files: list[pyarrow.fs.FileInfo], name: str) -> dict[str, list[int]]:
    """Checks from the headers alone that the files of one set of tensors are not cut and that no part is missing. Returns
    the tensors' shapes.
    """
    sizes: dict[str, int] = {}  # elements of each tensor that there are
    ends: dict[str, list[int]] = {}  # and its shape, as far as the parts reach
    for file in files:
        what = f"{shown(fs, file.path)}: cannot be read"
        try:
            header = retrying(what, partial(_read_header, fs, file))
            sharding = parse_json(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
            for tensor, entry in header.items():
                shape = entry["shape"]
                offsets = _counts(sharding[tensor]["saved_offsets"] if sharding else [0] * len(shape), len(shape))
                sizes[tensor] = sizes.get(tensor, 0) + math.prod(shape)
                reach = [offset + length for offset, length in zip(offsets, shape)]
                ends[tensor] = [max(pair) for pair in zip(ends.get(tensor, reach), reach, strict=True)]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise DamagedCheckpoint(f"{shown(fs, file.path)}: torn or foreign: {one_line(error)}") from None
        except OSError as error:
            raise storage_error(what, error) from None
    for tensor, size in sizes.items():
        if size != math.prod(ends[tensor]):
            raise DamagedCheckpoint(f"{name}: not whole: a part of {one_line(tensor)} is missing")
    return ends


def _read_header(fs: pyarrow.fs.FileSystem, info: pyarrow.fs.FileInfo) -> dict[str, Any]:
    """The header of a .safetensors file; raises ValueError, KeyError or TypeError where it is no such header, or where the
    file's size is not what the header says.

    Format: 8 bytes with the header's length, the header as JSON, the tensors' bytes.
    """
    with fs.open_input_file(info.path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > info.size - 8:
            raise ValueError(f"the file is cut in its header, at {info.size} bytes")
        header = parse_json(file.read(length))
    size = 8 + length
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = _counts(entry["data_offsets"], 2)
            if end - begin != math.prod(_counts(entry["shape"])) * SIZES.get(entry["dtype"], 0):
                raise ValueError(f"{name} does not have the bytes of its shape and dtype {short(entry['dtype'])}")
            size = max(size, 8 + length + end)
    if info.size != size:
        raise ValueError(f"the file has {info.size} bytes, its header says {size}")
    return header


def _counts(values: Any, length: int | None = None) -> list[int]:
    """A list of counts, `length` of them if that is given. Raises ValueError for anything else."""
    if not (isinstance(values, list) and len(values) == (len(values) if length is None else length)):
        raise ValueError(f"{short(values)} is not a list of {'' if length is None else f'{length} '}counts")
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{short(values)} are not counts")
    return values
