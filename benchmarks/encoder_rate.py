"""Frame pairs per second of the quantizer's encoder, and of what feeds it on the host.

    python benchmarks/encoder_rate.py --size tiny --batch-sizes 8 --no-compile
    python benchmarks/encoder_rate.py --device cuda --dtype bfloat16 --batch-sizes 64 256 1024

`encode` is the encoder alone on frames that lie on the device. `copy and encode` starts from uint8 frames in pinned host
memory and ends with codes on the host. `decode` reads 256-pixel JPEGs with Pillow in threads, two frames to a pair.
"""

import argparse
import io
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any

import numpy as np
import torch
from measuring import (
    Records,
    add_arguments,
    compile_layers,
    count_flops,
    median_seconds,
    out_of_memory,
    peak_gib,
    reset_peak,
    utilisation,
)
from PIL import Image
from quantizer_training import SIZES

from lapa import LapaQuantizerConfig
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder


def jpeg_rate(size: int, rounds: int, threads: int, num_images: int = 512) -> float:
    """Pairs per second that Pillow decodes from JPEGs of smooth pictures, quality 95."""
    coarse = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95)
    data = buffer.getvalue()

    def decode(_: int) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    with ThreadPoolExecutor(threads) as pool:
        seconds = median_seconds(lambda: list(pool.map(decode, range(num_images), chunksize=16)), rounds, "cpu")
    return num_images / 2 / seconds


def measure_encoder(model: Any, batch: int, compiled: bool, args: argparse.Namespace, records: Records) -> None:
    device, dtype = args.device, next(model.parameters()).dtype
    reset_peak(device)
    shape = (batch, 2, 3, *model.config.image_height_width)
    host = torch.randint(0, 256, shape, dtype=torch.uint8, pin_memory=device.startswith("cuda"))
    pairs = host.to(device).to(dtype) / 255
    described = {"size": args.size, "dtype": args.dtype, "compile": compiled, "batch": batch}

    def copy_and_encode() -> torch.Tensor:
        frames = host.to(device, non_blocking=True)
        return model(frames.to(dtype) / 255).latent_action_codes.cpu()

    with out_of_memory(records, **described):
        seconds = median_seconds(lambda: model(pairs), args.rounds, device)
        with_copy = median_seconds(copy_and_encode, args.rounds, device)
        copy = median_seconds(lambda: host.to(device, non_blocking=True), args.rounds, device)
        records.add(
            **described,
            encode_pairs_per_second=batch / seconds,
            copy_and_encode_pairs_per_second=batch / with_copy,
            copy_pairs_per_second=batch / copy if device.startswith("cuda") else None,
            teraflops_per_pair=args.flops / 1e12,
            utilisation=utilisation(batch * args.flops, seconds, device),
            peak_gib=peak_gib(device),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=7)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--no-compile", action="store_true", help="leave compiled layers out")
    parser.add_argument("--decode-threads", type=int, default=cpu_count() or 1)
    args = parser.parse_args()
    records = Records("label rate", args)
    with torch.device(args.device), torch.no_grad():
        model = LapaQuantizerEncoder(LapaQuantizerConfig(**SIZES[args.size])).eval().to(getattr(torch, args.dtype))
        size = model.config.image_height_width
        args.flops = count_flops(lambda: model(torch.rand(1, 2, 3, *size).to(model.dtype)))
    with torch.no_grad():
        for compiled in (False, True)[: 1 if args.no_compile else 2]:
            compile_layers(model, "LapaQuantizerLayer", compiled)
            for batch in args.batch_sizes:
                measure_encoder(model, batch, compiled, args, records)
    for threads in sorted({1, args.decode_threads}):
        rate = jpeg_rate(size[0], args.rounds, threads)
        records.add(decode_threads=threads, image_size=size[0], jpeg_decode_pairs_per_second=rate)


if __name__ == "__main__":
    main()
