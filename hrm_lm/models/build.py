"""The model that a config asks for."""

from hrm_lm.config import ModelConfig
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.encoder_decoder import HRMEncoderDecoder
from hrm_lm.models.prefix_lm import HRMPrefixLM

ARCHITECTURES: dict[str, type[HRMEncoderDecoder | HRMPrefixLM]] = {
    "encoder_decoder": HRMEncoderDecoder,
    "prefix_lm": HRMPrefixLM,
}


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """A new model, its weights drawn from torch's global generator."""
    return ARCHITECTURES[config.architecture](config, vocab_size)
