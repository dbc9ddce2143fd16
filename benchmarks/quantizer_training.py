"""Training steps of the latent action quantizer, beside the published code when it is given.

    python benchmarks/quantizer_training.py --published ../LAPA --threads 2
    python benchmarks/quantizer_training.py --device cuda --variants autocast/64 bf16/64 bf16+compile/64 --layers

A step is forward pass, backward pass, clipping and Adam. A variant is a precision (`fp32`, `autocast`: fp32 weights under
bf16 autocast, `bf16`: everything in bf16), `+compile` for compiled layers, and the batch size. `--published` is a
checkout of github.com/LatentActionPretraining/LAPA; its model needs `einops` and `beartype`. Both models get random
weights and images: speed does not depend on them. Operations are counted by torch's counter on one pair.
"""

import argparse
from pathlib import Path
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
from quantizer_encode import published_model
from timing import alternate, print_table

from lapa import LapaQuantizer, LapaQuantizerConfig
from lapa.modeling_lapa.modeling_lapa_quantizer_layers import (
    LapaQuantizerFeedForward,
    LapaQuantizerPositionConvolution,
    eager_attention_forward,
    short_attention_forward,
)

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "image_size": 64, "patch_size": 8, "num_spatial_layers": 1, "num_temporal_layers": 1,
             "num_attention_heads": 2},
    "full": {},
}  # fmt: skip
MAX_GRAD_NORM = 0.5


def adam(model: torch.nn.Module, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=fused)


def measure_variant(variant: str, size: str, args: argparse.Namespace, records: Records) -> None:
    options, batch = variant.split("/")[0].split("+"), int(variant.split("/")[1])
    precision, compiled, device = options[0], "compile" in options, args.device
    reset_peak(device)
    with torch.device(device):
        model = LapaQuantizer(LapaQuantizerConfig(**SIZES[size])).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.to(dtype)
    pairs = torch.rand(batch, 2, 3, *model.config.image_height_width, device=device, dtype=dtype)
    parameters = list(model.parameters())

    def loss(pixel_values: torch.Tensor = pairs) -> torch.Tensor:
        with autocast(device, precision == "autocast"):
            return model(pixel_values=pixel_values).loss

    flops = batch * count_flops(lambda: loss(pairs[:1]).backward())
    model.zero_grad(set_to_none=True)
    compile_layers(model, "LapaQuantizerLayer", compiled)
    optimizer = adam(model, fused=True)
    described = {"size": size, "precision": precision, "compile": compiled, "batch": batch}
    with out_of_memory(records, **described):
        seconds = median_seconds(
            lambda: training_step(loss, parameters, optimizer, MAX_GRAD_NORM), args.rounds, device, warmup=3
        )
        records.add(
            **described,
            parameters=sum(p.numel() for p in parameters),
            step_seconds=seconds,
            samples_per_second=batch / seconds,
            teraflops_per_sample=flops / batch / 1e12,
            utilisation=utilisation(flops, seconds, device),
            peak_gib=peak_gib(device),
        )


def measure_layers(args: argparse.Namespace, records: Records, batch: int) -> None:
    """What the layers' faster forms bring: forward and backward pass of each beside the plain one, full size, bf16."""
    device, config = args.device, LapaQuantizerConfig()
    width = config.hidden_size
    with torch.device(device):
        position = LapaQuantizerPositionConvolution(width).bfloat16()
        feed_forward = LapaQuantizerFeedForward(config).bfloat16()
        tokens = torch.randn(2 * batch, 64, width, dtype=torch.bfloat16, requires_grad=True)
        heads = [torch.randn(64 * batch, 16, 2, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    convolution = position.convolution

    def plain_convolution() -> torch.Tensor:
        volume = tokens.reshape(batch, 2, 8, 8, width).permute(0, 4, 1, 2, 3)
        return F.conv3d(F.pad(volume, (1, 1, 1, 1, 2, 0)), convolution.weight, convolution.bias, groups=width)

    def plain_feed_forward() -> torch.Tensor:
        value, gate = feed_forward.up_proj(feed_forward.norm(tokens)).chunk(2, dim=-1)
        return feed_forward.down_proj(value * F.gelu(gate))

    candidates = {
        "position convolution, 3-D": plain_convolution,
        "position convolution": lambda: position(tokens, (batch, 2, 8, 8)),
        "feed-forward, 2730 wide": plain_feed_forward,
        "feed-forward": lambda: feed_forward(tokens),
        "attention over 2 frames, sdpa": lambda: F.scaled_dot_product_attention(*heads, scale=8.0),
        "attention over 2 frames, eager": lambda: eager_attention_forward(position, *heads, None, 8.0)[0],
        "attention over 2 frames": lambda: short_attention_forward(position, *heads, None, 8.0)[0],
    }
    for name, function in candidates.items():
        gradient = torch.randn_like(function())

        def forward_backward(function: Any = function, gradient: torch.Tensor = gradient) -> None:
            function().backward(gradient)

        forward = median_seconds(function, args.rounds, device)
        both = median_seconds(forward_backward, args.rounds, device)
        records.add(layer=name, batch=batch, forward_seconds=forward, forward_backward_seconds=both)


def compare_published(checkout: Path, batches: list[int], args: argparse.Namespace, records: Records) -> None:
    """Alternating steps of both implementations at the published size in fp32."""
    theirs, ours = published_model(checkout).train(), LapaQuantizer(LapaQuantizerConfig()).train()
    their_adam, our_adam = adam(theirs, fused=False), adam(ours, fused=True)
    for batch in batches:
        pairs = torch.rand(batch, 2, 3, 256, 256)
        video = pairs.transpose(1, 2).contiguous()

        def published_step(video: torch.Tensor = video) -> None:
            training_step(lambda: theirs(video)[0], list(theirs.parameters()), their_adam, MAX_GRAD_NORM)

        def step(pairs: torch.Tensor = pairs) -> None:
            training_step(lambda: ours(pairs).loss, list(ours.parameters()), our_adam, MAX_GRAD_NORM)

        timings = alternate({"published": published_step, "lapa": step}, args.rounds, grad=True)
        print_table(f"quantizer training step, fp32, batch {batch}, {args.threads} threads", timings, batch, "pairs")
        for name, timing in timings.items():
            records.add(candidate=name, batch=batch, step_seconds=timing.wall, cpu_seconds=timing.cpu)
        wall = timings["published"].wall / timings["lapa"].wall
        records.add(factor_over_published=wall, batch=batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=5)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--variants", nargs="*", default=[], metavar="PRECISION[+compile]/BATCH")
    parser.add_argument("--layers", type=int, metavar="BATCH", help="also time single layers at this batch size")
    parser.add_argument("--published", type=Path, help="checkout of the published repository")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8], help="with --published")
    args = parser.parse_args()
    records = Records("quantizer training", args)
    if args.published is not None:
        compare_published(args.published, args.batch_sizes, args, records)
    if args.layers:
        measure_layers(args, records, args.layers)
    for variant in args.variants:
        measure_variant(variant, args.size, args, records)


if __name__ == "__main__":
    main()
