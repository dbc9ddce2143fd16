"""What has to be done for a study: jobs that name what they depend on, so that each is done once."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lapa.evaluation.policies import DO_NOTHING, EXPERT, RANDOM
from lapa.evaluation.study import METHODS, Column, Method, Point, Study, StudySettings
from lapa.evaluation.study_worlds import WORLDS

# Which settings a kind of job reads. What is not named here does not make it run again.
QUANTIZER = ("image_size", "frame_gap", "codebook_size", "num_latent_tokens", "quantizer_hidden_size", "quantizer_steps",
             "quantizer_batch_size", "quantizer_learning_rate", "quantizer_min_perplexity",
             "quantizer_min_perplexity_from", "quantizer_attempts", "quantizer_options")  # fmt: skip
TRUNK = ("hidden_size", "num_layers", "num_heads", "initializer_range", "embedding_initializer_range", "rope_theta",
         "image_size", "codebook_size", "num_latent_tokens", "num_bins")  # fmt: skip
READS: dict[str, tuple[str, ...]] = {
    "video": ("video_episodes",),
    "labelled": ("labelled_episodes_per_family",),
    "held_out": ("held_out_episodes",),
    "vision_tokenizer": ("tokenizer_episodes", "tokenizer_codes", "tokenizer_steps"),
    "image_tokens": (),
    "quantizer": QUANTIZER,
    "codes": ("frame_gap", "codebook_size"),
    "inverse_dynamics": ("image_size", "inverse_dynamics_steps", "inverse_dynamics_sizes"),
    "pseudo_actions": (),
    "pretrain": (*TRUNK, "frame_gap", "pretraining_steps", "pretraining_batch_size", "pretraining_learning_rate"),
    "finetune": (*TRUNK, "frame_gap", "finetuning_batch_size"),
    "latent_decoder": ("frame_gap", "codebook_size", "num_latent_tokens", "latent_decoder_steps"),
    "video_model": (
        "image_size",
        "video_model_steps",
        "video_model_finetuning_steps",
        "video_model_batch_size",
        "video_model_learning_rate",
        "video_model_options",
    ),
    "choose": ("validation_rollouts", "temperatures"),
    "play": ("rollouts_per_family",),
}
# These record or play, and read beside what the world is made of.
IN_THE_WORLD = ("video", "labelled", "held_out", "vision_tokenizer", "choose", "play")
# Where a job takes place whose settings do not say.
DEFAULT_WORLD = "tabletop"


@dataclass(frozen=True)
class Machine:
    """
    What jobs are done on; no part of what a job is.

    Args:
        device: That models are trained and played on.
        simulators: Processes in which a job records and plays, in a world whose simulator is slow or may crash.
    """

    device: str = "cpu"
    simulators: int = 1


ONE_CPU = Machine()


@dataclass(frozen=True)
class Job:
    """
    A piece of work whose result is a folder.

    Args:
        kind: Key of `READS`.
        label: For readers; no part of what the job is.
        settings: All it depends on beside its inputs, JSON-serialisable.
        inputs: Keys of the jobs whose results it reads, by role.
    """

    kind: str
    label: str = field(compare=False)
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """Name of its folder: the same for the same work, in whatever study."""
        content = json.dumps([self.kind, self.settings, self.inputs], sort_keys=True)
        return f"{self.kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Entry:
    """One training of a method in a column, and the jobs that led to it."""

    method: str
    column: str
    seed: int
    point: Point | None
    jobs: Mapping[str, str]


class Plan:
    """
    All jobs of a study, in an order in which they can be done.

    Attributes:
        jobs: By key.
        entries: What the table is made of.
        baselines: Keys of the jobs that play what is not learned: `do_nothing`, `random` and `expert`.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.world = WORLDS[study.world]
        self.jobs: dict[str, Job] = {}
        self.entries: list[Entry] = []
        for seed in study.seeds:
            for point in study.points or (None,):
                for column in study.columns:
                    for method in study.methods:
                        self.entries.append(self._entry(method, column, seed, point))
        # Last, as nothing waits for them.
        self.baselines = {
            name: self._add("play", name, study.settings, policy_name=name, splits=study.splits)
            for name in (DO_NOTHING, RANDOM, EXPERT)
        }

    def _add(
        self, kind: str, label: str, settings: StudySettings, inputs: Mapping[str, str] | None = None, **extra: Any
    ) -> str:
        elsewhere = {} if self.study.world == DEFAULT_WORLD else {"world": self.study.world}
        names = READS[kind] + (self.world.reads if elsewhere or kind in IN_THE_WORLD else ())
        read = {name: getattr(settings, name) for name in names} | extra | elsewhere
        job = Job(kind, f"{kind} {label}", json.loads(json.dumps(read)), dict(inputs or {}))
        self.jobs.setdefault(job.key, job)
        return job.key

    def _entry(self, name: str, column: Column, seed: int, point: Point | None) -> Entry:
        method, settings = METHODS[name], self.study.at(point)
        where = f"{name} {column.name} seed {seed}" + (f" {point.series}={point.value:g}" if point else "")
        jobs: dict[str, str] = {
            "labelled": self._add("labelled", where, settings, seed=seed, labelled=column.labelled),
            "held_out": self._add("held_out", self.world.embodiments[0], settings),
        }
        if self.world.vision_tokenizer is None:
            jobs["vision_tokenizer"] = self._add("vision_tokenizer", self.study.world, settings)
        if method.targets is not None:
            jobs["video"] = self._add(
                "video", f"{column.video} seed {seed}", settings, seed=seed, embodiment=column.video
            )
        if method.targets == "frames":
            policies = {"policy": self._video_model(jobs, where, settings, seed)}
        else:
            policies = self._policies(jobs, method, where, settings, seed)
        jobs |= policies
        jobs["choose"] = self._add("choose", where, settings, policies)
        inputs = {**policies, "choose": jobs["choose"]}
        jobs["play"] = self._add("play", where, settings, inputs, splits=self.study.splits)
        return Entry(name, column.name, seed, point, jobs)

    def _inverse_dynamics(self, jobs: dict[str, str], where: str, settings: StudySettings, seed: int) -> None:
        jobs["inverse_dynamics"] = self._add(
            "inverse_dynamics",
            where,
            settings,
            {"labelled": jobs["labelled"], "held_out": jobs["held_out"]},
            seed=seed,
        )

    def _video_model(self, jobs: dict[str, str], where: str, settings: StudySettings, seed: int) -> str:
        self._inverse_dynamics(jobs, where, settings, seed)
        inputs = {name: jobs[name] for name in ("video", "labelled", "inverse_dynamics")}
        return self._add("video_model", where, settings, inputs, seed=seed)

    def _images(self, jobs: Mapping[str, str]) -> dict[str, str]:
        """The input that reads images, where it is trained."""
        return {role: key for role, key in jobs.items() if role == "vision_tokenizer"}

    def _policies(
        self, jobs: dict[str, str], method: Method, where: str, settings: StudySettings, seed: int
    ) -> dict[str, str]:
        """A finetuning per candidate, or what takes its place."""
        inputs = self._images(jobs) | {"labelled": jobs["labelled"], "held_out": jobs["held_out"]}
        extra: dict[str, Any] = {}
        if method.targets is not None:
            self._pretraining(jobs, method, where, settings, seed)
            inputs["pretrained"] = jobs["pretrain"]
        if method.decode_codes:
            inputs = {role: jobs[role] for role in ("labelled", "held_out", "quantizer")} | {
                "pretrained": jobs["pretrain"]
            }
            return {"policy": self._add("latent_decoder", where, settings, inputs, seed=seed)}
        if method.keep_latent_head:
            inputs["quantizer"] = jobs["quantizer"]
            extra["keep_latent_head"] = True
        return {
            f"policy-{steps}-{rate:g}": self._add(
                "finetune", where, settings, inputs, seed=seed, steps=steps, learning_rate=rate, **extra
            )
            for steps, rate in settings.finetuning_candidates
        }

    def _pretraining(
        self, jobs: dict[str, str], method: Method, where: str, settings: StudySettings, seed: int
    ) -> None:
        video = {"video": jobs["video"]}
        jobs["image_tokens"] = self._add("image_tokens", where, settings, self._images(jobs) | video)
        if method.targets == "codes":
            options = {**settings.quantizer_options, **method.quantizer_options}
            jobs["quantizer"] = self._add("quantizer", where, settings, video, seed=seed, quantizer_options=options)
            targets = self._add("codes", where, settings, {"quantizer": jobs["quantizer"], **video})
            jobs["targets"] = targets
        elif method.targets == "pseudo_actions":
            self._inverse_dynamics(jobs, where, settings, seed)
            jobs["targets"] = self._add(
                "pseudo_actions", where, settings, {"inverse_dynamics": jobs["inverse_dynamics"], **video}
            )
        else:
            jobs["targets"] = jobs["video"]
        inputs = self._images(jobs) | video | {"image_tokens": jobs["image_tokens"], "targets": jobs["targets"]}
        jobs["pretrain"] = self._add("pretrain", where, settings, inputs, seed=seed, targets=method.targets)


__all__ = ["ONE_CPU", "Entry", "Job", "Machine", "Plan"]
