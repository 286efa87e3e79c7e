"""The configuration: typed sections, YAML files, dotted overrides.

The defaults stand here and only here; `configs/default.yaml` spells them out and a test keeps the two equal. Every
field has a dotted path (`model.hrm.h_cycles`), which is how the command line overrides it, how a sweep names it and
how an error points at it. Sections are frozen: a config is a value.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Iterable, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hrm_lm.errors import UserError
from hrm_lm.filesystem import one_line, read_text, reason, resolve, without_secrets

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HRMConfig(Section):
    """The H/L recurrence (`hrm_lm.models.hrm.HRMCore`)."""

    h_cycles: Count = 2
    """Slow cycles; 0 builds no core at all: a plain encoder-decoder, or a plain stack of h_layers + l_layers."""
    l_cycles: Positive = 2
    """Fast applications within each slow cycle."""
    h_layers: Positive = 1
    l_layers: Positive = 1
    backprop_steps: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    """How many applications of a stack carry gradient: the last ones of H first, and at least the last one of L."""
    backprop_warmup_steps: Count = 0
    """Optimisation steps over which the window grows from 2 to `backprop_steps`."""
    deep_supervision: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean loss of the earlier H-cycles' outputs."""

    def cycles(self, h_cycles: int | None, l_cycles: int | None) -> tuple[int, int]:
        """The counts given; for None, the configured ones."""
        return self.h_cycles if h_cycles is None else h_cycles, self.l_cycles if l_cycles is None else l_cycles


class BridgeConfig(Section):
    """From the core to the decoder (`encoder_decoder` only)."""

    type: Literal["cross_attention", "prefix"] = "cross_attention"
    prefix_len: Positive = 8
    """Vectors that the core's states are pooled into (`prefix` only)."""
    gate_warmup_steps: Count = 0
    """Optimisation steps during which the gate is held shut."""


class ModelConfig(Section):
    architecture: Literal["encoder_decoder", "prefix_lm"] = "encoder_decoder"
    """`hrm_lm.models.hybrid`, or the published HRM-Text model, `hrm_lm.models.prefix_lm`."""
    d_model: Positive = 64
    n_heads: Positive = 4
    encoder_layers: Count = 1
    """Before the core (`encoder_decoder` only)."""
    decoder_layers: Positive = 1
    """`encoder_decoder` only."""
    expansion: Annotated[float, Field(gt=0)] = 4.0
    """SwiGLU: the hidden size is 2/3 * expansion * d_model, rounded up to a multiple of 32 (`prefix_lm`: 256)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_prompt_len: Positive = 512
    max_response_len: Positive = 128
    """In tokens; the response's end-of-sequence token counts."""
    hrm: HRMConfig = HRMConfig()
    bridge: BridgeConfig = BridgeConfig()

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.d_model % self.n_heads:
            raise ValueError(f"model.d_model ({self.d_model}) must be divisible by model.n_heads ({self.n_heads})")
        if self.d_model // self.n_heads % 2:
            raise ValueError(
                f"model.d_model / model.n_heads ({self.d_model // self.n_heads}) must be even: rotary positions turn pairs"
            )
        return self


class OptimConfig(Section):
    name: Literal["adamw", "adam_atan2"] = "adamw"
    """`adam_atan2`: the published HRM-Text recipe's (`hrm_lm.training.optim`)."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """`adamw` only: the other has none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Not applied to norms, gates and embeddings."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Count = 20
    min_lr_ratio: Fraction = 0.1
    """The floor of the decay, as a share of `lr`."""


