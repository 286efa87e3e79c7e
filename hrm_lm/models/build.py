"""The model that a config asks for."""

from hrm_lm.config import ModelConfig
from hrm_lm.models.hybrid import HRMLanguageModel
from hrm_lm.models.prefix_lm import HRMPrefixLM

LanguageModel = HRMLanguageModel | HRMPrefixLM
"""What they have in common: a call on a Batch, `prefill`, `decode`, `set_step`, `config`, `core` (None without one)."""


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """A new model, its weights drawn from torch's global generator."""
    return {"encoder_decoder": HRMLanguageModel, "prefix_lm": HRMPrefixLM}[config.architecture](config, vocab_size)
