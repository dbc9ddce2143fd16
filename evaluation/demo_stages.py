"""The demo's stages: record, quantize, label, pretrain, finetune, play."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.data.atomic_files import atomic_file, write_atomically
from lapa.data.encoded_steps import EncodedStepDataset
from lapa.data.frame_pairs import FramePairDataset
from lapa.evaluation.demo_settings import (
    EVALUATION_SEEDS,
    LABELLED_SEEDS,
    SEED_STRIDE,
    VIDEO_SEEDS,
    DemoSettings,
    PlayingSettings,
)
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop import CONTROL_FREQUENCY, TabletopEnvironment
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.environments.tabletop_recording import TabletopEpisode, record_episode
from lapa.evaluation.rollout import Controller, PolicyController, Rollout, roll_out
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.processing_lapa import LapaProcessor
from lapa.serving.policy import LapaPolicy
from lapa.training.action_finetuning_trainer import LapaActionFinetuningTrainer
from lapa.training.arguments import (
    LapaActionFinetuningArguments,
    LapaLatentPretrainingArguments,
    LapaQuantizerTrainingArguments,
)
from lapa.training.label_latent_actions import hash_weights, label_latent_actions
from lapa.training.latent_pretraining_trainer import LapaLatentPretrainingTrainer
from lapa.training.lineage import model_name, record_latent_policy, record_quantizer
from lapa.training.quantizer_trainer import CodebookCollapse, LapaQuantizerTrainer
from lapa.training.safe_checkpoints import last_checkpoint
from lapa.training.trained_settings import SETTINGS_FILE

if TYPE_CHECKING:
    from lapa.evaluation.demo_rlds import RldsSettings

UNNORM_KEY = "tabletop"
# The image tokenizer that ships with the package.
VISION_TOKENIZER = Path(__file__).parent / "assets" / "tabletop_vision_tokenizer"
ENCODE_BATCH = 256
# Checkpoints per training, so that an interrupted one loses little.
CHECKPOINTS_PER_TRAINING = 5
EPISODES_SHOWN_PER_FAMILY = 2
ROLLOUTS_SIDE_BY_SIDE = 100


@dataclass(frozen=True)
class FrameTable:
    """Frames of some episodes, laid end to end.

    Args:
        frames: (num_frames, height, width, 3) uint8.
        lengths: (num_episodes,) frames per episode.
    """

    frames: np.ndarray
    lengths: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        """(num_episodes,) index of each episode's first frame."""
        return np.cumsum(self.lengths) - self.lengths

    def episodes(self) -> list[np.ndarray]:
        """Frames of each episode."""
        return np.split(self.frames, np.cumsum(self.lengths)[:-1])

    def steps(self, frame_gap: int) -> tuple[np.ndarray, np.ndarray]:
        """Episode and frame index of every step that has a frame `frame_gap` later, in `FramePairDataset`'s order."""
        counts = np.maximum(self.lengths - frame_gap, 0)
        episode = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return episode, self.starts[episode] + within


@dataclass(frozen=True)
class Recording(FrameTable):
    """What was recorded in the simulator.

    Args:
        frames, lengths: As in [`FrameTable`].
        instructions: (num_episodes,) sentences.
        effector: (num_frames, 2), in MetaWorld (num_frames, 3), metres; for the report only, no training sees it.
        actions: (num_frames, action_dim) float32 of each frame's step, zero at an episode's last frame; empty without
            actions.
    """

    instructions: np.ndarray
    effector: np.ndarray
    actions: np.ndarray

    def save(self, path: Path) -> None:
        """Write atomically."""
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: Path) -> "Recording":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def environment_options(settings: DemoSettings, embodiment: str = "arm") -> dict[str, Any]:
    """Options of the demo's simulator."""
    return {
        "families": settings.families,
        "embodiment": embodiment,
        "image_size": settings.image_size,
        "num_blocks": settings.num_blocks,
        "thresholds": settings.thresholds,
    }


def make_environment(settings: DemoSettings, embodiment: str = "arm") -> TabletopEnvironment:
    """The demo's simulator."""
    return TabletopEnvironment(**environment_options(settings, embodiment))


def record(
    settings: DemoSettings, episodes: dict[str, int], first_seed: int, embodiment: str, with_actions: bool
) -> Recording:
    """Record the expert: `episodes[family]` episodes of each family from consecutive seeds."""
    environment, recorded = make_environment(settings, embodiment), []
    jobs = [(family, index) for family, count in episodes.items() for index in range(count)]
    for number, (family, _) in enumerate(tqdm(jobs, desc="recording", unit="episode")):
        recorded.append(
            record_episode(environment, None, first_seed + number, noise=settings.expert_noise, family=family)
        )
    return join_episodes(recorded, with_actions)


