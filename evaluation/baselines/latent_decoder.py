"""Which action a latent action stands for."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from lapa.evaluation.baselines.action_statistics import (
    PredictedActions,
    fill_action_statistics,
    predicted_actions,
    register_action_statistics,
)
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig


class LatentActionDecoder(PreTrainedModel):
    r"""
    An MLP from latent action codes to the action of the first step that they span, as in LAPO (Schmidt and Jiang 2024,
    https://arxiv.org/abs/2312.10812).

    ```python
    >>> decoder = LatentActionDecoder(LatentActionDecoderConfig(codebook_size=16, num_latent_tokens=1, action_dim=2))
    >>> decoder.predict_actions(torch.tensor([[3], [15]])).shape
    torch.Size([2, 2])
    ```

    It learns from few labelled steps, because there is little to learn: the codes already hold what moves, and where.
    """

    config_class = LatentActionDecoderConfig
    base_model_prefix = "latent_decoder"
    main_input_name = "latent_action_codes"

    def __init__(self, config: LatentActionDecoderConfig):
        super().__init__(config)
        # A row per place and code: the same code means something else at another place.
        self.embeddings = nn.Embedding(config.num_latent_tokens * config.codebook_size, config.embedding_size)
        self.mlp = nn.Sequential(
            nn.Linear(config.num_latent_tokens * config.embedding_size, config.mlp_hidden_size),
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
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)

    def forward(self, latent_action_codes: torch.Tensor, actions: torch.Tensor | None = None) -> PredictedActions:
        """
        Actions of latent actions, with the loss that trains the model.

        Args:
            latent_action_codes (`torch.Tensor` of shape `(batch, num_latent_tokens)`, integer): In [0, codebook_size).
            actions (`torch.Tensor` of shape `(batch, action_dim)`, *optional*): The true ones, physical units.

        Returns:
            [`PredictedActions`]

        Raises:
            ValueError: Codes or actions of another shape, codes that are no integers or leave the codebook.
        """
        self._check_inputs(latent_action_codes, actions)
        places = torch.arange(self.config.num_latent_tokens, device=latent_action_codes.device)
        embedded = self.embeddings(latent_action_codes.long() + places * self.config.codebook_size)
        normalised = self.mlp(embedded.flatten(1)).float()
        return predicted_actions(self, normalised, actions)

    @torch.no_grad()
    def predict_actions(self, latent_action_codes: torch.Tensor) -> torch.Tensor:
        """
        Actions of latent actions.

        Args:
            latent_action_codes (`torch.Tensor` of shape `(batch, num_latent_tokens)`, integer): In [0, codebook_size).

        Returns:
            `torch.Tensor` of shape `(batch, action_dim)`: Physical units.
        """
        return self(latent_action_codes).actions

    def _check_inputs(self, codes: torch.Tensor, actions: torch.Tensor | None) -> None:
        config = self.config
        if codes.ndim != 2 or codes.shape[1] != config.num_latent_tokens or codes.is_floating_point():
            raise ValueError(
                f"`latent_action_codes` must be integers of shape (batch, {config.num_latent_tokens}), "
                f"got {tuple(codes.shape)} {codes.dtype}."
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < config.codebook_size:
            raise ValueError(
                f"`latent_action_codes` must lie in [0, {config.codebook_size}), "
                f"got {int(codes.min())} to {int(codes.max())}."
            )
        if actions is not None and tuple(actions.shape) != (len(codes), config.action_dim):
            raise ValueError(
                f"`actions` must have shape ({len(codes)}, {config.action_dim}), got {tuple(actions.shape)}."
            )


__all__ = ["LatentActionDecoder"]
