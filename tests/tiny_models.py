"""Tiny random models, one per architecture variant, and inputs that fit them."""

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model

from lapa import (
    LapaConfig,
    LapaForActionPrediction,
    LapaForLatentAction,
    LapaQuantizer,
    LapaQuantizerConfig,
    LapaVisionTokenizer,
    LapaVisionTokenizerConfig,
)

TINY_QUANTIZER = {
    "hidden_size": 32,
    "codebook_dim": 8,
    "image_size": 32,
    "patch_size": 4,
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
}
TINY_VISION_TOKENIZER = {
    "image_size": 8,
    "base_channels": 32,
    "channel_multipliers": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 8,
    "codebook_size": 32,
    "codebook_dim": 8,
}
TINY_POLICY = {
    "text_config": {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "vision_vocab_size": 34,
    "latent_vocab_size": 8,
    "num_latent_tokens": 4,
    "action_vocab_size": 16,
    "action_dim": 7,
}


def quantizer_config(**changes: Any) -> LapaQuantizerConfig:
    return LapaQuantizerConfig(**{**TINY_QUANTIZER, **changes})


def policy_config(with_images: bool = True, **changes: Any) -> LapaConfig:
    images = {"vision_tokenizer_config": dict(TINY_VISION_TOKENIZER)} if with_images else {}
    return LapaConfig(**{**TINY_POLICY, "text_config": dict(TINY_POLICY["text_config"]), **images, **changes})


QUANTIZER_VARIANTS: dict[str, dict[str, Any]] = {
    "nsvq": {},
    "vq-query": {"quantizer": "vq", "bottleneck": "query", "num_latent_tokens": 3, "interleave_latent_tokens": False},
    "fsq-additive": {
        "quantizer": "fsq",
        "fsq_levels": [3, 5],
        "codebook_size": 15,
        "action_injection": "additive",
        "residual_decoding": True,
        "num_latent_tokens": 1,
    },
    "oblong": {"image_size": [24, 32], "patch_size": [8, 4], "bottleneck": "query", "num_latent_tokens": 2},
    "end-to-end": {"stop_gradient_first_frame": False},
    "aligned": {"align_frames": True},
    "entropy": {"entropy_weight": 0.5},
    "continuous": {"quantizer": "continuous", "interleave_latent_tokens": False},
    "instruction": {"instruction_vocab_size": 50, "interleave_latent_tokens": False},
    "task-centric": {"task_centric": True, "interleave_latent_tokens": False},
    "actions": {"action_dim": 3, "action_mean": [0.0, 1.0, 2.0], "action_std": [1.0, 2.0, 3.0]},
    "features": {"feature_loss_weight": 1.0, "pixel_loss_weight": 0.5, "feature_dim": 16, "features_per_patch": 2},
}


# Removed when the process ends.
_BACKBONE = TemporaryDirectory(prefix="lapa-dinov2-")


@cache
def feature_backbone() -> str:
    """Folder of a tiny random DINOv2."""
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=2, mlp_ratio=2
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(_BACKBONE.name)
    return _BACKBONE.name


def build(kind: str, **changes: Any) -> Any:
    """A freshly initialised model, one of `KINDS`."""
    torch.manual_seed(0)
    if kind in QUANTIZER_VARIANTS:
        if kind == "features":
            changes = {"feature_backbone": feature_backbone(), **changes}
        return LapaQuantizer(quantizer_config(**{**QUANTIZER_VARIANTS[kind], **changes}))
    if kind == "vision_tokenizer":
        return LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY_VISION_TOKENIZER, **changes))
    if kind == "latent-positions":
        return LapaForLatentAction(policy_config(vision_position_embeddings=True, **changes))
    return {"latent": LapaForLatentAction, "action": LapaForActionPrediction}[kind](policy_config(**changes))


KINDS = (*QUANTIZER_VARIANTS, "vision_tokenizer", "latent", "latent-positions", "action")


def prompt(config: LapaConfig, batch: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch with an image in each row: text, placeholders, end of vision, text."""
    num_image_tokens = config.vision_tokenizer_config.num_image_tokens if config.vision_tokenizer_config else 4
    image = [config.vision_offset] * num_image_tokens + [config.vision_offset + config.end_of_vision_id]
    rows = [[0] * (i % 3) + [1, *range(3, 8 - i % 3), *image, 9, 10] for i in range(batch)]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor([[0] * (i % 3) + [1] * (len(row) - i % 3) for i, row in enumerate(rows)]),
    }
    generator = torch.Generator().manual_seed(1)
    if config.vision_tokenizer_config is not None:
        size = config.vision_tokenizer_config.image_size
        inputs["pixel_values"] = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    else:
        inputs["vision_codes"] = torch.randint(0, 32, (batch, num_image_tokens), generator=generator)
    return inputs


def training_batch(model: Any, batch: int = 3) -> dict[str, torch.Tensor]:
    """Inputs with a loss for any of the tiny models."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    if config.model_type == "lapa_quantizer":
        inputs = {"pixel_values": torch.rand(batch, 2, 3, *config.image_height_width, generator=generator)}
        if config.instruction_vocab_size is not None:
            ids = torch.randint(1, config.instruction_vocab_size, (batch, 4), generator=generator)
            inputs["instruction_ids"] = torch.cat((ids, torch.zeros_like(ids)), 1)
        if config.action_dim is not None:
            inputs["actions"] = torch.randn(batch, config.action_dim, generator=generator)
            inputs["actions"][0] = float("nan")
        return inputs
    if config.model_type == "lapa_vision_tokenizer":
        return {
            "pixel_values": torch.rand(batch, 3, config.image_size, config.image_size, generator=generator) * 2 - 1
        }
    inputs = prompt(config, batch)
    action = "Action" in type(model).__name__ and "Latent" not in type(model).__name__
    start, end = config.segment("action" if action else "latent")
    num_tokens = config.action_dim if action else config.num_latent_tokens
    targets = torch.randint(start, end, (batch, num_tokens), generator=generator)
    ending = torch.full((batch, 1), 2)
    no_loss = torch.full_like(inputs["input_ids"], -100)
    return inputs | {
        "input_ids": torch.cat((inputs["input_ids"], targets, ending), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones(batch, num_tokens + 1).long()), 1),
        "labels": torch.cat((no_loss, targets, ending), 1),
    }


def outputs_of(model: Any) -> torch.Tensor:
    """The main float output of a model on fixed inputs, without labels."""
    inputs = {name: value for name, value in training_batch(model).items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        output = model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()})
    return (output.logits if "logits" in output else output.reconstruction).float()