def join_episodes(episodes: Sequence[TabletopEpisode], with_actions: bool) -> Recording:
    """Lay episodes end to end; without actions they are dropped, not hidden."""
    actions = []
    for episode in episodes if with_actions else ():
        assert episode.actions is not None
        actions.append(np.concatenate([episode.actions, np.zeros_like(episode.actions[:1])]))
    return Recording(
        frames=np.concatenate([episode.frames for episode in episodes]),
        lengths=np.array([len(episode.frames) for episode in episodes]),
        instructions=np.array([episode.instruction for episode in episodes]),
        effector=np.concatenate([episode.effector_positions for episode in episodes]),
        actions=np.concatenate(actions) if actions else np.zeros((0, 2), dtype=np.float32),
    )


def record_video(settings: DemoSettings, seed: int, embodiment: str) -> Recording:
    """The action-free episodes."""
    return record(settings, settings.video_episodes, VIDEO_SEEDS + seed * SEED_STRIDE, embodiment, with_actions=False)


def record_labelled(settings: DemoSettings, seed: int) -> Recording:
    """The few episodes with actions, of the embodiment that is to be controlled."""
    episodes = dict.fromkeys(settings.families, settings.labelled_episodes_per_family)
    return record(settings, episodes, LABELLED_SEEDS + seed * SEED_STRIDE, "arm", with_actions=True)


def recording_codes(recording: Recording, quantizer: Path, frame_gap: int, device: str = "cpu") -> np.ndarray:
    """A quantizer's labels (num_pairs, num_latent_tokens) int64 of all pairs of a recording, in the order of `steps`."""
    model = LapaQuantizer.from_pretrained(quantizer).to(device)
    return label_latent_actions(model, FramePairDataset(recording.episodes(), frame_gap), batch_size=256)


def quantizer_config(settings: DemoSettings) -> LapaQuantizerConfig:
    """A tiny quantizer: one spatial and one temporal layer, decoding the change of the first frame."""
    fields = {
        "hidden_size": settings.quantizer_hidden_size,
        "codebook_dim": 8,
        "codebook_size": settings.codebook_size,
        "num_latent_tokens": settings.num_latent_tokens,
        "image_size": settings.image_size,
        "patch_size": 4,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_attention_heads": 3,
        "head_dim": 16,
        "action_injection": "additive",
        "residual_decoding": True,
        "interleave_latent_tokens": False,
    }
    return LapaQuantizerConfig(**fields | settings.quantizer_options)


