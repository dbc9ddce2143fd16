"""What lerobot does before and after the policy: a batch dimension and the device; the model's own processor does the rest."""

from typing import Any

from lerobot.processor.factory import make_default_pre_post_processors

from lerobot_policy_lapa.configuration_lapa_adapter import LapaAdapterConfig


def make_lapa_pre_post_processors(config: LapaAdapterConfig, dataset_stats: Any = None) -> tuple[Any, Any]:
    """
    Pipelines of lerobot for a LAPA model.

    Args:
        config: Its `normalization_mapping` is the identity.
        dataset_stats: Not used by the identity.

    Returns:
        What runs before the policy, and what runs after it.
    """
    return make_default_pre_post_processors(config, dataset_stats)
