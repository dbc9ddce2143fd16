"""Converts the published checkpoints: the quantizer, the vision tokenizer and the policy."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from lapa.configuration.configuration_lapa import RELEASED_TEXT_CONFIG, LapaConfig
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.configuration.configuration_lapa_vision_tokenizer import LapaVisionTokenizerConfig
from lapa.conversion.checkpoint_mapping import (
    QUANTIZER_TABLE,
    VISION_TOKENIZER_TABLE,
    compare_parameters,
    rename,
)
from lapa.conversion.checksum import hash_file
from lapa.conversion.flax_stream import FlaxStream, describe_wrong_file
from lapa.conversion.output_folder import (
    MAX_SHARD_BYTES,
    WEIGHTS_NAME,
    ReadTensor,
    TensorSpec,
    staged_folder,
    verify_weights,
    write_record,
    write_weights,
)
from lapa.conversion.policy_reader import FRESH_ROWS_SEED, PolicyReader
from lapa.conversion.restricted_pickle import load_arrays
from lapa.conversion.sizes import build_config, merge_sizes, policy_sizes, quantizer_sizes, vision_tokenizer_sizes
from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction, LapaForLatentAction
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer
from lapa.modeling_lapa.modeling_lapa_vision_tokenizer import LapaVisionTokenizer
from lapa.processing.processing_lapa import LapaProcessor
from lapa.processing.tokenization_lapa import LapaTokenizer


@dataclass(frozen=True)
class ConversionReport:
    """
    What a conversion wrote and compared with its source.

    Args:
        output (`Path`): The folder.
        num_tensors, num_parameters, num_bytes (`int`): What was written, read again and found equal.
        notes (`list[str]`): What the user should know, such as rows that were drawn fresh.
    """

    output: Path
    num_tensors: int
    num_parameters: int
    num_bytes: int
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        checked = (
            f"{self.output}: {self.num_tensors} tensors, {self.num_parameters:,} parameters, {self.num_bytes:,} bytes "
            "written and compared with the source, all equal."
        )
        return "\n".join([checked, *self.notes])


def _check_shapes(
    found: Mapping[str, torch.Tensor | TensorSpec],
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    source: str | Path,
) -> None:
    """Compares the names and shapes that a source gives with those of the model that it is to become."""
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compare_parameters({name: tuple(tensor.shape) for name, tensor in found.items()}, expected, str(source))


def _write_model(
    output: str | Path,
    source: Path,
    config: PreTrainedConfig,
    specs: Mapping[str, TensorSpec],
    read: ReadTensor,
    notes: list[str],
    overwrite: bool,
    add_files: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    with staged_folder(output, overwrite) as folder:
        if add_files is not None:
            add_files(folder)
        write_weights(folder, specs, read, max_shard_bytes)
        verify_weights(folder, specs, read)
        config.save_pretrained(folder)
        write_record(folder, source, specs, notes)
    return ConversionReport(
        Path(output),
        len(specs),
        sum(spec.num_parameters for spec in specs.values()),
        sum(spec.num_bytes for spec in specs.values()),
        notes,
    )


def _write_tensors(
    output: str | Path,
    source: Path,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    overwrite: bool,
) -> ConversionReport:
    """Writes a model whose tensors fit into memory."""
    specs = {name: TensorSpec(tuple(tensor.shape), dtype or tensor.dtype) for name, tensor in tensors.items()}
    config.dtype = next(iter(specs.values())).dtype
    config.architectures = [model_class.__name__]
    return _write_model(output, source, config, specs, lambda name: tensors[name].to(specs[name].dtype), [], overwrite)


# --- quantizer ---------------------------------------------------------------------------------------------------


def _load_torch_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    # torch reports broken archives and refused pickles in many ways.
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a torch checkpoint of tensors{describe_wrong_file(path)}: {reason}"
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise ValueError(f"{path} is not a state dict: it must map names to tensors and nothing else.")
    if all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): tensor for key, tensor in state_dict.items()}
    return state_dict


def _check_dropped(state_dict: Mapping[str, torch.Tensor], names: Mapping[str, str | None], path: Path) -> None:
    for key, name in names.items():
        if name is None and bool(state_dict[key].any()):
            raise ValueError(f"{path}: {key} would be dropped as always zero or empty, and it is neither.")


def convert_quantizer(
    checkpoint: str | Path,
    output: str | Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Converts `laq_openx.pt` to a [`LapaQuantizer`] folder.

    Args:
        checkpoint (`str` or `Path`): The torch checkpoint.
        output (`str` or `Path`): Folder to write.
        config (`Mapping`, *optional*): Fields of [`LapaQuantizerConfig`] that differ from the released ones.
        dtype (`torch.dtype`, *optional*): Stored dtype; None keeps the source's.
        overwrite (`bool`, *optional*): Whether an earlier conversion at `output` is replaced.

    Returns:
        [`ConversionReport`]

    Raises:
        ValueError: If the file is no such checkpoint or does not fit the sizes.
    """
    path = Path(checkpoint)
    state_dict = _load_torch_checkpoint(path)
    names = rename(state_dict, QUANTIZER_TABLE, str(path))
    sizes = merge_sizes(LapaQuantizerConfig, config, quantizer_sizes(state_dict, str(path)), str(path))
    quantizer_config = build_config(LapaQuantizerConfig, {"bottleneck_activation": "relu", **sizes})
    _check_dropped(state_dict, names, path)
    tensors = {name: state_dict[key] for key, name in names.items() if name is not None}
    _check_shapes(tensors, LapaQuantizer, quantizer_config, path)
    return _write_tensors(output, path, LapaQuantizer, quantizer_config, tensors, dtype, overwrite)


