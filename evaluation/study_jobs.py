"""What the jobs of a study do. Each reads the folders of others, writes its own, and returns numbers for the report."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset

from lapa.data.encoded_steps import EncodedStepDataset
from lapa.evaluation import demo_stages as stages
from lapa.evaluation.demo_report import code_motion
from lapa.evaluation.demo_settings import LABELLED_SEEDS, SEED_STRIDE, VIDEO_SEEDS
from lapa.evaluation.small_vision_tokenizer import train_vision_tokenizer
from lapa.evaluation.study_baseline_jobs import inverse_dynamics, latent_decoder, pseudo_actions, video_model
from lapa.evaluation.study_playing import choose, play
from lapa.evaluation.study_work import Work, quantizer_codes
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import LapaActionFinetuningArguments, LapaLatentPretrainingArguments
from lapa.training.label_latent_actions import hash_weights
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
from lapa.training.lineage import record_latent_policy, record_quantizer
from lapa.training.metrics import perplexity

# Start states beyond every other's: of episodes for token accuracy, and of the pictures of an image tokenizer.
HELD_OUT_SEEDS, TOKENIZER_SEEDS = 250_000_000, 300_000_000
# Every so many-th episode of a video is kept from stage 2, to measure its accuracy.
HELD_OUT_EVERY = 50
NUM_HELD_OUT_STEPS = 1000


def video(work: Work) -> dict[str, Any]:
    """Episodes without labels. Actions are kept for those methods and measurements that may see them."""
    embodiment = work.extra["embodiment"]
    recording = work.world.record(
        work.settings,
        work.settings.video_episodes,
        VIDEO_SEEDS + work.seed * SEED_STRIDE,
        embodiment,
        with_actions=work.world.has_actions(embodiment),
        num_processes=work.machine.simulators,
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "frames": len(recording.frames)}


def labelled(work: Work) -> dict[str, Any]:
    """The few episodes with actions."""
    wanted = work.extra["labelled"]
    # As many in all, whether they are of one family or of all.
    total = work.settings.labelled_episodes_per_family * len(work.settings.families)
    episodes = {family: total // len(wanted) for family in wanted}
    first, embodiment = LABELLED_SEEDS + work.seed * SEED_STRIDE, work.world.embodiments[0]
    recording = work.world.record(
        work.settings, episodes, first, embodiment, with_actions=True, num_processes=work.machine.simulators
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths), "steps": int(len(recording.frames) - len(recording.lengths))}


def held_out(work: Work) -> dict[str, Any]:
    """Episodes with actions that nothing is trained on."""
    episodes = dict.fromkeys(work.settings.families, work.settings.held_out_episodes)
    embodiment, processes = work.world.embodiments[0], work.machine.simulators
    recording = work.world.record(
        work.settings, episodes, HELD_OUT_SEEDS, embodiment, with_actions=True, num_processes=processes
    )
    recording.save(work.folder / "recording.npz")
    return {"episodes": len(recording.lengths)}


def vision_tokenizer(work: Work) -> dict[str, Any]:
    """The image tokenizer of all policies, as the published VQGAN is: trained on pictures of its own, once for all seeds."""
    settings, world = work.settings, work.world
    episodes = dict.fromkeys(settings.families, settings.tokenizer_episodes)
    embodiment, processes = world.embodiments[0], work.machine.simulators
    frames = world.record(settings, episodes, TOKENIZER_SEEDS, embodiment, False, processes).frames
    log = train_vision_tokenizer(
        frames, settings.tokenizer_codes, settings.tokenizer_steps, 0, work.folder / "model", work.device
    )
    trained = LapaVisionTokenizer.from_pretrained(work.folder / "model").eval().to(work.device)
    codes = stages.encode_frames(frames, trained)
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
    labels = quantizer_codes(work, recording)
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
    labels = quantizer_codes(work, recording)
    vision = stages.encode_frames(recording.frames, work.vision_tokenizer())[frame]
    return EncodedStepDataset(processor, recording.instructions[episode], vision, latent_action_codes=labels)


JOBS: dict[str, Callable[[Work], dict[str, Any]]] = {
    function.__name__: function
    for function in (video, labelled, held_out, vision_tokenizer, image_tokens, quantizer, codes, inverse_dynamics, pseudo_actions,
                     pretrain, finetune, latent_decoder, video_model, choose, play)
}  # fmt: skip


__all__ = ["JOBS"]
