"""Training steps of the policy: whole, LoRA or QLoRA, and beside transformers' Llama and the published batch layout.

    python benchmarks/policy_training.py --size 50m --threads 2 --compare
    python benchmarks/policy_training.py --size 7b --device cuda --variants checkpoint/32 compile/16 --halve
    python benchmarks/policy_training.py --size 7b --device cuda --method qlora --variants checkpoint+compile/16

A step is forward pass, backward pass, clipping and AdamW. A variant is `plain`, or `checkpoint` (activation
checkpointing) and `compile` (compiled layers) joined by `+`, and the batch size. Whole training (`full`) is latent
pretraining with weights, gradients and both moments in `--dtype`; `lora` and `qlora` finetune on actions, rank 32 on all
linear layers, the action rows trained too, under bf16 autocast; `qlora` holds the layers in nf4. Weights and batches are
random: speed does not depend on them. An example is 311 ids long, as published ones are with an instruction of a dozen
words: 35 of text, 257 of the image, 15 of markers, 4 codes. `--compare` holds three steps beside each other:

- `llama`: transformers' `LlamaForCausalLM` of the same layers on the same lengths, logits and loss at the same positions;
- `published layout`: the same policy on rows padded to 384, with logits of every position and no mask, as published.

Rates count ids that are no padding. Operations are counted on one row without checkpointing, so that recomputation does
not count as use; attention counts in full, masked half included.
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from measuring import (
    Records,
    add_arguments,
    autocast,
    compile_layers,
    count_flops,
    median_seconds,
    out_of_memory,
    peak_gib,
    reset_peak,
    training_step,
    utilisation,
)
from timing import alternate, print_table
from torch import nn

from lapa import LapaConfig, LapaForActionPrediction, LapaForLatentAction

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 2},
    "50m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "200m": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16},
    "7b": {},
}
NUM_TEXT, NUM_IMAGE_TOKENS, NUM_MIDDLE, NUM_END = 35, 256, 9, 6
PUBLISHED_LENGTH = 384
# 70,000 steps of 256, the published latent pretraining.
PUBLISHED_SAMPLES = 70_000 * 256
LORA_RANK = 32


def batch_of(config: LapaConfig, rows: int, segment: str, device: str) -> dict[str, torch.Tensor]:
    """A batch of equally long examples, as the collator makes them."""
    start, end = config.segment(segment)
    num_codes = config.action_dim if segment == "action" else config.num_latent_tokens
    text = torch.randint(3, config.text_vocab_size, (rows, NUM_TEXT + NUM_MIDDLE + NUM_END), device=device)
    before, middle, after = text.split((NUM_TEXT, NUM_MIDDLE, NUM_END), dim=1)
    image = torch.full((rows, NUM_IMAGE_TOKENS), config.vision_offset, device=device)
    end_of_vision = torch.full((rows, 1), config.vision_offset + config.end_of_vision_id, device=device)
    codes = torch.randint(start, end, (rows, num_codes), device=device)
    input_ids = torch.cat((before, image, end_of_vision, middle, codes, after), dim=1)
    labels = input_ids.clone()
    labels[:, : -num_codes - NUM_END - NUM_MIDDLE // 2] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "vision_codes": torch.randint(0, 8192, (rows, NUM_IMAGE_TOKENS), device=device),
    }


def rows_of(batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    return {name: value[:count] for name, value in batch.items()}


def build(args: argparse.Namespace) -> tuple[nn.Module, LapaConfig]:
    """The policy with random weights, made on the device in its dtype, and wrapped for its method."""
    config = LapaConfig(
        text_config=SIZES[args.size],
        residual_in_fp32=args.published_numerics,
        rope_in_model_dtype=args.published_numerics,
    )
    config.text_config.use_cache = False
    model_class = LapaForLatentAction if args.method == "full" else LapaForActionPrediction
    with torch.device(args.device):
        model = model_class._from_config(config, dtype=getattr(torch, args.dtype), attn_implementation=args.attention)
    if args.method == "qlora":
        quantise_layers(model)
    if args.method == "full":
        return model.train(), model.config
    from peft import LoraConfig, get_peft_model

    rows = list(range(*model.config.segment("action")))
    lora = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules="all-linear",
        exclude_modules=["lm_head"],
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
    )
    wrapped = get_peft_model(model, lora)
    return wrapped.train(), model.config


def quantise_layers(model: nn.Module) -> None:
    """Puts nf4 layers with doubly quantised constants in place of the trunk's linear ones, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in model.model.layers:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    weight = child.weight.data
                    packed = Linear4bit(
                        child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                        quant_type="nf4", device="meta",
                    )  # fmt: skip
                    packed.weight = Params4bit(
                        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
                    ).to(weight.device)
                    setattr(module, name, packed)


