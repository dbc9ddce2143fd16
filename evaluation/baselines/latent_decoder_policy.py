"""A latent-pretrained model that acts: its codes, decoded to actions."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapa.evaluation.baselines.folders import new_folder
from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
from lapa.hub_cards.checkpoint import DECODER_FOLDER
from lapa.modeling_lapa.modeling_lapa import LapaForLatentAction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.serving.policy import policy_inputs
from lapa.serving.row_sampling import RowSamplingLogitsProcessor

POLICY = "policy with an action decoder"


class LatentDecoderPolicy:
    """
    The latent-pretrained model says what should happen, as codes; the decoder which action does it. The model itself is not
    finetuned: the few labelled steps train the decoder alone.

    Args:
        model: The latent-pretrained model.
        decoder: Of its codes.
        processor: Of the model.
        generation: Arguments of `generate`, for example `{"do_sample": True, "temperature": 0.5}`; greedy when empty.

    Raises:
        ValueError: A decoder of other codes than the model's.
    """

    def __init__(
        self, model: LapaForLatentAction, decoder: LatentActionDecoder, processor: LapaProcessor, **generation: Any
    ) -> None:
        for ours, theirs in (("latent_vocab_size", "codebook_size"), ("num_latent_tokens", "num_latent_tokens")):
            if getattr(model.config, ours) != getattr(decoder.config, theirs):
                raise ValueError(
                    f"`{ours}` of the model ({getattr(model.config, ours)}) and `{theirs}` of the decoder "
                    f"({getattr(decoder.config, theirs)}) must be the same."
                )
        hashes = model.config.quantizer_hash, decoder.config.quantizer_hash
        if None not in hashes and len(set(hashes)) > 1:
            raise ValueError(
                f"the model was trained on the codes of the quantizer {hashes[0]}, the decoder on those of {hashes[1]}: the "
                "same code means something else."
            )
        self.model, self.decoder, self.processor = model.eval(), decoder.eval(), processor
        self.generation = generation

    @classmethod
    def from_pretrained(cls, folder: str | Path, **generation: Any) -> "LatentDecoderPolicy":
        """Load a folder that `write_latent_decoder_policy` wrote; `generation` as in [`LatentDecoderPolicy`]."""
        return cls(
            LapaForLatentAction.from_pretrained(folder),
            LatentActionDecoder.from_pretrained(folder, subfolder=DECODER_FOLDER),
            LapaProcessor.from_pretrained(folder),
            **generation,
        )

    @property
    def action_dim(self) -> int:
        """Length of an action."""
        return self.decoder.config.action_dim

    def to(self, device: str | torch.device) -> "LatentDecoderPolicy":
        """Moves both models."""
        self.model.to(device)
        self.decoder.to(device)
        return self

    @torch.inference_mode()
    def act(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
        draws: Sequence[np.random.Generator] | None = None,
    ) -> np.ndarray:
        """Actions (batch, action_dim) float32 in physical units; see [`~lapa.serving.policy.Policy`].

        Args:
            images, instructions, proprio: See [`~lapa.serving.policy.Policy`].
            draws: See [`~lapa.serving.policy.LapaPolicy.act_chunk`].
        """
        inputs = policy_inputs(self, "latent", images, instructions, proprio)
        options = RowSamplingLogitsProcessor.options(self.model, "latent", self.generation, draws)
        codes = self.model.predict_latent_action(**inputs, **options)
        actions: np.ndarray = self.decoder.predict_actions(codes).cpu().numpy().astype(np.float32)
        return actions


def write_latent_decoder_policy(model: str | Path, decoder: str | Path, output: Path) -> None:
    """
    Write the folder that `lapa evaluate --policy` plays: the latent-pretrained model as it is, and the decoder in a folder of
    its own inside.

    Args:
        model: Folder of [`~lapa.LapaForLatentAction`], with a processor.
        decoder: Folder of [`LatentActionDecoder`].
        output: Folder to write; one that an earlier call wrote is replaced.

    Raises:
        ValueError: `output` holds something else, and models that do not fit together.
    """
    with new_folder(output, DECODER_FOLDER, POLICY) as partial:
        LatentDecoderPolicy(
            LapaForLatentAction.from_pretrained(model),
            LatentActionDecoder.from_pretrained(decoder),
            LapaProcessor.from_pretrained(model),
        )
        left_out = shutil.ignore_patterns("checkpoint-*", "runs", DECODER_FOLDER)
        shutil.copytree(model, partial, ignore=left_out)
        shutil.copytree(decoder, partial / DECODER_FOLDER, ignore=left_out)


__all__ = ["POLICY", "LatentDecoderPolicy", "write_latent_decoder_policy"]