def schedule(steps: int, learning_rate: float, seed: int, output: Path, device: str = "cpu") -> dict[str, Any]:
    """Training arguments that all stages share; `device` is `cpu`, or anything else for the GPU that transformers finds."""
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.05},
        "warmup_steps": min(50, steps // 10),
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, steps // 60),
        "save_steps": max(1, steps // CHECKPOINTS_PER_TRAINING),
        "save_total_limit": 1,
        "seed": seed,
        "use_cpu": device == "cpu",
        "report_to": "tensorboard",
        "disable_tqdm": False,
    }


class OneLineProgress(ProgressCallback):
    """A progress bar that shows the latest numbers instead of printing every log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Puts the loss beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}", refresh=False)


def run_training(trainer: Any, output: Path) -> list[dict[str, float]]:
    """Train, from the last checkpoint if there is one, save the model, and return the log."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(OneLineProgress)
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    trainer.save_model()
    return [row for row in trainer.state.log_history if "loss" in row]


def train_quantizer(
    settings: DemoSettings,
    seed: int,
    video: Recording,
    output: Path,
    frequency: float = CONTROL_FREQUENCY,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Stage 1, started again from another seed where the codebook collapses; needs no label to see that."""
    train = partial(_train_quantizer, settings, frequency=frequency, device=device)
    if output.is_dir():  # interrupted after the training had ended: its last checkpoint gives the log
        return train(seed, video, output)
    for attempt in range(1, settings.quantizer_attempts + 1):
        folder = output.with_name(f"{output.name}-attempt-{attempt}")
        collapsed = folder / "collapsed.txt"
        if collapsed.is_file():
            continue
        try:
            log = train(seed + 1000 * (attempt - 1), video, folder)
        except CodebookCollapse as collapse:
            print(f"attempt {attempt}: {collapse}")
            collapsed.write_text(str(collapse), encoding="utf-8")
            continue
        os.replace(folder, output)
        return log
    raise CodebookCollapse(
        f"the codebook collapsed in all {settings.quantizer_attempts} attempts; try another `--seed` (now {seed})."
    )


def _train_quantizer(
    settings: DemoSettings, seed: int, video: Recording, output: Path, frequency: float, device: str
) -> list[dict[str, float]]:
    torch.manual_seed(seed)
    arguments = LapaQuantizerTrainingArguments(
        **schedule(settings.quantizer_steps, settings.quantizer_learning_rate, seed, output, device)
        # The pixels that change are so few that the loss starts at 0.006, and its gradient is as small.
        | {"max_grad_norm": 0.006, "adam_epsilon": 1e-10},
        per_device_train_batch_size=settings.quantizer_batch_size,
        codebook_update_interval=25,
        min_perplexity=settings.quantizer_min_perplexity,
        min_perplexity_from=settings.quantizer_min_perplexity_from,
        num_sample_reconstructions=0,
    )
    dataset = FramePairDataset(video.episodes(), settings.frame_gap)
    log = run_training(LapaQuantizerTrainer(LapaQuantizer(quantizer_config(settings)), arguments, dataset), output)
    trained = {"frame_gap": settings.frame_gap, "frame_gap_seconds": None, "frequency": frequency}
    write_atomically(output / SETTINGS_FILE, json.dumps(trained, indent=1).encode())
    return log


def load_vision_tokenizer() -> LapaVisionTokenizer:
    """The image tokenizer that ships with the package, in fp32."""
    return LapaVisionTokenizer.from_pretrained(VISION_TOKENIZER, dtype=torch.float32).eval()


@torch.no_grad()
def encode_frames(frames: np.ndarray, tokenizer: LapaVisionTokenizer) -> np.ndarray:
    """Vision codes (num_frames, num_image_tokens) int64 of (num_frames, height, width, 3) uint8."""
    codes = []
    for start in tqdm(range(0, len(frames), ENCODE_BATCH), desc="image tokens", unit="batch"):
        pixels = torch.from_numpy(frames[start : start + ENCODE_BATCH]).to(tokenizer.device)
        codes.append(tokenizer.image_tokens(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).cpu())
    return torch.cat(codes).numpy()


def policy_config(settings: DemoSettings, text_vocab_size: int) -> LapaConfig:
    """A Llama of about half a million parameters over 16 image tokens."""
    vision = load_vision_tokenizer().config
    return small_policy_config(settings, vision, text_vocab_size, action_dim=2, text_loss_weight=0.0)


def small_policy_config(
    settings: "DemoSettings | RldsSettings",
    vision: LapaVisionTokenizerConfig,
    text_vocab_size: int,
    action_dim: int,
    **fields: Any,
) -> LapaConfig:
    """The policy of either demo: a small Llama that embeds the place of an image token in its image.

    Args:
        settings: Sizes.
        vision: Configuration of the vision tokenizer.
        text_vocab_size: Rows of the text segment.
        action_dim: Dimensions of an action.
        fields: Further fields of [`LapaConfig`].
    """
    return LapaConfig(
        text_config={
            "vocab_size": text_vocab_size,
            "hidden_size": settings.hidden_size,
            "intermediate_size": 3 * settings.hidden_size,
            "num_hidden_layers": settings.num_layers,
            "num_attention_heads": settings.num_heads,
            "initializer_range": settings.initializer_range,
            "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        },
        vision_tokenizer_config=vision.to_dict(),
        vision_vocab_size=vision.codebook_size + 2,
        latent_vocab_size=settings.codebook_size,
        num_latent_tokens=settings.num_latent_tokens,
        action_vocab_size=settings.num_bins,
        action_dim=action_dim,
        embedding_initializer_range=settings.embedding_initializer_range,
        vision_position_embeddings=True,
        **fields,
    )


def fresh_policy(model_class: type, config: LapaConfig, vision_tokenizer: LapaVisionTokenizer, seed: int) -> Any:
    """A policy with a fresh trunk and a trained vision tokenizer."""
    torch.manual_seed(seed)
    model = model_class(config)
    model.model.vision_tokenizer.load_state_dict(vision_tokenizer.state_dict())
    start_vision_embeddings_from_codebook(model, config.embedding_initializer_range)
    return model


@torch.no_grad()
def start_vision_embeddings_from_codebook(model: LapaForLatentAction | LapaForActionPrediction, std: float) -> None:
    """Give vision codes that look alike embeddings that are alike: a random projection of the tokenizer's codebook."""
    codebook = model.model.vision_tokenizer.codebook.weight.float()
    centred = codebook - codebook.mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    # Between the raw codebook, whose first directions drown the rest, and a fully whitened one.
    features = left * singular.sqrt()
    hidden_size = model.config.text_config.hidden_size
    features = features / features.std(0).square().sum().sqrt() * hidden_size**0.5 * std
    projection = torch.linalg.qr(torch.randn(hidden_size, features.shape[1]))[0]
    start = model.config.vision_offset
    model.model.embed_tokens.weight[start : start + len(codebook)] = features @ projection.t()


def pretrain(
    settings: DemoSettings,
    seed: int,
    video: Recording,
    codes: np.ndarray,
    processor: LapaProcessor,
    output: Path,
    quantizer: Path,
) -> list[dict[str, float]]:
    """Stage 2: predict the codes (num_pairs, num_latent_tokens) of a quantizer's folder from image and instruction."""
    episode, frame = video.steps(settings.frame_gap)
    dataset = EncodedStepDataset(
        processor,
        video.instructions[episode],
        encode_frames(video.frames, load_vision_tokenizer())[frame],
        latent_action_codes=codes,
    )
    config = policy_config(settings, len(processor.tokenizer))
    record_quantizer(config, hash_weights(quantizer), model_name(quantizer))
    model = fresh_policy(LapaForLatentAction, config, load_vision_tokenizer(), seed)
    arguments = LapaLatentPretrainingArguments(
        **schedule(settings.pretraining_steps, settings.pretraining_learning_rate, seed, output),
        per_device_train_batch_size=settings.pretraining_batch_size,
        weight_decay=0.01,
    )
    return run_training(LapaLatentPretrainingTrainer(model, arguments, dataset, processor=processor), output)


def finetune(
    settings: DemoSettings,
    playing: PlayingSettings,
    seed: int,
    labelled: Recording,
    processor: LapaProcessor,
    output: Path,
    pretrained: Path | None,
) -> list[dict[str, float]]:
    """Stage 3, from a latent-pretrained folder or, as the Scratch baseline, from a fresh trunk."""
    episode, frame = labelled.steps(1)
    processor.fit_actions(labelled.actions[frame], UNNORM_KEY, num_bins=settings.num_bins, gripper_dimension=None)
    dataset = EncodedStepDataset(
        processor,
        labelled.instructions[episode],
        encode_frames(labelled.frames, load_vision_tokenizer())[frame],
        action_tokens=processor.encode_actions(labelled.actions[frame], UNNORM_KEY),
    )
    torch.manual_seed(seed + 1)
    if pretrained is not None:
        model = LapaForActionPrediction.from_pretrained(pretrained)
        record_latent_policy(model.config, pretrained)
    else:
        config = policy_config(settings, len(processor.tokenizer))
        model = fresh_policy(LapaForActionPrediction, config, load_vision_tokenizer(), seed)
    arguments = LapaActionFinetuningArguments(
        **schedule(settings.finetuning_steps, playing.learning_rate, seed, output),
        per_device_train_batch_size=settings.finetuning_batch_size,
        weight_decay=0.01,
    )
    return run_training(LapaActionFinetuningTrainer(model, arguments, dataset, processor=processor), output)


def play_policy(
    settings: DemoSettings, playing: PlayingSettings, seed: int, folder: Path, record: list[int]
) -> list[Rollout]:
    """Closed loop of a finetuned folder."""
    torch.manual_seed(seed)
    policy = LapaPolicy.from_pretrained(str(folder), UNNORM_KEY, **_sampling(playing.temperature))
    return play(settings, PolicyController(policy), folder.name, record)


def play_decoder(settings: DemoSettings, seed: int, folder: Path, record: list[int]) -> list[Rollout]:
    """Closed loop of a latent-pretrained folder with an action decoder."""
    from lapa.evaluation.baselines.latent_decoder_policy import LatentDecoderPolicy

    torch.manual_seed(seed)
    policy = LatentDecoderPolicy.from_pretrained(folder, **_sampling(settings.decoder_temperature))
    return play(settings, PolicyController(policy), folder.name, record)


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}


def evaluation_episodes(settings: DemoSettings) -> list[tuple[str, int]]:
    """Family and seed of every evaluation start: the same for all methods and all training seeds."""
    return [
        (family, EVALUATION_SEEDS + index)
        for family in settings.families
        for index in range(settings.rollouts_per_family)
    ]


def shown_episodes(settings: DemoSettings) -> list[int]:
    """Which evaluation episodes the report shows: the first of each family, however they end."""
    shown = min(EPISODES_SHOWN_PER_FAMILY, settings.rollouts_per_family)
    families = range(len(settings.families))
    return [family * settings.rollouts_per_family + index for family in families for index in range(shown)]


def play(settings: DemoSettings, controller: Controller, name: str, record: Sequence[int]) -> list[Rollout]:
    """Closed loop of any controller on the evaluation starts."""
    with EnvironmentPool(partial(TabletopEvaluation, **environment_options(settings)), ROLLOUTS_SIDE_BY_SIDE) as pool:
        return roll_out(pool, controller, evaluation_episodes(settings), record, f"playing {name}")
