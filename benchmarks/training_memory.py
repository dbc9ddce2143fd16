"""Memory of a training step: a formula, held against measurements, and what it says of the 7B.

    python benchmarks/training_memory.py --check tiny 50m --check-rows 2 8
    python benchmarks/training_memory.py --rows 32
    python benchmarks/training_memory.py --device cuda --check 200m --rows 32

    peak = weights + optimizer + max(gradients, activations + 2 * gradient of the head)

`activations = tokens * layers * per_layer + last` and `last = once + tokens * outside`. With checkpointing a layer keeps
its input only (`per_checkpoint`), and `last` is what a recomputed layer keeps, `tokens * per_layer`, if that is more. The
gradients come while the activations go, so the larger of the two counts; each of the two losses makes a gradient of the
whole head before they are added. `per_layer`, `per_checkpoint`, `outside` and `once` are measured: the bytes that autograd
keeps in forward passes of one row of 311 ids and of two, with one layer and with two, at three small widths, from which
they grow in a straight line with the widths. `--check` measures whole steps: on a CPU all allocations that torch's profiler sees, on a GPU `max_memory_allocated`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measuring import GIB, Records, add_arguments, autocast, peak_gib, reset_peak, training_step
from policy_training import SIZES, batch_of, build
from quantizer_training import SIZES as QUANTIZER_SIZES
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lapa import LapaQuantizer, LapaQuantizerConfig

METHODS = ("full", "lora", "qlora")
# Bytes per weight in nf4 with doubly quantised constants: 4 bits, 8 bits per 64 weights, 32 bits per 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
DEVICES = 8


@dataclass
class Kept:
    """Bytes that autograd keeps per token in each layer, the same under checkpointing, per token outside, and once."""

    per_layer: float
    per_checkpoint: float
    outside: float
    once: float


@dataclass
class Sizes:
    """Bytes of what a method holds before any token: weights, gradients, optimizer, and the gradient of the head."""

    weights: float
    gradients: float
    optimizer: float
    head: float

    def peak(self, kept: Kept, tokens: int, layers: int, checkpoint: bool) -> float:
        """Peak bytes of a step by the formula above."""
        per_layer = kept.per_checkpoint if checkpoint else kept.per_layer
        # Embedding and head are done with before the first layer is recomputed.
        last = max(kept.once + tokens * kept.outside, tokens * kept.per_layer if checkpoint else 0)
        activations = tokens * layers * per_layer + last
        return self.weights + self.optimizer + max(self.gradients, activations + 2 * self.head)


def stored_bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def kept_bytes(forward: Callable[[], torch.Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps of a forward pass, parameters and what they are packed into left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = stored_bytes(kept.values())
    del loss
    return total


def policy_forward(model: Any, config: Any, args: argparse.Namespace, rows: int) -> Callable[[], torch.Tensor]:
    batch = batch_of(config, rows, "latent" if args.method == "full" else "action", args.device)

    def forward() -> torch.Tensor:
        with autocast(args.device, args.method != "full"):
            return model(**batch, use_cache=False).loss

    forward.tokens = batch["input_ids"].numel()  # type: ignore[attr-defined]
    return forward


def set_checkpointing(model: Any, checkpoint: bool) -> None:
    if checkpoint:
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


def kept_per_token(args: argparse.Namespace, size: dict[str, Any]) -> Kept:
    """Measures `Kept` at a width: one layer and two, one row and two, with and without checkpointing."""
    totals: dict[tuple[int, int, bool], float] = {}
    tokens = 0
    for layers in (1, 2):
        SIZES["probe"] = {**size, "num_hidden_layers": layers}
        model, config = build(argparse.Namespace(**{**vars(args), "size": "probe"}))
        for rows in (1, 2):
            for checkpoint in (False, True):
                set_checkpointing(model, checkpoint)
                forward = policy_forward(model, config, args, rows)
                tokens = forward.tokens // rows  # type: ignore[attr-defined]
                totals[layers, rows, checkpoint] = kept_bytes(forward, model)
        del model
    row = {(layers, c): totals[layers, 2, c] - totals[layers, 1, c] for layers in (1, 2) for c in (False, True)}
    per_layer, per_checkpoint = ((row[2, c] - row[1, c]) / tokens for c in (False, True))
    return Kept(per_layer, per_checkpoint, row[1, False] / tokens - per_layer, totals[1, 1, False] - row[1, False])


def kept_at(args: argparse.Namespace, hidden_size: int, intermediate_size: int) -> Kept:
    """`Kept` at any width: what is kept grows in a straight line with both sizes, so three small widths tell all."""

    def probe(hidden: int, intermediate: int) -> Kept:
        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": hidden // 128}
        return kept_per_token(args, sizes)

    base, wider, deeper = probe(256, 512), probe(512, 512), probe(256, 1024)
    values = {}
    for name, value in vars(base).items():
        by_hidden = (getattr(wider, name) - value) / 256
        by_intermediate = (getattr(deeper, name) - value) / 512
        values[name] = value + by_hidden * (hidden_size - 256) + by_intermediate * (intermediate_size - 512)
    return Kept(**values)


def held(model: nn.Module, state_bytes: int | None = None) -> Sizes:
    """What a model holds; moments in the parameters' dtype unless `state_bytes` per value are given."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = 2 * sum(p.numel() * (state_bytes or p.element_size()) for p in trained)
    heads = [m.weight for name, m in model.named_modules() if name.endswith("lm_head") and hasattr(m, "weight")]
    head = sum(w.numel() * w.element_size() for w in heads[:1] if w.requires_grad)
    weights = stored_bytes([*model.parameters(), *model.buffers()])
    return Sizes(weights, gradients, states, head)


