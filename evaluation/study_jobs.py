"""What the jobs of a study do. Each reads the folders of others, writes its own, and returns numbers for the report."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.data.atomic_files import atomic_file
from lapa.data.encoded_steps import EncodedStepDataset
from lapa.data.frame_pairs import FramePairDataset
from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_report import code_motion
from lapa.evaluation.demo_settings import EVALUATION_SEEDS, LABELLED_SEEDS, SEED_STRIDE, VIDEO_SEEDS
from lapa.evaluation.demo_tokenizer import build_tokenizer
from lapa.evaluation.evaluate import Evaluation, EvaluationSettings
from lapa.evaluation.policies import DECODER_FOLDER, UNIPI, NamedPolicy, open_policy
from lapa.evaluation.small_vision_tokenizer import train_vision_tokenizer
from lapa.evaluation.study import StudySettings
from lapa.evaluation.study_plan import DEFAULT_WORLD
from lapa.evaluation.study_worlds import WORLDS, World
from lapa.evaluation.suites import Suite
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.processing.tokenization_lapa import LapaTokenizer
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments, LapaLatentPretrainingArguments
from lapa.training.label_latent_actions import hash_weights, label_latent_actions
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
from lapa.training.lineage import record_latent_policy, record_quantizer
from lapa.training.metrics import perplexity

# Start states beyond every other's: of episodes for token accuracy, and of those on which temperatures are chosen.
HELD_OUT_SEEDS, VALIDATION_SEEDS, TOKENIZER_SEEDS = 250_000_000, 500_000_000, 300_000_000
# Every so many-th episode of a video is kept from stage 2, to measure its accuracy.
HELD_OUT_EVERY = 50
NUM_HELD_OUT_STEPS = 1000


@dataclass(frozen=True)
class Work:
    """
    What a job has at hand.

    Args:
        folder: To write into; what an interrupted run left is there.
        settings: Of the study, where the job reads them, defaults elsewhere.
        extra: What a job depends on beside settings (seed, embodiment, ...).
        inputs: Folders of other jobs by role.
        device: To compute on; no part of what a job is.
    """

    folder: Path
    settings: StudySettings
    extra: Mapping[str, Any]
    inputs: Mapping[str, Path]
    device: str = "cpu"

    @classmethod
    def of(cls, folder: Path, values: Mapping[str, Any], inputs: Mapping[str, Path], device: str = "cpu") -> "Work":
        """From a job's settings."""
        names = {entry.name: entry.default for entry in fields(StudySettings)}
        known = {
            name: tuple(value) if isinstance(names[name], tuple) else value
            for name, value in values.items()
            if name in names
        }
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(folder, StudySettings(**known), extra, inputs, device)

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

    def schedule(self, steps: int, learning_rate: float) -> dict[str, Any]:
        """Training arguments of a policy, which is written to `folder / "model"`."""
        return stages.schedule(steps, learning_rate, self.seed, self.folder / "model", self.device)


def video(work: Work) -> dict[str, Any]:
    """Episodes without labels. Actions are kept for those methods and measurements that may see them."""
    embodiment = work.extra["embodiment"]
    recording = work.world.record(
        work.settings,
        work.settings.video_episodes,
        VIDEO_SEEDS + work.seed * SEED_STRIDE,
        embodiment,
        with_actions=work.world.has_actions(embodiment),
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "frames": len(recording.frames)}


def labelled(work: Work) -> dict[str, Any]:
    """The few episodes with actions."""
    wanted = work.extra["labelled"]
    # As many in all, whether they are of one family or of all.
    total = work.settings.labelled_episodes_per_family * len(work.settings.families)
    episodes = {family: total // len(wanted) for family in wanted}
    recording = work.world.record(
        work.settings, episodes, LABELLED_SEEDS + work.seed * SEED_STRIDE, work.world.embodiments[0], with_actions=True
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "steps": int(len(recording.frames) - len(recording.lengths))}


def held_out(work: Work) -> dict[str, Any]:
    """Episodes with actions that nothing is trained on."""
    episodes = dict.fromkeys(work.settings.families, work.settings.held_out_episodes)
    recording = work.world.record(
        work.settings, episodes, HELD_OUT_SEEDS, work.world.embodiments[0], with_actions=True
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths)}


