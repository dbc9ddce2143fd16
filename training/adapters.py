"""Training through adapters: LoRA, DoRA and QLoRA, with the new rows of a policy trained whole."""

import copy
import functools
import tempfile
from typing import TYPE_CHECKING, Any

import torch

from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import BitsAndBytesConfig

# Never quantised: the tables, whose rows are trained, and the frozen vision tokenizer, whose codes would change.
UNQUANTISED_MODULES = ("vision_tokenizer", "embed_tokens", "lm_head")


def quantization_config(
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    quant_type: str = "nf4",
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> "BitsAndBytesConfig | None":
    """
    How the trunk of a policy is quantised for QLoRA; None where it is not.

    Args:
        load_in_4bit: 4 bits per weight.
        load_in_8bit: 8 bits per weight.
        quant_type: `"nf4"` or `"fp4"`, of 4 bits.
        nested: Whether the constants of the quantisation are quantised too.
        compute_dtype: Dtype of the products; bf16 where an accelerator has it, else fp32, when None.

    Raises:
        ValueError: Both kinds at once.
        ImportError: No bitsandbytes; the message names the extra that has it.
    """
    if not (load_in_4bit or load_in_8bit):
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other.")
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError("`load_in_4bit` and `load_in_8bit` need bitsandbytes: pip install 'lapa[quantize]'.")
    if compute_dtype is None:
        compute_dtype = (
            torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
        )
    return BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(UNQUANTISED_MODULES),
    )


def add_lora(
    model: LapaForActionPrediction, peft_config: "LoraConfig", activation_checkpointing: bool = False
) -> "PeftModel":
    """
    Wraps a policy for LoRA with its new rows trained whole.

    The adapters go where `peft_config.target_modules` says (all linear layers of the trunk when None); the action rows
    of the embedding and of the head, which start from noise, are trained directly, and so are the latent rows where the
    policy keeps its latent head. All else stays as it is. The config itself is not changed.

    Args:
        model: An action policy; its trunk may be quantised (QLoRA).
        peft_config: peft's `LoraConfig`.
        activation_checkpointing: Whether the training will recompute activations.

    Raises:
        ValueError: `trainable_token_indices` or `modules_to_save` of one's own for the embedding or the head.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    peft_config = copy.deepcopy(peft_config)
    taken = {"embed_tokens", "lm_head"} & set(peft_config.modules_to_save or ())
    if peft_config.trainable_token_indices is not None or taken:
        raise ValueError(
            "`peft_config` must leave `trainable_token_indices` and `modules_to_save` of embed_tokens and lm_head "
            "alone: the action rows are trained in any case, the others stay."
        )
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=activation_checkpointing)
    segments = ("latent", "action") if model.config.keep_latent_head else ("action",)
    rows = [row for segment in segments for row in range(*model.config.segment(segment))]
    peft_config.trainable_token_indices = {"embed_tokens": rows, "lm_head": rows}
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    if model.model.vision_tokenizer is not None and peft_config.exclude_modules is None:
        peft_config.exclude_modules = r".*vision_tokenizer.*"
    wrapped = get_peft_model(model, peft_config)
    # The adapter holds the rows it trains. Left to itself peft sees a table that grew and saves all of it as well.
    wrapped.save_pretrained = functools.partial(wrapped.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    return wrapped


def save_model_config(model: "PeftModel", folder: str) -> None:
    """Writes the config of the model under an adapter beside it, without which the folder could not be loaded."""
    config = copy.deepcopy(model.get_base_model().config)
    # The adapter fits the model in any precision; how it was trained is not how it must be loaded.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def merged(model: "PeftModel") -> LapaForActionPrediction:
    """
    The policy with its adapter in its weights, unquantised.

    A quantised trunk is loaded again as it was stored, and the adapter merged into that: merging into 4 bits would round
    most of the training away.

    Raises:
        ValueError: A quantised trunk that was not loaded from a folder or repository.
    """
    from peft import PeftModel

    if not getattr(model.get_base_model(), "is_quantized", False):
        result: Any = model.merge_and_unload()
        return result
    (settings,) = model.peft_config.values()
    base = settings.base_model_name_or_path
    if not base:
        raise ValueError("the quantised model under the adapter was not loaded from a folder, so none can be merged.")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_model_config(model, folder)
        config = type(model.get_base_model().config).from_pretrained(folder)
        plain = LapaForActionPrediction.from_pretrained(base, config=config, dtype="auto")
        whole: Any = PeftModel.from_pretrained(plain, folder).merge_and_unload()
    return whole


__all__ = ["UNQUANTISED_MODULES", "add_lora", "merged", "quantization_config", "save_model_config"]
