"""The configuration: typed sections, YAML files with a base, dotted overrides.

The defaults stand here and only here; `configs/default.yaml` spells them out and a test keeps the two equal. The
docstring of a field is its only help text: `--help` and `docs/configuration.md` are made from it. Every field has a
dotted path (`model.hrm.h_cycles`), which is how the command line overrides it, how a sweep names it and how an error
points at it. Sections are frozen: a config is a value.
"""

import copy
import difflib
import math
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hrm_lm.errors import UserError
from hrm_lm.filesystem import reason, resolve, without_keys, without_secrets
from hrm_lm.parsing import DEEPEST, is_text, one_line, parse_yaml, short


def _of_64_bits(number: int) -> int:
    if number >= 2**63:
        raise PydanticCustomError("too_large", "should be less than 2^63")
    return number


Positive = Annotated[int, Field(ge=1), AfterValidator(_of_64_bits)]
Count = Annotated[int, Field(ge=0), AfterValidator(_of_64_bits)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# What a model is made of has bounds beyond all use: a config that asks for more is refused before it takes all memory.
Layers = Annotated[int, Field(ge=1, le=1000)]
MOST_CYCLES = 256
Rounds = Annotated[int, Field(ge=1, le=MOST_CYCLES)]
MOST_TOKENS = 10_000_000
Length = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Width = Annotated[int, Field(ge=1, le=100_000)]
MOST_TOLD = 10
"""Mistakes of a config that are told at a time."""


class Cycles(NamedTuple):
    """How often the recurrence runs: slow H-cycles, and fast L-cycles within each of them."""

    h: int
    l: int
    halt: float | None = None
    """Where a model does not learn: a sample takes no further H-cycle once |z' - z| / |z'|, over the states of all its tokens,
    is no more than this. `h` is then the most that it takes."""

    @property
    def name(self) -> int | str:
        """What `--h_cycles` says for the H-cycles."""
        return self.h if self.halt is None else f"auto:{self.halt:g}:{self.h}"


class Halting(NamedTuple):
    """`--h_cycles auto`: each sample takes H-cycles until its states rest."""

    residual: float = 0.03
    """See `Cycles.halt`."""
    most: int | None = None
    """The most H-cycles; None for the most that the model was trained with."""


def parse_h_cycles(text: str) -> int | Halting:
    """What `--h_cycles` says: a count, or `auto[:RESIDUAL[:MOST]]`. Raises UserError."""
    auto, *numbers = text.split(":")
    try:
        if auto == "auto" and len(numbers) <= 2:
            halting = Halting(*(kind(number) for kind, number in zip((float, int), numbers)))
            count, is_right = halting.most or 1, 0 < halting.residual < math.inf and halting.most != 0
        else:
            count, is_right = int(text), True
    except ValueError:
        is_right, count = False, 0
    if not is_right:
        raise UserError(f"--h_cycles {text}: expected a count, such as 4, or auto, auto:0.03, auto:0.03:16")
    if not 0 <= count <= MOST_CYCLES:
        raise UserError(f"--h_cycles must be at least 0 and at most {MOST_CYCLES}, not {count}")
    return halting if auto == "auto" else count


class Workers(NamedTuple):
    """How many workers a run has at least, and at most."""

    least: int
    most: int


class Section(BaseModel):
    """A part of the config. The docstring below a field is its help text in every command and in the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number_or_text(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic takes true for 1, and texts that no file can have in its name."""
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool) and {int, float} & kinds and not {bool, Any} & kinds:
                raise PydanticCustomError("bool", "should be a number")
            if isinstance(item, str) and not is_text(item):
                raise PydanticCustomError("text", "should be text without half characters and zero bytes")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    inner = get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


class HRMConfig(Section):
    """The H/L recurrence (`hrm_lm.models.hrm.HRMCore`)."""

    h_cycles: Annotated[int, Field(ge=0, le=MOST_CYCLES)] = 2
    """How many slow cycles the core takes. With 0 there is no core: the model is a plain encoder-decoder, or for
    `prefix_lm` a plain stack of h_layers + l_layers."""
    l_cycles: Rounds = 2
    """How often the fast stack is applied within each slow cycle."""
    h_layers: Layers = 1
    """Layers of the slow stack."""
    l_layers: Layers = 1
    """Layers of the fast stack."""
    inject: Literal["none", "add", "gated"] = "none"
    """Whether L reads the core's input again in each of its applications: not at all, as in HRM-Text; added; or added with a
    weight for each channel that is learned, while L's own state is damped by another (`hrm_lm.models.hrm`)."""
    shared: bool = False
    """Whether H's stack, of `h_layers`, is L's, too (TRM)."""
    backprop_steps: Literal["all"] | Annotated[int, Field(ge=2)] = "all"
    """How many applications of a stack carry gradient. The last applications of H come first, and at least the last
    application of L always counts."""
    backprop_warmup_steps: Count = 0
    """Optimisation steps over which the applications with gradient grow from 2 to `backprop_steps`."""
    deep_supervision: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean loss of the earlier H-cycles' outputs. With 0 only the last output is trained."""

    @property
    def cycles(self) -> Cycles:
        return Cycles(self.h_cycles, self.l_cycles)


