"""A training state as a directory, and back. Nothing in it is unpickled: a stranger's checkpoint cannot run code.

    model.safetensors       weights
    average.safetensors     their moving average, where train.ema_decay is on; what generates
    optimizer.safetensors   Adam's moments, `exp_avg/<parameter name>`; Muon's, `momentum_buffer/<parameter name>`
    config.yaml             the run's config
    tokenizer.json
    trainer_state.json      step, progress, scaler, format version; written last

A run whose model is sharded over its workers (`ray.parallel: fsdp` or `hsdp`) has folders `model/`, `average/` and
`optimizer/` in place of the first three, with a file of each worker's parts, also safetensors
(torch.distributed.checkpoint's Hugging Face format). A part that several workers hold is saved by one of them. Both kinds
load into any number of workers, sharded or not. torch.distributed takes most of a second to import, so the functions that
need it import it.
"""

import json
import math
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hrm_lm.config import Config, flatten, parse_config
from hrm_lm.data.tokenizer import Tokenizer, model_vocab_size, tokenizer_from_json
from hrm_lm.errors import UserError
from hrm_lm.filesystem import one_line, read_text, shown, storage_error, without_keys
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel

if TYPE_CHECKING:
    from hrm_lm.training.step import TrainState

FORMAT_VERSION = 1

# A change of any of these fields changes the model's shape or the order of samples, so no run goes on across it.
FIXED = (
    *("data.", "train.seed", "train.batch_size", "train.batch_tokens", "train.length_window", "train.packing"),
    *("model.architecture", "model.d_model", "model.n_heads", "model.encoder_layers", "model.decoder_layers"),
    *("model.expansion", "model.hrm.h_layers", "model.hrm.l_layers", "model.bridge.type", "model.bridge.prefix_len"),
)


@dataclass
class Progress:
    """What a run knows besides its weights."""

    step: int = 0
    val_loss: float | None = None
    val_exact_match: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    """Validations since the best validation."""
    seconds: float = 0.0
    """Spent training, over all restarts up to here; validation and checkpoints not counted."""
    tokens: int = 0
    num_train_samples: int = 0
    window: int = 0
    """The window that the last trained batch came from (`hrm_lm.data.sampler`)."""
    window_step: int = 0
    """The number of that window's first batch. Without both fields a resume counts from the first window."""

    def update(self, step: int, val_loss: float, val_exact_match: float) -> None:
        """Counts a validation."""
        self.step, self.val_loss, self.val_exact_match = step, val_loss, val_exact_match
        if self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step, self.stale_validations = val_loss, step, 0
        else:
            self.stale_validations += 1


@dataclass
class Checkpoint:
    """What a checkpoint says of itself, without its tensors."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    progress: Progress
    scaler: dict


def save_checkpoint(path: Path, state: "TrainState", progress: Progress, tokenizer: Tokenizer) -> None:
    """Writes `state` into the existing folder `path`. All workers write a sharded state, rank 0 the rest."""
    _save(path / "optimizer", _optimizer_tensors(state))
    if state.average:
        _save(path / "average", state.average.tensors)
    _save(path / "model", state.model.state_dict())
    if state.rank == 0:
        _save_description(path, state.config, tokenizer, progress, state.scaler.state_dict())


def save_model(path: Path, model: LanguageModel, config: Config, tokenizer: Tokenizer, progress: Progress) -> None:
    """Writes a checkpoint without optimizer state: enough to generate and for `train.init_from`."""
    _save(path / "model", model.state_dict())
    _save_description(path, config, tokenizer, progress, scaler={})


def _save_description(path: Path, config: Config, tokenizer: Tokenizer, progress: Progress, scaler: dict) -> None:
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    fields = {"format_version": FORMAT_VERSION, "scaler": scaler, **asdict(progress)}
    (path / "trainer_state.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")


def read_checkpoint(path: str | Path, fs: pyarrow.fs.FileSystem | None = None, for_resume: bool = False) -> Checkpoint:
    """Reads what a checkpoint says of itself, and of its tensors the headers, from a local folder or from storage.

    fs: the file system that `path` is in. for_resume: the optimizer's state must be there, too. Raises UserError,
    naming the file and the reason, where the folder is torn or not a checkpoint.
    """
    if fs is None:
        fs, path = pyarrow.fs.LocalFileSystem(), Path(path).absolute()
    name = shown(fs, str(path))
    if fs.get_file_info(str(path)).type != pyarrow.fs.FileType.Directory:
        raise UserError(f"{name}: no such checkpoint folder")

    def text(file: str) -> str:
        try:
            return read_text(fs, f"{path}/{file}")
        except FileNotFoundError:
            raise UserError(f"{name}: not a whole checkpoint: {file} is missing") from None
        except OSError as error:
            raise storage_error(f"{name}/{file}: cannot be read", error) from None

    try:
        fields = json.loads(text("trainer_state.json"))
        version, scaler = fields.pop("format_version"), fields.pop("scaler")
        if version != FORMAT_VERSION:
            raise UserError(f"{name}/trainer_state.json: format version {version}, this program reads {FORMAT_VERSION}")
        progress = Progress(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}/trainer_state.json: torn or foreign: {error!r}") from None
    try:
        raw = yaml.safe_load(text("config.yaml"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}/config.yaml: torn or foreign: {one_line(error)}") from None
    config = parse_config(raw or {}, source=f"{name}/config.yaml")
    try:
        tokenizer = tokenizer_from_json(text("tokenizer.json"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}/tokenizer.json: torn or foreign: {error}") from None
    for kind in ["model"] + ["average"] * bool(config.train.ema_decay) + ["optimizer"] * for_resume:
        files = _tensor_files(fs, f"{path}/{kind}")
        if not files:
            raise UserError(f"{name}: not a whole checkpoint: {kind}.safetensors is missing")
        _check_tensors(fs, files, f"{name}/{kind}")
    return Checkpoint(Path(path), config, tokenizer, progress, scaler)


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
        if path in ("model.max_prompt_len", "model.max_response_len"):
            return now.data.truncate  # where samples are cut there, their lengths decide on the batches
        return path.startswith(FIXED)

    return {path: values for path, values in differences(saved, now).items() if is_obstacle(path, values)}


def load_weights(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Fills `model` for use, with averaged weights where there are any; raises UserError where the two do not fit."""
    _fill(model.state_dict(), checkpoint.path / "model")
    if checkpoint.config.train.ema_decay:
        _fill(dict(model.named_parameters()), checkpoint.path / "average")


