"""The model card of an export: what was measured, how to ask the model, and where other tools read it wrong."""

import math
import re
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs

from hrm_lm.errors import UserError
from hrm_lm.filesystem import read_text, shown, storage_error
from hrm_lm.parsing import parse_json
from hrm_lm.training.checkpoint import Checkpoint

Results = dict[str, Any]
"""What `evaluate` writes as results_h<n>.json, and `lm_eval` as results_<date>.json."""


def read_results(fs: pyarrow.fs.FileSystem, path: str) -> Results:
    """Raises UserError where the file is not one of results."""
    try:
        results = parse_json(read_text(fs, path))
        if not rows_of(results):
            raise ValueError
        return results
    except OSError as error:
        raise storage_error(f"{shown(fs, path)}: cannot be read", error) from None
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"{shown(fs, path)}: not the results that evaluate or lm_eval writes") from None


def find_results(fs: pyarrow.fs.FileSystem, checkpoint: str) -> list[Results]:
    """The results of a checkpoint's evaluations beside it. Of the same tasks and cycles it is those of most samples, and of
    these the last. What cannot be read is told, and left out.
    """
    run, _, name = checkpoint.rpartition("/")
    files = fs.get_file_info(pyarrow.fs.FileSelector(f"{run}/evaluation", recursive=True, allow_not_found=True))
    found = []
    for file in files:
        if re.search(r"/results_h[^/]+\.json$", file.path):
            try:
                found.append(read_results(fs, file.path))
            except UserError as error:
                print(f"not in the model card: {error}", file=sys.stderr)
    own = [results for results in found if PurePosixPath(str(results.get("model_name"))).name == name]
    chosen = {}
    for results in sorted(own, key=lambda results: (num_samples(results), str(results.get("date")))):
        chosen[str(results.get("h_cycles")), str(results.get("l_cycles")), *results["results"]] = results
    return list(chosen.values())


def num_samples(results: Results) -> int:
    return sum(samples for *_, samples in rows_of(results) if isinstance(samples, int))


def rows_of(results: Results) -> list[tuple[str, str, float, float | None, Any]]:
    """(task, score, value, standard error, samples) of each score."""
    rows = []
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            score, _, filter_ = key.partition(",")
            if filter_ and isinstance(value, int | float) and math.isfinite(value) and not score.endswith("_stderr"):
                error = numbers.get(f"{score}_stderr,{filter_}")
                samples = results.get("n-samples", {}).get(task, {}).get("effective", "")
                rows.append((task, score, float(value), error if isinstance(error, float) else None, samples))
    return rows


def table(results: Sequence[Results]) -> str:
    rows = [
        f"| {task} | {one.get('h_cycles', '')} | {one.get('l_cycles', '')} | {score} | {value:.4f}"
        f"{f' ± {error:.4f}' if error else ''} | {samples} |"
        for one in results
        for task, score, value, error, samples in rows_of(one)
    ]
    head = ["task", "H-cycles", "L-cycles", "score", "value ± standard error", "samples"]
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *rows])


def metadata(results: Sequence[Results], name: str) -> str:
    """The card's head, with results as the Hub reads them."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            dataset_config=f"h_cycles={results_['h_cycles']}" if "h_cycles" in results_ else None,
            metric_type=score,
            metric_value=round(value, 6),
        )
        for results_ in results
        for task, score, value, *_ in rows_of(results_)
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hrm", "hrm_text", "prefix-lm"],
        model_name=name if measured else None,
        eval_results=measured or None,
    ).to_yaml()


MARK = """\
inputs["token_type_ids"] = inputs["attention_mask"]  # 1: the prompt's tokens see one another both ways
"""
BOTH_WAYS = """
The model reads prompts both ways. Not all tools do:

- **Transformers** reads a prompt causally unless `token_type_ids` mark it, as above. lm-evaluation-harness does not mark it: its
  `--model hf` scores another model than this one. `hrm-lm lm_eval --model hrm_lm` scores a checkpoint as it was trained.
- **vLLM** (`vllm serve FOLDER`) reads prompts both ways. Its log-likelihoods (`prompt_logprobs`) are wrong: they read the continuation
  as a part of the prompt.
- **llama.cpp** reads prompts causally, so its answers are another model's, and usually worse.
"""
CAUSAL = """
The model reads prompts causally, as Transformers and llama.cpp do. **vLLM** reads them both ways all the same, so its answers are
another model's.
"""


def model_card(checkpoint: Checkpoint, parameters: int, results: Sequence[Results], name: str) -> str:
    progress = checkpoint.progress
    training = {
        "optimisation steps": f"{progress.step:,}",
        "tokens seen": f"{progress.tokens:,}",
        "validation loss": None if progress.val_loss is None else f"{progress.val_loss:.4f}",
        "validation exact match": None if progress.val_exact_match is None else f"{progress.val_exact_match:.4f}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in training.items() if value is not None)
    # Where the run was kept is its owner's business.
    config = checkpoint.config.model_copy(update={"ray": type(checkpoint.config.ray)()})
    is_causal = config.model.mask == "causal"
    mark = "" if is_causal else MARK
    measured = f"\n## Results\n\n{table(results)}\n" if results else ""
    return f"""---
{metadata(results, name)}
---

An HRM-Text model (arXiv 2605.20613) of {parameters:,} parameters, trained with `hrm_lm`.

| | |
| --- | --- |
{rows}
{measured}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer(["a prompt"], return_tensors="pt", padding=True, add_special_tokens=False)
{mark}output = model.generate(**inputs)
print(tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
{CAUSAL if is_causal else BOTH_WAYS}
## Config of the run

```yaml
{config.to_yaml()}```
"""
