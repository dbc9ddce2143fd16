"""VPT's inverse dynamics model: which action leads from one frame to the next."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetModel
from transformers import initialization as init

from lapa.evaluation.baselines.action_statistics import (
    PredictedActions,
    fill_action_statistics,
    predicted_actions,
    register_action_statistics,
)
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig


class InverseDynamicsModel(PreTrainedModel):
    r"""
    A ResNet over two frames that are stacked on their channels, then an MLP to the action between them.

    ```python
    >>> model = InverseDynamicsModel(InverseDynamicsConfig(image_size=64, action_dim=2))
    >>> model.predict_actions(torch.rand(5, 2, 3, 64, 64)).shape
    torch.Size([5, 2])
    ```

    The first convolution sees both frames at every place, so that motion is found where it is small. Actions are normalised
    by the statistics of the training data, which the config keeps.
    """

    config_class = InverseDynamicsConfig
    base_model_prefix = "inverse_dynamics"
    main_input_name = "pixel_values"
    input_modalities = "video"

    def __init__(self, config: InverseDynamicsConfig):
        super().__init__(config)
        self.resnet = ResNetModel(
            ResNetConfig(
                num_channels=2 * config.num_channels,
                embedding_size=config.embedding_size,
                hidden_sizes=list(config.hidden_sizes),
                depths=list(config.depths),
                layer_type="basic",
            )
        )
        if not config.stem_pooling:
            embedder: Any = self.resnet.embedder
            embedder.pooler = nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(config.hidden_sizes[-1], config.mlp_hidden_size),
            nn.ReLU(),
            nn.Linear(config.mlp_hidden_size, config.action_dim),
        )
        register_action_statistics(self, config.action_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            fill_action_statistics(self)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)

    def forward(self, pixel_values: torch.Tensor, actions: torch.Tensor | None = None) -> PredictedActions:
        """
        Actions of frame pairs, with the loss that trains the model.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 2, channels, height, width)`, floating): In [0, 1].
            actions (`torch.Tensor` of shape `(batch, action_dim)`, *optional*): The true ones, physical units.

        Returns:
            [`PredictedActions`]

        Raises:
            ValueError: Frames or actions of another shape, or frames that are not floating.
        """
        self._check_inputs(pixel_values, actions)
        # b t c h w -> b (t c) h w; centred, because the first layer is followed by a normalisation without a bias
        frames = pixel_values.to(self.dtype).flatten(1, 2) * 2 - 1
        normalised = self.mlp(self.resnet(frames).pooler_output.flatten(1)).float()
        return predicted_actions(self, normalised, actions)

    @torch.no_grad()
    def predict_actions(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Actions of frame pairs, each the same whatever stands beside it in the batch.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 2, channels, height, width)`, floating): In [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch, action_dim)`: Physical units.
        """
        was_training = self.training
        # In training mode the ResNet would normalise by the statistics of the batch, and change its own.
        self.eval()
        try:
            return self(pixel_values).actions
        finally:
            self.train(was_training)

    def _check_inputs(self, pixel_values: torch.Tensor, actions: torch.Tensor | None) -> None:
        config = self.config
        expected = (2, config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"`pixel_values` must have shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(pixel_values.shape)}."
            )
        if not pixel_values.is_floating_point():
            raise ValueError(f"`pixel_values` must be floating, scaled to [0, 1], got {pixel_values.dtype}.")
        if actions is not None and tuple(actions.shape) != (len(pixel_values), config.action_dim):
            raise ValueError(
                f"`actions` must have shape ({len(pixel_values)}, {config.action_dim}), got {tuple(actions.shape)}."
            )


__all__ = ["InverseDynamicsModel"]