def measured_peak(step: Callable[[], object], device: str) -> float:
    """Peak bytes that a step adds to what is held when it starts."""
    if device.startswith("cuda"):
        reset_peak(device)
        before = torch.cuda.memory_allocated()
        step()
        return peak_gib(device) * GIB - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    now = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak


def check(size: str, args: argparse.Namespace, records: Records) -> None:
    """Measured peaks of whole steps beside the formula's, for one method at a small size."""
    model, config = build(argparse.Namespace(**{**vars(args), "size": size}))
    kept = kept_at(args, config.text_config.hidden_size, config.text_config.intermediate_size)
    sizes = held(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    for checkpoint in (False, True):
        set_checkpointing(model, checkpoint)
        for rows in args.check_rows:
            forward = policy_forward(model, config, args, rows)

            def step(forward: Callable[[], torch.Tensor] = forward) -> None:
                training_step(forward, trained, optimizer, 1.0)

            step()
            peak = sizes.weights + sizes.optimizer + measured_peak(step, args.device)
            tokens, layers = forward.tokens, config.text_config.num_hidden_layers  # type: ignore[attr-defined]
            formula = sizes.peak(kept, tokens, layers, checkpoint)
            records.add(
                table="check", size=size, method=args.method, checkpoint=checkpoint, batch=rows,
                measured_mib=peak / (1 << 20), formula_mib=formula / (1 << 20), ratio=formula / peak,
            )  # fmt: skip


def check_quantizer(args: argparse.Namespace, records: Records) -> None:
    """What autograd keeps per pair at full size, in each precision."""
    for precision in ("fp32", "autocast", "bf16"):
        with torch.device(args.device):
            model = LapaQuantizer(LapaQuantizerConfig(**QUANTIZER_SIZES[args.quantizer_size])).train()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model.to(dtype)
        pairs = torch.rand(2, 2, 3, *model.config.image_height_width, device=args.device, dtype=dtype)

        def forward(pairs: torch.Tensor, model: Any = model, precision: str = precision) -> torch.Tensor:
            with autocast(args.device, precision == "autocast"):
                return model(pairs).loss

        one, two = (kept_bytes(lambda n=n, f=forward, p=pairs: f(p[:n]), model) for n in (1, 2))
        held_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        # Weights, gradients, two moments; under autocast the bf16 copies of the weights are kept too.
        fixed, per_pair = 4 * held_bytes + (one - (two - one)), two - one
        records.add(
            table="quantizer", precision=precision, fixed_gib=fixed / GIB, mib_per_pair=per_pair / (1 << 20),
            batch_64_gib=(fixed - held_bytes + max(held_bytes, 64 * per_pair)) / GIB,
        )  # fmt: skip
        del model


def count_7b() -> tuple[int, int, int, int]:
    """Weights of the 7B: in the layers' matrices, elsewhere, in the head; and of LoRA of rank 32 on the matrices."""
    args = argparse.Namespace(
        size="7b", method="lora", dtype="bfloat16", device="meta", attention="sdpa", published_numerics=False
    )
    model, config = build(args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    text = config.text_config
    matrices = text.num_hidden_layers * text.hidden_size * (4 * text.hidden_size + 3 * text.intermediate_size)
    return matrices, total - matrices, config.vocab_size * text.hidden_size, trained


def extrapolate(args: argparse.Namespace, records: Records) -> None:
    """The formula at 7B: every way to hold the weights, for `--rows` rows, with and without checkpointing."""
    matrices, rest, head, lora = count_7b()
    whole, layers = matrices + rest, 32
    one_layer = 2 * matrices / layers
    kept = {}
    for method in METHODS:
        args.method = method
        kept[method] = kept_at(args, 4096, 11008)
        records.add(table="kept", method=method, **{f"{k}_kib": v / 1024 for k, v in vars(kept[method]).items()})
    ways = {
        "bf16 weights, fp32 moments": ("full", Sizes(2 * whole, 2 * whole, 8 * whole, 2 * head)),
        "bf16 weights and moments": ("full", Sizes(2 * whole, 2 * whole, 4 * whole, 2 * head)),
        "LoRA, bf16 base": ("lora", Sizes(2 * whole + 4 * lora, 4 * lora, 8 * lora, 0)),
        "QLoRA, nf4 base": ("qlora", Sizes(NF4_BYTES * matrices + 2 * rest + 4 * lora, 4 * lora, 8 * lora, 0)),
    }
    for name in ("bf16 weights, fp32 moments", "bf16 weights and moments"):
        s = ways[name][1]
        # Two layers are gathered at a time; the head is gathered whole.
        shard = Sizes(
            s.weights / DEVICES + 2 * one_layer + s.head, s.gradients / DEVICES, s.optimizer / DEVICES, s.head
        )
        ways[f"{name}, FSDP over {DEVICES}"] = ("full", shard)
    for name, (method, sizes) in ways.items():
        tokens = args.rows * 311
        plain, checkpoint = (sizes.peak(kept[method], tokens, layers, c) / GIB for c in (False, True))
        one = sizes.peak(kept[method], 311, layers, True) / GIB
        records.add(
            table="7b", way=name, weights_gib=sizes.weights / GIB, gradients_gib=sizes.gradients / GIB,
            optimizer_gib=sizes.optimizer / GIB, rows=args.rows, one_row_gib=one, checkpoint_gib=checkpoint,
            plain_gib=plain,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=1)
    parser.add_argument("--rows", type=int, default=32, help="rows per device of the 7B table; 0 leaves it out")
    parser.add_argument("--check", nargs="*", default=[], choices=SIZES, help="sizes at which steps are measured")
    parser.add_argument("--check-rows", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of --check")
    parser.add_argument("--quantizer-size", choices=QUANTIZER_SIZES, help="also what the quantizer keeps per pair")
    args = parser.parse_args()
    args.dtype, args.attention, args.published_numerics = "bfloat16", "sdpa", False
    records = Records("training memory", args)
    for size in args.check:
        for method in args.methods:
            args.method = method
            check(size, args, records)
    if args.quantizer_size:
        check_quantizer(args, records)
    if args.rows:
        extrapolate(args, records)


if __name__ == "__main__":
    main()
