"""Finetuned LAPA models as policies of lerobot; installing this package is enough, lerobot finds it by its name."""

try:
    import lerobot  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lerobot_policy_lapa is a plugin of lerobot, which is not installed: pip install lerobot"
    ) from error

from lerobot_policy_lapa.configuration_lapa_adapter import LapaAdapterConfig
from lerobot_policy_lapa.modeling_lapa_adapter import LapaAdapterPolicy
from lerobot_policy_lapa.processor_lapa_adapter import make_lapa_pre_post_processors

__all__ = ["LapaAdapterConfig", "LapaAdapterPolicy", "make_lapa_pre_post_processors"]