# --- vision tokenizer --------------------------------------------------------------------------------------------


def _read_published_vision_tokenizer(
    path: Path, config: Mapping[str, Any] | None
) -> tuple[LapaVisionTokenizerConfig, dict[str, torch.Tensor]]:
    arrays = load_arrays(path)
    names = rename(arrays, VISION_TOKENIZER_TABLE, str(path))
    sizes = merge_sizes(LapaVisionTokenizerConfig, config, vision_tokenizer_sizes(arrays, str(path)), str(path))
    vision_config = build_config(LapaVisionTokenizerConfig, sizes)
    # Convolution kernels are (height, width, in, out) there, (out, in, height, width) here.
    tensors = {
        name: (arrays[key].permute(3, 2, 0, 1) if arrays[key].ndim == 4 else arrays[key]).contiguous()
        for key, name in names.items()
        if name is not None
    }
    _check_shapes(tensors, LapaVisionTokenizer, vision_config, path)
    return vision_config, tensors


def _read_converted_vision_tokenizer(folder: Path) -> tuple[LapaVisionTokenizerConfig, dict[str, torch.Tensor]]:
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise ValueError(f"`vision_tokenizer` is no converted vision tokenizer (config.json, weights): {folder}.")
    vision_config = LapaVisionTokenizerConfig.from_pretrained(folder)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except SafetensorError as error:
        raise ValueError(f"{folder / 'model.safetensors'} is broken: {error}") from error
    _check_shapes(tensors, LapaVisionTokenizer, vision_config, folder)
    return vision_config, tensors


def convert_vision_tokenizer(
    checkpoint: str | Path,
    output: str | Path,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ConversionReport:
    """
    Converts the `vqgan` pickle to a [`LapaVisionTokenizer`] folder; nothing in the pickle is executed.

    Args:
        checkpoint (`str` or `Path`): The pickle.
        output (`str` or `Path`): Folder to write.
        config (`Mapping`, *optional*): Fields of [`LapaVisionTokenizerConfig`] that differ from the released ones.
        dtype (`torch.dtype`, *optional*): Stored dtype; None keeps the source's.
        overwrite (`bool`, *optional*): Whether an earlier conversion at `output` is replaced.

    Returns:
        [`ConversionReport`]

    Raises:
        ValueError: If the file holds anything but arrays, or does not fit the sizes.
    """
    path = Path(checkpoint)
    vision_config, tensors = _read_published_vision_tokenizer(path, config)
    return _write_tensors(output, path, LapaVisionTokenizer, vision_config, tensors, dtype, overwrite)


# --- policy ------------------------------------------------------------------------------------------------------


def _policy_config(
    stream: FlaxStream, given: Mapping[str, Any] | None, vision_config: LapaVisionTokenizerConfig | None
) -> LapaConfig:
    given, source = dict(given or {}), str(stream.path)
    text_found, found = policy_sizes(stream)
    text_given = given.pop("text_config", None)
    sizes = merge_sizes(LapaConfig, given, found, source)
    text_sizes = merge_sizes(LlamaConfig, text_given, text_found, source)
    hidden_size = text_sizes.get("hidden_size", RELEASED_TEXT_CONFIG["hidden_size"])
    if "num_attention_heads" not in text_sizes and hidden_size != RELEASED_TEXT_CONFIG["hidden_size"]:
        raise ValueError(
            f"`text_config.num_attention_heads` must be given in the configuration: it cannot be read from {source}, "
            f"whose hidden size is {hidden_size} and not the released {RELEASED_TEXT_CONFIG['hidden_size']}."
        )
    if vision_config is not None:
        sizes["vision_tokenizer_config"] = vision_config.to_dict()
    # The released weights were trained and run with these two roundings.
    published = {"rope_in_model_dtype": True, "residual_in_fp32": True}
    return build_config(LapaConfig, {**published, **sizes, "text_config": text_sizes})


def _load_vision_tokenizer(
    path: str | Path | None, sizes: Mapping[str, Any] | None
) -> tuple[LapaVisionTokenizerConfig | None, dict[str, torch.Tensor]]:
    if path is None:
        return None, {}
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"`vision_tokenizer` does not exist: {path}.")
    if not path.is_dir():
        return _read_published_vision_tokenizer(path, sizes)
    vision_config, tensors = _read_converted_vision_tokenizer(path)
    found = {name: getattr(vision_config, name) for name in sizes or () if hasattr(vision_config, name)}
    merge_sizes(LapaVisionTokenizerConfig, sizes, found, str(path))
    return vision_config, tensors