class TrainConfig(Section):
    steps: Positive = 200
    batch_size: Positive = 64
    """Samples of one optimisation step, over all workers and accumulation steps."""
    batch_tokens: Positive | None = None
    """Instead of `batch_size`: as many samples as fit so many tokens of prompt and response, padding counted."""
    length_window: Count = 0
    """Samples out of which batches of similar length are made, padded to few sizes; 0: batches are random."""
    grad_accum_steps: Positive = 1
    grad_clip: float = 0.0
    """Largest global L2 norm of the gradient; off when <= 0."""
    mixed_precision: Literal["none", "bf16", "fp16"] = "none"
    loader_workers: Count = 0
    """Processes of each worker that make its batches; 0: a thread, which is enough where samples are ready to take."""
    compile: bool = False
    """Compile each transformer block (torch.compile): seconds at the start for speed, on GPUs above all."""
    val_every: Count = 0
    """Steps between validations, each with a checkpoint; 0: only at the end."""
    checkpoint_every: Count = 0
    """Steps between checkpoints that come without a validation; 0: checkpoints come with validations only."""
    log_every: Positive = 10
    early_stopping_patience: Count = 0
    """Validations in a row without a better `val_loss` before the run ends; 0: never."""
    sample_h_cycles: tuple[Positive, Positive] | None = None
    """Least and most H-cycles: each step draws its count. Only such a model is right at other counts than one."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an average of the weights, which validation, generation and export then use; 0: none."""
    seed: Count = 0
    init_from: str | None = None
    """Checkpoint whose weights a new run starts from."""

    @model_validator(mode="after")
    def _cycles_ordered(self):
        if self.sample_h_cycles and self.sample_h_cycles[0] > self.sample_h_cycles[1]:
            raise ValueError(f"train.sample_h_cycles ({list(self.sample_h_cycles)}) must be [least, most]")
        return self


class SyntheticConfig(Section):
    """Addition questions (`hrm_lm.data.synthetic`)."""

    min_digits: Positive = 1
    max_digits: Annotated[int, Field(ge=1, le=18)] = 2
    num_samples: Annotated[int, Field(ge=2)] = 20_000
    """At most so many questions; all of them where there are fewer."""

    @model_validator(mode="after")
    def _digits_ordered(self):
        if self.min_digits > self.max_digits:
            raise ValueError(
                f"data.synthetic.min_digits ({self.min_digits}) is larger than max_digits ({self.max_digits})"
            )
        return self


class MixturePart(Section):
    """A dataset of a mixture. Fields left out are those of `data`."""

    dataset: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Its share of the training samples is this over the sum of all weights."""
    prompt_field: str | None = None
    response_field: str | None = None


class DataConfig(Section):
    dataset: str | None = None
    """`synthetic`, `reasoning_gym:<task>[,option=value...]`, a .jsonl file, a folder with train.jsonl, a prepared dataset
    (folder or URI), or `module:function`."""
    mixture: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], MixturePart] = {}
    """Instead of `dataset`: several, by names of your own, which `val_loss/<name>` and the like then bear."""
    prompt_field: str = "prompt"
    response_field: str = "response"
    tokenizer: str | None = None
    """What text is read with: `bytes`, or a tokenizer.json (a checkpoint's, a prepared dataset's, a Hugging Face one).
    Left out: the characters that occur; bytes for reasoning_gym; for a mixture its prepared dataset's, else bytes."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Held-out share where the dataset brings no validation split."""
    val_samples: Annotated[int, Field(ge=1, le=4096)] = 500
    """Validation samples drawn where the dataset is endless (`reasoning_gym:`)."""
    truncate: bool = False
    """Cut what is longer than the model takes, instead of refusing it."""
    synthetic: SyntheticConfig = SyntheticConfig()

    @model_validator(mode="after")
    def _one_or_many(self):
        if self.dataset is not None and self.mixture:
            raise ValueError("data.dataset and data.mixture exclude one another")
        return self


class RayConfig(Section):
    num_workers: Positive = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several workers: the model whole on each, or in parts (`hrm_lm.training.parallel`)."""
    use_gpu: Literal["auto"] | bool = "auto"
    cpus_per_worker: Literal["auto"] | Positive = "auto"
    """`auto`: an equal share of the cluster's CPUs when training on CPU, else 1."""
    run_name: str | None = None
    storage_path: str | None = None
    """Folder or URI that run folders are created in; see `hrm_lm.cluster.run_folder`."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures a run recovers from; -1: any number."""
    wait_for_nodes: bool = False
    """Wait for workers that do not fit the cluster and whatever growth of it is known."""
    num_to_keep: Positive = 1
    """Checkpoints kept by `val_loss`, beside the last one."""


