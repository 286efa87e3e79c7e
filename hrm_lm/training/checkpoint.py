"""A training state as a directory, and back. Nothing in it is unpickled: a stranger's checkpoint cannot run code.

    model.safetensors       weights
    average.safetensors     their moving average, where train.ema_decay is on; what generates
    optimizer.safetensors   Adam's moments, `exp_avg/<parameter name>`
    config.yaml             the run's config
    tokenizer.json
    trainer_state.json      step, progress, scaler, format version; written last

A run whose model is sharded over its workers (`ray.parallel: fsdp`) has folders `model/`, `average/` and `optimizer/`
in place of the first three, with a file of each worker's parts, also safetensors (torch.distributed.checkpoint's
Hugging Face format). Both kinds load into any number of workers, sharded or not.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from hrm_lm.config import Config, parse_config, read_yaml
from hrm_lm.data.tokenizer import Tokenizer, load_tokenizer, model_vocab_size
from hrm_lm.errors import UserError
from hrm_lm.models.build import build_model
from hrm_lm.models.contract import LanguageModel
from hrm_lm.training.step import TrainState

FORMAT_VERSION = 1


@dataclass
class Progress:
    """What a run knows besides its weights."""

    step: int = 0
    val_loss: float | None = None
    val_exact_match: float | None = None
    best_val_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    """Validations since the best one."""
    seconds: float = 0.0
    """Spent training, over all restarts up to here; validation and checkpoints not counted."""
    tokens: int = 0
    num_train_samples: int = 0

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


def save_checkpoint(path: Path, state: TrainState, progress: Progress, tokenizer: Tokenizer) -> None:
    """Writes `state` into the existing folder `path`; of a sharded one this worker's part, rank 0 also the rest."""
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


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Raises UserError, naming the file and the reason, where the directory is torn or not a checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    for name in ("trainer_state.json", "config.yaml", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file() and not (path / name).with_suffix("").is_dir():
            raise UserError(f"{path}: not a whole checkpoint: {name} is missing")
    state_file = path / "trainer_state.json"
    try:
        fields = json.loads(state_file.read_text(encoding="utf-8"))
        version, scaler = fields.pop("format_version"), fields.pop("scaler")
        if version != FORMAT_VERSION:
            raise UserError(f"{state_file}: format version {version}, this program reads {FORMAT_VERSION}")
        progress = Progress(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{state_file}: torn or foreign: {error!r}") from None
    config = parse_config(read_yaml(path / "config.yaml"), source=str(path / "config.yaml"))
    return Checkpoint(path, config, load_tokenizer(path / "tokenizer.json"), progress, scaler)


def load_weights(checkpoint: Checkpoint, model: LanguageModel) -> None:
    """Fills `model` for use, with averaged weights where there are any; raises UserError where the two do not fit."""
    _fill(model.state_dict(), checkpoint.path / "model")
    if checkpoint.config.train.ema_decay:
        _fill(dict(model.named_parameters()), checkpoint.path / "average")


def load_state(checkpoint: Checkpoint, state: TrainState) -> None:
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


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """The optimizer's own tensors as `<slot>/<parameter name>`, made where it has not taken a step yet."""
    tensors = {}
    for name, p in state.model.named_parameters():
        slots = state.optimizer.state[p]
        if not slots:
            # Optimizers count their steps on the CPU unless they are fused.
            fused = state.optimizer.defaults.get("fused")
            slots["step"] = torch.zeros((), device=state.device if fused else "cpu")
            slots["exp_avg"], slots["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        tensors |= {f"{slot}/{name}": tensor for slot, tensor in slots.items()}
    return tensors


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `<path>.safetensors`, or of sharded tensors this worker's part, a file of its own in the folder `path`."""
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
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
            if isinstance(tensor, DTensor):
                value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(value)
        return
    reader = HuggingFaceStorageReader(str(path))
    try:
        saved = reader.read_metadata().state_dict_metadata
        for name, parts in saved.items():
            if sum(part.sizes.numel() for part in parts.chunks) != parts.size.numel():
                raise UserError(f"{path}: not whole: a part of {name} is missing")
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