def _build_processor(path: Path, config: LapaConfig) -> LapaProcessor:
    if not path.is_file():
        raise FileNotFoundError(f"`tokenizer` does not exist: {path}.")
    try:
        tokenizer = LapaTokenizer(vocab_file=str(path))
    # sentencepiece raises RuntimeError, or TypeError for an empty file.
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`tokenizer` is not a sentencepiece model{describe_wrong_file(path)}: {path}.") from error
    return LapaProcessor.from_config(config, None, tokenizer)


def convert_policy(
    params: str | Path,
    output: str | Path,
    vision_tokenizer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    quantizer: str | Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionReport:
    """
    Converts the published `params` to a policy folder, layer by layer from the file.

    The class follows the arrays: with action rows [`LapaForActionPrediction`], else [`LapaForLatentAction`]. A file
    without latent rows (LWM-Chat-1M-Jax) gets fresh ones.

    Args:
        params (`str` or `Path`): The stream of Flax arrays.
        output (`str` or `Path`): Folder to write.
        vision_tokenizer (`str` or `Path`, *optional*): A converted vision tokenizer, or the released `vqgan`; its
            weights keep their own dtype. None makes a policy that takes image codes only.
        tokenizer (`str` or `Path`, *optional*): The sentencepiece `tokenizer.model`; None writes no processor.
        config (`Mapping`, *optional*): Fields of [`LapaConfig`] that differ from the released ones.
        dtype (`torch.dtype`, *optional*): Stored dtype; None keeps the source's.
        quantizer (`str` or `Path`, *optional*): The `laq_openx.pt` whose codes the policy predicts; converted into the
            sub-folder `quantizer`, the SHA-256 of its weights recorded in the configuration.
        overwrite (`bool`, *optional*): Whether an earlier conversion at `output` is replaced.
        max_shard_bytes (`int`, *optional*): Size of a weights file; memory use follows it.

    Returns:
        [`ConversionReport`]

    Raises:
        ValueError: If a file is not what it should be or does not fit the sizes.
    """
    vision_sizes = (config or {}).get("vision_tokenizer_config")
    vision_config, vision_tensors = _load_vision_tokenizer(vision_tokenizer, vision_sizes)
    stream = FlaxStream(params)
    policy_config = _policy_config(stream, config, vision_config)
    reader = PolicyReader(stream, policy_config, vision_tensors, dtype)
    reader.check_segments()
    model_class = LapaForActionPrediction if policy_config.has_action_segment else LapaForLatentAction
    _check_shapes(reader.specs, model_class, policy_config, params)

    policy_config.architectures = [model_class.__name__]
    policy_config.dtype = reader.specs["model.embed_tokens.weight"].dtype
    notes = [
        f"The checkpoint has no {segment} rows: fresh ones were drawn (normal, seed {FRESH_ROWS_SEED}). Train before "
        "use."
        for segment in policy_config.fresh_segments or ()
    ]
    processor = None if tokenizer is None else _build_processor(Path(tokenizer), policy_config)
    policy_config.prompt_tails = None if processor is None else processor.prompt_tails

    def add_files(folder: Path) -> None:
        if processor is not None:
            processor.save_pretrained(folder)
        if quantizer is not None:
            report = convert_quantizer(quantizer, folder / "quantizer")
            notes.append(f"Sub-folder `quantizer`: {report.num_parameters:,} parameters, all equal to {quantizer}.")
            policy_config.quantizer_hash = hash_file(folder / "quantizer" / WEIGHTS_NAME)

    return _write_model(
        output,
        Path(params),
        policy_config,
        reader.specs,
        reader.read,
        notes,
        overwrite,
        add_files=add_files,
        max_shard_bytes=max_shard_bytes,
    )
