"""What the jobs of a study do. Each reads the folders of others, writes its own, and returns numbers for the report."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from lapa.data.atomic_files import atomic_file
from lapa.data.encoded_steps import EncodedStepDataset
from lapa.data.frame_pairs import FramePairDataset
from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_report import code_motion
from lapa.evaluation.demo_settings import EVALUATION_SEEDS, LABELLED_SEEDS, SEED_STRIDE, VIDEO_SEEDS
from lapa.evaluation.demo_tokenizer import build_tokenizer, simulator_words
from lapa.evaluation.evaluate import Evaluation, EvaluationSettings
from lapa.evaluation.policies import DO_NOTHING, EXPERT, UNIPI, NamedPolicy, open_policy
from lapa.evaluation.study import StudySettings
from lapa.evaluation.suites import Cell, Suite
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments, LapaLatentPretrainingArguments
from lapa.training.label_latent_actions import label_latent_actions
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
from lapa.training.metrics import perplexity

# Start states beyond every other's: of episodes for token accuracy, and of those on which temperatures are chosen.
HELD_OUT_SEEDS, VALIDATION_SEEDS = 250_000_000, 500_000_000
# Every so many-th episode of a video is kept from stage 2, to measure its accuracy.
HELD_OUT_EVERY = 50
NUM_HELD_OUT_STEPS = 1000
ROLLOUTS_SIDE_BY_SIDE = 60


@dataclass(frozen=True)
class Work:
    """
    What a job has at hand.

    Args:
        folder: To write into; what an interrupted run left is there.
        settings: Of the study, where the job reads them, defaults elsewhere.
        extra: What a job depends on beside settings (seed, embodiment, ...).
        inputs: Folders of other jobs by role.
    """

    folder: Path
    settings: StudySettings
    extra: Mapping[str, Any]
    inputs: Mapping[str, Path]

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, Any], inputs: Mapping[str, Path]) -> "Work":
        """From a job's settings."""
        names = {entry.name: entry.default for entry in fields(StudySettings)}
        known = {
            name: tuple(value) if isinstance(names[name], tuple) else value
            for name, value in values.items()
            if name in names
        }
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(folder, StudySettings(**known), extra, inputs)

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

    def keep(self, array: np.ndarray) -> None:
        """Writes the array of this job."""
        with atomic_file(self.folder / "array.npy") as partial, partial.open("wb") as file:
            np.save(file, array)

    def processor(self) -> LapaProcessor:
        """For the study's trunk; colours and shapes are words of their own, so that an unseen pair of them can be read."""
        tokenizer = build_tokenizer(self.folder / "tokenizer.model", simulator_words())
        config = stages.policy_config(self.settings, len(tokenizer))
        return LapaProcessor.from_config(config, LapaImageProcessor(size=self.settings.image_size), tokenizer)


def video(work: Work) -> dict[str, Any]:
    """Episodes without labels. Actions are kept for those methods and measurements that may see them."""
    embodiment = work.extra["embodiment"]
    recording = stages.record(
        work.settings,
        work.settings.video_episodes,
        VIDEO_SEEDS + work.seed * SEED_STRIDE,
        embodiment,
        with_actions=stages.make_environment(work.settings, embodiment).embodiment.has_actions,
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "frames": len(recording.frames)}


def labelled(work: Work) -> dict[str, Any]:
    """The few episodes with actions."""
    wanted = work.extra["labelled"]
    # As many in all, whether they are of one family or of all.
    total = work.settings.labelled_episodes_per_family * len(work.settings.families)
    episodes = {family: total // len(wanted) for family in wanted}
    recording = stages.record(
        work.settings, episodes, LABELLED_SEEDS + work.seed * SEED_STRIDE, "arm", with_actions=True
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "steps": int(len(recording.frames) - len(recording.lengths))}


def held_out(work: Work) -> dict[str, Any]:
    """Episodes with actions that nothing is trained on."""
    episodes = dict.fromkeys(work.settings.families, work.settings.held_out_episodes)
    recording = stages.record(work.settings, episodes, HELD_OUT_SEEDS, "arm", with_actions=True)
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths)}


def image_tokens(work: Work) -> dict[str, Any]:
    """Vision codes of every frame."""
    codes = stages.encode_frames(work.recording("video").frames, stages.load_vision_tokenizer())
    work.keep(codes.astype(np.int32))
    return {}


def quantizer(work: Work) -> dict[str, Any]:
    """Stage 1."""
    log = stages.train_quantizer(work.settings, work.seed, work.recording("video"), work.folder / "model")
    return {"final_loss": log[-1]["loss"], "attempts": 1 + len(list(work.folder.glob("*/collapsed.txt")))}


