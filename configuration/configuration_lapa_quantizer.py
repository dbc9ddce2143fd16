"""Configuration of the latent action quantizer."""

import math

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# Pixels; in a smaller frame `align_frames` finds no shift.
MIN_ALIGNED_SIDE = 16
# Kernel, stride and padding of the convolutions that turn the patch grid into latent tokens in the published code,
# by number of latent tokens. A ReLU stands between two convolutions.
PUBLISHED_CNN_BOTTLENECKS: dict[int, tuple[tuple[tuple[int, int], int, int], ...]] = {
    1: (((3, 3), 2, 1), ((4, 4), 1, 0)),
    2: (((3, 3), 2, 1), ((3, 4), 1, 0)),
    4: (((3, 3), 2, 1), ((3, 3), 1, 0)),
    16: (((3, 3), 2, 1), ((3, 3), 2, 1)),
    64: (((3, 3), 2, 1),),
    256: (((3, 3), 2, 1),),
}


def cnn_bottleneck_grid(num_latent_tokens: int, grid: tuple[int, int]) -> tuple[int, int] | None:
    """Size of the latent grid that the published convolutions make of a patch grid; None where they do not fit."""
    height, width = grid
    for (kernel_h, kernel_w), stride, padding in PUBLISHED_CNN_BOTTLENECKS.get(num_latent_tokens, ()):
        height = (height + 2 * padding - kernel_h) // stride + 1
        width = (width + 2 * padding - kernel_w) // stride + 1
    if num_latent_tokens not in PUBLISHED_CNN_BOTTLENECKS or height < 1 or width < 1:
        return None
    return (height, width) if height * width == num_latent_tokens else None


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@strict
class LapaQuantizerConfig(PreTrainedConfig):
    r"""
    Sizes and switches of [`LapaQuantizer`]. The defaults are the released `laq_openx.pt` (343.8M parameters).

    Args:
        hidden_size (`int`, defaults to 1024): Width of the encoder and of the decoder.
        codebook_dim (`int`, defaults to 32): Width of a latent action embedding and of a codebook entry.
        codebook_size (`int`, defaults to 8): Number of codes.
        num_latent_tokens (`int`, defaults to 4): Codes per frame pair.
        image_size, patch_size (`int` or `[height, width]`, default to 256 and 32): In pixels; patches must divide
            the image.
        num_channels (`int`, defaults to 3): Colour channels of a frame.
        align_frames (`bool`, defaults to `False`): Whether the second frame is moved back onto the first by the shift that most
            of the picture made, before anything looks at it (see [`~lapa.modeling_lapa.frame_alignment_lapa.align_frames`]).
            For video of a hand-held camera, whose motion the codes would tell in the place of the hand's. Frames of at least
            16 pixels a side.
        num_spatial_layers (`int`, defaults to 8): Layers of the spatial encoder, and of the decoder.
        num_temporal_layers (`int`, defaults to 8): Layers of the temporal encoder.
        num_attention_heads, head_dim (`int`, default to 16 and 64): Attention sizes.
        num_null_key_values (`int`, defaults to 2): Learned key/value pairs that cross attention always sees.
        bottleneck (`str`, defaults to `"cnn"`): `"cnn"`, the published convolutions, which fit a few pairs of patch
            grid and `num_latent_tokens` only, or `"query"`, learned queries that attend to the patch tokens and serve
            any number of latent tokens.
        bottleneck_activation (`str`, defaults to `"leaky_relu"`): Between the convolutions of `bottleneck="cnn"`:
            `"leaky_relu"` (slope 0.1), or `"relu"` as published, which the converter writes. The few channels of a small
            bottleneck can all die behind a ReLU, and every pair then has the same embedding for good.
        quantizer (`str`, defaults to `"nsvq"`): `"nsvq"` (noise substitution, published), `"vq"` (straight-through
            with codebook and commitment loss), `"fsq"` (finite scalar quantisation, no codebook to collapse) or
            `"continuous"` (a variational bottleneck: embeddings, no codes).
        fsq_levels (`list[int]`, *optional*): Levels per FSQ dimension; their product must be `codebook_size`.
            Required by, and only allowed with, `quantizer="fsq"`.
        commitment_weight (`float`, defaults to 0.25): Weight of the commitment loss of `quantizer="vq"`.
        action_injection (`str`, defaults to `"cross_attention"`): How the decoder receives the latent action:
            `"cross_attention"` (published) or `"additive"` (added to every patch embedding, as in Genie).
        stop_gradient_first_frame (`bool`, defaults to `True`): Whether the decoder's view of the first frame is
            detached in training (published).
        residual_decoding (`bool`, defaults to `False`): Whether the decoder predicts the change of the first frame
            instead of the whole next frame.
        interleave_latent_tokens (`bool`, defaults to `True`): Whether the quantised tokens are reinterpreted as
            (codebook_dim, tokens) before the decoder, as the published code does. With more than one latent token
            this mixes channels of different tokens; the released weights need it.
        codebook_init_std (`float`, defaults to 1.0): Standard deviation of a fresh codebook (published: 1).
        entropy_weight (`float`, defaults to 0): Weight of a loss that makes each embedding sure of its code and all codes
            equally frequent in a batch; `"nsvq"` and `"vq"` only.
        entropy_temperature (`float`, defaults to 0.1): Of the soft assignment in that loss, as a share of the mean squared
            distance between embeddings and codes.
        kl_weight (`float`, defaults to 1e-5): Weight of the divergence from a standard normal of
            `quantizer="continuous"`.
        pixel_loss_weight (`float`, defaults to 1.0): Weight of the squared error in pixels. At 0 the pixels are still
            decoded, to be looked at, but teach only the layer that draws them.
        feature_loss_weight (`float`, defaults to 0): Weight of the squared error in the patch features of
            `feature_backbone`.
        feature_backbone (`str`, *optional*): Name or folder of a vision model (`AutoModel`) whose features of the second
            frame are a target. It is frozen, loaded when a loss is first computed, and not saved with the quantizer.
        feature_dim (`int`, *optional*): Width of its features; required by `feature_backbone`.
        features_per_patch (`int`, defaults to 1): Features along each side of a patch of the quantizer.
        feature_image_mean, feature_image_std (`list[float]`, default to ImageNet's): What the backbone's frames are
            normalised by.
        instruction_vocab_size (`int`, *optional*): Rows of a table of hashed words. With it the decoder is told the
            instruction, so that the codes hold what the instruction does not say (the first of two stages, as in UniVLA).
        task_centric (`bool`, defaults to `False`): The second of the two stages: a frozen codebook of the first holds what
            is irrelevant to the task, a second one, which gives the latent actions, what is left.
        action_dim (`int`, *optional*): Width of true actions, which a linear head then reads off the embeddings, for the
            pairs that have any (as in LAOM).
        action_loss_weight (`float`, defaults to 0.1): Weight of that head's squared error, in standardised units.
        action_mean, action_std (`list[float]`, *optional*): What true actions are standardised by; 0 and 1 when None.
    """

    model_type = "lapa_quantizer"

    hidden_size: int = 1024
    codebook_dim: int = 32
    codebook_size: int = 8
    num_latent_tokens: int = 4
    image_size: int | list[int] | tuple[int, ...] = 256
    patch_size: int | list[int] | tuple[int, ...] = 32
    num_channels: int = 3
    align_frames: bool = False
    num_spatial_layers: int = 8
    num_temporal_layers: int = 8
    num_attention_heads: int = 16
    head_dim: int = 64
    num_null_key_values: int = 2
    bottleneck: str = "cnn"
    bottleneck_activation: str = "leaky_relu"
    quantizer: str = "nsvq"
    fsq_levels: list[int] | tuple[int, ...] | None = None
    commitment_weight: float = 0.25
    action_injection: str = "cross_attention"
    stop_gradient_first_frame: bool = True
    residual_decoding: bool = False
    interleave_latent_tokens: bool = True
    codebook_init_std: float = 1.0
    entropy_weight: float = 0.0
    entropy_temperature: float = 0.1
    kl_weight: float = 1e-5
    pixel_loss_weight: float = 1.0
    feature_loss_weight: float = 0.0
    feature_backbone: str | None = None
    feature_dim: int | None = None
    features_per_patch: int = 1
    feature_image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    feature_image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    instruction_vocab_size: int | None = None
    task_centric: bool = False
    action_dim: int | None = None
    action_loss_weight: float = 0.1
    action_mean: list[float] | tuple[float, ...] | None = None
    action_std: list[float] | tuple[float, ...] | None = None

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Frame size in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """Patch size in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def has_codes(self) -> bool:
        """Whether latent actions are codes; a continuous quantizer has embeddings only."""
        return self.quantizer != "continuous"

    @property
    def num_noise_tokens(self) -> int:
        """Rows of noise that a frame pair takes in training."""
        return self.num_latent_tokens * (2 if self.task_centric else 1)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: sizes that cannot work together."""
        for name in ("hidden_size", "codebook_dim", "codebook_size", "num_latent_tokens", "num_channels",
                     "num_spatial_layers", "num_temporal_layers", "num_attention_heads", "head_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name, options in (
            ("bottleneck", ("cnn", "query")),
            ("bottleneck_activation", ("leaky_relu", "relu")),
            ("quantizer", ("nsvq", "vq", "fsq", "continuous")),
            ("action_injection", ("cross_attention", "additive")),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"`{name}` must be one of {', '.join(options)}, got {getattr(self, name)!r}.")
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != 2:
                raise ValueError(f"`{name}` must be one number or [height, width], got {value}.")
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        if min(height, width, patch_height, patch_width) < 1 or height % patch_height or width % patch_width:
            raise ValueError(
                f"`image_size` ({self.image_size}) is not a multiple of `patch_size` ({self.patch_size})."
            )
        if self.align_frames and min(height, width) < MIN_ALIGNED_SIDE:
            raise ValueError(
                f"`align_frames` needs frames of at least {MIN_ALIGNED_SIDE} pixels a side, got `image_size` {self.image_size}."
            )
        self._validate_bottleneck()
        self._validate_quantizer()
        self._validate_losses()
        self._validate_features()
        self._validate_actions()

    def _validate_bottleneck(self) -> None:
        if self.bottleneck == "cnn" and cnn_bottleneck_grid(self.num_latent_tokens, self.grid) is None:
            fitting = [n for n in PUBLISHED_CNN_BOTTLENECKS if cnn_bottleneck_grid(n, self.grid) is not None]
            raise ValueError(
                f'`bottleneck="cnn"` cannot make `num_latent_tokens` ({self.num_latent_tokens}) out of the patch grid '
                f"{self.grid[0]}x{self.grid[1]}: on this grid it makes {fitting or 'none'}. "
                'Use `bottleneck="query"` for any other number.'
            )

    def _validate_quantizer(self) -> None:
        if (self.quantizer == "fsq") != (self.fsq_levels is not None):
            raise ValueError(
                f'`fsq_levels` ({self.fsq_levels}) must be given with `quantizer="fsq"` and only then; '
                f"`quantizer` is {self.quantizer!r}."
            )
        if self.fsq_levels is not None:
            if min(self.fsq_levels) < 2:
                raise ValueError(f"`fsq_levels` must be at least 2 each, got {self.fsq_levels}.")
            if math.prod(self.fsq_levels) != self.codebook_size:
                raise ValueError(
                    f"`fsq_levels` ({self.fsq_levels}) multiply to {math.prod(self.fsq_levels)}, which is not "
                    f"`codebook_size` ({self.codebook_size})."
                )
        if self.entropy_weight and self.quantizer not in ("nsvq", "vq"):
            raise ValueError(
                f"`entropy_weight` ({self.entropy_weight:g}) needs a codebook: `quantizer` nsvq or vq, got "
                f"{self.quantizer!r}."
            )
        if self.task_centric and not self.has_codes:
            raise ValueError('`task_centric` needs codes: `quantizer` nsvq, vq or fsq, got "continuous".')
        if self.task_centric and self.instruction_vocab_size is not None:
            raise ValueError(
                f"`task_centric` and `instruction_vocab_size` ({self.instruction_vocab_size}) exclude each other: the "
                "second stage learns what the instruction told the first."
            )

    def _validate_losses(self) -> None:
        for name in ("entropy_weight", "kl_weight", "pixel_loss_weight", "feature_loss_weight", "action_loss_weight",
                     "commitment_weight"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
        if self.entropy_temperature <= 0:
            raise ValueError(f"`entropy_temperature` must be above 0, got {self.entropy_temperature}.")
        if not self.pixel_loss_weight + self.feature_loss_weight:
            raise ValueError("`pixel_loss_weight` and `feature_loss_weight` are both 0: nothing would be learned.")
        if self.instruction_vocab_size is not None and self.instruction_vocab_size < 2:
            raise ValueError(f"`instruction_vocab_size` must be at least 2, got {self.instruction_vocab_size}.")

    def _validate_features(self) -> None:
        given = (self.feature_backbone is not None, self.feature_dim is not None, self.feature_loss_weight > 0)
        if len(set(given)) > 1:
            raise ValueError(
                f"`feature_backbone` ({self.feature_backbone!r}), `feature_dim` ({self.feature_dim}) and a "
                f"`feature_loss_weight` above 0 ({self.feature_loss_weight:g}) must be given together or not at all."
            )
        if self.features_per_patch < 1 or (self.feature_dim is not None and self.feature_dim < 1):
            raise ValueError(
                f"`features_per_patch` ({self.features_per_patch}) and `feature_dim` ({self.feature_dim}) must be at "
                "least 1."
            )
        for name in ("feature_image_mean", "feature_image_std"):
            if len(getattr(self, name)) != self.num_channels and self.feature_backbone is not None:
                raise ValueError(f"`{name}` must have {self.num_channels} numbers, got {getattr(self, name)}.")

    def _validate_actions(self) -> None:
        if self.action_dim is not None and self.action_dim < 1:
            raise ValueError(f"`action_dim` must be at least 1, got {self.action_dim}.")
        for name in ("action_mean", "action_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.action_dim:
                raise ValueError(f"`{name}` must have `action_dim` ({self.action_dim}) numbers, got {len(values)}.")
        if self.action_std is not None and min(self.action_std) <= 0:
            raise ValueError(f"`action_std` must be above 0 everywhere, got {list(self.action_std)}.")


__all__ = ["LapaQuantizerConfig"]
