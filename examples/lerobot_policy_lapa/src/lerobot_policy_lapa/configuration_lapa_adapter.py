"""What lerobot is told of a LAPA model."""

from dataclasses import dataclass, field

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode
from lerobot.optim.optimizers import AdamWConfig


@PreTrainedConfig.register_subclass("lapa")
@dataclass
class LapaAdapterConfig(PreTrainedConfig):
    """
    A finetuned LAPA model as a policy of lerobot.

    Args:
        model (`str`): Folder or Hub name of the model, as `lapa finetune` writes it.
        unnorm_key (`str`, *optional*): Statistics that de-tokenise its actions; may be None where there is one set.
        camera (`str`, *optional*): Key of the image it sees, such as `observation.images.top`; may be None where there is one.
        chunk_size (`int`): Steps of a prediction: the model's `action_horizon`.
        replan_every (`int`, *optional*): Steps that are played of a prediction; all of them when None.
        do_sample (`bool`): Whether actions are sampled instead of chosen greedily.
        temperature (`float`, *optional*): With `do_sample`.
        optimizer_lr (`float`): Of further training, the paper's.
    """

    model: str = ""
    unnorm_key: str | None = None
    camera: str | None = None
    chunk_size: int = 1
    replan_every: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    optimizer_lr: float = 2e-5

    # The model's own processor normalises: images, states and actions pass as they are.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1, got {self.chunk_size}.")
        if self.temperature is not None and not self.do_sample:
            raise ValueError("`temperature` needs `do_sample`: without it actions are chosen greedily.")

    @property
    def observation_delta_indices(self) -> None:
        """One frame is seen at a time."""
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        """The steps that a training example needs."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """Rewards are not looked at."""
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """The published finetuning: AdamW without weight decay."""
        return AdamWConfig(lr=self.optimizer_lr, betas=(0.9, 0.95), weight_decay=0.0, grad_clip_norm=1.0)

    def get_scheduler_preset(self) -> None:
        """A constant rate, as published."""
        return None

    @property
    def image_key(self) -> str:
        """The image that the model sees.

        Raises:
            ValueError: No image, several and no `camera`, or a `camera` that is not there.
        """
        images = list(self.image_features)
        if self.camera is None and len(images) == 1:
            return images[0]
        if self.camera not in images:
            raise ValueError(
                f"`camera` must be one of {', '.join(images) or 'the images, and there are none'}, got {self.camera!r}."
            )
        return self.camera

    def validate_features(self) -> None:
        """Checks that there is an image to see and an action to take.

        Raises:
            ValueError: There is none.
        """
        if not self.model:
            raise ValueError("`model` must name a finetuned LAPA model (--policy.model=FOLDER).")
        _ = self.image_key
        if self.action_feature is None:
            raise ValueError("`output_features` must have 'action'.")
