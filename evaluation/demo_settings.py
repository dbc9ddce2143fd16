"""Every constant of the demo. `docs/LOG.md` says how they were found."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

# Seeds of start states. Recordings and evaluation never share one, whatever the demo's own seed.
SEED_STRIDE = 1_000_000
VIDEO_SEEDS, LABELLED_SEEDS, EVALUATION_SEEDS = 0, 100_000_000, 200_000_000


@dataclass(frozen=True)
class PlayingSettings:
    """How a policy is finetuned and played: what the search of equal effort chose for each method."""

    learning_rate: float
    temperature: float  # 0 is greedy


@dataclass(frozen=True)
class DemoSettings:
    """Sizes, data, schedules. Lengths in pixels, steps or episodes; thresholds in metres."""

    image_size: int = 32
    num_blocks: int = 2
    families: tuple[str, ...] = ("reach", "separate", "relative_move")
    thresholds: dict[str, float] = field(default_factory=lambda: {"separate": 0.14, "relative_move": 0.08})

    video_episodes: dict[str, int] = field(
        default_factory=lambda: {"reach": 5000, "separate": 700, "relative_move": 700}
    )
    labelled_episodes_per_family: int = 15
    expert_noise: float = 0.15
    frame_gap: int = 4  # 0.4 s at the simulator's 10 Hz

    codebook_size: int = 16
    num_latent_tokens: int = 1
    quantizer_hidden_size: int = 48
    quantizer_steps: int = 2500
    quantizer_batch_size: int = 32
    quantizer_learning_rate: float = 3e-3
    # A quantizer whose codes are hardly used by then never recovers; it is started again, from another seed.
    quantizer_min_perplexity: float = 4.0
    quantizer_min_perplexity_from: int = 600
    quantizer_attempts: int = 3
    # Fields of the quantizer's config, over the demo's; the published injection, see the ablations in `docs/LOG.md`.
    quantizer_options: dict[str, Any] = field(default_factory=lambda: {"action_injection": "cross_attention"})

    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 3
    initializer_range: float = 0.08
    embedding_initializer_range: float = 0.5
    rope_theta: float = 100.0
    pretraining_steps: int = 3500
    pretraining_batch_size: int = 64
    pretraining_learning_rate: float = 2e-3
    finetuning_steps: int = 300
    finetuning_batch_size: int = 64
    num_bins: int = 12
    latent_decoder_steps: int = 500
    lapa: PlayingSettings = PlayingSettings(learning_rate=1e-3, temperature=1.0)
    scratch: PlayingSettings = PlayingSettings(learning_rate=5e-4, temperature=0.5)
    # Of the codes that are decoded; nothing was searched for it.
    decoder_temperature: float = 1.0

    rollouts_per_family: int = 100

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    def quick(self) -> "DemoSettings":
        """A few seconds of everything, to check that the stages run; its results mean nothing."""
        return replace(
            self,
            video_episodes=dict.fromkeys(self.families, 6),
            labelled_episodes_per_family=3,
            quantizer_steps=4,
            pretraining_steps=4,
            finetuning_steps=4,
            latent_decoder_steps=4,
            rollouts_per_family=2,
        )
