"""The model that a config asks for."""

from hrm_lm.config import ModelConfig
from hrm_lm.models.contract import LanguageModel
from hrm_lm.models.encoder_decoder import HRMEncoderDecoder
from hrm_lm.models.layers import drawing_at_once
from hrm_lm.models.prefix_lm import HRMPrefixLM
from hrm_lm.models.puzzle import HRMPuzzle

ARCHITECTURES: dict[str, type[HRMEncoderDecoder | HRMPrefixLM | HRMPuzzle]] = {
    "encoder_decoder": HRMEncoderDecoder,
    "prefix_lm": HRMPrefixLM,
    "puzzle": HRMPuzzle,
}


def build_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """A new model, its weights drawn from torch's global generator."""
    with drawing_at_once():
        return ARCHITECTURES[config.architecture](config, vocab_size)
