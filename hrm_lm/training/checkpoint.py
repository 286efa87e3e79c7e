"""A training state as a directory, and back. Nothing in it is unpickled: a stranger's checkpoint cannot run code.

    model.safetensors       weights
    average.safetensors     their moving average, where train.ema_decay is on; what generates
    optimizer.safetensors   Adam's moments, `exp_avg/<parameter name>`
    config.yaml             the run's config
    tokenizer.json
    trainer_state.json      step, progress, scaler, format version; written last
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hrm_lm.config import Config, parse_config, read_yaml
from hrm_lm.data.tokenizer import Tokenizer, load_tokenizer
from hrm_lm.errors import UserError
from hrm_lm.models.build import LanguageModel, build_model
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
    """Writes `state` into the existing folder `path`."""
    names = {p: name for name, p in state.model.named_parameters()}
    moments = {f"{key}/{names[p]}": value for p, slots in state.optimizer.state.items() for key, value in slots.items()}
    save_file(_cpu(moments), path / "optimizer.safetensors", metadata={"format": "pt"})
    if state.average:
        save_file(_cpu(state.average.tensors), path / "average.safetensors", metadata={"format": "pt"})
    save_model(path, state.model, state.config, tokenizer, progress, state.scaler.state_dict())


def save_model(
    path: Path,
    model: LanguageModel,
    config: Config,
    tokenizer: Tokenizer,
    progress: Progress,
    scaler: dict | None = None,
) -> None:
    """Writes a checkpoint without optimizer state: enough to generate and for `train.init_from`."""
    save_file(_cpu(model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    fields = {"format_version": FORMAT_VERSION, "scaler": scaler or {}, **asdict(progress)}
    (path / "trainer_state.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Raises UserError, naming the file and the reason, where the directory is torn or not a checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder")
    for name in ("trainer_state.json", "config.yaml", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
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
    _fill(model.state_dict(), checkpoint.path / "model.safetensors")
    if checkpoint.config.train.ema_decay:
        _fill(dict(model.named_parameters()), checkpoint.path / "average.safetensors")


def load_state(checkpoint: Checkpoint, state: TrainState) -> None:
    """Continues a run exactly: weights, their average, optimizer, scaler and step."""
    _fill(state.model.state_dict(), checkpoint.path / "model.safetensors")
    if state.average and checkpoint.config.train.ema_decay:
        _fill(state.average.tensors, checkpoint.path / "average.safetensors")
    elif state.average:  # switched on in mid-run
        state.average.restart()
    file = checkpoint.path / "optimizer.safetensors"
    moments = _read_tensors(file)
    parameters = dict(state.model.named_parameters())
    for key, value in moments.items():
        slot, _, name = key.partition("/")
        if name not in parameters:
            raise UserError(f"{file}: {name} is not in this model")
        # Optimizers count their steps on the CPU unless they are fused.
        device = state.device if slot != "step" or state.optimizer.defaults.get("fused") else "cpu"
        state.optimizer.state[parameters[name]][slot] = value.to(device)
    if checkpoint.scaler and state.scaler.is_enabled():
        state.scaler.load_state_dict(checkpoint.scaler)
    state.step = checkpoint.progress.step


def load_model(path: str | Path, device: torch.device | None = None) -> tuple[LanguageModel, Tokenizer, Checkpoint]:
    """A checkpoint's model, ready for inference; with averaged weights where there is an average."""
    checkpoint = read_checkpoint(path)
    model = build_model(checkpoint.config.model, checkpoint.tokenizer.vocab_size)
    load_weights(checkpoint, model)
    return model.to(device or torch.device("cpu")).eval(), checkpoint.tokenizer, checkpoint


@torch.no_grad()
def _fill(own: dict[str, Tensor], file: Path) -> None:
    """Copies a file's tensors into `own`; raises UserError where names or shapes differ."""
    saved = _read_tensors(file)
    for name in own.keys() | saved.keys():
        if name not in saved or name not in own:
            where = "is missing in it" if name not in saved else "is not in this model"
            raise UserError(f"{file}: {name} {where}; the model's config differs from the checkpoint's")
        if saved[name].shape != own[name].shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(saved[name].shape)}, this model's has {tuple(own[name].shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file.parent}: not a whole checkpoint: {file.name} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: torn or foreign: {error}") from None