def codes(work: Work) -> dict[str, Any]:
    """The quantizer's labels, and what they say of the true motion."""
    recording, gap = work.recording("video"), work.settings.frame_gap
    model = LapaQuantizer.from_pretrained(work.inputs["quantizer"] / "model")
    labels = label_latent_actions(model, FramePairDataset(recording.episodes(), gap), batch_size=256)
    work.keep(labels)
    _, first = recording.steps(gap)
    motion = recording.effector[first + gap] - recording.effector[first]
    order = np.random.default_rng(0).permutation(len(first))
    size = model.config.codebook_size
    return {
        "motion_r2": code_motion(labels[order], motion[order], size),
        "perplexity": perplexity(np.bincount(labels.ravel(), minlength=size)),
    }


def inverse_dynamics(work: Work) -> dict[str, Any]:
    """VPT's and UniPi's model of which action lies between two frames."""
    from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import (
        InverseDynamicsSettings,
        label_actions,
        r_squared,
        train_inverse_dynamics,
    )
    from lapa.evaluation.baselines.training import Schedule

    recording, held = work.recording("labelled"), work.recording("held_out")
    (episode, first), (_, test) = recording.steps(1), held.steps(1)
    sizes = list(work.settings.inverse_dynamics_sizes)
    config = InverseDynamicsConfig(
        image_size=work.settings.image_size,
        action_dim=2,
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[1] * len(sizes),
        stem_pooling=False,
        mlp_hidden_size=128,
    )
    # All labelled episodes are trained on: so few that holding some out costs more than it tells.
    settings = InverseDynamicsSettings(
        Schedule(work.settings.inverse_dynamics_steps, 64, 2e-3), max_shift=3, held_out_share=0.0, keep_best=False
    )
    pairs = recording.frames[first], recording.frames[first + 1]
    folder = work.folder / "model"
    log = train_inverse_dynamics(*pairs, recording.actions[first], config, settings, work.seed, folder, episode)
    predicted = label_actions(
        InverseDynamicsModel.from_pretrained(folder), held.frames[test], held.frames[test + 1], show_progress=False
    )
    return {"final_loss": log[-1]["loss"], "held_out_r2": float(np.mean(r_squared(predicted, held.actions[test])))}


def pseudo_actions(work: Work) -> dict[str, Any]:
    """The inverse dynamics model's labels of the video."""
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import label_actions, r_squared

    recording = work.recording("video")
    model = InverseDynamicsModel.from_pretrained(work.inputs["inverse_dynamics"] / "model")
    _, first = recording.steps(1)
    predicted = label_actions(model, recording.frames[first], recording.frames[first + 1])
    actions = np.zeros((len(recording.frames), predicted.shape[1]), np.float32)
    actions[first] = predicted
    work.keep(actions)
    if not len(recording.actions):
        return {}
    # Another embodiment acts in a frame of its own: the two need not agree there.
    return {"video_r2": float(np.mean(r_squared(predicted, recording.actions[first])))}


