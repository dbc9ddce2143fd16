"""Configuration of the latent action decoder."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from lapa.evaluation.baselines.configuration_inverse_dynamics import check_action_statistics


@strict
class LatentActionDecoderConfig(PreTrainedConfig):
    r"""
    Sizes and action statistics of [`LatentActionDecoder`]. The defaults fit the released codes (4 of 8) and a 7-dimensional action.

    Args:
        codebook_size (`int`, defaults to 8): Values of a code.
        num_latent_tokens (`int`, defaults to 4): Codes per latent action.
        embedding_size (`int`, defaults to 16): Width of a code's embedding; each place of a latent action has its own.
        mlp_hidden_size (`int`, defaults to 128): Width of the hidden layer.
        action_dim (`int`, defaults to 7): Dimensions of an action.
        action_mean (`list[float]`, *optional*): (action_dim,) means of the training actions, physical units; zeros when
            None.
        action_std (`list[float]`, *optional*): (action_dim,) standard deviations, physical units; ones when None.
        quantizer_hash (`str`, *optional*): SHA-256 of the weights of the quantizer whose codes these are.
        quantizer_name (`str`, *optional*): Its name.
    """

    model_type = "lapa_latent_action_decoder"

    codebook_size: int = 8
    num_latent_tokens: int = 4
    embedding_size: int = 16
    mlp_hidden_size: int = 128
    action_dim: int = 7
    action_mean: list[float] | tuple[float, ...] | None = None
    action_std: list[float] | tuple[float, ...] | None = None
    quantizer_hash: str | None = None
    quantizer_name: str | None = None

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name in ("codebook_size", "num_latent_tokens", "embedding_size", "mlp_hidden_size", "action_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        check_action_statistics(self)


__all__ = ["LatentActionDecoderConfig"]