class BridgeConfig(Section):
    """From the core to the decoder (`encoder_decoder` only)."""

    type: Literal["cross_attention", "prefix"] = "cross_attention"
    """How the decoder sees the core's states. With `cross_attention` every decoder block attends to them; with `prefix`
    they are pooled into a few vectors that stand before the decoder's input."""
    prefix_len: Width = 8
    """How many vectors the core's states are pooled into (`prefix` only)."""
    gate_warmup_steps: Count = 0
    """Optimisation steps during which the gate on the bridge is held shut."""


class ModelConfig(Section):
    """The shape of the model."""

    architecture: Literal["encoder_decoder", "prefix_lm", "puzzle"] = "encoder_decoder"
    """What the model is made of: an encoder, the HRM core and a decoder; the published HRM-Text model, which takes
    prompt and response through the core as a single sequence; or the core alone, which answers in the prompt's places."""
    mask: Literal["prefix", "causal"] = "prefix"
    """What a prompt's tokens see: all of the prompt, or what is before them alone (`prefix_lm` only)."""
    places: bool = True
    """Whether each place of a prompt has a learned vector, besides rotary positions (`puzzle` only). Places of a grid want one;
    without it a sequence may be longer than those trained on, up to `max_prompt_len`."""
    d_model: Width = 64
    """Width of a token's state. It is a multiple of `n_heads`."""
    n_heads: Positive = 4
    """Attention heads of each layer."""
    vocab_size: Length | None = None
    """How many tokens embedding and head hold. When it is left out, they hold the tokenizer's."""
    encoder_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    """Layers before the core (`encoder_decoder` only)."""
    decoder_layers: Layers = 1
    """Layers after the bridge (`encoder_decoder` only)."""
    expansion: Annotated[float, Field(gt=0, le=1000)] = 4.0
    """How wide a SwiGLU is. Its hidden size is 2/3 * expansion * d_model, rounded up to a multiple of 32 (for
    `prefix_lm`: 256)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of activations that are dropped while training."""
    max_prompt_len: Length = 512
    """Tokens of the longest prompt that the model takes."""
    max_response_len: Length = 128
    """Tokens of the longest response that the model takes. The end-of-sequence token counts."""
    hrm: HRMConfig = HRMConfig()
    """The H/L recurrence."""
    bridge: BridgeConfig = BridgeConfig()
    """What takes the core's states to the decoder (`encoder_decoder` only)."""

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
    """The optimizer and the schedule of its learning rate."""

    name: Literal["adamw", "adam_atan2", "muon"] = "adamw"
    """The optimizer. `adam_atan2` is what the published HRM-Text recipe takes. `muon` makes the updates of the blocks'
    matrices orthogonal and leaves all other parameters to AdamW; `lr` and `weight_decay` of `adamw` carry over
    (`hrm_lm.training.optim`)."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """The learning rate after warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of the averages of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """What keeps AdamW from a division by zero. `adam_atan2` does not divide and ignores it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay. Norms, gates and embeddings do not decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warm-up."""
    warmup_steps: Count = 20
    """Optimisation steps over which the learning rate rises from 0 to `lr`."""
    min_lr_ratio: Fraction = 0.1
    """Where the learning rate's decay ends, as a share of `lr`."""


