"""What a job of a study has at hand."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.data.atomic_files import atomic_file
from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_tokenizer import build_tokenizer
from lapa.evaluation.study import StudySettings
from lapa.evaluation.study_plan import DEFAULT_WORLD, ONE_CPU, Machine
from lapa.evaluation.study_worlds import WORLDS, World
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.processing.tokenization_lapa import LapaTokenizer


@dataclass(frozen=True)
class Work:
    """
    What a job has at hand.

    Args:
        folder: To write into; what an interrupted run left is there.
        settings: Of the study, where the job reads them, defaults elsewhere.
        extra: What a job depends on beside settings (seed, embodiment, ...).
        inputs: Folders of other jobs by role.
        machine: To compute on; no part of what a job is.
    """

    folder: Path
    settings: StudySettings
    extra: Mapping[str, Any]
    inputs: Mapping[str, Path]
    machine: Machine = ONE_CPU

    @classmethod
    def of(
        cls, folder: Path, values: Mapping[str, Any], inputs: Mapping[str, Path], machine: Machine = ONE_CPU
    ) -> "Work":
        """From a job's settings."""
        names = {entry.name: entry.default for entry in fields(StudySettings)}
        known = {
            name: tuple(value) if isinstance(names[name], tuple) else value
            for name, value in values.items()
            if name in names
        }
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(folder, StudySettings(**known), extra, inputs, machine)

    @property
    def device(self) -> str:
        """To compute on."""
        return self.machine.device

    @property
    def world(self) -> World:
        """Where all this takes place; the tabletop where nothing else is said."""
        return WORLDS[self.extra.get("world", DEFAULT_WORLD)]

    @property
    def seed(self) -> int:
        """Training seed."""
        return int(self.extra["seed"])

    def recording(self, role: str) -> stages.Recording:
        """What another job recorded."""
        return stages.Recording.load(self.inputs[role] / "recording.npz")

    def array(self, role: str) -> Any:
        """The array of another job."""
        return np.load(self.inputs[role] / "array.npy", allow_pickle=False)

    def result(self, role: str) -> dict[str, Any]:
        """What another job returned."""
        done: dict[str, Any] = json.loads((self.inputs[role] / "done.json").read_text(encoding="utf-8"))["result"]
        return done

    def keep(self, array: np.ndarray) -> None:
        """Writes the array of this job."""
        with atomic_file(self.folder / "array.npy") as partial, partial.open("wb") as file:
            np.save(file, array)

    def vision_tokenizer(self) -> LapaVisionTokenizer:
        """The world's, or the one that was trained for the study; in fp32."""
        folder = self.world.vision_tokenizer or self.inputs["vision_tokenizer"] / "model"
        return LapaVisionTokenizer.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)

    def text_tokenizer(self) -> LapaTokenizer:
        """Of the world's instructions."""
        return build_tokenizer(self.folder / "tokenizer.model", self.world.words())

    def policy_config(self, text_vocab_size: int) -> LapaConfig:
        """Of the study's trunk."""
        vision = self.vision_tokenizer().config
        return stages.small_policy_config(
            self.settings, vision, text_vocab_size, self.world.action_dim, text_loss_weight=0.0
        )

    def processor(self) -> LapaProcessor:
        """For the study's trunk."""
        tokenizer = self.text_tokenizer()
        config = self.policy_config(len(tokenizer))
        return LapaProcessor.from_config(config, LapaImageProcessor(size=self.settings.image_size), tokenizer)

    @property
    def use_cpu(self) -> bool:
        """Whether models are trained on the CPU, though there may be a GPU."""
        return self.device == "cpu"

    def schedule(self, steps: int, learning_rate: float) -> dict[str, Any]:
        """Training arguments of a policy, which is written to `folder / "model"`."""
        # On a GPU as one trains there: a large trunk in fp32 would take several times as long.
        bf16 = self.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        return stages.schedule(steps, learning_rate, self.seed, self.folder / "model", self.device) | {"bf16": bf16}


def quantizer_codes(work: Work, recording: stages.Recording) -> Any:
    """The quantizer's labels (num_pairs, num_latent_tokens) of a recording."""
    return stages.recording_codes(recording, work.inputs["quantizer"] / "model", work.settings.frame_gap, work.device)


__all__ = ["Work", "quantizer_codes"]
