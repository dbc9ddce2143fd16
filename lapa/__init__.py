"""Hugging Face-native latent action pretraining: from video to robot policies.

Importing `lapa` registers its classes with transformers' Auto classes and its `robot-action` pipeline. The classes
themselves are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lapa.registration import register

if TYPE_CHECKING:
    from lapa.configuration.configuration_lapa import LapaConfig
    from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
    from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
    from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
    from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
    from lapa.modeling_lapa.pipeline_robot_action import RobotActionPipeline
    from lapa.processing.image_processing_lapa import LapaImageProcessor
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.processing.tokenization_lapa import LapaTokenizer

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "LapaConfig": "lapa.configuration.configuration_lapa",
    "LapaForActionPrediction": "lapa.modeling_lapa.modeling_lapa",
    "LapaForLatentAction": "lapa.modeling_lapa.modeling_lapa",
    "LapaImageProcessor": "lapa.processing.image_processing_lapa",
    "LapaProcessor": "lapa.processing.processing_lapa",
    "LapaQuantizer": "lapa.modeling_lapa.modeling_lapa_quantizer",
    "LapaQuantizerConfig": "lapa.configuration.configuration_lapa_quantizer",
    "LapaTokenizer": "lapa.processing.tokenization_lapa",
    "LapaVisionTokenizer": "lapa.modeling_lapa.modeling_lapa_vision_tokenizer",
    "LapaVisionTokenizerConfig": "lapa.configuration.configuration_lapa_vision_tokenizer",
    "RobotActionPipeline": "lapa.modeling_lapa.pipeline_robot_action",
}
__all__ = [
    "LapaConfig",
    "LapaForActionPrediction",
    "LapaForLatentAction",
    "LapaImageProcessor",
    "LapaProcessor",
    "LapaQuantizer",
    "LapaQuantizerConfig",
    "LapaTokenizer",
    "LapaVisionTokenizer",
    "LapaVisionTokenizerConfig",
    "RobotActionPipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'lapa' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC_NAMES])


register()
