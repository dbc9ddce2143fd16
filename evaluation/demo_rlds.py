"""`lapa demo --data`: the three stages on a real RLDS folder, judged offline on held-out episodes."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.data.atomic_files import write_atomically
from lapa.data.encoded_steps import EncodedStepDataset
from lapa.data.frame_pairs import FramePairDataset
from lapa.data.rlds import RldsSource
from lapa.evaluation import report as page
from lapa.evaluation.demo import Progress, versions
from lapa.evaluation.demo_report import LABELS
from lapa.evaluation.demo_stages import (
    FrameTable,
    encode_frames,
    fresh_policy,
    run_training,
    schedule,
    small_policy_config,
)
from lapa.evaluation.demo_tokenizer import build_tokenizer
from lapa.evaluation.small_vision_tokenizer import train_vision_tokenizer
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import (
    LapaActionFinetuningArguments,
    LapaLatentPretrainingArguments,
    LapaQuantizerTrainingArguments,
)
from lapa.training.label_latent_actions import hash_weights, label_latent_actions
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
from lapa.training.lineage import model_name, record_latent_policy, record_quantizer
from lapa.training.metrics import action_error, mean_action_error, token_accuracy
from lapa.training.quantizer_trainer import LapaQuantizerTrainer

FRAME_GAP_SECONDS = 0.6  # of the paper, for robot data
NUM_PICTURES = 8


@dataclass(frozen=True)
class RldsSettings:
    """Sizes for a folder of some tens of short episodes; larger data wants larger models and more steps."""

    image_size: int = 64
    held_out_share: float = 0.2
    tokenizer_codes: int = 256
    tokenizer_steps: int = 400
    codebook_size: int = 8
    num_latent_tokens: int = 4
    quantizer_steps: int = 400
    pretraining_steps: int = 300
    finetuning_steps: int = 200
    num_bins: int = 32
    hidden_size: int = 96
    num_layers: int = 3
    # About a million parameters. These have not been varied and are no part of what identifies a run.
    num_heads: ClassVar[int] = 3
    initializer_range: ClassVar[float] = 0.08
    embedding_initializer_range: ClassVar[float] = 0.5
    rope_theta: ClassVar[float] = 100.0

    def quick(self) -> "RldsSettings":
        """A few seconds of everything."""
        steps = {name: 3 for name in self.__dataclass_fields__ if name.endswith("_steps")}
        return RldsSettings(**{**asdict(self), **steps})


@dataclass(frozen=True)
class StepTable(FrameTable):
    """Steps of episodes with an instruction, one frame each.

    Args:
        frames, lengths: As in [`FrameTable`].
        instructions: (num_steps,) sentences.
        actions: (num_steps, action_dim) float32 in the data's units.
    """

    instructions: np.ndarray
    actions: np.ndarray


def load_steps(path: Path, camera: str | None, frequency: float, image_size: int) -> tuple[str, list[Any]]:
    """Name of the data set and, per usable episode, its frames, instruction and actions."""
    options: dict[str, Any] = {"split": "train", "frequency": frequency, "action_transform": None}
    camera = RldsSource(path, **options).cameras[0] if camera is None else camera
    source = RldsSource(path, cameras=[camera], **options)
    # The policy's own processor, so that training sees what serving will.
    resizer, episodes = LapaImageProcessor(size=image_size), []
    for episode in source:
        if episode.action is None or episode.instruction is None or camera not in episode.frames:
            continue
        frames = [resizer.resize_image(episode.frame(camera, step)) for step in range(episode.num_steps)]
        episodes.append((np.stack(frames), episode.instruction, episode.action))
    if len(episodes) < 5:
        raise ValueError(
            f"--data {path} has {len(episodes)} episodes with actions and an instruction, at least 5 are needed."
        )
    print(f"{source.folder.name}: {len(episodes)} episodes from camera {camera}, "
          f"{source.num_episodes - len(episodes)} left out (no instruction, no action or a blank camera)")  # fmt: skip
    return source.folder.name, episodes


def table(episodes: Sequence[Any]) -> StepTable:
    """Lay episodes end to end."""
    return StepTable(
        frames=np.concatenate([frames for frames, _, _ in episodes]),
        lengths=np.array([len(frames) for frames, _, _ in episodes]),
        instructions=np.concatenate([np.repeat(np.array([text], dtype=object), len(f)) for f, text, _ in episodes]),
        actions=np.concatenate([actions for _, _, actions in episodes]).astype(np.float32),
    )


def quantizer_config(settings: RldsSettings) -> LapaQuantizerConfig:
    """A tiny quantizer with the published number of tokens and codes."""
    return LapaQuantizerConfig(
        hidden_size=64,
        codebook_dim=8,
        codebook_size=settings.codebook_size,
        num_latent_tokens=settings.num_latent_tokens,
        image_size=settings.image_size,
        patch_size=8,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_attention_heads=4,
        head_dim=16,
        residual_decoding=True,
        interleave_latent_tokens=False,
    )


class RldsDemo:
    """The stages over one folder; every method leaves its result in `output`."""

    def __init__(
        self, settings: RldsSettings, seed: int, train: StepTable, held_out: StepTable, gap: int, output: Path
    ):
        self.settings, self.seed, self.output, self.frame_gap = settings, seed, output, gap
        self.train, self.held_out = train, held_out
        self.paths = {
            name: output / name for name in ("vision_tokenizer", "quantizer", "pretrained", "lapa", "scratch")
        }

    def policy_config(self, text_vocab_size: int) -> LapaConfig:
        """A Llama of about a million parameters."""
        vision = LapaVisionTokenizerConfig.from_pretrained(self.paths["vision_tokenizer"])
        return small_policy_config(self.settings, vision, text_vocab_size, self.train.actions.shape[1])

    def processor(self) -> LapaProcessor:
        """Processor with a tokenizer made from the training instructions and bins from the training actions."""
        sentences = sorted(set(self.train.instructions.tolist()))
        tokenizer = build_tokenizer(self.output / "tokenizer.model", [], sentences)
        config = self.policy_config(len(tokenizer))
        processor = LapaProcessor.from_config(config, LapaImageProcessor(size=self.settings.image_size), tokenizer)
        gripper = "last" if set(np.unique(self.train.actions[:, -1].round(3))) <= {0.0, 1.0} else None
        processor.fit_actions(self.train.actions, "data", num_bins=self.settings.num_bins, gripper_dimension=gripper)
        return processor

    def train_quantizer(self) -> list[dict[str, float]]:
        """Stage 1."""
        torch.manual_seed(self.seed)
        arguments = LapaQuantizerTrainingArguments(
            **schedule(self.settings.quantizer_steps, 2e-3, self.seed, self.paths["quantizer"]),
            per_device_train_batch_size=16,
            num_sample_reconstructions=0,
        )
        model, dataset = LapaQuantizer(quantizer_config(self.settings)), self.pairs(self.train)
        return run_training(LapaQuantizerTrainer(model, arguments, dataset), self.paths["quantizer"])

    def pairs(self, steps: StepTable) -> FramePairDataset:
        """Frame pairs of a table."""
        return FramePairDataset(steps.episodes(), self.frame_gap)

    def codes(self, steps: StepTable) -> np.ndarray:
        """Latent action codes of every pair."""
        return label_latent_actions(LapaQuantizer.from_pretrained(self.paths["quantizer"]), self.pairs(steps))

    def vision_codes(self, steps: StepTable) -> np.ndarray:
        """Image tokens of every frame."""
        return encode_frames(steps.frames, LapaVisionTokenizer.from_pretrained(self.paths["vision_tokenizer"]))

    def fresh(self, model_class: type[nn.Module], processor: LapaProcessor) -> Any:
        """A policy with a fresh trunk and the trained vision tokenizer."""
        config = self.policy_config(len(processor.tokenizer))
        tokenizer = LapaVisionTokenizer.from_pretrained(self.paths["vision_tokenizer"])
        return fresh_policy(model_class, config, tokenizer, self.seed)

    def pretrain(self) -> list[dict[str, float]]:
        """Stage 2."""
        processor, (_, chosen) = self.processor(), self.train.steps(self.frame_gap)
        dataset = EncodedStepDataset(
            processor,
            self.train.instructions[chosen],
            self.vision_codes(self.train)[chosen],
            latent_action_codes=self.codes(self.train),
        )
        arguments = LapaLatentPretrainingArguments(
            **schedule(self.settings.pretraining_steps, 1e-3, self.seed, self.paths["pretrained"]),
            per_device_train_batch_size=16,
        )
        model = self.fresh(LapaForLatentAction, processor)
        record_quantizer(model.config, hash_weights(self.paths["quantizer"]), model_name(self.paths["quantizer"]))
        trainer = LapaLatentPretrainingTrainer(model, arguments, dataset, processor=processor)
        return run_training(trainer, self.paths["pretrained"])

    def finetune(self, name: str) -> list[dict[str, float]]:
        """Stage 3, from the pretrained folder (`lapa`) or from a fresh trunk (`scratch`)."""
        processor = self.processor()
        dataset = self.labelled(processor, self.train)
        if name == "lapa":
            torch.manual_seed(self.seed)
            model = LapaForActionPrediction.from_pretrained(self.paths["pretrained"])
            record_latent_policy(model.config, self.paths["pretrained"])
        else:
            model = self.fresh(LapaForActionPrediction, processor)
        arguments = LapaActionFinetuningArguments(
            **schedule(self.settings.finetuning_steps, 1e-3, self.seed, self.paths[name]),
            per_device_train_batch_size=16,
        )
        trainer = LapaActionFinetuningTrainer(model, arguments, dataset, processor=processor)
        return run_training(trainer, self.paths[name])

    def labelled(self, processor: LapaProcessor, steps: StepTable) -> EncodedStepDataset:
        """Steps with action tokens."""
        tokens = processor.encode_actions(steps.actions, "data")
        return EncodedStepDataset(processor, steps.instructions, self.vision_codes(steps), action_tokens=tokens)

    @torch.no_grad()
    def evaluate(self, name: str) -> dict[str, Any]:
        """Decode actions for every held-out step, greedily, and compare them with the recorded ones."""
        model = LapaForActionPrediction.from_pretrained(self.paths[name]).eval()
        processor = LapaProcessor.from_pretrained(self.paths[name])
        predicted = []
        vision = self.vision_codes(self.held_out)
        for start in range(0, len(vision), 64):
            stop = min(start + 64, len(vision))
            inputs = processor(
                vision_codes=torch.from_numpy(vision[start:stop]),
                instruction=self.held_out.instructions[start:stop].tolist(),
                target="action",
                padding="longest",
                return_tensors="pt",
            )
            predicted.append(model.predict_action_tokens(**inputs).numpy())
        tokens = np.concatenate(predicted)
        decoded = processor.decode_actions(tokens, "data")
        true_tokens = processor.encode_actions(self.held_out.actions, "data")
        return self.metrics(decoded, tokens, true_tokens)

    def metrics(self, actions: np.ndarray, tokens: np.ndarray, true_tokens: np.ndarray) -> dict[str, Any]:
        """Token accuracy and mean absolute error, per dimension and pooled."""
        accuracy, error = token_accuracy(tokens, true_tokens), action_error(actions, self.held_out.actions)
        return {
            "token_accuracy": float(np.mean(accuracy)),
            "action_error": float(np.mean(error)),
            "token_accuracy_per_dimension": np.asarray(accuracy).tolist(),
            "action_error_per_dimension": np.asarray(error).tolist(),
        }

    def mean_action(self) -> dict[str, Any]:
        """The baseline that always predicts the mean training action."""
        processor = self.processor()
        mean = np.broadcast_to(self.train.actions.mean(0), self.held_out.actions.shape)
        result = self.metrics(
            mean, processor.encode_actions(mean, "data"), processor.encode_actions(self.held_out.actions, "data")
        )
        expected = mean_action_error(self.train.actions, self.held_out.actions)
        assert np.allclose(result["action_error_per_dimension"], expected, atol=1e-6)
        return result

    @torch.no_grad()
    def reconstructions(self) -> str:
        """Held-out pairs: first frame, second frame, decoded second frame."""
        quantizer = LapaQuantizer.from_pretrained(self.paths["quantizer"]).eval()
        dataset = self.pairs(self.held_out)
        chosen = np.linspace(0, len(dataset) - 1, NUM_PICTURES).astype(int)
        pixels = torch.stack([dataset[int(i)]["frames"] for i in chosen]).float() / 255
        decoded = quantizer.decode(pixels[:, 0], quantizer.encode(pixels).latent_action_codes)
        first, second = quantizer.align(pixels).unbind(1)
        rows = [page.to_uint8(frames.numpy()) for frames in (first, second, decoded)]
        return page.png(page.grid([list(row) for row in rows]), 2)


def run_rlds_demo(args: argparse.Namespace) -> int:
    """`lapa demo --data RLDS_DIR`."""
    settings = RldsSettings().quick() if args.quick else RldsSettings()
    if args.frequency <= 0:
        raise ValueError(f"--frequency must be positive, got {args.frequency}.")
    name, episodes = load_steps(args.data, args.camera, args.frequency, settings.image_size)
    identity = {
        "seed": args.seed,
        "data": str(args.data.resolve()),
        "camera": args.camera,
        "frequency": args.frequency,
        "settings": asdict(settings),
    }
    progress = Progress(args.output, identity, args.restart)
    order = np.random.default_rng(args.seed).permutation(len(episodes))
    num_held_out = max(1, round(settings.held_out_share * len(episodes)))
    held_out, train = (table([episodes[i] for i in part]) for part in (order[:num_held_out], order[num_held_out:]))
    gap = max(1, round(FRAME_GAP_SECONDS * args.frequency))
    demo = RldsDemo(settings, args.seed, train, held_out, gap, args.output)
    logs = {
        "vision tokenizer": progress.stage(
            "train the vision tokenizer",
            lambda: train_vision_tokenizer(
                train.frames,
                settings.tokenizer_codes,
                settings.tokenizer_steps,
                args.seed,
                demo.paths["vision_tokenizer"],
            ),
        ),
        "quantizer": progress.stage("train the quantizer", demo.train_quantizer),
        "pretraining": progress.stage("pretrain", demo.pretrain),
    }
    methods = {}
    for method in ("lapa", "scratch"):
        logs[method] = progress.stage(f"finetune {method}", lambda method=method: demo.finetune(method))
        methods[method] = progress.stage(f"evaluate {method}", lambda method=method: demo.evaluate(method))
    methods["mean_action"] = demo.mean_action()
    report = {
        "data": name,
        "seed": args.seed,
        "minutes": sum(progress.seconds.values()) / 60,
        "versions": versions(),
        "train_episodes": len(train.lengths),
        "held_out_episodes": len(held_out.lengths),
        "held_out_steps": len(held_out.actions),
        "frame_gap": gap,
        "methods": methods,
        "stage_seconds": progress.seconds,
        "settings": asdict(settings),
    }
    write_rlds_report(report, logs, demo, args.output)
    print_rlds_summary(report, args.output)
    return 0


def write_rlds_report(report: dict[str, Any], logs: dict[str, Any], demo: RldsDemo, output: Path) -> None:
    """`report.json` and `report.html`."""
    finetuning = {LABELS[name].split(" (")[0]: logs[name] for name in ("lapa", "scratch")}
    html = page.render(
        "rlds_report.html",
        report=report,
        labels={**LABELS, "mean_action": "always the mean action"},
        reconstructions=demo.reconstructions(),
        tokenizer_curve=page.curves({"tokenizer": logs["vision tokenizer"]}, "loss", "loss"),
        quantizer_curve=page.curves({"quantizer": logs["quantizer"]}, "loss", "loss"),
        pretraining_curve=page.curves({"pretraining": logs["pretraining"]}, "latent_loss", "cross entropy"),
        finetuning_curve=page.curves(finetuning, "action_loss", "cross entropy"),
    )
    write_atomically(output / "report.html", html.encode())
    write_atomically(output / "report.json", json.dumps(report, indent=1).encode())


def print_rlds_summary(report: dict[str, Any], output: Path) -> None:
    """The table on the terminal."""
    print(f"\n{report['held_out_steps']} held-out steps of {report['held_out_episodes']} episodes of {report['data']}")
    for name, metrics in report["methods"].items():
        print(
            f"{name:12} token accuracy {100 * metrics['token_accuracy']:5.1f}%   mean absolute error "
            f"{metrics['action_error']:.4f} (units of the data)"
        )
    print(os.fspath(output / "report.html"))