def _split(episode: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the steps to train on, and of some to measure on, from other episodes."""
    kept = episode % HELD_OUT_EVERY == 0
    test = np.flatnonzero(kept)
    return np.flatnonzero(~kept), np.random.default_rng(0).permutation(test)[:NUM_HELD_OUT_STEPS]


def _majority(tokens: np.ndarray) -> float:
    """Accuracy of always naming the most frequent token of each column."""
    return float(np.mean([np.bincount(column).max() / len(column) for column in tokens.T]))


def pretrain(work: Work) -> dict[str, Any]:
    """Stage 2, on codes, pseudo actions or true actions."""
    settings, processor, recording = work.settings, work.processor(), work.recording("video")
    vision = work.array("image_tokens")
    on_codes = work.extra["targets"] == "codes"
    episode, frame = recording.steps(settings.frame_gap if on_codes else 1)
    if on_codes:
        name, targets = "latent_action_codes", work.array("targets")
    else:
        pseudo = work.extra["targets"] == "pseudo_actions"
        actions = (work.array("targets") if pseudo else recording.actions)[frame]
        processor.fit_actions(actions, stages.UNNORM_KEY, num_bins=settings.num_bins, gripper_dimension=None)
        name, targets = "action_tokens", processor.encode_actions(actions, stages.UNNORM_KEY)
    targets = np.asarray(targets)

    def dataset(steps: np.ndarray) -> Dataset[Any]:
        sentences = recording.instructions[episode[steps]]
        return EncodedStepDataset(processor, sentences, vision[frame[steps]], **{name: targets[steps]})

    train, test = _split(episode)
    config = stages.policy_config(settings, len(processor.tokenizer))
    model_class = LapaForLatentAction if on_codes else LapaForActionPrediction
    model = stages.fresh_policy(model_class, config, stages.load_vision_tokenizer(), work.seed)
    arguments_class = LapaLatentPretrainingArguments if on_codes else LapaActionFinetuningArguments
    arguments = arguments_class(
        **stages.schedule(
            settings.pretraining_steps, settings.pretraining_learning_rate, work.seed, work.folder / "model"
        ),
        per_device_train_batch_size=settings.pretraining_batch_size,
        per_device_eval_batch_size=250,
        weight_decay=0.01,
    )
    trainer_class = LapaLatentPretrainingTrainer if on_codes else LapaActionFinetuningTrainer
    trainer = trainer_class(model, arguments, dataset(train), dataset(test), processor=processor)
    log = stages.run_training(trainer, work.folder / "model")
    return {"final_loss": log[-1]["loss"], "majority": _majority(targets[test]), **_accuracy(trainer)}


def _accuracy(trainer: Any) -> dict[str, float]:
    """Share of right tokens on the trainer's evaluation data."""
    metrics = trainer.evaluate()
    values = [value for name, value in metrics.items() if name.endswith("accuracy") and isinstance(value, float)]
    return {"held_out_accuracy": float(values[0]), "held_out_loss": float(metrics["eval_loss"])}


def finetune(work: Work) -> dict[str, Any]:
    """Stage 3, from a pretrained folder or from a fresh trunk."""
    settings, processor, seed = work.settings, work.processor(), work.seed
    recordings = {role: work.recording(role) for role in ("labelled", "held_out")}
    tokenizer = stages.load_vision_tokenizer()
    steps = {role: recording.steps(1) for role, recording in recordings.items()}
    actions = {role: recording.actions[steps[role][1]] for role, recording in recordings.items()}
    processor.fit_actions(actions["labelled"], stages.UNNORM_KEY, num_bins=settings.num_bins, gripper_dimension=None)

    def dataset(role: str, **targets: Any) -> Dataset[Any]:
        recording, (episode, frame) = recordings[role], steps[role]
        vision = stages.encode_frames(recording.frames, tokenizer)[frame]
        return EncodedStepDataset(processor, recording.instructions[episode], vision, **targets)

    tokens = {role: np.asarray(processor.encode_actions(a, stages.UNNORM_KEY)) for role, a in actions.items()}
    train: Dataset[Any] = dataset("labelled", action_tokens=tokens["labelled"])
    options: dict[str, Any] = {}
    if work.extra.get("keep_latent_head"):
        options["keep_latent_head"] = True
        train = ConcatDataset([train, _latent_examples(work, processor, recordings["labelled"])])
    torch.manual_seed(seed + 1)
    if "pretrained" in work.inputs:
        model = LapaForActionPrediction.from_pretrained(work.inputs["pretrained"] / "model", **options)
    else:
        config = stages.policy_config(settings, len(processor.tokenizer))
        model = stages.fresh_policy(LapaForActionPrediction, config, tokenizer, seed)
    folder = work.folder / "model"
    arguments = LapaActionFinetuningArguments(
        **stages.schedule(int(work.extra["steps"]), float(work.extra["learning_rate"]), seed, folder),
        per_device_train_batch_size=settings.finetuning_batch_size,
        per_device_eval_batch_size=250,
        weight_decay=0.01,
    )
    held = dataset("held_out", action_tokens=tokens["held_out"])
    trainer = LapaActionFinetuningTrainer(model, arguments, train, held, processor=processor)
    log = stages.run_training(trainer, folder)
    return {"final_loss": log[-1]["loss"], "majority": _majority(tokens["held_out"]), **_accuracy(trainer)}


def _latent_examples(work: Work, processor: LapaProcessor, recording: stages.Recording) -> Dataset[Any]:
    """The labelled frames with the quantizer's codes, for a policy that goes on to predict them."""
    episode, frame = recording.steps(work.settings.frame_gap)
    model = LapaQuantizer.from_pretrained(work.inputs["quantizer"] / "model")
    labels = label_latent_actions(
        model, FramePairDataset(recording.episodes(), work.settings.frame_gap), batch_size=256
    )
    vision = stages.encode_frames(recording.frames, stages.load_vision_tokenizer())[frame]
    return EncodedStepDataset(processor, recording.instructions[episode], vision, latent_action_codes=labels)


def video_model(work: Work) -> dict[str, Any]:
    """UniPi: a video model of the video, which then goes on with the labelled episodes, because the arm is what it must draw."""
    from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
    from lapa.evaluation.baselines.training import Schedule
    from lapa.evaluation.baselines.unipi import write_unipi
    from lapa.evaluation.baselines.video_diffusion_training import VideoSettings, clip_index, train_video_model

    settings = work.settings
    tokenizer = build_tokenizer(work.folder / "tokenizer.model", simulator_words())
    config = VideoDiffusionConfig(
        image_size=settings.image_size, text_vocab_size=len(tokenizer), **settings.video_model_options
    )
    start, losses = None, {}
    for role, steps in (
        ("video", settings.video_model_steps),
        ("labelled", settings.video_model_finetuning_steps),
    ):
        recording = work.recording(role)
        clips, episode = clip_index(recording.lengths, config.num_frames, config.frame_gap)
        schedule = Schedule(
            steps, settings.video_model_batch_size, settings.video_model_learning_rate, weight_decay=0.01
        )
        log = train_video_model(
            recording.frames,
            clips,
            recording.instructions[episode],
            tokenizer,
            config,
            VideoSettings(schedule),
            work.seed,
            work.folder / role,
            start=start,
        )
        start = work.folder / role
        losses[f"loss_on_{role}"] = log[-1]["loss"]
    write_unipi(work.folder / "labelled", work.inputs["inverse_dynamics"] / "model", work.folder / "model")
    return losses


def _suite(work: Work, name: str, splits: tuple[str, ...], rollouts: int, first_seed: int) -> Suite:
    options = {key: _plain(value) for key, value in stages.environment_options(work.settings).items()}
    cells = tuple(
        Cell(split, family, options | {"split": split}) for split in splits for family in work.settings.families
    )
    return Suite(name, "tabletop", cells, rollouts, first_seed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _open(work: Work, role: str, temperature: float) -> NamedPolicy:
    folder = work.inputs[role] / "model"
    if _is_unipi(folder):
        return open_policy(str(folder), 2)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    return open_policy(str(folder), 2, stages.UNNORM_KEY, "cpu", **sampling)


def _is_unipi(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == UNIPI


def _play(policy: NamedPolicy, suite: Suite, folder: Path, num_shown: int) -> Evaluation:
    settings = EvaluationSettings(num_environments=ROLLOUTS_SIDE_BY_SIDE, num_shown=num_shown)
    evaluation = Evaluation(suite, policy, folder, settings)
    evaluation.run()
    return evaluation


def choose(work: Work) -> dict[str, Any]:
    """Which finetuning is played, at which temperature: the one that solves most on starts that no reported number uses."""
    suite = _suite(work, "validation", ("seen",), work.settings.validation_rollouts, VALIDATION_SEEDS)
    roles = [role for role in work.inputs if role.startswith("policy")]
    if roles == ["policy"]:  # nothing to choose
        return {"policy": "policy", "temperature": 0.0, "successes": {}}
    successes: dict[str, int] = {}
    options: dict[str, tuple[str, float]] = {}
    for role in roles:
        for temperature in work.settings.temperatures:
            name = f"{role}-temperature-{temperature:g}"
            report = _play(_open(work, role, temperature), suite, work.folder / name, 0).report()
            successes[name], options[name] = report["groups"]["seen"]["successes"], (role, temperature)
    best = max(successes, key=lambda name: successes[name])  # the first of equals
    return {"policy": options[best][0], "temperature": options[best][1], "successes": successes}


def play(work: Work) -> dict[str, Any]:
    """The reported episodes."""
    rollouts = work.settings.rollouts_per_family
    suite = _suite(work, "study", tuple(work.extra["splits"]), rollouts, EVALUATION_SEEDS)
    name = work.extra.get("policy_name")
    if name in (DO_NOTHING, EXPERT):
        policy = open_policy(name, suite.action_dim())
    else:
        chosen = json.loads((work.inputs["choose"] / "done.json").read_text(encoding="utf-8"))["result"]
        policy = _open(work, chosen["policy"], chosen["temperature"])
    report = _play(policy, suite, work.folder / "evaluation", 1).report()
    return {"cells": report["cells"]}


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    function.__name__: function
    for function in (video, labelled, held_out, image_tokens, quantizer, codes, inverse_dynamics, pseudo_actions,
                     pretrain, finetune, video_model, choose, play)
}  # fmt: skip


__all__ = ["JOBS", "Work"]
