"""Stage 2: teaching the policy to predict the quantizer's codes from an image and an instruction."""

from typing import Any

from lapa.training.arguments import LapaLatentPretrainingArguments
from lapa.training.policy_trainer import LapaPolicyTrainer


class LapaLatentPretrainingTrainer(LapaPolicyTrainer):
    r"""
    Trainer of [`LapaForLatentAction`], see `LapaPolicyTrainer` for the arguments.

    ```python
    >>> dataset = LabelledStepDataset(processor, instructions, images=images, latent_action_codes=codes)
    >>> trainer = LapaLatentPretrainingTrainer(
    ...     LapaForLatentAction(config), LapaLatentPretrainingArguments("policy"), dataset, processor=processor
    ... )
    >>> trainer.train()
    ```
    """

    args: LapaLatentPretrainingArguments

    def __init__(self, model: Any, args: LapaLatentPretrainingArguments, *more: Any, **kwargs: Any) -> None:
        if args.text_loss_weight is not None:
            model.config.text_loss_weight = args.text_loss_weight
        super().__init__(model, args, *more, **kwargs)


__all__ = ["LapaLatentPretrainingTrainer"]
