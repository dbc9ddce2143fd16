"""Training UniPi's video model on clips."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from lapa.evaluation.baselines.card import write_card
from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
from lapa.evaluation.baselines.training import BaselineTrainer, Schedule, train_to_end
from lapa.evaluation.baselines.video_diffusion import VideoDiffusionModel

# Fields that weights, or what they mean, depend on.
SIZES = (
    "image_size", "num_channels", "num_frames", "frame_gap", "patch_size", "block_out_channels", "cross_attention_levels",
    "layers_per_block", "attention_head_dim", "norm_num_groups", "text_vocab_size", "text_hidden_size", "text_num_layers",
    "text_num_heads", "max_text_length", "num_train_timesteps", "prediction_type", "predict_change", "sample_scale",
)  # fmt: skip
SAMPLING = ("num_inference_steps", "guidance_scale", "text_dropout", "replan_every")


@dataclass(frozen=True)
class VideoSettings:
    """
    How a video model is trained.

    Args:
        schedule (`Schedule`): Steps, batch size, learning rate.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(steps=100_000, batch_size=64, learning_rate=1e-4))


def clip_index(lengths: ArrayLike, num_frames: int, frame_gap: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """
    Every clip that lies within an episode.

    Args:
        lengths: (num_episodes,) frames of each episode; episodes lie end to end.
        num_frames: Frames of a clip after its first.
        frame_gap: Frames from one to the next.

    Returns:
        (num_clips, 1 + num_frames) indices of frames, and (num_clips,) the episode of each clip.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts, counts = np.cumsum(lengths) - lengths, np.maximum(lengths - num_frames * frame_gap, 0)
    episode = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return (starts[episode] + within)[:, None] + frame_gap * np.arange(num_frames + 1), episode


def encode_instructions(
    tokenizer: PreTrainedTokenizerBase, sentences: list[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Token ids and mask, (num_sentences, length) int64 each, padded to the longest.

    Raises:
        ValueError: A sentence of more than `max_length` tokens.
    """
    # The token in front stands there even where the sentence is empty.
    rows = [tokenizer(f"{tokenizer.bos_token} {sentence}")["input_ids"] for sentence in sentences]
    length = max(map(len, rows))
    if length > max_length:
        longest = max(range(len(rows)), key=lambda row: len(rows[row]))
        raise ValueError(
            f"an instruction has {length} tokens, more than `max_text_length` ({max_length}): {sentences[longest]!r}."
        )
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
    return ids, mask


class ClipDataset(Dataset[dict[str, Any]]):
    """
    Clips of frames with their instructions.

    Args:
        frames: (num_frames, height, width, channels) uint8; may be a memory map.
        clips: (num_clips, 1 + num_frames) indices into `frames`, see `clip_index`.
        instructions: (num_clips,) sentences.
        tokenizer: Of the instructions.
        max_text_length: Tokens that an instruction may have.

    Raises:
        ValueError: Frames that are no uint8 images, rows of unequal number, indices that leave `frames`.
    """

    def __init__(
        self,
        frames: NDArray[np.uint8],
        clips: NDArray[np.int64],
        instructions: ArrayLike,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int,
    ) -> None:
        sentences, self.sentence = np.unique(np.asarray(instructions, dtype=object), return_inverse=True)
        if frames.ndim != 4 or frames.dtype != np.uint8:
            raise ValueError(
                f"`frames` must be (num_frames, height, width, channels) uint8, got {frames.shape} {frames.dtype}."
            )
        if clips.ndim != 2 or len(clips) != len(self.sentence):
            raise ValueError(
                f"`clips` must have a row for each of {len(self.sentence)} instructions, got {clips.shape}."
            )
        if clips.size and not 0 <= clips.min() <= clips.max() < len(frames):
            raise ValueError(
                f"`clips` must lie in [0, {len(frames) - 1}], the frames, got {clips.min()} to {clips.max()}."
            )
        self.frames, self.clips = frames, clips
        self.ids, self.mask = encode_instructions(
            tokenizer, [str(sentence) for sentence in sentences], max_text_length
        )

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """`frame`, `next_frames` uint8 channels first, `input_ids`, `attention_mask`, `example_id`."""
        pixels = torch.from_numpy(self.frames[self.clips[item]]).permute(0, 3, 1, 2)  # t h w c -> t c h w
        row = self.sentence[item]
        return {
            "frame": pixels[0],
            "next_frames": pixels[1:],
            "input_ids": self.ids[row],
            "attention_mask": self.mask[row],
            "example_id": f"clip {item}",
        }


def collate_clips(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, frames as float32 in [0, 1], `example_id` as a list."""
    batch: dict[str, Any] = {"example_id": [example.pop("example_id") for example in examples]}
    for name in examples[0]:
        stacked = torch.stack([example[name] for example in examples])
        batch[name] = stacked.float() / 255 if name in ("frame", "next_frames") else stacked
    return batch


class VideoDiffusionTrainer(BaselineTrainer):
    """Trainer of [`VideoDiffusionModel`]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=collate_clips, **kwargs)


def train_video_model(
    frames: NDArray[np.uint8],
    clips: NDArray[np.int64],
    instructions: ArrayLike,
    tokenizer: PreTrainedTokenizerBase,
    config: VideoDiffusionConfig,
    settings: VideoSettings,
    seed: int,
    output: Path,
    start: Path | None = None,
) -> list[dict[str, float]]:
    """
    Train a model on clips and leave it in `output`, with its tokenizer; an interrupted training goes on from its last
    checkpoint.

    Args:
        frames: (num_frames, height, width, channels) uint8.
        clips: (num_clips, 1 + config.num_frames) indices into `frames`, `config.frame_gap` steps apart; see `clip_index`.
        instructions: (num_clips,) sentences.
        tokenizer: Of the instructions; `config.text_vocab_size` must hold its ids.
        config: Sizes.
        settings: Schedule.
        seed: Of the weights, the order of the clips and the noise.
        output: Folder to write.
        start: Folder of a trained model to go on from, as when labelled episodes follow the video; its sizes must be
            those of `config`. A fresh model when None.

    Returns:
        The log, rows with `loss`.

    Raises:
        ValueError: See [`ClipDataset`]; clips of another length, a tokenizer that is too large, a `start` of other sizes.
    """
    if clips.ndim == 2 and clips.shape[1] != 1 + config.num_frames:
        raise ValueError(
            f"`clips` must have {1 + config.num_frames} columns (1 + `num_frames`), got {clips.shape[1]}."
        )
    if len(tokenizer) > config.text_vocab_size:
        raise ValueError(
            f"`text_vocab_size` ({config.text_vocab_size}) is less than the tokenizer's {len(tokenizer)}."
        )
    set_seed(seed)
    trainer = VideoDiffusionTrainer(
        model=VideoDiffusionModel(config) if start is None else _load(start, config),
        args=settings.schedule.arguments(output, seed, evaluates=False),
        train_dataset=ClipDataset(frames, clips, instructions, tokenizer, config.max_text_length),
        processing_class=tokenizer,
    )
    log = train_to_end(trainer)
    write_card(output, config)
    return log


def _load(start: Path, config: VideoDiffusionConfig) -> VideoDiffusionModel:
    model: VideoDiffusionModel = VideoDiffusionModel.from_pretrained(start)
    # Lists are tuples before they are written.
    ours, theirs = (json.loads(c.to_json_string(use_diff=False)) for c in (model.config, config))
    different = [name for name in SIZES if ours[name] != theirs[name]]
    if different:
        name = different[0]
        raise ValueError(f"`start` ({start}) has `{name}` {ours[name]}, `config` has {theirs[name]}.")
    for name in SAMPLING:
        setattr(model.config, name, getattr(config, name))
    return model


__all__ = [
    "ClipDataset",
    "VideoDiffusionTrainer",
    "VideoSettings",
    "clip_index",
    "encode_instructions",
    "train_video_model",
]
