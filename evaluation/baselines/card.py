"""Cards of the baselines' models."""

from pathlib import Path
from typing import Any

from lapa.data.atomic_files import write_atomically
from lapa.evaluation.baselines.configuration_inverse_dynamics import InverseDynamicsConfig
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.configuration_video_diffusion import VideoDiffusionConfig
from lapa.hub_cards.card import NO_LICENCE, CardOptions, CardPage, render_page
from lapa.hub_cards.checkpoint import read_weights

CARD_NAME = "README.md"


BaselineConfig = InverseDynamicsConfig | LatentActionDecoderConfig | VideoDiffusionConfig


def write_card(folder: Path, config: BaselineConfig, is_policy: bool = False) -> None:
    """
    Write the card of a trained model beside its weights, from what its training recorded there.

    Args:
        folder: Of the model.
        config: Of the model.
        is_policy: Whether the folder of a video model holds its inverse dynamics model too.
    """
    weights = read_weights(folder)
    sizes = [("parameters", f"{weights.num_parameters:,}"), *_sizes(config)]
    licence: tuple[dict[str, str], list[str]] = ({}, [NO_LICENCE.partition(" (")[0] + "."])
    values: dict[str, Any] = {}
    if isinstance(config, InverseDynamicsConfig):
        page = CardPage("inverse_dynamics", "inverse dynamics model", config, sizes, *licence)
    elif isinstance(config, LatentActionDecoderConfig):
        page = CardPage("latent_decoder", "latent action decoder", config, sizes, *licence)
    else:
        page = CardPage("video_diffusion", "video diffusion model", config, sizes, *licence)
        values["is_policy"] = is_policy
    card = render_page(folder, page, CardOptions(), folder.name, **values)
    write_atomically(folder / CARD_NAME, str(card).encode())


def _sizes(config: BaselineConfig) -> list[tuple[str, str]]:
    if isinstance(config, LatentActionDecoderConfig):
        return [
            ("codes", f"{config.num_latent_tokens} of {config.codebook_size} values"),
            ("MLP", f"{config.mlp_hidden_size} wide, over embeddings of {config.embedding_size}"),
            ("action", f"{config.action_dim} dimensions"),
        ]
    pixels = f"{config.image_size} x {config.image_size} pixels"
    if isinstance(config, InverseDynamicsConfig):
        stages = ", ".join(f"{depth} of {width}" for depth, width in zip(config.depths, config.hidden_sizes))
        pooling = "" if config.stem_pooling else ", no pooling in the stem"
        return [
            ("frames", f"2 of {pixels}, {config.frame_gap} control steps apart"),
            ("trunk", f"ResNet, blocks and channels per stage: {stages}{pooling}"),
            ("MLP", f"{config.mlp_hidden_size} wide"),
            ("action", f"{config.action_dim} dimensions"),
        ]
    return [
        ("frames", f"{config.num_frames} of {pixels}, {config.frame_gap} control steps apart"),
        ("U-Net", f"{' '.join(map(str, config.block_out_channels))} channels"),
        ("instruction", f"{config.text_num_layers} layers, {config.text_hidden_size} wide"),
        (
            "noise",
            f"{config.num_train_timesteps} levels, {config.prediction_type}, {config.num_inference_steps} DDIM steps",
        ),
    ]


__all__ = ["CARD_NAME", "write_card"]