class LoRAConfig(Section):
    """Fine-tuning of a few parameters (LoRA, `hrm_lm.models.lora`). It needs `train.init_from`."""

    rank: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Rank of the change of each matrix. With 0 the whole model is trained."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    """The change counts alpha / rank."""
    targets: Literal["attention", "mlp", "all"] = "all"
    """Which matrices of the blocks are changed."""


class TrainConfig(Section):
    """How long and on which batches a run trains, and how often it validates."""

    steps: Positive = 200
    """Optimisation steps of the run."""
    batch_size: Positive = 64
    """Samples of an optimisation step, over all workers and accumulation steps."""
    batch_tokens: Positive | None = None
    """Tokens of an optimisation step. When set, it replaces `batch_size`: a batch holds as many samples as fit this many
    tokens of prompts and responses, padding included. It needs `length_window`."""
    length_window: Count = 0
    """How many samples are sorted by length at a time, to make batches of similar length with little padding. With 0
    batches are random."""
    packing: bool = False
    """Whether samples lie end to end, without padding between them, each seeing itself alone. It needs `batch_tokens`, and
    `length_window` says out of how many samples batches are filled. An `encoder_decoder` packs with
    `model.bridge.type: cross_attention` only."""
    grad_accum_steps: Positive = 1
    """Into how many parts each worker cuts its share of a batch, to save memory."""
    grad_clip: float = 0.0
    """Largest global L2 norm of the gradient. With 0 or less the gradient is not clipped."""
    mixed_precision: Literal["none", "bf16", "fp16", "fp8"] = "none"
    """Number format of the matrix products. `fp16` needs a CUDA GPU. `fp8` is `bf16` with the blocks' matrices in float8 while
    training; it needs a GPU of compute capability 8.9 or more (a CPU computes it slowly), and is meant for `compile`."""
    loader_workers: Count = 0
    """Processes of each worker that make its batches. With 0 a thread makes them, which is enough where samples need no
    work."""
    compile: bool = False
    """Whether each transformer block is compiled (torch.compile). The start takes some seconds longer and each step is
    faster, above all on GPUs."""
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Whether steps are replayed as CUDA graphs, which keeps small models from waiting for the launches of their kernels.
    Sizes of batches are then rounded up to few sizes. `auto` means yes on a GPU, with one worker, without `fp16`,
    without `batch_tokens` and with all of `activation_memory`, for as long as a step takes less than a quarter of the
    GPU's memory."""
    activation_memory: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the activations that a step keeps for its backward pass. What is not kept is computed again, the cheapest
    first; attention over 512 positions or more is always kept on GPUs. Less than 1 needs `compile`."""
    val_every: Count = 0
    """Steps between validations, each with a checkpoint. With 0 the run validates only at its end."""
    checkpoint_every: Count = 0
    """Steps between checkpoints that come without a validation. With 0 checkpoints come with validations only."""
    log_every: Positive = 10
    """Steps between lines of the log."""
    sample_answers: Count = 4
    """How many held-out prompts, always the same, each validation also answers for the run's report and TensorBoard. Answers
    are at most 64 tokens long. Trials of a sweep answer none."""
    loggers: list[Literal["mlflow", "wandb"]] = []
    """Where a run's config, numbers and result go besides its folder: `[mlflow]`, `[wandb]` or both, to the servers that these
    libraries' own environment variables name (`MLFLOW_TRACKING_URI`, `WANDB_MODE`). They need `hrm-lm[mlflow]` and
    `hrm-lm[wandb]`. Trials of a sweep log nothing there."""
    profile: bool = False
    """Whether some steps soon after the start are profiled on the first worker. `profile/` in the run's folder then has
    a table of where a step's time goes, and the trace that it is made of. Trials of a sweep are not profiled."""
    early_stopping_patience: Count = 0
    """How many validations in a row may pass without a better `val_loss` before the run ends. With 0 the run never ends
    early."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What becomes of a step whose loss or gradient is not finite. `stop` ends the run as `diverged`. `skip` does not take
    the step, unless 100 steps in a row are not finite. `rollback` goes back to the last checkpoint, of which each worker
    keeps a copy in its host's memory, and leaves the step out when it comes there again."""
    spike: Annotated[float, Field(gt=0)] | None = None
    """How many running standard deviations above its running mean, over about 100 steps, the loss of a step is a spike;
    7, say. With `on_nonfinite: rollback` the run goes back and leaves out the steps around a spike. Otherwise spikes are
    told and counted. With null nothing looks for spikes."""
    objective: Literal["response", "all"] = "response"
    """Which tokens are labels: those of the response, or those of the prompt, too (`prefix_lm` with `model.mask: causal`).
    Validation is on the response's."""
    segments: Rounds = 1
    """How many times a training step takes its batch through the core. Each segment goes on from the states where the one
    before ended, has a loss and a backward pass of its own, and gradient does not flow from segment to segment. So
    memory is that of one segment, and validation takes `segments` times the H-cycles (HRM's deep supervision)."""
    sample_h_cycles: tuple[Rounds, Rounds] | None = None
    """The least and the most H-cycles that a training step takes; each step draws its count between them. A model
    trained with a fixed count is right only at that count."""
    h_cycles_distribution: Literal["uniform", "poisson", "log_normal"] = "uniform"
    """How `sample_h_cycles` are drawn. Of `poisson` and `log_normal`, draws beyond the least and the most count as these."""
    h_cycles_mean: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """The mean of `poisson` and `log_normal`."""
    h_cycles_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.7
    """The standard deviation of the logarithm of `log_normal`."""
    fixed_point: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of a penalty on |z' - z|^2 / |z'|^2, where z and z' are the core's last two states of H, as a mean over tokens: it
    makes the recurrence come to rest. With 0 there is no penalty."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a running average of the weights. Validation, generation and export use the average where it is
    kept. With 0 no average is kept."""
    seed: Count = 0
    """Seed of the weights, of the order of samples and of dropout."""
    init_from: str | None = None
    """Checkpoint, folder or URI, whose weights a new run starts from."""
    lora: LoRAConfig = LoRAConfig()
    """Fine-tuning of a few parameters."""

    @model_validator(mode="after")
    def _lora_changes_weights(self):
        if self.lora.rank and self.init_from is None:
            raise ValueError(
                f"train.lora.rank ({self.lora.rank}) needs train.init_from, the checkpoint that it changes"
            )
        if self.lora.rank and self.mixed_precision == "fp8":
            raise ValueError("train.lora does not go with train.mixed_precision fp8; use bf16 or none")
        return self

    @model_validator(mode="after")
    def _scaler_skips(self):
        if self.on_nonfinite == "skip" and self.mixed_precision == "fp16":
            raise ValueError(
                "train.on_nonfinite: skip does not go with train.mixed_precision fp16, whose loss scaling skips steps "
                "itself; use stop, rollback or bf16"
            )
        return self

    @model_validator(mode="after")
    def _recomputation_compiled(self):
        if self.activation_memory < 1 and not self.compile:
            raise ValueError(
                f"train.activation_memory ({self.activation_memory:g}) less than 1 needs train.compile=true"
            )
        return self

    @model_validator(mode="after")
    def _cycles_ordered(self):
        if self.sample_h_cycles and self.sample_h_cycles[0] > self.sample_h_cycles[1]:
            raise ValueError(f"train.sample_h_cycles ({list(self.sample_h_cycles)}) must be [least, most]")
        return self


class SyntheticConfig(Section):
    """Addition questions (`hrm_lm.data.synthetic`)."""

    min_digits: Positive = 1
    """Digits of the shortest summand."""
    max_digits: Annotated[int, Field(ge=1, le=18)] = 2
    """Digits of the longest summand."""
    num_samples: Annotated[int, Field(ge=2, le=10_000_000)] = 20_000
    """How many questions there are at most. Short summands allow fewer, and then all of them are there."""

    @model_validator(mode="after")
    def _digits_ordered(self):
        if self.min_digits > self.max_digits:
            raise ValueError(
                f"data.synthetic.min_digits ({self.min_digits}) is larger than max_digits ({self.max_digits})"
            )
        return self


class MixtureMember(Section):
    """A dataset of a mixture."""

    dataset: str
    """The dataset, named as in `data.dataset`."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often the dataset is drawn from. Its share of the training samples is its weight over the sum of all
    weights."""
    prompt_field: str | None = None
    """Field of a record that holds the prompt. When it is left out, it is `data.prompt_field`."""
    response_field: str | None = None
    """Field of a record that holds the response. When it is left out, it is `data.response_field`."""


class DataConfig(Section):
    """What a run trains on."""

    dataset: str | None = None
    """What to train on: `synthetic`, `task:<name>[,option=value...]`, `reasoning_gym:<task>[,option=value...]`, `hf:<name or folder>[,option=value...]`, a
    .jsonl file, a folder with train.jsonl, a prepared dataset (folder or URI), or `module:function`, which is code of your
    own."""
    mixture: dict[Annotated[str, Field(pattern=r"^[\w-]+$")], MixtureMember] = {}
    """Several datasets at once, instead of `dataset`. You name each of them, and its own scores bear that name
    (`val_loss/<name>`)."""
    prompt_field: str = "prompt"
    """Field of a record (a JSON line, a row of `hf:`) that holds the prompt: `question`, `data.question`, or a template such
    as `{question} Context: {context}`. Where the field holds a list of messages, the record is a conversation."""
    response_field: str = "response"
    """Field of a record that holds the response, or a template. A record that lacks `prompt` or `response` may have a
    conversation in `messages`, unless other fields are named."""
    tokenizer: str | None = None
    """What text is read with: `bytes`, or a tokenizer.json of a checkpoint, of a prepared dataset or of Hugging Face.
    When it is left out, the vocabulary is the characters of the dataset; `reasoning_gym` takes bytes; a mixture takes
    the tokenizer of its prepared dataset, or else bytes."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the samples that is held out where the dataset brings no validation split."""
    val_samples: Annotated[int, Field(ge=1, le=4096)] = 500
    """How many validation samples are drawn where the dataset is endless (`task:`, `reasoning_gym:`)."""
    max_val_samples: Positive | None = 16_384
    """How many validation samples a validation reads at most, of each dataset, spread evenly over what is held out. With
    null it reads all of them."""
    cache_gb: Annotated[float, Field(gt=0)] | None = 100.0
    """Gigabytes of each node's disk that copies of remote prepared datasets may take (`HRM_LM_CACHE` says where). Of a
    larger dataset a node holds a part at a time, and its samples come in a random order within blocks of a quarter
    of that. Several remote datasets of a mixture share it equally. With null all copies are kept, and samples come
    in a random order over the whole dataset."""
    truncate: bool = False
    """Whether samples longer than the model takes are cut. Otherwise they are refused."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """The addition questions of `dataset: synthetic`."""

    @model_validator(mode="after")
    def _one_or_many(self):
        if self.dataset is not None and self.mixture:
            raise ValueError("data.dataset and data.mixture exclude one another")
        return self


class RayConfig(Section):
    """Where a run takes place and where it is kept."""

    num_workers: Positive | str = 1
    """Data-parallel workers that share each batch. With a range such as `1:4` a run starts with the workers that fit, and
    their number follows the cluster; `batch_size` is divided as by the most of them."""
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """How several workers hold the model: each holds all of it (`ddp`), each holds a part (`fsdp`), or each holds a part
    of its node's copy (`hsdp`)."""
    use_gpu: Literal["auto"] | bool = "auto"
    """Whether each worker trains on a GPU. `auto` means yes where the cluster has GPUs."""
    cpus_per_worker: Literal["auto"] | Positive = "auto"
    """CPUs that each worker reserves. `auto` means an equal share of the cluster's CPUs when training on CPU, and 1
    otherwise."""
    run_name: str | None = None
    """Name of the run's folder. A run of that name is resumed where it stopped. When it is left out, the name is made
    from the time."""
    storage_path: str | None = None
    """Folder or URI that run folders are created in. When it is left out, it is `runs/`, and `~/hrm_lm_runs` of the
    cluster in a submitted job."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """How many failures of workers a run recovers from. With -1 it recovers from any number. An error that the user must
    mend ends the run at once."""
    hang_timeout: Annotated[float, Field(ge=0, le=1e6)] = 900.0
    """After how many seconds without progress a worker counts as failed, and its stack is logged. The start, with the first
    step, may take four times as long. Storage that is away is waited for up to 600 s, which must be less. 0 means
    never."""
    wait_for_nodes: bool = False
    """Whether a run or a sweep waits when its workers do not fit the cluster. Otherwise it is refused, unless the
    cluster is known to grow far enough. Set it where Ray cannot know how far the cluster grows, as under KubeRay."""
    num_to_keep: Positive = 1
    """How many checkpoints of the lowest `val_loss` are kept, at least two, so that a run can go back behind a damaged one.
    The last checkpoint is kept besides."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", value if isinstance(value, str) else short(value), re.ASCII)
        least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= least <= most:
            raise ValueError(f"ray.num_workers: {short(value)} should be a number from 1 up, or a range such as 1:4")
        return most if least == most else f"{least}:{most}"

    @property
    def workers(self) -> Workers:
        """The range of `num_workers`; both ends are the same where it is a number."""
        least, _, most = str(self.num_workers).partition(":")
        return Workers(int(least), int(most or least))

    def shards(self, workers: int) -> bool:
        """Whether so many workers hold a part of the model each."""
        return workers > 1 and self.parallel != "ddp"