def vision_tokenizer(work: Work) -> dict[str, Any]:
    """The image tokenizer of all policies, as the published VQGAN is: trained on pictures of its own, once for all seeds."""
    settings, world = work.settings, work.world
    episodes = dict.fromkeys(settings.families, settings.tokenizer_episodes)
    frames = world.record(settings, episodes, TOKENIZER_SEEDS, world.embodiments[0], with_actions=False).frames
    log = train_vision_tokenizer(
        frames, settings.tokenizer_codes, settings.tokenizer_steps, 0, work.folder / "model", work.device
    )
    codes = stages.encode_frames(frames, LapaVisionTokenizer.from_pretrained(work.folder / "model").eval())
    used = perplexity(np.bincount(codes.ravel(), minlength=settings.tokenizer_codes))
    return {"frames": len(frames), "final_loss": log[-1]["loss"], "perplexity": used}


def image_tokens(work: Work) -> dict[str, Any]:
    """Vision codes of every frame."""
    codes = stages.encode_frames(work.recording("video").frames, work.vision_tokenizer())
    work.keep(codes.astype(np.int32))
    return {}


def quantizer(work: Work) -> dict[str, Any]:
    """Stage 1."""
    frequency = work.world.frequency(work.settings)
    log = stages.train_quantizer(
        work.settings, work.seed, work.recording("video"), work.folder / "model", frequency, work.device
    )
    return {"final_loss": log[-1]["loss"], "attempts": 1 + len(list(work.folder.glob("*/collapsed.txt")))}


def codes(work: Work) -> dict[str, Any]:
    """The quantizer's labels, and what they say of the true motion."""
    recording, gap = work.recording("video"), work.settings.frame_gap
    labels = _codes(work, recording)
    work.keep(labels)
    _, first = recording.steps(gap)
    motion = recording.effector[first + gap] - recording.effector[first]
    order = np.random.default_rng(0).permutation(len(first))
    size = work.settings.codebook_size
    return {
        "quantizer": {"hash": hash_weights(work.inputs["quantizer"] / "model"), "name": work.inputs["quantizer"].name},
        "motion_r2": code_motion(labels[order], motion[order], size),
        "perplexity": perplexity(np.bincount(labels.ravel(), minlength=size)),
    }


def _codes(work: Work, recording: stages.Recording) -> Any:
    """The quantizer's labels (num_pairs, num_latent_tokens) of a recording."""
    model = LapaQuantizer.from_pretrained(work.inputs["quantizer"] / "model").to(work.device)
    return label_latent_actions(model, FramePairDataset(recording.episodes(), work.settings.frame_gap), batch_size=256)


def inverse_dynamics(work: Work) -> dict[str, Any]:
    """VPT's and UniPi's model of which action lies between two frames."""
    from lapa.evaluation.baselines.action_regression import r_squared
    from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import (
        InverseDynamicsSettings,
        label_actions,
        train_inverse_dynamics,
    )
    from lapa.evaluation.baselines.training import Schedule

    recording, held = work.recording("labelled"), work.recording("held_out")
    (episode, first), (_, test) = recording.steps(1), held.steps(1)
    sizes = list(work.settings.inverse_dynamics_sizes)
    config = InverseDynamicsConfig(
        image_size=work.settings.image_size,
        action_dim=work.world.action_dim,
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
        InverseDynamicsModel.from_pretrained(folder).to(work.device),
        held.frames[test],
        held.frames[test + 1],
        show_progress=False,
    )
    return {"final_loss": log[-1]["loss"], "held_out_r2": float(np.mean(r_squared(predicted, held.actions[test])))}


