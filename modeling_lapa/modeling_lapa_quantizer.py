"""The latent action quantizer: a VQ-VAE over frame pairs.

Its encoder is an inverse dynamics model (two frames to latent action codes), its decoder a small world model (a frame
and codes to the next frame).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.modeling_lapa.linear_lapa import linear
from lapa.modeling_lapa.modeling_lapa_quantizer_base import LapaQuantizerPreTrainedModel
from lapa.modeling_lapa.modeling_lapa_quantizer_layers import in_dtype_of
from lapa.modeling_lapa.modeling_outputs_lapa_quantizer import LapaQuantizerEncoderOutput, LapaQuantizerOutput
from lapa.modeling_lapa.quantizer_targets_lapa import (
    FrozenFeatures,
    LapaQuantizerActionHead,
    features_per_token,
)
from lapa.modeling_lapa.vector_quantization_lapa import VectorQuantizerOutput

# Parts of a first stage that become the frozen half of a task-centric quantizer: name there, name here.
IRRELEVANT_PARTS = {
    "bottleneck.": "irrelevant_bottleneck.",
    "vector_quantizer.": "irrelevant_quantizer.",
    "latent_projection.": "irrelevant_projection.",
}


class LapaQuantizerEncoder(LapaQuantizerPreTrainedModel):
    """The quantizer's inverse dynamics half alone: frame pairs to latent actions. Loads from a quantizer's folder."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^latent_projection\.",
        r"^irrelevant_projection\.",
        r"^decoder\.",
        r"^to_pixels\.",
        r"^to_features\.",
        r"^instruction\.",
        r"^action_head\.",
    ]

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_encoder_modules()
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> LapaQuantizerEncoderOutput:
        """Encode frame pairs.

        Args:
            pixel_values: (batch, 2, channels, height, width) float in [0, 1], first and second frame.
        """
        self._check_frames(pixel_values, ("batch", "2"), "pixel_values")
        tokens = self.patch_embedding(self.align(pixel_values).flatten(0, 1)).unflatten(0, (-1, 2))
        embeddings, irrelevant = self._embed_latent_actions(tokens, self.position_bias(self.config.grid))
        codes = irrelevant_codes = None
        if self.config.has_codes:
            codes = self.vector_quantizer(embeddings.flatten(0, 1)).codes.reshape(embeddings.shape[:2])
        else:
            # What the decoder is given: the mean of the bottleneck.
            embeddings = self.vector_quantizer.mean(embeddings)
        if irrelevant is not None:
            irrelevant_codes = self._quantize_irrelevant(irrelevant, None).codes.reshape(irrelevant.shape[:2])
        return LapaQuantizerEncoderOutput(codes, embeddings, irrelevant_codes)