def load_state(checkpoint: Checkpoint, state: "TrainState") -> None:
    """Continues a run exactly: weights, their average, optimizer, scaler and step."""
    _fill(state.model.state_dict(), checkpoint.path / "model")
    if state.average and checkpoint.config.train.ema_decay:
        _fill(state.average.tensors, checkpoint.path / "average")
    elif state.average:  # switched on in mid-run
        state.average.restart()
    _fill(_optimizer_tensors(state), checkpoint.path / "optimizer")
    if checkpoint.scaler and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint.scaler)
    state.step = checkpoint.progress.step


def load_model(path: str | Path, device: torch.device | None = None) -> tuple[LanguageModel, Tokenizer, Checkpoint]:
    """A checkpoint's model, ready for inference; with averaged weights where there is an average."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint.config.model, model_vocab_size(checkpoint.config.model, checkpoint.tokenizer))
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


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `<path>.safetensors`, or of sharded tensors this worker's part, a file of its own in the folder `path`."""
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if any(_is_sharded(tensor) for tensor in tensors.values()):
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    else:
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, path.with_suffix(".safetensors"), metadata={"format": "pt"})


@torch.no_grad()
def _fill(own: dict[str, Tensor], path: Path) -> None:
    """Copies what `_save` wrote into `own`, sharded or not, however many workers wrote it.

    Raises UserError where names or shapes differ, or where a part is missing.
    """
    if not path.is_dir():
        file = path.with_suffix(".safetensors")
        saved = _read_tensors(file)
        _check_fit(own, {name: tensor.shape for name, tensor in saved.items()}, file)
        for name, tensor in own.items():
            value = saved[name].to(tensor.device)
            if _is_sharded(tensor):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)
        return
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        saved = reader.read_metadata().state_dict_metadata
        _check_fit(own, {name: parts.size for name, parts in saved.items()}, path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(own, storage_reader=reader, no_dist=True)  # each worker reads what it needs
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: torn or foreign: {error}") from None


def _check_fit(own: dict[str, Tensor], saved: dict[str, torch.Size], source: Path) -> None:
    for name in own.keys() | saved.keys():
        if name not in saved or name not in own:
            where = "is missing in it" if name not in saved else "is not in this model"
            raise UserError(f"{source}: {name} {where}; the model's config differs from the checkpoint's")
        if saved[name] != own[name].shape:
            shapes = f"has shape {tuple(saved[name])}, this model's has {tuple(own[name].shape)}"
            raise UserError(f"{source}: {name} {shapes}")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file.parent}: not a whole checkpoint: {file.name} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: torn or foreign: {error}") from None


def _tensor_files(fs: pyarrow.fs.FileSystem, path: str) -> list[pyarrow.fs.FileInfo]:
    """The files that `_save` made of `path`."""
    folder, file = fs.get_file_info([path, f"{path}.safetensors"])
    if folder.type != pyarrow.fs.FileType.Directory:
        return [file] if file.is_file else []
    return [part for part in fs.get_file_info(pyarrow.fs.FileSelector(path)) if part.extension == "safetensors"]


def _check_tensors(fs: pyarrow.fs.FileSystem, files: list[pyarrow.fs.FileInfo], name: str) -> None:
    """Checks from the headers alone that the files of one set of tensors are not cut and that no part is missing."""
    sizes: dict[str, int] = {}  # elements of each tensor that there are
    ends: dict[str, list[int]] = {}  # and its shape, as far as the parts reach
    for file in files:
        try:
            header = _read_header(fs, file)
            sharding = json.loads(header.pop("__metadata__", {}).get("DCP_SHARDING_INFO", "{}"))
            for tensor, entry in header.items():
                shape = entry["shape"]
                offsets = sharding[tensor]["saved_offsets"] if sharding else [0] * len(shape)
                sizes[tensor] = sizes.get(tensor, 0) + math.prod(shape)
                reach = [offset + length for offset, length in zip(offsets, shape)]
                ends[tensor] = [max(pair) for pair in zip(ends.get(tensor, reach), reach)]
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise UserError(f"{shown(fs, file.path)}: torn or foreign: {error}") from None
        except OSError as error:
            raise storage_error(f"{shown(fs, file.path)}: cannot be read", error) from None
    for tensor, size in sizes.items():
        if size != math.prod(ends[tensor]):
            raise UserError(f"{name}: not whole: a part of {tensor} is missing")


def _read_header(fs: pyarrow.fs.FileSystem, info: pyarrow.fs.FileInfo) -> dict[str, Any]:
    """The header of a .safetensors file; raises ValueError where the file's size is not what the header says.

    Format: 8 bytes with the header's length, the header as JSON, the tensors' bytes.
    """
    with fs.open_input_file(info.path) as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > info.size - 8:
            raise ValueError(f"the file is cut in its header, at {info.size} bytes")
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    size = 8 + length + max(ends, default=0)
    if info.size != size:
        raise ValueError(f"the file has {info.size} bytes, its header says {size}")
    return header
