"""Vision codes beside the labels: the tokenizer of a policy or of its own folder, and codes kept on disk for training."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.data.atomic_files import atomic_file, remove_stale
from lapa.data.label_table import LabelFolder
from lapa.data.labelled_stream import code_file, decode_stored_image
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.image_processing_lapa import PIXEL_VALUE_OF_LEVEL, LapaImageProcessor

# OpenCV's way to resize is slow in numpy.
DECODING_THREADS = 4
TOKENIZER_PREFIX = "model.vision_tokenizer."


def load_vision_tokenizer(folder: str) -> tuple[LapaVisionTokenizer, LapaImageProcessor]:
    """
    The vision tokenizer of a folder, and the image processor before it.

    Args:
        folder: Of a vision tokenizer or of a policy, of which nothing else is loaded.

    Raises:
        ValueError: Another kind of folder, or a policy without a vision tokenizer.
    """
    config = _config(folder)
    if config.get("model_type") == "lapa_vision_tokenizer":
        tokenizer = LapaVisionTokenizer.from_pretrained(folder)
        return tokenizer.eval(), LapaImageProcessor(size=tokenizer.config.image_size)
    if config.get("model_type") != "lapa":
        raise ValueError(
            f"`vision_tokenizer` ({folder}) must hold a vision tokenizer or a policy, "
            f"got a model of type {config.get('model_type')!r}."
        )
    vision_config: Any = LapaConfig.from_pretrained(folder).vision_tokenizer_config
    if vision_config is None:
        raise ValueError(f"`vision_tokenizer` ({folder}) holds a policy that has no vision tokenizer inside.")
    tokenizer = LapaVisionTokenizer(vision_config)
    weights = dict(_tokenizer_weights(Path(folder)))
    tokenizer.load_state_dict(weights)
    processor = Path(folder) / "processor_config.json"
    if processor.is_file():
        from lapa.processing.processing_lapa import LapaProcessor

        return tokenizer.eval(), LapaProcessor.from_pretrained(folder).image_processor
    return tokenizer.eval(), LapaImageProcessor(size=vision_config.image_size)


def _config(folder: str) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"`vision_tokenizer` ({folder}) is no model folder: it has no config.json.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return config


def _tokenizer_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 values of the tokenizer's weights in a policy's files."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                if name.startswith(TOKENIZER_PREFIX):
                    yield name.removeprefix(TOKENIZER_PREFIX), file.get_tensor(name).float()


def hash_vision_tokenizer(tokenizer: LapaVisionTokenizer, image_processor: LapaImageProcessor) -> str:
    """
    Names what vision codes come from: SHA-256 over the weights as float32, the tokenizer's sizes and how images are
    prepared. It is the same for a tokenizer's own folder and for the policy that was made around it.
    """
    sizes = {name: getattr(tokenizer.config, name) for name in LapaVisionTokenizerConfig.__annotations__}
    image = [image_processor.size["height"], image_processor.do_center_crop, image_processor.center_crop_scale]
    digest = hashlib.sha256(json.dumps([sizes, image], sort_keys=True, default=list).encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_levels(tokenizer: LapaVisionTokenizer, levels: torch.Tensor) -> torch.Tensor:
    """
    Vision codes of images that are resized already, as the policy computes them.

    Args:
        tokenizer: On whatever device, in whatever dtype.
        levels: (batch, size, size, 3) uint8, on any device.

    Returns:
        (batch, num_image_tokens) int64, on the tokenizer's device.
    """
    parameter = next(tokenizer.parameters())
    table = torch.from_numpy(PIXEL_VALUE_OF_LEVEL).to(parameter.device)
    # b h w c -> b c h w
    pixels = table[levels.to(parameter.device, non_blocking=True).permute(0, 3, 1, 2).contiguous().int()]
    return tokenizer.image_tokens(pixels.to(parameter.dtype))


def vision_code_folder(parent: Path, labels: LabelFolder, tokenizer_hash: str) -> Path:
    """
    Folder for the code files of labels: of another tokenizer, other settings, or other files it is another.

    Args:
        parent: Where such folders lie.
        labels: What is encoded.
        tokenizer_hash: As of `hash_vision_tokenizer`.
    """
    files = hashlib.sha256(json.dumps([labels.files, labels.rows]).encode()).hexdigest()
    return parent / f"{tokenizer_hash[:16]}-{labels.manifest.settings.digest}-{files[:8]}"


def _has_codes(path: Path, shape: tuple[int, int]) -> bool:
    """Whether a code file is there and has a row of codes for every row of labels; only its header is read."""
    try:
        codes = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return codes.shape == shape and codes.dtype.kind in "iu"


def cache_vision_codes(
    labels: LabelFolder,
    tokenizer: LapaVisionTokenizer,
    image_processor: LapaImageProcessor,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    batch_size: int = 32,
    show_progress: bool = True,
) -> None:
    """
    Computes the vision codes of a folder of labels, file by file, and keeps them on disk; what is there stays, unless it
    has another number of rows or codes.

    Args:
        labels: With images.
        tokenizer: The policy's, on the device it should run on.
        image_processor: The processor's.
        folder: For the code files (`vision_code_folder`); used for nothing but these labels and this tokenizer.
        rank, world_size: Which of the files this process computes.
        batch_size: Images encoded at a time.
        show_progress: Whether a progress bar is shown.

    Raises:
        ReadError: An image that cannot be decoded.
    """
    if folder.is_dir():
        remove_stale(folder)
    mine = range(rank, len(labels.files), world_size)
    num_tokens = tokenizer.config.num_image_tokens
    missing = [
        number
        for number in mine
        if not _has_codes(code_file(folder, labels.files[number]), (labels.rows[number], num_tokens))
    ]
    total = sum(labels.rows[number] for number in missing)
    kind = np.uint16 if tokenizer.config.codebook_size <= 1 << 16 else np.int32
    with (
        tqdm(total=total, desc="encoding images", unit="image", disable=not show_progress) as bar,
        ThreadPoolExecutor(DECODING_THREADS) as pool,
    ):
        for number in missing:
            codes = np.zeros((labels.rows[number], num_tokens), dtype=kind)
            row = 0
            for images in _batches(labels, number, batch_size):
                levels = np.stack(list(pool.map(image_processor.resize_image, images)))
                codes[row : row + len(images)] = encode_levels(tokenizer, torch.from_numpy(levels)).cpu().numpy()
                row += len(images)
                bar.update(len(images))
            with atomic_file(code_file(folder, labels.files[number])) as partial, partial.open("wb") as file:
                np.save(file, codes, allow_pickle=False)


def _batches(labels: LabelFolder, number: int, batch_size: int) -> Iterator[list[NDArray[np.uint8]]]:
    """Decoded images of a file."""
    for table in labels.read_groups(number, range(labels.group_count(number)), ["image"]):
        for start in range(0, len(table), batch_size):
            rows = table["image"].slice(start, batch_size).to_pylist()
            yield [decode_stored_image(row["bytes"], f"an image of {labels.files[number]}") for row in rows]


__all__ = [
    "cache_vision_codes",
    "encode_levels",
    "hash_vision_tokenizer",
    "load_vision_tokenizer",
    "vision_code_folder",
]