class LapaQuantizerDecoder(LapaQuantizerPreTrainedModel):
    """The quantizer's world-model half alone: a frame and codes to the next frame. Loads from a quantizer's folder."""

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^spatial_encoder\.",
        r"^temporal_encoder\.",
        r"^bottleneck\.",
        r"^irrelevant_bottleneck\.",
        r"^(vector|irrelevant)_quantizer\.projection_in\.",
        r"^to_features\.",
        r"^action_head\.",
    ]

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_decoder_modules()
        self.post_init()

    def forward(
        self,
        first_frame: torch.Tensor,
        codes: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        irrelevant_codes: torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict the next frame.

        Args:
            first_frame: (batch, channels, height, width) float in [0, 1].
            codes: (batch, num_latent_tokens) int64 in [0, codebook_size).
            embeddings: (batch, num_latent_tokens, codebook_dim) float, in the place of codes and exclusive with them: what
                `quantizer="continuous"` decodes.
            irrelevant_codes: (batch, num_latent_tokens) int64 of the first stage of a task-centric quantizer; the mean
                entry of its codebook when None.
            instruction_ids: (batch, num_words) int64, for `instruction_vocab_size`; no instruction when None.

        Returns:
            (batch, channels, height, width) float, not clipped.

        Raises:
            ValueError: Codes for a model without, both or neither of codes and embeddings, other shapes.
        """
        self._check_frames(first_frame, ("batch",), "first_frame")
        quantized = self._quantized(codes, embeddings, len(first_frame))
        irrelevant = None
        if self.config.task_centric:
            irrelevant = self._irrelevant(irrelevant_codes, quantized)
        tokens = self._decode_tokens(
            self.patch_embedding(first_frame), quantized, self.position_bias(self.config.grid), irrelevant,
            instruction_ids,
        )  # fmt: skip
        return self._draw(tokens, first_frame)

    def _quantized(self, codes: torch.Tensor | None, embeddings: torch.Tensor | None, batch: int) -> torch.Tensor:
        if (codes is None) == (embeddings is None):
            raise ValueError("exactly one of `codes` and `embeddings` must be given.")
        if codes is None:
            expected = (batch, self.config.num_latent_tokens, self.config.codebook_dim)
            if tuple(embeddings.shape) != expected:
                raise ValueError(f"`embeddings` must have shape {expected}, got {tuple(embeddings.shape)}.")
            return embeddings.to(self.latent_projection.weight.dtype)
        if not self.config.has_codes:
            raise ValueError('`codes` mean nothing to a quantizer with `quantizer="continuous"`: give `embeddings`.')
        self._check_codes(codes, batch)
        return self.vector_quantizer.lookup(codes)

    def _irrelevant(self, codes: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        if codes is not None:
            self._check_codes(codes, len(like), "irrelevant_codes")
            return self.irrelevant_quantizer.lookup(codes)
        every = torch.arange(self.config.codebook_size, device=like.device)
        return self.irrelevant_quantizer.lookup(every).mean(0).expand_as(like)

    def _check_codes(self, codes: torch.Tensor, batch: int, name: str = "codes") -> None:
        expected = (batch, self.config.num_latent_tokens)
        if not torch.is_tensor(codes) or codes.is_floating_point() or tuple(codes.shape) != expected:
            got = f"{codes.dtype} of shape {tuple(codes.shape)}" if torch.is_tensor(codes) else type(codes).__name__
            raise ValueError(f"`{name}` must be an integer tensor of shape {expected}, got {got}.")
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.config.codebook_size):
            raise ValueError(
                f"`{name}` must lie in [0, {self.config.codebook_size - 1}] (`codebook_size` "
                f"{self.config.codebook_size}), got values from {codes.min().item()} to {codes.max().item()}."
            )


class LapaQuantizer(LapaQuantizerPreTrainedModel):
    """The latent action quantizer of stage 1.

    ```python
    >>> from lapa import LapaQuantizer, LapaQuantizerConfig

    >>> config = LapaQuantizerConfig(hidden_size=32, image_size=64, patch_size=8, num_spatial_layers=1)
    >>> quantizer = LapaQuantizer(config)
    >>> codes = quantizer.encode(torch.rand(2, 2, 3, 64, 64)).latent_action_codes
    >>> codes.shape
    torch.Size([2, 4])
    ```
    """

    def __init__(self, config: LapaQuantizerConfig):
        super().__init__(config)
        self._add_shared_modules()
        self._add_encoder_modules()
        self._add_decoder_modules()
        if config.feature_backbone is not None:
            self.to_features = nn.Linear(config.hidden_size, config.features_per_patch**2 * config.feature_dim)
        if config.action_dim is not None:
            self.action_head = LapaQuantizerActionHead(config)
        self._frozen_features = FrozenFeatures(config)
        self.post_init()

    @classmethod
    def from_first_stage(cls, folder: str, **kwargs: Any) -> "LapaQuantizer":
        """
        A task-centric quantizer (second stage) on top of a trained first stage.

        What the first stage's codes hold goes on being told to the decoder, by a codebook that is frozen; a fresh
        bottleneck and codebook of the same sizes learn what is left. The instruction is no longer told.

        Args:
            folder: Folder or name of the first stage, trained with `instruction_vocab_size`.
            kwargs: Further arguments of `from_pretrained`.

        Raises:
            ValueError: A quantizer that was not told instructions, or is a second stage itself.
        """
        first = LapaQuantizerConfig.from_pretrained(folder)
        if first.instruction_vocab_size is None or first.task_centric:
            raise ValueError(
                f"{folder} is no first stage: it must have been trained with `instruction_vocab_size` and without "
                f"`task_centric`, got {first.instruction_vocab_size} and {first.task_centric}."
            )
        fields = first.to_dict() | {"instruction_vocab_size": None, "task_centric": True}
        trained = cls.from_pretrained(folder, **kwargs)
        model = cls(LapaQuantizerConfig.from_dict(fields)).to(trained.dtype)
        fresh = model.state_dict()
        state = {}
        for name, value in trained.state_dict().items():
            prefix = next((old for old in IRRELEVANT_PARTS if name.startswith(old)), "")
            state[IRRELEVANT_PARTS.get(prefix, "") + name.removeprefix(prefix)] = value
        model.load_state_dict({name: state.get(name, value) for name, value in fresh.items()})
        return model

    def forward(
        self,
        pixel_values: torch.Tensor,
        noise: torch.Tensor | None = None,
        actions: torch.Tensor | None = None,
        instruction_ids: torch.Tensor | None = None,
    ) -> LapaQuantizerOutput:
        """Encode frame pairs, quantise, and predict the second frame from the first.

        Args:
            pixel_values: (batch, 2, channels, height, width) float in [0, 1].
            noise: (batch * num_noise_tokens, codebook_dim) standard normal for NSVQ and the continuous bottleneck, the
                rows of a pair together. When None it is drawn in training, and in evaluation the decoder receives the
                hard codes (the means).
            actions: (batch, action_dim) float in physical units, NaN where a pair has none; for `action_dim`.
            instruction_ids: (batch, num_words) int64, 0 on pads; for `instruction_vocab_size`, required in training.
        """
        self._check_frames(pixel_values, ("batch", "2"), "pixel_values")
        self._check_conditions(actions, instruction_ids, len(pixel_values))
        pixel_values = self.align(pixel_values)
        position_bias = self.position_bias(self.config.grid)
        tokens = self.patch_embedding(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
        embeddings, irrelevant = self._embed_latent_actions(tokens, position_bias)
        noise, irrelevant_noise = self._split_noise(noise, embeddings)
        bottleneck: VectorQuantizerOutput = self.vector_quantizer(embeddings.flatten(0, 1), noise)
        told = None if irrelevant is None else self._quantize_irrelevant(irrelevant, irrelevant_noise)
        first_tokens = tokens[:, 0].detach() if self.config.stop_gradient_first_frame else tokens[:, 0]
        decoded = self._decode_tokens(
            first_tokens,
            bottleneck.quantized.reshape(embeddings.shape),
            position_bias,
            None if told is None else told.quantized.reshape(embeddings.shape),
            instruction_ids,
        )
        if not self.config.has_codes:
            embeddings = self.vector_quantizer.mean(embeddings)
        losses = self._losses(decoded, embeddings, pixel_values, actions)
        return LapaQuantizerOutput(
            loss=bottleneck.loss + self._weighted(losses),
            latent_action_codes=None if bottleneck.codes is None else bottleneck.codes.reshape(embeddings.shape[:2]),
            latent_action_embeddings=embeddings,
            perplexity=bottleneck.perplexity,
            kl=bottleneck.kl,
            irrelevant_codes=None if told is None else told.codes.reshape(embeddings.shape[:2]),
            **losses,
        )

    def _losses(
        self,
        decoded: torch.Tensor,
        embeddings: torch.Tensor,
        pixel_values: torch.Tensor,
        actions: torch.Tensor | None,
    ) -> dict[str, torch.Tensor | None]:
        """The reconstruction and the errors by their names in the output."""
        config = self.config
        first_frame, second_frame = pixel_values.unbind(1)
        reconstruction = self._draw(decoded if config.pixel_loss_weight else decoded.detach(), first_frame)
        feature_loss = action_loss = None
        if config.feature_backbone is not None:
            target = features_per_token(self._frozen_features(second_frame), config.features_per_patch)
            predicted = linear(self.to_features, in_dtype_of(self.to_features, decoded))
            feature_loss = F.mse_loss(predicted.float(), target)
        if config.action_dim is not None and actions is not None:
            action_loss = self.action_head.loss(embeddings, actions)
        return {
            "reconstruction": reconstruction,
            "reconstruction_loss": F.mse_loss(reconstruction, second_frame),
            "feature_loss": feature_loss,
            "action_loss": action_loss,
        }

    def _weighted(self, losses: dict[str, torch.Tensor | None]) -> torch.Tensor:
        config = self.config
        reconstruction_loss = losses["reconstruction_loss"]
        assert reconstruction_loss is not None
        # A weight of 0 leaves the error to the layer that draws, which alone sees it.
        total = (config.pixel_loss_weight or 1.0) * reconstruction_loss
        for name, weight in (("feature_loss", config.feature_loss_weight), ("action_loss", config.action_loss_weight)):
            if (loss := losses[name]) is not None:
                total = total + weight * loss
        return total

    encode = LapaQuantizerEncoder.forward
    decode = LapaQuantizerDecoder.forward
    _check_codes = LapaQuantizerDecoder._check_codes

    _quantized = LapaQuantizerDecoder._quantized
    _irrelevant = LapaQuantizerDecoder._irrelevant

    def _split_noise(
        self, noise: torch.Tensor | None, embeddings: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Noise of the codes and, in a task-centric quantizer, of the first stage's."""
        batch, num_tokens, width = embeddings.shape
        expected = (batch * self.config.num_noise_tokens, width)
        if noise is None:
            return None, None
        if tuple(noise.shape) != expected:
            raise ValueError(
                f"`noise` must have shape (batch * num_noise_tokens, codebook_dim) = {expected}, "
                f"got {tuple(noise.shape)}."
            )
        if not self.config.task_centric:
            return noise, None
        rows = noise.unflatten(0, (batch, -1))
        return rows[:, :num_tokens].flatten(0, 1), rows[:, num_tokens:].flatten(0, 1)

    def _check_conditions(
        self, actions: torch.Tensor | None, instruction_ids: torch.Tensor | None, batch: int
    ) -> None:
        config = self.config
        if actions is not None and (config.action_dim is None or tuple(actions.shape) != (batch, config.action_dim)):
            raise ValueError(
                f"`actions` must have shape (batch, action_dim) = ({batch}, {config.action_dim}), got "
                f"{tuple(actions.shape)}."
            )
        if instruction_ids is not None and config.instruction_vocab_size is None:
            raise ValueError("`instruction_ids` are given, but the model has no `instruction_vocab_size`.")
        if self.training and instruction_ids is None and config.instruction_vocab_size is not None:
            raise ValueError("`instruction_ids` must be given to train a model with `instruction_vocab_size`.")


__all__ = [
    "LapaQuantizer",
    "LapaQuantizerDecoder",
    "LapaQuantizerEncoder",
    "LapaQuantizerEncoderOutput",
    "LapaQuantizerOutput",
    "LapaQuantizerPreTrainedModel",
]