def pseudo_actions(work: Work) -> dict[str, Any]:
    """The inverse dynamics model's labels of the video."""
    from lapa.evaluation.baselines.action_regression import r_squared
    from lapa.evaluation.baselines.inverse_dynamics import InverseDynamicsModel
    from lapa.evaluation.baselines.inverse_dynamics_training import label_actions

    recording = work.recording("video")
    model = InverseDynamicsModel.from_pretrained(work.inputs["inverse_dynamics"] / "model").to(work.device)
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
        processor.fit_actions(actions, work.world.name, num_bins=settings.num_bins, gripper_dimension=None)
        name, targets = "action_tokens", processor.encode_actions(actions, work.world.name)
    targets = np.asarray(targets)

    def dataset(steps: np.ndarray) -> Dataset[Any]:
        sentences = recording.instructions[episode[steps]]
        return EncodedStepDataset(processor, sentences, vision[frame[steps]], **{name: targets[steps]})

    train, test = _split(episode)
    config = work.policy_config(len(processor.tokenizer))
    if on_codes:
        labeller = work.result("targets")["quantizer"]
        record_quantizer(config, labeller["hash"], labeller["name"])
    model_class = LapaForLatentAction if on_codes else LapaForActionPrediction
    model = stages.fresh_policy(model_class, config, work.vision_tokenizer(), work.seed)
    arguments_class = LapaLatentPretrainingArguments if on_codes else LapaActionFinetuningArguments
    arguments = arguments_class(
        **work.schedule(settings.pretraining_steps, settings.pretraining_learning_rate),
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
    tokenizer = work.vision_tokenizer()
    steps = {role: recording.steps(1) for role, recording in recordings.items()}
    actions = {role: recording.actions[steps[role][1]] for role, recording in recordings.items()}
    processor.fit_actions(actions["labelled"], work.world.name, num_bins=settings.num_bins, gripper_dimension=None)

    def dataset(role: str, **targets: Any) -> Dataset[Any]:
        recording, (episode, frame) = recordings[role], steps[role]
        vision = stages.encode_frames(recording.frames, tokenizer)[frame]
        return EncodedStepDataset(processor, recording.instructions[episode], vision, **targets)

    tokens = {role: np.asarray(processor.encode_actions(a, work.world.name)) for role, a in actions.items()}
    train: Dataset[Any] = dataset("labelled", action_tokens=tokens["labelled"])
    options: dict[str, Any] = {}
    if work.extra.get("keep_latent_head"):
        options["keep_latent_head"] = True
        train = ConcatDataset([train, _latent_examples(work, processor, recordings["labelled"])])
    torch.manual_seed(seed + 1)
    if "pretrained" in work.inputs:
        model = LapaForActionPrediction.from_pretrained(work.inputs["pretrained"] / "model", **options)
        record_latent_policy(model.config, work.inputs["pretrained"] / "model")
    else:
        config = work.policy_config(len(processor.tokenizer))
        model = stages.fresh_policy(LapaForActionPrediction, config, tokenizer, seed)
    arguments = LapaActionFinetuningArguments(
        **work.schedule(int(work.extra["steps"]), float(work.extra["learning_rate"])),
        per_device_train_batch_size=settings.finetuning_batch_size,
        per_device_eval_batch_size=250,
        weight_decay=0.01,
    )
    held = dataset("held_out", action_tokens=tokens["held_out"])
    trainer = LapaActionFinetuningTrainer(model, arguments, train, held, processor=processor)
    log = stages.run_training(trainer, work.folder / "model")
    return {"final_loss": log[-1]["loss"], "majority": _majority(tokens["held_out"]), **_accuracy(trainer)}


def _latent_examples(work: Work, processor: LapaProcessor, recording: stages.Recording) -> Dataset[Any]:
    """The labelled frames with the quantizer's codes, for a policy that goes on to predict them."""
    episode, frame = recording.steps(work.settings.frame_gap)
    labels = _codes(work, recording)
    vision = stages.encode_frames(recording.frames, work.vision_tokenizer())[frame]
    return EncodedStepDataset(processor, recording.instructions[episode], vision, latent_action_codes=labels)


def latent_decoder(work: Work) -> dict[str, Any]:
    """What takes stage 3's place where codes are decoded: the labelled steps train a decoder, the policy stays as it is."""
    from lapa.evaluation.baselines.action_regression import r_squared
    from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
    from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
    from lapa.evaluation.baselines.latent_decoder_policy import write_latent_decoder_policy
    from lapa.evaluation.baselines.latent_decoder_training import LatentDecoderSettings, train_latent_decoder
    from lapa.evaluation.baselines.training import Schedule

    settings, folder = work.settings, work.folder / "decoder"
    labels, actions, episodes = {}, {}, {}
    for role in ("labelled", "held_out"):
        recording = work.recording(role)
        labels[role] = _codes(work, recording)
        episodes[role], first = recording.steps(settings.frame_gap)
        actions[role] = recording.actions[first]
    config = LatentActionDecoderConfig(
        codebook_size=settings.codebook_size,
        num_latent_tokens=settings.num_latent_tokens,
        action_dim=work.world.action_dim,
        quantizer_hash=hash_weights(work.inputs["quantizer"] / "model"),
        quantizer_name=work.inputs["quantizer"].name,
    )
    # All labelled episodes are trained on, as by the other methods.
    training = LatentDecoderSettings(
        Schedule(settings.latent_decoder_steps, 64, 3e-3, weight_decay=0.01), held_out_share=0.0, keep_best=False
    )
    log = train_latent_decoder(
        labels["labelled"], actions["labelled"], config, training, work.seed, folder, episodes["labelled"]
    )
    predicted = LatentActionDecoder.from_pretrained(folder).predict_actions(torch.from_numpy(labels["held_out"]))
    write_latent_decoder_policy(work.inputs["pretrained"] / "model", folder, work.folder / "model")
    return {
        "final_loss": log[-1]["loss"],
        "decoder_r2": float(np.mean(r_squared(predicted.numpy(), actions["held_out"]))),
    }


def video_model(work: Work) -> dict[str, Any]:
    """UniPi: a video model of the video, which then goes on with the labelled episodes, because the arm is what it must draw."""
    from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
    from lapa.evaluation.baselines.training import Schedule
    from lapa.evaluation.baselines.unipi import write_unipi
    from lapa.evaluation.baselines.video_diffusion_training import VideoSettings, clip_index, train_video_model

    settings = work.settings
    tokenizer = work.text_tokenizer()
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


def _open(work: Work, role: str, temperature: float) -> NamedPolicy:
    folder = work.inputs[role] / "model"
    if _is_unipi(folder):
        return open_policy(str(folder), work.world.action_dim)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
    # A decoder of codes has the statistics of its actions in itself.
    key = None if (folder / DECODER_FOLDER).is_dir() else work.world.name
    return open_policy(str(folder), work.world.action_dim, key, work.device, **sampling)


def _is_unipi(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] == UNIPI


def _play(world: World, policy: NamedPolicy, suite: Suite, folder: Path, num_shown: int) -> Evaluation:
    # One process of its own where the simulator may crash: each job has one core.
    processes = min(1, suite.num_processes())
    settings = EvaluationSettings(num_environments=world.side_by_side, num_processes=processes, num_shown=num_shown)
    evaluation = Evaluation(suite, policy, folder, settings)
    evaluation.run()
    return evaluation


def choose(work: Work) -> dict[str, Any]:
    """Which finetuning is played, at which temperature: the one that solves most on starts that no reported number uses."""
    split = work.world.splits[0]
    suite = work.world.suite(
        work.settings, "validation", (split,), work.settings.validation_rollouts, VALIDATION_SEEDS
    )
    roles = [role for role in work.inputs if role.startswith("policy")]
    if roles == ["policy"] and _is_unipi(work.inputs["policy"] / "model"):  # nothing to choose
        return {"policy": "policy", "temperature": 0.0, "successes": {}}
    successes: dict[str, int] = {}
    options: dict[str, tuple[str, float]] = {}
    for role in roles:
        for temperature in work.settings.temperatures:
            name = f"{role}-temperature-{temperature:g}"
            report = _play(work.world, _open(work, role, temperature), suite, work.folder / name, 0).report()
            successes[name], options[name] = report["groups"][split]["successes"], (role, temperature)
    best = max(successes, key=lambda name: successes[name])  # the first of equals
    return {"policy": options[best][0], "temperature": options[best][1], "successes": successes}


def play(work: Work) -> dict[str, Any]:
    """The reported episodes."""
    rollouts = work.settings.rollouts_per_family
    suite = work.world.suite(work.settings, "study", tuple(work.extra["splits"]), rollouts, EVALUATION_SEEDS)
    name = work.extra.get("policy_name")
    if name is not None:
        policy = open_policy(name, suite.action_dim(), action_bounds=suite.action_bounds())
    else:
        chosen = work.result("choose")
        policy = _open(work, chosen["policy"], chosen["temperature"])
    report = _play(work.world, policy, suite, work.folder / "evaluation", 1).report()
    return {"cells": report["cells"]}


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    function.__name__: function
    for function in (video, labelled, held_out, vision_tokenizer, image_tokens, quantizer, codes, inverse_dynamics, pseudo_actions,
                     pretrain, finetune, latent_decoder, video_model, choose, play)
}  # fmt: skip


__all__ = ["JOBS", "Work"]
