"""Tiny `params` files of the published layout, and what a conversion wrote."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

TINY_SIZES = {"hidden": 8, "inner": 12, "layers": 3, "heads": 2}
# What the tiny arrays do not say of themselves.
TINY_CONFIG = {"text_config": {"num_attention_heads": 2}}
STACK = "transformer/h/scan_decoder"


def tiny_arrays(seed: int = 0, action_rows: int = 0, latent_rows: int = 4) -> dict[str, np.ndarray]:
    """A policy of the published layout: hidden 8, 3 layers, text 10, vision 6 rows."""
    generator = np.random.default_rng(seed)
    hidden, inner, layers, _ = TINY_SIZES.values()
    shapes = {}
    for table, head, rows in (
        ("wte", "lm_head", 10),
        ("vte", "vision_head", 6),
        ("dte", "delta_head", latent_rows),
        ("ate", "action_head", action_rows),
    ):
        if rows:
            shapes |= {f"transformer/{table}/embedding": (rows, hidden), f"{head}/kernel": (hidden, rows)}
    shapes |= {f"{STACK}/attention/{name}/kernel": (layers, hidden, hidden) for name in ("wq", "wk", "wv", "wo")}
    shapes |= {f"{STACK}/feed_forward/{name}/kernel": (layers, hidden, inner) for name in ("w1", "w3")}
    shapes |= {f"{STACK}/feed_forward/w2/kernel": (layers, inner, hidden)}
    shapes |= {f"{STACK}/{name}/kernel": (layers, hidden) for name in ("attention_norm", "ffn_norm")}
    shapes["transformer/ln_f/kernel"] = (hidden,)
    return {key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors
