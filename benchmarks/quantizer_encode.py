"""Frame pairs per second of the full-size quantizer's encoder, beside the published code when it is given.

    python benchmarks/quantizer_encode.py --published ../LAPA --threads 2
    python benchmarks/quantizer_encode.py --device cuda

`--published` is a checkout of github.com/LatentActionPretraining/LAPA; its model needs `einops` and `beartype`. Both
models get random weights: speed does not depend on them.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import torch
from timing import alternate, print_table

from lapa import LapaQuantizer, LapaQuantizerConfig


def published_model(checkout: Path) -> Any:
    """The published quantizer on the CPU. Its package imports a trainer and its sizes a GPU; both are stepped around."""
    folder = checkout / "laq" / "laq_model"
    if not folder.is_dir():
        raise SystemExit(f"--published {checkout}: {folder} is missing; give a checkout of the published repository")
    package = types.ModuleType("laq_model")
    package.__path__ = [str(folder)]
    sys.modules["laq_model"] = package
    from laq_model import latent_action_quantization as module  # type: ignore[import-not-found]

    quantizer_class = module.NSVQ
    module.NSVQ = lambda **kwargs: quantizer_class(**{**kwargs, "device": "cpu"})
    return module.LatentActionQuantization(
        dim=1024, quant_dim=32, codebook_size=8, image_size=256, patch_size=32, spatial_depth=8, temporal_depth=8,
        dim_head=64, heads=16, code_seq_len=4,
    ).eval()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=Path, help="checkout of the published repository")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours = {dtype: LapaQuantizer(LapaQuantizerConfig()).eval().to(args.device, dtype)
            for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    theirs = published_model(args.published) if args.published else None
    for batch in args.batch_sizes:
        pairs = torch.rand(batch, 2, 3, 256, 256, device=args.device)
        candidates = {}
        if theirs is not None:
            video = pairs.transpose(1, 2).contiguous()
            candidates["published fp32"] = lambda video=video: theirs(video, return_only_codebook_ids=True)
        for dtype, model in ours.items():
            name = f"lapa {'fp32' if dtype == torch.float32 else 'bf16'}"
            inputs = pairs.to(dtype)
            candidates[name] = lambda model=model, inputs=inputs: model.encode(inputs)
        timings = alternate(candidates, args.rounds, args.device)
        print_table(f"quantizer encode, batch {batch}, {args.threads} threads, {args.device}", timings, batch, "pairs")


if __name__ == "__main__":
    main()