class Config(Section):
    """All that decides a run."""

    model: ModelConfig = ModelConfig()
    """The shape of the model."""
    optim: OptimConfig = OptimConfig()
    """The optimizer and the schedule of its learning rate."""
    train: TrainConfig = TrainConfig()
    """How long and on which batches a run trains, and how often it validates."""
    data: DataConfig = DataConfig()
    """What a run trains on."""
    ray: RayConfig = RayConfig()
    """Where a run takes place and where it is kept."""

    @model_validator(mode="after")
    def _stream(self):
        if self.model.mask == "causal" and self.model.architecture != "prefix_lm":
            raise ValueError(f"model.mask: causal is for prefix_lm alone, not for {self.model.architecture}")
        if not self.model.places and self.model.architecture != "puzzle":
            raise ValueError(f"model.places: false is for puzzle alone; {self.model.architecture} has no such vectors")
        if self.train.objective == "all" and self.model.mask != "causal":
            raise ValueError(
                "train.objective: all needs model.architecture prefix_lm with model.mask causal: a prompt's tokens must "
                "not see those that they predict"
            )
        return self

    @model_validator(mode="after")
    def _core_to_sample(self):
        train = self.train
        named = {
            "sample_h_cycles": train.sample_h_cycles,
            "segments": train.segments > 1,
            "fixed_point": train.fixed_point,
        }
        for name, asked in named.items():
            if asked and not self.model.hrm.h_cycles:
                raise ValueError(f"train.{name}: model.hrm.h_cycles is 0, so there is no HRM core to cycle")
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
    def _packing_possible(self):
        apart = self.model.architecture == "encoder_decoder"
        if self.train.packing and apart and self.model.bridge.type == "prefix":
            raise ValueError(
                "train.packing: model.bridge.type prefix puts vectors before each response; use cross_attention"
            )
        if self.train.packing and self.model.architecture == "puzzle":
            raise ValueError("train.packing does not go with model.architecture puzzle, whose samples are of one size")
        if self.train.packing and self.train.batch_tokens is None:
            raise ValueError("train.packing needs train.batch_tokens, such as 32768: it fills batches up to that")
        return self

    @model_validator(mode="after")
    def _sharded_precision(self):
        parallel, precision = self.ray.parallel, self.train.mixed_precision
        if parallel != "ddp" and precision == "fp16":
            raise ValueError(f"train.mixed_precision: fp16 does not go with ray.parallel {parallel}; use bf16 or none")
        return self

    @model_validator(mode="after")
    def _float8_sizes(self):
        if self.train.mixed_precision == "fp8" and self.model.d_model % 16:
            raise ValueError(
                f"train.mixed_precision: fp8 needs a model.d_model ({self.model.d_model}) that is a multiple of 16"
            )
        return self

    @model_validator(mode="after")
    def _equal_nodes(self):
        if self.ray.parallel == "hsdp" and isinstance(self.ray.num_workers, str):
            raise ValueError(
                f"ray.num_workers ({self.ray.num_workers}): ray.parallel hsdp needs equally many workers on every node, "
                "which a range does not promise; give a number, or take fsdp"
            )
        return self

    @model_validator(mode="after")
    def _muon_precision(self):
        if self.optim.name == "muon" and self.train.mixed_precision == "fp16":
            raise ValueError("train.mixed_precision: fp16 does not go with optim.name muon; use bf16 or none")
        if self.optim.name == "muon" and self.train.lora.rank:
            raise ValueError("train.lora: optim.name muon takes whole matrices, and LoRA trains factors; use adamw")
        return self

    @model_validator(mode="after")
    def _batch_divides(self):
        if self.train.batch_tokens is not None:
            return self
        if self.train.batch_size % self.shares:
            raise ValueError(
                f"train.batch_size ({self.train.batch_size}) must be divisible by ray.num_workers * "
                f"train.grad_accum_steps ({self.ray.workers.most} * {self.train.grad_accum_steps})"
            )
        return self

    @property
    def cycles(self) -> Cycles:
        """The cycles that a trained model answers with: those of all segments of a step."""
        hrm = self.model.hrm
        return Cycles(hrm.h_cycles * self.train.segments, hrm.l_cycles)

    @property
    def shares(self) -> int:
        """Micro-batches of a global batch, over all workers that a run has at most."""
        return self.ray.workers.most * self.train.grad_accum_steps

    def for_workers(self, world_size: int) -> "Config":
        """The config of a group of so many workers, where `ray.num_workers` is a range.

        All workers take equally many micro-batches, and as few as keep a micro-batch from being larger than it is where
        all workers are there: 2 of 3 workers are as fast as they can be.
        """
        if isinstance(self.ray.num_workers, int):
            return self
        parts = {"grad_accum_steps": -(-self.shares // world_size)}
        ray = self.ray.model_copy(update={"num_workers": world_size})
        return self.model_copy(update={"ray": ray, "train": self.train.model_copy(update=parts)})

    @property
    def graphs_obstacle(self) -> str | None:
        """Why steps cannot be CUDA graphs, wherever the run takes place; None where they can."""
        if self.ray.workers.most > 1:
            return f"needs a single worker (ray.num_workers is {self.ray.num_workers})"
        if self.train.mixed_precision == "fp16":
            return "does not go with train.mixed_precision fp16; use bf16 or none"
        return None

    @model_validator(mode="after")
    def _graphs_possible(self):
        if self.train.cuda_graphs is True and self.graphs_obstacle:
            raise ValueError(f"train.cuda_graphs: true {self.graphs_obstacle}")
        return self

    @property
    def micro_batch_size(self) -> int:
        """Samples that one worker takes through the model at a time; with `train.batch_tokens`, the longest ones."""
        if self.train.batch_tokens is not None:
            tokens = self.train.batch_tokens // self.shares
            return max(tokens // (self.model.max_prompt_len + self.model.max_response_len), 1)
        return -(-self.train.batch_size // self.shares)

    @property
    def row_tokens(self) -> int | None:
        """With `train.packing`, the tokens of the row that a worker takes through the model at a time: always as many.
        An `encoder_decoder` takes two rows, which hold so many together.

        A batch's samples are dealt out whole, so of several shares some get more than their part: by up to a sample, or
        by a few tokens where a share has many samples for a single row (`hrm_lm.data.sampler.token_share`).
        """
        if not self.train.packing or self.train.batch_tokens is None:
            return None
        part = -(-self.train.batch_tokens // self.shares)
        longest = self.model.max_prompt_len + self.model.max_response_len
        alike = self.model.architecture == "prefix_lm" and part >= 16 * longest
        return part + (0 if self.shares == 1 else longest // 8 if alike else longest)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able values, nested by section."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """For a file, so URIs lose their keys: whoever uses the file has keys of their own."""
        return yaml.safe_dump(without_keys(self.to_dict()), sort_keys=False)


class Layer(NamedTuple):
    """A config file's own values, without its base's."""

    source: str
    """The file's path or URI, for messages."""
    values: dict[str, Any]
    own: bool
    """Whether the file is the user's own. A file of a checkpoint or from a URI may come from a stranger."""


def load_config(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The defaults, under a YAML file and its bases, under `overrides` (dotted path -> value).

    Raises UserError, a line per mistake, naming the file or the dotted path.
    """
    return config_of(read_layers(path) if path else [], overrides or {})


def config_of(layers: Sequence[Layer], overrides: dict[str, Any]) -> Config:
    """The defaults, under `layers` (the last wins), under `overrides`. Raises UserError as `load_config` does."""
    raw = merged(layers)
    for dotted, value in overrides.items():
        set_dotted(raw, dotted, value)
    *bases, source = [layer.source for layer in layers] or ["config"]
    return parse_config(raw, source=f"{source} (base: {', '.join(reversed(bases))})" if bases else source)


def read_layers(path: str | Path) -> list[Layer]:
    """A config file (path or URI) as the last layer; before it its base, that file's base, and so on."""
    return with_bases(read_yaml(path), str(path))


def with_bases(values: dict[str, Any], place: str) -> list[Layer]:
    """`values`, which stand in the file `place`, as the last layer; before it the layers of the base that they name.

    A base is a URI or a path relative to the file that names it. Raises UserError, naming the files on the way, where a
    base cannot be read or comes round in a circle.
    """
    layers: list[Layer] = []
    way, seen, own = [without_secrets(place)], [_identity(place)], True
    while True:
        own = own and is_own(place)  # a stranger's file does not make its base the user's own
        values = dict(values)
        base = values.pop("base", None)
        layers.insert(0, Layer(without_secrets(place), values, own))
        if base is None:
            return layers
        if not isinstance(base, str):
            raise UserError(
                f"{' -> '.join(way)}: base must be the path or URI of a config, not {short(without_keys(base))}"
            )
        place = _beside(place, base)
        way.append(without_secrets(place))
        if _identity(place) in seen:
            raise UserError(f"{' -> '.join(way)}: the bases go round in a circle")
        seen.append(_identity(place))
        values = read_yaml(place, shown=" -> ".join(way))


def merged(layers: Iterable[Layer]) -> dict[str, Any]:
    """One mapping of all layers: sections are merged field by field, and the last layer wins."""
    raw: dict[str, Any] = {}
    for layer in layers:
        _merge(raw, copy.deepcopy(layer.values))
    return raw


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def is_own(place: str) -> bool:
    """Whether a config file is the user's own: it is on this machine, and not in the folder of a checkpoint."""
    if "://" in place:
        return False
    files = (place, os.path.realpath(place))
    return not any(os.path.exists(f"{os.path.dirname(file) or '.'}/trainer_state.json") for file in files)


def _beside(place: str, base: str) -> str:
    """A base as seen from the file `place` that names it. The options of a URI hold for its neighbours too."""
    if "://" in base:
        return base
    if "://" not in place:
        return str(Path(place).parent / base)
    uri, mark, options = place.partition("?")
    scheme, _, path = uri.partition("://")
    path = posixpath.normpath(f"{path.rpartition('/')[0]}/{base}")  # object storage knows no ".."
    return f"{scheme}://{path}{mark}{options}"


def _identity(place: str) -> str:
    return place if "://" in place else os.path.realpath(place)


MOST_BYTES = 1 << 20
"""Of a config file."""


def read_yaml(path: str | Path, shown: str | None = None) -> dict[str, Any]:
    """A YAML file (path or URI) that holds a mapping. Raises UserError, naming it as `shown`, where it does not."""
    shown = shown or without_secrets(str(path))
    try:
        data = _read(str(path))
        if len(data) > MOST_BYTES:
            raise UserError(f"{shown}: has more than {MOST_BYTES:,} bytes, too many for a config")
        raw = parse_yaml(data.decode("utf-8-sig"))  # editors of Windows begin a file with a byte order mark
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{shown}: not valid YAML: {without_secrets(str(error))}") from None
    if not isinstance(raw or {}, dict):
        raise UserError(f"{shown}: must be a mapping of sections (model, optim, train, data, ray)")
    return raw or {}


def _read(place: str) -> bytes:
    """What the file holds, but not much more than MOST_BYTES of it."""
    if "://" not in place:
        with open(place, "rb") as file:  # a pipe, too, which pyarrow does not read
            return file.read(MOST_BYTES + 1)
    fs, path = resolve(place)
    with fs.open_input_file(path) as file:
        return file.read(MOST_BYTES + 1)


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
            raise UserError(
                f"--set {one_line(without_secrets(assignment))}: expected PATH=VALUE, such as model.hrm.h_cycles=4"
            )
        try:
            overrides[dotted.strip()] = parse_yaml(text)
        except ValueError:
            raise UserError(f"--set {one_line(without_secrets(assignment))}: the value is not valid YAML") from None
    return overrides


def set_dotted(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, field = dotted.split(".")
    if len(sections) > DEEPEST:
        raise UserError(f"{one_line(dotted)}: no such field")
    for section in sections:
        inner = raw.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{one_line(dotted)}: {one_line(section)} is a value, not a section")
        raw = inner
    raw[field] = value


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted path -> value."""
    flat = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """A line for each mistake, with the dotted path below `root`; of more than MOST_TOLD mistakes, of the first."""
    lines = {}
    for item in error.errors(include_url=False):
        if len(lines) > MOST_TOLD:
            break
        # A union reports each member's view at the same place, with the member's name at the path's end.
        names = [part for part in item["loc"] if isinstance(part, str) and part != "[key]"]
        path: list[str] = []
        owner: Any = root
        kind: Any = root
        for name in names:
            if is_section(kind):
                owner, field = kind, kind.model_fields.get(name)
                kind = field.annotation if field else None
            elif get_origin(kind) is dict:  # whose keys are free
                kind = get_args(kind)[1]
            else:
                break
            path.append(name if len(name) <= 60 else f"{name[:57]}...")
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
            message = item["msg"].removeprefix("Input ")
        known = lines.get(dotted)
        got = f" (got {short(without_keys(item['input']))})" if item["type"] != "extra_forbidden" else ""
        lines[dotted] = f"{known.removesuffix(got)} or {message}{got}" if known else message + got
    told = [without_secrets(": ".join(filter(None, line))) for line in lines.items()]
    return told if len(told) <= MOST_TOLD else [*told[:MOST_TOLD], "and more mistakes"]


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
