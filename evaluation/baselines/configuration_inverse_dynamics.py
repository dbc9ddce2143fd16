"""Configuration of the inverse dynamics model."""

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


def check_action_statistics(config: Any) -> None:
    """
    Refuses statistics that do not fit `config.action_dim`.

    Raises:
        ValueError: Another number of values, values that are not finite, deviations that are not positive.
    """
    for name in ("action_mean", "action_std"):
        values = getattr(config, name)
        if values is not None and (len(values) != config.action_dim or not all(map(math.isfinite, values))):
            raise ValueError(f"`{name}` must be {config.action_dim} finite numbers (`action_dim`), got {values}.")
    if config.action_std is not None and min(config.action_std) <= 0:
        raise ValueError(f"`action_std` must be positive, got {config.action_std}.")


@strict
class InverseDynamicsConfig(PreTrainedConfig):
    r"""
    Sizes and action statistics of [`InverseDynamicsModel`]. The defaults are a ResNet-18 over 256-pixel frames.

    Args:
        image_size (`int`, defaults to 256): Height and width of both frames in pixels.
        num_channels (`int`, defaults to 3): Colour channels of a frame.
        frame_gap (`int`, defaults to 1): Frames from the first to the second. The action is the one of the first frame's
            step; for gaps above 1, the mean over the steps between.
        action_dim (`int`, defaults to 7): Dimensions of an action.
        embedding_size (`int`, defaults to 64): Channels of the stem.
        hidden_sizes (`list[int]`, defaults to `[64, 128, 256, 512]`): Channels of each stage.
        depths (`list[int]`, defaults to `[2, 2, 2, 2]`): Blocks of each stage; between two stages the resolution halves.
        stem_pooling (`bool`, defaults to `True`): Whether the stem ends in ResNet's max pooling. Small frames do without:
            a robot that moves by a pixel is lost in it.
        mlp_hidden_size (`int`, defaults to 256): Width of the hidden layer after the trunk.
        action_mean (`list[float]`, *optional*): (action_dim,) means of the training actions, physical units; zeros when
            None.
        action_std (`list[float]`, *optional*): (action_dim,) standard deviations, physical units; ones when None.
    """

    model_type = "lapa_inverse_dynamics"

    image_size: int = 256
    num_channels: int = 3
    frame_gap: int = 1
    action_dim: int = 7
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    stem_pooling: bool = True
    mlp_hidden_size: int = 256
    action_mean: list[float] | tuple[float, ...] | None = None
    action_std: list[float] | tuple[float, ...] | None = None

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name in ("image_size", "num_channels", "frame_gap", "action_dim", "embedding_size", "mlp_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("hidden_sizes", "depths"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"`{name}` must be positive numbers, got {getattr(self, name)}.")
        if len(self.hidden_sizes) != len(self.depths):
            raise ValueError(
                f"`hidden_sizes` and `depths` must name the same stages, got {len(self.hidden_sizes)} and "
                f"{len(self.depths)}."
            )
        check_action_statistics(self)


__all__ = ["InverseDynamicsConfig", "check_action_statistics"]
