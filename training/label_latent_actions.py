"""Between stages 1 and 2: the quantizer's encoder labels every step of a video with latent action codes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lapa.data.frame_pairs import FramePairCollator, FramePairDataset, Frames
from lapa.data.label_table import LabelFolder
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer, LapaQuantizerEncoder
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.image_processing_lapa import LapaImageProcessor

# Bytes of a file read at a time when it is hashed.
HASH_CHUNK = 1 << 20


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _items(source: Any) -> Iterator[Any]:
    # A map-style data set need not define iteration, and the old protocol of Python would run past its end.
    return (source[index] for index in range(len(source))) if isinstance(source, Dataset) else iter(source)


def _as_frames(pair: Any) -> torch.Tensor:
    """A pair in any accepted form -> (2, 3, height, width) uint8."""
    if isinstance(pair, dict):
        return pair["frames"]
    frames = torch.as_tensor(np.asarray(pair))
    if frames.dtype != torch.uint8 or frames.ndim != 4 or len(frames) != 2 or frames.shape[-1] != 3:
        raise ValueError(
            "`frame_pairs` must hold (2, height, width, 3) uint8 pairs, got "
            f"{frames.dtype} of shape {tuple(frames.shape)}."
        )
    return frames.permute(0, 3, 1, 2)


def check_has_codes(config: Any) -> None:
    """Refuses a quantizer that has embeddings only."""
    if not config.has_codes:
        raise ValueError(
            f'a quantizer with `quantizer="{config.quantizer}"` has no codes to label with: its latent actions are '
            "`latent_action_embeddings`, which `encode` gives. Stages 2 and 3 need codes: train with nsvq, vq or fsq."
        )


@torch.no_grad()
def label_latent_actions(
    quantizer: LapaQuantizer | LapaQuantizerEncoder,
    frame_pairs: Any,
    batch_size: int = 64,
    show_progress: bool = True,
) -> NDArray[np.int64]:
    """
    Latent action codes of frame pairs, in their order.

    Args:
        quantizer: On whatever device and in whatever dtype it should run.
        frame_pairs: A `FramePairDataset`, an array (num_pairs, 2, height, width, 3) uint8, or any iterable of such
            pairs. Frames must have the quantizer's `image_size`.
        batch_size: Pairs encoded at a time. The codes do not depend on it.
        show_progress: Whether a progress bar is shown.

    Returns:
        (num_pairs, num_latent_tokens) int64 in [0, codebook_size).

    Raises:
        ValueError: A batch size below one, frames of another size or kind, or a quantizer without codes.
    """
    check_has_codes(quantizer.config)
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    collate, parameter = FramePairCollator(), next(quantizer.parameters())
    # The encoder alone lets the reconstruction, two thirds of the work, out.
    encode = quantizer.encode if isinstance(quantizer, LapaQuantizer) else quantizer
    was_training = quantizer.training
    quantizer.eval()
    total = len(frame_pairs) if isinstance(frame_pairs, (Dataset, Sequence, np.ndarray)) else None
    codes = []
    try:
        with tqdm(total=total, desc="labelling", unit="pair", disable=not show_progress) as bar:
            for batch in _batches(_items(frame_pairs), batch_size):
                pixels = collate([{"frames": _as_frames(pair)} for pair in batch])["pixel_values"]
                output = encode(pixels.to(parameter.device, parameter.dtype))
                codes.append(output.latent_action_codes.cpu())
                bar.update(len(batch))
    finally:
        quantizer.train(was_training)
    width = quantizer.config.num_latent_tokens
    return torch.cat(codes).numpy() if codes else np.zeros((0, width), dtype=np.int64)


def label_episodes(
    quantizer: LapaQuantizer | LapaQuantizerEncoder,
    episodes: Sequence[Frames],
    frame_gap: int | Sequence[int],
    batch_size: int = 64,
    show_progress: bool = True,
) -> list[NDArray[np.int64]]:
    """
    Codes of every step that has a frame `frame_gap` later in its episode.

    Args:
        quantizer: See `label_latent_actions`.
        episodes: Sequences of frames (num_frames, height, width, 3) uint8; resized to the quantizer's size.
        frame_gap: Frames between the two of a pair; one number, or one per episode.
        batch_size: Pairs encoded at a time, across episodes.
        show_progress: Whether a progress bar is shown.

    Returns:
        Per episode (max(num_frames - frame_gap, 0), num_latent_tokens) int64: row t is what happens from frame t on.
    """
    gaps = [frame_gap] * len(episodes) if isinstance(frame_gap, int) else list(frame_gap)
    lengths = [max(len(frames) - gap, 0) for frames, gap in zip(episodes, gaps)]
    if not sum(lengths):
        return [np.zeros((0, quantizer.config.num_latent_tokens), dtype=np.int64) for _ in episodes]
    dataset = FramePairDataset(episodes, gaps, quantizer.config.image_height_width)
    codes = label_latent_actions(quantizer, dataset, batch_size, show_progress)
    return np.split(codes, np.cumsum(lengths)[:-1])


@torch.no_grad()
def encode_images(
    vision_tokenizer: LapaVisionTokenizer,
    image_processor: LapaImageProcessor,
    images: Iterable[Any],
    batch_size: int = 32,
    show_progress: bool = True,
) -> NDArray[np.int64]:
    """
    Vision codes of images, to train a policy without running the frozen tokenizer in every step.

    Args:
        vision_tokenizer: The policy's own (`policy.model.vision_tokenizer`).
        image_processor: The processor's.
        images: As the image processor accepts them.
        batch_size: Images encoded at a time.
        show_progress: Whether a progress bar is shown.

    Returns:
        (num_images, num_image_tokens) int64.
    """
    parameter = next(vision_tokenizer.parameters())
    total = len(images) if isinstance(images, (Sequence, np.ndarray)) else None
    codes = []
    with tqdm(total=total, desc="encoding images", unit="image", disable=not show_progress) as bar:
        for batch in _batches(images, batch_size):
            pixels = torch.as_tensor(np.asarray(image_processor(batch)["pixel_values"]))
            codes.append(vision_tokenizer.image_tokens(pixels.to(parameter.device, parameter.dtype)).cpu())
            bar.update(len(batch))
    if not codes:
        raise ValueError("`images` holds no image.")
    return torch.cat(codes).numpy()


def hash_weights(folder: str | Path) -> str:
    """
    SHA-256 of a checkpoint's `model.safetensors`, and of `align_frames` where its config has that: which quantizer made some
    labels. Other fields of the config are taken to go with the weights.
    """
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} is no quantizer folder: it has no model.safetensors.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    config = path.with_name("config.json")
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("align_frames"):
        digest.update(b"align_frames")
    return digest.hexdigest()


def read_labels(folder: str | Path) -> Any:
    """
    A local folder that `lapa label` wrote, as a `datasets.Dataset` whose images decode when they are read.

    Raises:
        ValueError: A folder without labels, or with units missing.
    """
    from datasets import load_dataset

    labels = LabelFolder(folder)
    files = [str(Path(folder) / file) for file in labels.files]
    return load_dataset("parquet", data_files=files, split="train")


__all__ = [
    "check_has_codes",
    "encode_images",
    "hash_weights",
    "label_episodes",
    "label_latent_actions",
    "read_labels",
]
