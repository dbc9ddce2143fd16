"""Gives the policy's parameters one at a time, each read from the published file when it is asked for."""

from collections.abc import Mapping
from functools import reduce

import torch

from lapa.configuration.configuration_lapa import LapaConfig
from lapa.conversion.checkpoint_mapping import Piece, halves_from_pairs, policy_pieces
from lapa.conversion.flax_stream import FlaxStream
from lapa.conversion.output_folder import TensorSpec

VISION_PREFIX = "model.vision_tokenizer."
FRESH_ROWS_SEED = 0


class PolicyReader:
    """Gives the policy's parameters by our names, each read from the file when it is asked for."""

    def __init__(
        self,
        stream: FlaxStream,
        config: LapaConfig,
        vision_tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None,
    ):
        self.stream = stream
        self.config = config
        self.vision_tensors = {f"{VISION_PREFIX}{name}": tensor for name, tensor in vision_tensors.items()}
        self.num_layers = config.text_config.num_hidden_layers
        self.pieces = policy_pieces(stream.entries, self.num_layers, config.fresh_segments or ())
        self.fresh_dtype = stream.entries[self.pieces["model.embed_tokens.weight"][0].key].dtype
        self.specs = {name: self._spec(parts, dtype) for name, parts in self.pieces.items()}
        self.specs |= {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self.vision_tensors.items()}

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        if piece.key.startswith("fresh/"):
            return (self.config.latent_vocab_size, self.config.text_config.hidden_size)
        shape = self.stream.entries[piece.key].shape
        if piece.layer is not None:
            if not shape or shape[0] != self.num_layers:
                raise ValueError(
                    f"{self.stream.path}: {piece.key} has shape {shape} instead of {self.num_layers} layers."
                )
            shape = shape[1:]
        return shape if piece.layout == "copy" else shape[::-1]

    def _dtype(self, piece: Piece) -> torch.dtype:
        return self.fresh_dtype if piece.key.startswith("fresh/") else self.stream.entries[piece.key].dtype

    def _spec(self, parts: list[Piece], dtype: torch.dtype | None) -> TensorSpec:
        shapes = [self._shape(piece) for piece in parts]
        if len({shape[1:] for shape in shapes}) != 1 or not all(shapes):
            keys = ", ".join(f"{piece.key} {shape}" for piece, shape in zip(parts, shapes))
            raise ValueError(f"{self.stream.path}: these arrays cannot be joined on their rows: {keys}.")
        # Tables of different dtypes (rows finetuned in float32 on a bfloat16 trunk) join without loss.
        dtype = dtype or reduce(torch.promote_types, map(self._dtype, parts))
        return TensorSpec((sum(shape[0] for shape in shapes), *shapes[0][1:]), dtype)

    def check_segments(self) -> None:
        """Raises if a segment's embedding and head have different numbers of rows."""
        for embedding, head in zip(self.pieces["model.embed_tokens.weight"], self.pieces["lm_head.weight"]):
            if self._shape(embedding) != self._shape(head):
                raise ValueError(
                    f"{self.stream.path}: {embedding.key} has rows {self._shape(embedding)}, {head.key} has "
                    f"{self._shape(head)}; a segment's embedding and head must be of one size."
                )

    def _read_piece(self, piece: Piece) -> torch.Tensor:
        if piece.key.startswith("fresh/"):
            return self._draw(piece)
        tensor = self.stream.read(piece.key, piece.layer)
        if piece.layout == "copy":
            return tensor
        # Kernels are (in, out) there, (out, in) here.
        tensor = tensor.t().contiguous()
        return halves_from_pairs(tensor, self.config.text_config.head_dim) if piece.layout == "rope" else tensor

    def _draw(self, piece: Piece) -> torch.Tensor:
        # Seeded by place, so that the verification draws the same rows again.
        seed = FRESH_ROWS_SEED + piece.key.endswith("/head")
        std = self.config.embedding_initializer_range or self.config.text_config.initializer_range
        return torch.randn(self._shape(piece), generator=torch.Generator().manual_seed(seed)) * std

    def read(self, name: str) -> torch.Tensor:
        """One parameter, whole, in the dtype it is written in."""
        if name in self.vision_tensors:
            return self.vision_tensors[name]
        dtype = self.specs[name].dtype
        parts = [self._read_piece(piece).to(dtype) for piece in self.pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
