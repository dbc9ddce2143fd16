"""What would stop a study is said before it records and trains for hours."""

from dataclasses import replace

from huggingface_hub.errors import StrictDataclassError

from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.evaluation.demo_stages import quantizer_config, small_policy_config
from lapa.evaluation.study import METHODS, Study
from lapa.evaluation.study_worlds import WORLDS

# Of any length that holds the special tokens: instructions are not read yet.
TEXT_VOCABULARY = 8


def check_models(study: Study) -> None:
    """
    Makes the configurations of the quantizers and of the policies' trunk.

    Raises:
        ValueError: Settings of which there is no such model; the method and the point are named.
    """
    action_dim = WORLDS[study.world].action_dim
    for point in study.points or (None,):
        settings = study.at(point)
        for name in study.methods:
            method = METHODS[name]
            where = f"method {name!r}" + (f" at {point.series} = {point.value:g}" if point else "")
            try:
                small_policy_config(settings, LapaVisionTokenizerConfig(), TEXT_VOCABULARY, action_dim)
                if method.targets == "codes":
                    options = {**settings.quantizer_options, **method.quantizer_options}
                    quantizer_config(replace(settings, quantizer_options=options))
            except (ValueError, TypeError, StrictDataclassError) as error:
                raise ValueError(f"study {study.name}: {where} cannot be: {error.__cause__ or error}") from error


__all__ = ["check_models"]
