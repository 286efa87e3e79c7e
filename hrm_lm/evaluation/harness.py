"""The model `hrm_lm` of lm-evaluation-harness: `hrm-lm lm_eval --model hrm_lm --model_args checkpoint=... --tasks ...`.

The harness's own `hf` model reads an export causally from the first token on. Here a context is the prompt, read both ways
where the architecture does so, and a continuation is the response. Both are tokenized apart, as in training. Where there is
no context, BOS stands for the prompt.

`lm_eval` has no place where a package could announce a model, so the command `hrm-lm lm_eval` imports this module and hands
over to the harness.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from hrm_lm.config import parse_h_cycles
from hrm_lm.data.sampler import by_length
from hrm_lm.data.splits import Ragged, Sample
from hrm_lm.errors import UserError
from hrm_lm.evaluation.scoring import losses
from hrm_lm.inference.choice import chosen_checkpoint, chosen_cycles
from hrm_lm.models.contract import EvalOptions
from hrm_lm.models.decoding import generate_ids
from hrm_lm.training.checkpoint import load_model

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "seed"}
"""What a request may say of how it is answered."""


@register_model("hrm_lm")
class HarnessModel(LM):
    """`--model_args`: checkpoint=PATH or run_name=NAME, and where they are wanted save_dir, h_cycles, l_cycles and
    mixed_precision (default: the run's).
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        run_name: str | None = None,
        save_dir: str | None = None,
        h_cycles: int | str | None = None,
        l_cycles: int | None = None,
        mixed_precision: Any = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if not torch.cuda.is_available():
            device = "cpu"  # the harness says cuda:0 unless told otherwise
        self._device = torch.device(device or "cuda")
        with chosen_checkpoint(checkpoint, None if run_name is None else str(run_name), save_dir) as folder:
            self.model, self.tokenizer, saved = load_model(folder, self._device)
        size = int(batch_size) if batch_size and str(batch_size).isdigit() else 64  # which `auto` stands for
        h = None if h_cycles is None else parse_h_cycles(str(h_cycles))
        cycles = chosen_cycles(saved.config, h, l_cycles)
        self.options = EvalOptions.of(saved.config, cycles=cycles, batch_size=size)
        if mixed_precision:
            self.options = replace(self.options, mixed_precision=mixed_precision)
        elif self.options.mixed_precision == "fp16" and self._device.type != "cuda":
            self.options = replace(self.options, mixed_precision="none")

    def prompt(self, context: str) -> Sequence[int]:
        """A context's last tokens, as many as the model takes; BOS where there are none."""
        return self.tokenizer.encode(context)[-self.model.config.max_prompt_len :] or [self.tokenizer.bos_id]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        samples = [Sample(self.prompt(context), self.tokenizer.encode(text), ends=False) for context, text in pairs]
        scores = self.score(samples)
        for request, one in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """A text in windows of `max_response_len` tokens, each with what stands before it in the text as its prompt."""
        samples, owners = [], []
        window, context = self.model.config.max_response_len, self.model.config.max_prompt_len
        for number, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            for start in range(0, len(ids), window):
                prompt = ids[max(start - context, 0) : start] or [self.tokenizer.bos_id]
                samples.append(Sample(prompt, ids[start : start + window], ends=False))
                owners.append(number)
        sums = np.zeros(len(requests))
        np.add.at(sums, owners, [logprob for logprob, _ in self.score(samples)])
        for request, total in zip(requests, sums.tolist(), strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums.tolist()

    def score(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        """Of each sample the log-probability of its response, and whether greedy decoding gives it."""
        if not samples:
            return []
        lengths = np.array([(len(sample.prompt), len(sample.response)) for sample in samples])
        if (empty := lengths[:, 1] == 0).any():
            raise UserError(f"lm_eval asks for the log-likelihood of an empty text (request {int(empty.argmax()) + 1})")
        order = by_length(lengths, len(samples) / self.options.batch_size)
        found = np.empty((3, len(samples)))
        for first in tqdm(range(0, len(order), self.options.batch_size), desc="log-likelihoods", disable=None):
            some = order[first : first + self.options.batch_size]
            batch = Ragged.of([samples[i] for i in some])
            found[:, some], _ = losses(self.model, self.tokenizer, batch, self.options)
        return [(-loss, right == labels) for loss, labels, right in found.T.tolist()]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers that end where the model ends them, before one of the texts `until`, or after `max_gen_toks` tokens."""
        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items(), key=lambda item: item[0])), []).append(i)
        for some in kinds.values():
            said = normalize_gen_kwargs(requests[some[0]].args[1], self.model.config.max_response_len)
            if unknown := said.keys() - GENERATION:
                raise UserError(f"gen_kwargs: {min(unknown)} is not among {', '.join(sorted(GENERATION))}")
            prompts = [self.prompt(requests[i].args[0]) for i in some]
            sampling = {name: said[name] for name in ("temperature", "top_k", "seed") if name in said}
            ids = generate_ids(
                self.model, self.tokenizer, prompts, self.options, max_new_tokens=said["max_gen_toks"], **sampling
            )
            for i, answer in zip(some, map(self.tokenizer.decode, ids), strict=True):
                ends = (answer.find(stop) for stop in said["until"] if stop)
                answers[i] = answer[: min((end for end in ends if end >= 0), default=None)]
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model into its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": self.options.mixed_precision,
            "h_cycles": self.options.cycles.name,
            "l_cycles": self.options.cycles.l,
        }