def measure_variant(variant: str, model: Any, config: LapaConfig, args: argparse.Namespace, records: Records) -> bool:
    """Measures one variant; whether it fitted."""
    options, rows = variant.split("/")[0].split("+"), int(variant.split("/")[1])
    segment, device = "latent" if args.method == "full" else "action", args.device
    batch = batch_of(config, rows, segment, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(inputs: dict[str, torch.Tensor] = batch) -> torch.Tensor:
        with autocast(device, args.method != "full"):
            return model(**inputs, use_cache=False).loss

    if args.flops is None:
        args.flops = count_flops(lambda: loss(rows_of(batch, 1)).backward())
        model.zero_grad(set_to_none=True)
    if args.optimizer is None:
        args.optimizer = torch.optim.AdamW(parameters, lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    compile_layers(model, "LlamaDecoderLayer", "compile" in options)
    if "checkpoint" in options:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()
    described = {
        "size": args.size, "method": args.method, "dtype": args.dtype, "attention": args.attention,
        "published_numerics": args.published_numerics, "checkpoint": "checkpoint" in options,
        "compile": "compile" in options, "batch": rows, "length": batch["input_ids"].shape[1],
    }  # fmt: skip
    fitted = False
    with out_of_memory(records, **described):
        reset_peak(device)
        seconds = median_seconds(lambda: training_step(loss, parameters, args.optimizer, 1.0), args.rounds, device)
        records.add(
            **described,
            parameters=sum(p.numel() for p in model.parameters()),
            trained_parameters=sum(p.numel() for p in parameters),
            step_seconds=seconds,
            samples_per_second=rows / seconds,
            tokens_per_second=batch["input_ids"].numel() / seconds,
            teraflops_per_sample=args.flops / 1e12,
            utilisation=utilisation(rows * args.flops, seconds, device),
            peak_gib=peak_gib(device),
            hours_for_published=PUBLISHED_SAMPLES * seconds / rows / 3600 if args.method == "full" else None,
        )
        fitted = True
    model.zero_grad(set_to_none=True)
    return fitted


def measure(args: argparse.Namespace, records: Records) -> None:
    reset_peak(args.device)
    model, config = build(args)
    args.flops = args.optimizer = None
    for variant in args.variants:
        options, rows = variant.split("/")
        batch = int(rows)
        while not measure_variant(f"{options}/{batch}", model, config, args, records) and args.halve and batch > 1:
            batch //= 2


def compare(args: argparse.Namespace, records: Records) -> None:
    """Alternating steps of the policy, of transformers' Llama, and of the policy on the published batch layout."""
    from transformers import LlamaForCausalLM

    config, device = LapaConfig(text_config=SIZES[args.size]), args.device
    llama_config = LapaConfig(text_config=SIZES[args.size]).text_config
    llama_config.vocab_size = config.vocab_size
    dtype = getattr(torch, args.dtype)
    with torch.device(device):
        policy = LapaForLatentAction._from_config(config, dtype=dtype).train()
        llama = LlamaForCausalLM._from_config(llama_config, dtype=dtype).train()
    batch = batch_of(config, args.rows, "latent", device)
    useful = batch["input_ids"].numel()
    filled = policy.model.fill_vision_codes(batch["input_ids"], batch["vision_codes"])
    kept = torch.where((batch["labels"][:, 1:] != -100).all(0))[0]
    padding = PUBLISHED_LENGTH - filled.shape[1]
    padded_ids, padded_labels = F.pad(filled, (0, padding), value=1), F.pad(batch["labels"], (0, padding), value=-100)

    def llama_loss() -> torch.Tensor:
        mask = batch["attention_mask"]
        logits = llama(input_ids=filled, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, kept + 1].flatten())

    def published_loss() -> torch.Tensor:
        hidden_states = policy.model(input_ids=padded_ids, use_cache=False).last_hidden_state
        # Separate heads over all positions, each with its own softmax, weighted by a mask.
        loss = hidden_states.new_zeros(())
        for segment, weight in (("text", 0.01), ("vision", 0.0), ("latent", 0.99)):
            start, end = config.segment(segment)
            logits = policy._segment_logits(hidden_states[:, :-1], start, end).float()
            targets = padded_labels[:, 1:]
            chosen = (targets >= start) & (targets < end)
            scores = logits.log_softmax(-1).gather(-1, (targets - start).clamp(0, end - start - 1).unsqueeze(-1))
            counts = chosen.sum(1).clamp(min=1)
            loss = loss - weight * ((scores.squeeze(-1) * chosen).sum(1) / counts).mean()
        return loss

    def step(model: nn.Module, loss: Any) -> Any:
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)
        return lambda: training_step(loss, parameters, optimizer, 1.0)

    candidates = {
        "published layout": step(policy, published_loss),
        "llama": step(llama, llama_loss),
        "lapa": step(policy, lambda: policy(**batch, use_cache=False).loss),
    }
    timings = alternate(candidates, args.rounds, device, grad=True)
    print_table(f"policy training step, {args.size}, {args.dtype}, {args.rows} rows", timings, useful, "useful ids")
    for name, timing in timings.items():
        records.add(
            size=args.size, dtype=args.dtype, candidate=name, batch=args.rows, step_seconds=timing.wall,
            cpu_seconds=timing.cpu, tokens_per_second=useful / timing.wall,
            factor=timings["lapa"].wall and timing.wall / timings["lapa"].wall,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU, else float32 by default")
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="full")
    parser.add_argument("--attention", choices=["sdpa", "eager", "flash_attention_2"], default="sdpa")
    parser.add_argument("--published-numerics", action="store_true", help="fp32 residual stream, as converted models")
    parser.add_argument("--variants", nargs="*", default=[], metavar="OPTIONS/BATCH")
    parser.add_argument("--halve", action="store_true", help="halve the batch until it fits")
    parser.add_argument("--compare", action="store_true", help="beside Llama and the published layout")
    parser.add_argument("--rows", type=int, default=4, help="batch size of --compare")
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    records = Records("policy training", args)
    if args.compare:
        compare(args, records)
    if args.variants:
        measure(args, records)


if __name__ == "__main__":
    main()
