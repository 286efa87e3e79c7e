"""Answers of a checkpoint. The command is `hrm_lm.commands.generate`."""

import sys
from collections.abc import Sequence
from typing import Any

from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.errors import UserError
from hrm_lm.models.contract import EvalOptions, LanguageModel
from hrm_lm.models.decoding import generate_ids
from hrm_lm.parsing import is_text
from hrm_lm.training.memory import is_out_of_memory


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    options: EvalOptions | None = None,
    **sampling: Any,
) -> list[str]:
    """The responses to `prompts`, in their order. `sampling` is what `generate_ids` takes beside the options.

    options: None for the trained cycles, in float32. Raises UserError for a prompt that is empty, too long or of
    unknown characters, and where the memory does not hold the answers.
    """
    options = options or EvalOptions(cycles=model.config.hrm.cycles)
    if broken := [prompt for prompt in prompts if not is_text(prompt.replace("\0", ""))]:
        raise UserError(f"prompt {broken[0][:60]!r} has half a character")
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded):
        if not 0 < len(ids) <= model.config.max_prompt_len:
            raise UserError(
                f"prompt {prompt[:60]!r} has {len(ids)} tokens; this model takes 1 to {model.config.max_prompt_len}"
            )

    try:
        answers = generate_ids(model, tokenizer, encoded, options, **sampling)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the answers take more than the memory holds; ask for fewer at a time, or for shorter ones"
        ) from None
    return [tokenizer.decode(answer) for answer in answers]


if __name__ == "__main__":
    from hrm_lm.commands.generate import main
    from hrm_lm.commands.main import run_command

    sys.exit(run_command(main))
