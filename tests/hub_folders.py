"""Tiny model folders, images and a process without `lapa`, for the tests of pipeline and export."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared_files import shared_path

from lapa import (
    LapaConfig,
    LapaForActionPrediction,
    LapaForLatentAction,
    LapaProcessor,
    LapaQuantizer,
    LapaQuantizerConfig,
    LapaTokenizer,
    LapaVisionTokenizer,
    LapaVisionTokenizerConfig,
)
from lapa.processing.action_tokenization_lapa import ActionTokenizer

VISION_TOKENIZER = {
    "image_size": 16, "base_channels": 8, "channel_multipliers": [1, 2, 2], "num_res_blocks": 1,
    "latent_channels": 8, "codebook_size": 30, "codebook_dim": 4, "num_norm_groups": 4,
}  # fmt: skip
QUANTIZER = {
    "hidden_size": 16, "codebook_dim": 4, "image_size": 32, "patch_size": 4, "num_spatial_layers": 1,
    "num_temporal_layers": 1, "num_attention_heads": 2, "head_dim": 8,
}  # fmt: skip
TRUNK = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 512}  # fmt: skip
EDGES = ((0.0, 1.0, 3.0, 4.0), (-1.0, 0.0, 1.0), (-0.5, 0.5, 1.5))


def policy_config(**changes: Any) -> LapaConfig:
    sizes: dict[str, Any] = {"vision_vocab_size": 32, "action_vocab_size": 16, "action_dim": 3}
    sizes |= {"text_config": dict(TRUNK), "vision_tokenizer_config": dict(VISION_TOKENIZER)}
    return LapaConfig(**{**sizes, "embedding_initializer_range": 0.5, **changes})


def save_policy(folder: Path, kind: str, statistics: tuple[str, ...] = ("toy",), **changes: Any) -> Path:
    """A random policy (`kind="action"`) or latent model with its processor."""
    torch.manual_seed(0)
    config = policy_config(has_action_segment=kind == "action", **changes)
    model = (LapaForActionPrediction if kind == "action" else LapaForLatentAction)(config)
    model.save_pretrained(folder)
    tokenizer = LapaTokenizer(str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")))
    processor = LapaProcessor.from_config(config, None, tokenizer)
    for key in statistics if kind == "action" else ():
        processor.set_action_statistics(key, ActionTokenizer(EDGES))
    processor.save_pretrained(folder)
    return folder


def save_quantizer(folder: Path) -> Path:
    torch.manual_seed(0)
    LapaQuantizer(LapaQuantizerConfig(**QUANTIZER)).save_pretrained(folder)
    return folder


def save_vision_tokenizer(folder: Path) -> Path:
    torch.manual_seed(0)
    LapaVisionTokenizer(LapaVisionTokenizerConfig(**VISION_TOKENIZER)).save_pretrained(folder)
    return folder


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)


# Takes the named packages out of sight of every finder: for the process they are not installed.
HIDE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
NOT_NEEDED = (
    "lapa", "peft", "trl", "datasets", "av", "gymnasium", "pymunk", "msgpack", "pandas", "pyarrow", "torchvision",
    "bitsandbytes", "cv2", "tensorboard", "einops", "scipy",
)  # fmt: skip


def run_without(hidden: tuple[str, ...], code: str, cwd: Path, *arguments: str) -> str:
    """Standard output of Python code in a process that cannot import the `hidden` packages."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_MODULES_CACHE"] = str(cwd / ".modules")
    command = [sys.executable, "-c", HIDE.format(hidden=set(hidden)) + code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def cached_repository(cache: Path, repo: str, files: dict[str, Path]) -> Path:
    """A Hub cache as huggingface_hub leaves it: blobs by checksum, links in a snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / ("0" * 40)
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    for name, source in files.items():
        content = source.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return root
