"""UniPi as a policy: plan in video, read the actions off the plan."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.evaluation.baselines.card import write_card
from lapa.evaluation.baselines.folders import new_folder
from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
from lapa.evaluation.baselines.video_diffusion import VideoDiffusionModel
from lapa.evaluation.baselines.video_diffusion_training import encode_instructions
from lapa.hub_cards.card import RESULTS_NAME, TRAINER_STATE_NAME
from lapa.processing.tokenization_lapa import LapaTokenizer

# Folder of the inverse dynamics model in the folder of the video model.
INVERSE_DYNAMICS_FOLDER = "inverse_dynamics"


class UniPiPolicy:
    """
    A video model generates the next frames from the current one and the instruction; an inverse dynamics model reads the
    action off each two that follow each other. Where they are several control steps apart, the action is played that often.

    Args:
        video_model: Generates.
        inverse_dynamics: Reads actions, of frames as far apart as the generated ones.
        tokenizer: Of the video model's instructions.
        num_inference_steps: Of a sample; the video model's own number when None.
        seed: Of the noise that samples start from.

    Raises:
        ValueError: Models of other frames than each other.
    """

    def __init__(
        self,
        video_model: VideoDiffusionModel,
        inverse_dynamics: InverseDynamicsModel,
        tokenizer: LapaTokenizer,
        num_inference_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        for name in ("image_size", "num_channels", "frame_gap"):
            ours, theirs = getattr(video_model.config, name), getattr(inverse_dynamics.config, name)
            if ours != theirs:
                raise ValueError(
                    f"`{name}` of the video model ({ours}) and of the inverse dynamics model ({theirs}) must be the same."
                )
        self.video_model, self.inverse_dynamics = video_model.eval(), inverse_dynamics.eval()
        self.tokenizer, self.num_inference_steps = tokenizer, num_inference_steps
        self.reseed(seed)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "UniPiPolicy":
        """
        Load a folder that `write_unipi` wrote; `options` as in [`UniPiPolicy`].

        Raises:
            ValueError: A folder without an inverse dynamics model, and what loading the models refuses.
        """
        if not (Path(folder) / INVERSE_DYNAMICS_FOLDER / "config.json").is_file():
            raise ValueError(
                f"`policy` ({folder}) is a video model alone: a UniPi policy has an inverse dynamics model in "
                f"{INVERSE_DYNAMICS_FOLDER}/ beside it."
            )
        return cls(
            VideoDiffusionModel.from_pretrained(folder),
            InverseDynamicsModel.from_pretrained(folder, subfolder=INVERSE_DYNAMICS_FOLDER),
            LapaTokenizer.from_pretrained(folder),
            **options,
        )

    @property
    def action_horizon(self) -> int:
        """Control steps that one plan holds."""
        return self.video_model.config.plan_length

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        return self.inverse_dynamics.config.action_dim

    def to(self, device: str | torch.device) -> "UniPiPolicy":
        """Moves both models."""
        self.video_model.to(device)
        self.inverse_dynamics.to(device)
        return self

    def reseed(self, seed: int) -> None:
        """Begins the draws anew."""
        # On the CPU wherever the models are, so that a plan does not depend on the device.
        self.generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def plan(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> torch.Tensor:
        """The current frame and the generated ones, (batch, 1 + num_frames, channels, height, width) in [0, 1].

        Args:
            images: One (height, width, channels) uint8 image per robot.
            instructions: One sentence per robot.
        """
        device, config = self.video_model.device, self.video_model.config
        frame = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device).float() / 255  # b h w c -> b c h w
        ids, mask = encode_instructions(self.tokenizer, list(instructions), config.max_text_length)
        generated = self.video_model.generate(
            frame, ids.to(device), mask.to(device), self.num_inference_steps, generator=self.generator
        )
        return torch.cat((frame.unsqueeze(1), generated), dim=1)

    @torch.inference_mode()
    def act_chunk(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], proprio: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Actions of a plan, (batch, action_horizon, action_dim) float32; see [`~lapa.serving.policy.Policy`]."""
        plan = self.plan(images, instructions)
        pairs = torch.stack((plan[:, :-1], plan[:, 1:]), dim=2)  # b n 2 c h w
        actions = self.inverse_dynamics.predict_actions(pairs.flatten(0, 1)).unflatten(0, pairs.shape[:2])
        repeated = actions.repeat_interleave(self.video_model.config.frame_gap, dim=1)
        return repeated.cpu().numpy().astype(np.float32)

    def act(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], proprio: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """See [`~lapa.serving.policy.Policy`]; the first action of every plan."""
        return self.act_chunk(images, instructions)[:, 0]


def write_unipi(video_model: str | Path, inverse_dynamics: str | Path, output: Path) -> None:
    """
    Write the folder that `lapa evaluate --policy` plays: the video model with its tokenizer, and the inverse dynamics model in
    a folder of its own inside.

    Args:
        video_model: Folder of [`VideoDiffusionModel`], with a tokenizer.
        inverse_dynamics: Folder of [`InverseDynamicsModel`].
        output: Folder to write; one that an earlier call wrote is replaced.

    Raises:
        ValueError: `output` holds something else, and models that do not fit together.
    """
    with new_folder(output, INVERSE_DYNAMICS_FOLDER, "UniPi policy") as partial:
        policy = UniPiPolicy(
            VideoDiffusionModel.from_pretrained(video_model),
            InverseDynamicsModel.from_pretrained(inverse_dynamics),
            LapaTokenizer.from_pretrained(video_model),
        )
        policy.video_model.save_pretrained(partial)
        policy.tokenizer.save_pretrained(partial)
        policy.inverse_dynamics.save_pretrained(partial / INVERSE_DYNAMICS_FOLDER)
        _copy_records(Path(video_model), partial)
        _copy_records(Path(inverse_dynamics), partial / INVERSE_DYNAMICS_FOLDER)
        write_card(partial, policy.video_model.config, is_policy=True)
        write_card(partial / INVERSE_DYNAMICS_FOLDER, policy.inverse_dynamics.config)


def _copy_records(source: Path, target: Path) -> None:
    """What trainings recorded for the cards."""
    for name in (TRAINER_STATE_NAME, RESULTS_NAME):
        if (source / name).is_file():
            shutil.copy(source / name, target)


__all__ = ["INVERSE_DYNAMICS_FOLDER", "UniPiPolicy", "write_unipi"]