class Config(Section):
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def _core_to_sample(self):
        if self.train.sample_h_cycles and not self.model.hrm.h_cycles:
            raise ValueError("train.sample_h_cycles: model.hrm.h_cycles is 0, so there is no HRM core to cycle")
        return self

    @model_validator(mode="after")
    def _window_holds_batches(self):
        train, longest = self.train, self.model.max_prompt_len + self.model.max_response_len
        if train.batch_tokens is not None and not train.length_window:
            raise ValueError("train.batch_tokens needs train.length_window, such as 65536: it fills batches from that")
        if train.batch_tokens is not None and train.batch_tokens < longest:
            raise ValueError(
                f"train.batch_tokens ({train.batch_tokens}) is less than one sample of model.max_prompt_len + "
                f"model.max_response_len ({longest}) takes"
            )
        if train.batch_tokens is None and 0 < train.length_window < train.batch_size:
            raise ValueError(
                f"train.length_window ({train.length_window}) is smaller than train.batch_size ({train.batch_size})"
            )
        return self

    @model_validator(mode="after")
    def _sharded_precision(self):
        if self.ray.parallel == "fsdp" and self.train.mixed_precision == "fp16":
            raise ValueError("train.mixed_precision: fp16 does not go with ray.parallel fsdp; use bf16 or none")
        return self

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.train.batch_tokens is not None:
            return self
        shares = self.ray.num_workers * self.train.grad_accum_steps
        if self.train.batch_size % shares:
            raise ValueError(
                f"train.batch_size ({self.train.batch_size}) must be divisible by ray.num_workers * "
                f"train.grad_accum_steps ({self.ray.num_workers} * {self.train.grad_accum_steps})"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """Samples that one worker takes through the model at a time; with `train.batch_tokens`, the longest ones."""
        if self.train.batch_tokens is not None:
            tokens = self.train.batch_tokens // (self.ray.num_workers * self.train.grad_accum_steps)
            return max(tokens // (self.model.max_prompt_len + self.model.max_response_len), 1)
        return self.train.batch_size // (self.ray.num_workers * self.train.grad_accum_steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able values, nested by section."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The defaults, under a YAML file, under `overrides` (dotted path -> value).

    Raises UserError, a line per mistake, naming the file or the dotted path.
    """
    raw = {} if path is None else read_yaml(path)
    for dotted, value in (overrides or {}).items():
        set_dotted(raw, dotted, value)
    return parse_config(raw, source=without_secrets(str(path)) if path else "config")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, which may be a path or a URI."""
    name = without_secrets(str(path))
    try:
        raw = yaml.safe_load(read_text(*resolve(str(path))))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {reason(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not valid YAML: {one_line(error)}") from None
    if not isinstance(raw or {}, dict):
        raise UserError(f"{name}: must be a mapping of sections (model, optim, train, data, ray)")
    return raw or {}


def parse_config(raw: dict[str, Any], source: str = "config") -> Config:
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{source}: {line}" for line in explain(error, Config))) from None


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """`["model.hrm.h_cycles=4", ...]` as dotted path -> value; values are YAML."""
    overrides = {}
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise UserError(f"--set {assignment}: expected PATH=VALUE, such as model.hrm.h_cycles=4")
        try:
            overrides[dotted.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {assignment}: the value is not valid YAML") from None
    return overrides


def set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{dotted}: {section} is a value, not a section")
        raw = inner
    raw[field] = value


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted path -> value."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """A line a mistake, with the dotted path below `root`."""
    lines = {}
    for item in error.errors():
        # A union reports each member's view at the same place, with the member's name at the path's end.
        names = [part for part in item["loc"] if isinstance(part, str) and part != "[key]"]
        path, owner, section, values = [], root, root, None
        for name in names:
            if section is None and values is None:
                break
            path.append(name)
            if values is not None:  # of a mapping, whose keys are free
                section, values = values, None
                continue
            owner, field = section, section.model_fields.get(name)
            inner = field.annotation if field else None
            section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
            values = get_args(inner)[1] if get_origin(inner) is dict else None
        dotted = ".".join(path)
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(path[-1], owner.model_fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(owner.model_fields)}"
            message = f"no such field; {hint}"
        elif item["type"] == "model_type":
            message = "should be a section of fields"
        elif item["type"] == "value_error":
            lines[str(item["ctx"]["error"])] = ""
            continue
        else:
            message = item["msg"].removeprefix("Input ") if item["msg"].startswith("Input ") else item["msg"]
        known = lines.get(dotted)
        got = f" (got {item['input']!r})" if item["type"] != "extra_forbidden" else ""
        lines[dotted] = f"{known.removesuffix(got)} or {message}{got}" if known else message + got
    return [f"{path}: {message}" if message else path for path, message in lines.items()]
