"""
What a policy plugin meets of lerobot (0.6.2), as small as it goes: the same names in the same modules, the same abstract methods.

lerobot itself does not install beside the torch of these tests; with lerobot on the path the tests take that.
"""

import abc
import enum
import types
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn


class FeatureType(enum.StrEnum):
    STATE, VISUAL, ENV, ACTION = "STATE", "VISUAL", "ENV", "ACTION"


class NormalizationMode(enum.StrEnum):
    MIN_MAX, MEAN_STD, IDENTITY = "MIN_MAX", "MEAN_STD", "IDENTITY"


@dataclass
class PolicyFeature:
    type: FeatureType
    shape: tuple[int, ...]


@dataclass
class AdamWConfig:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    grad_clip_norm: float = 10.0


@dataclass
class PreTrainedConfig(abc.ABC):
    n_obs_steps: int = 1
    input_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    output_features: dict[str, PolicyFeature] | None = field(default_factory=dict)
    device: str | None = None
    known: ClassVar[dict[str, type]] = {}

    @classmethod
    def register_subclass(cls, name: str) -> Any:
        def register(subclass: type) -> type:
            cls.known[name] = subclass
            return subclass

        return register

    def __post_init__(self) -> None:
        self.device = self.device or "cpu"

    @property
    def type(self) -> str:
        return next(name for name, known in self.known.items() if known is type(self))

    @property
    def image_features(self) -> dict[str, PolicyFeature]:
        return {key: value for key, value in (self.input_features or {}).items() if value.type is FeatureType.VISUAL}

    @property
    def action_feature(self) -> PolicyFeature | None:
        return (self.output_features or {}).get("action")

    observation_delta_indices = abc.abstractproperty()
    action_delta_indices = abc.abstractproperty()
    reward_delta_indices = abc.abstractproperty()

    @abc.abstractmethod
    def get_optimizer_preset(self) -> Any: ...

    @abc.abstractmethod
    def get_scheduler_preset(self) -> Any: ...

    @abc.abstractmethod
    def validate_features(self) -> None: ...


class PreTrainedPolicy(nn.Module, abc.ABC):
    config_class: Any = None
    name: Any = None

    def __init__(self, config: PreTrainedConfig, *inputs: Any, **kwargs: Any) -> None:
        super().__init__()
        assert isinstance(config, PreTrainedConfig)
        self.config = config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert cls.config_class and cls.name

    @abc.abstractmethod
    def get_optim_params(self) -> Any: ...

    @abc.abstractmethod
    def reset(self) -> None: ...

    @abc.abstractmethod
    def forward(self, batch: Any) -> Any: ...

    @abc.abstractmethod
    def predict_action_chunk(self, batch: Any, **kwargs: Any) -> Any: ...

    @abc.abstractmethod
    def select_action(self, batch: Any, **kwargs: Any) -> Any: ...


def make_default_pre_post_processors(config: PreTrainedConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """Only the identity needs no statistics."""
    assert set(config.normalization_mapping.values()) == {NormalizationMode.IDENTITY}
    return (lambda batch: batch), (lambda action: action.cpu())


MEMBERS = {
    "lerobot": {},
    "lerobot.configs": {},
    "lerobot.configs.policies": {"PreTrainedConfig": PreTrainedConfig},
    "lerobot.configs.types": {
        "FeatureType": FeatureType, "NormalizationMode": NormalizationMode, "PolicyFeature": PolicyFeature,
    },
    "lerobot.optim": {},
    "lerobot.optim.optimizers": {"AdamWConfig": AdamWConfig},
    "lerobot.policies": {},
    "lerobot.policies.pretrained": {"PreTrainedPolicy": PreTrainedPolicy},
    "lerobot.processor": {},
    "lerobot.processor.factory": {"make_default_pre_post_processors": make_default_pre_post_processors},
    "lerobot.utils": {},
    "lerobot.utils.constants": {"ACTION": "action", "OBS_STATE": "observation.state"},
}  # fmt: skip


def modules() -> dict[str, types.ModuleType]:
    """The modules, for `sys.modules`."""
    made = {}
    for name, members in MEMBERS.items():
        made[name] = types.ModuleType(name)
        vars(made[name]).update(members)
    return made
