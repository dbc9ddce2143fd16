"""Makes transformers' Auto classes and pipelines know the classes of `lapa`, without importing them yet.

Importing models, processors and pipelines costs about two seconds each, which a program that uses one of them, or only
the command line, should not pay for the others. So models are registered as stand-ins, and the rest when the module of
transformers that would look them up is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig


class _DeferredClass(type):
    """Metaclass of stand-ins: any attribute but the name and module comes from the real class, imported on demand."""

    def __getattribute__(cls, name: str) -> Any:
        if name in ("__name__", "__module__", "__qualname__", "__class__", "__mro__", "__dict__", "__hash__"):
            return super().__getattribute__(name)
        if name == "config_class":  # asked for while registering; answering would import the model
            raise AttributeError(name)
        namespace = type.__getattribute__(cls, "__dict__")
        return getattr(getattr(importlib.import_module(namespace["__module__"]), namespace["_real_name"]), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        namespace = type.__getattribute__(cls, "__dict__")
        return getattr(importlib.import_module(namespace["__module__"]), namespace["_real_name"])(*args, **kwargs)


def _deferred(module: str, name: str) -> type:
    return _DeferredClass(name, (), {"__module__": module, "_real_name": name})


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls an action once, right after the module it waits for has been imported by anyone."""

    def __init__(self, actions: dict[str, Callable[[], None]]):
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.actions:
            return None
        action = self.actions.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_then_act(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = execute_then_act  # type: ignore[method-assign]
        return spec


def _register_processor() -> None:
    from transformers import AutoProcessor

    from lapa.processing.processing_lapa import LapaProcessor

    AutoProcessor.register(LapaConfig, LapaProcessor, exist_ok=True)


def _register_image_processor() -> None:
    from transformers import AutoImageProcessor

    from lapa.processing.image_processing_lapa import LapaImageProcessor

    AutoImageProcessor.register(LapaConfig, image_processor_classes={"pil": LapaImageProcessor}, exist_ok=True)


def _register_tokenizer() -> None:
    from transformers import AutoTokenizer

    from lapa.processing.tokenization_lapa import LapaTokenizer

    AutoTokenizer.register(LapaConfig, LapaTokenizer, exist_ok=True)


def _register_pipeline() -> None:
    from transformers.pipelines import PIPELINE_REGISTRY

    # A stand-in again: whoever imports the pipeline's own module first is still in the middle of importing it.
    pipeline_class = _deferred("lapa.modeling_lapa.pipeline_robot_action", "RobotActionPipeline")
    PIPELINE_REGISTRY.register_pipeline(
        "robot-action", pipeline_class=pipeline_class, pt_model=AutoModelForCausalLM, type="multimodal"
    )


AFTER_IMPORT: dict[str, Callable[[], None]] = {
    "transformers.models.auto.image_processing_auto": _register_image_processor,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
    "transformers.models.auto.processing_auto": _register_processor,
    "transformers.pipelines": _register_pipeline,
}


def register() -> None:
    """Register configs, models, processor and pipeline; calling it again changes nothing."""
    configs = (
        LapaConfig,
        LapaQuantizerConfig,
        LapaVisionTokenizerConfig,
        InverseDynamicsConfig,
        VideoDiffusionConfig,
        LatentActionDecoderConfig,
    )
    for config_class in configs:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    policies = tuple(
        _deferred("lapa.modeling_lapa.modeling_lapa", name)
        for name in ("LapaForLatentAction", "LapaForActionPrediction")
    )
    # A tuple lets the Auto classes choose by the checkpoint's `architectures`.
    for auto_class in (AutoModel, AutoModelForCausalLM):
        auto_class.register(LapaConfig, policies, exist_ok=True)
    quantizer = _deferred("lapa.modeling_lapa.modeling_lapa_quantizer", "LapaQuantizer")
    AutoModel.register(LapaQuantizerConfig, quantizer, exist_ok=True)
    vision_tokenizer = _deferred("lapa.modeling_lapa.modeling_lapa_vision_tokenizer", "LapaVisionTokenizer")
    AutoModel.register(LapaVisionTokenizerConfig, vision_tokenizer, exist_ok=True)
    baselines = "lapa.evaluation.baselines"
    inverse_dynamics = _deferred(f"{baselines}.inverse_dynamics", "InverseDynamicsModel")
    AutoModel.register(InverseDynamicsConfig, inverse_dynamics, exist_ok=True)
    latent_decoder = _deferred(f"{baselines}.latent_decoder", "LatentActionDecoder")
    AutoModel.register(LatentActionDecoderConfig, latent_decoder, exist_ok=True)
    video_model = _deferred(f"{baselines}.video_diffusion", "VideoDiffusionModel")
    AutoModel.register(VideoDiffusionConfig, video_model, exist_ok=True)
    for module, action in AFTER_IMPORT.items():
        if module in sys.modules:
            action()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        pending = {module: action for module, action in AFTER_IMPORT.items() if module not in sys.modules}
        sys.meta_path.insert(0, _AfterImport(pending))
