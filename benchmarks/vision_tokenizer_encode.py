"""Images per second of the full-size vision tokenizer's encoder.

python benchmarks/vision_tokenizer_encode.py --threads 2
"""

import argparse

import torch
from timing import alternate, print_table

from lapa import LapaVisionTokenizer, LapaVisionTokenizerConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {
        name: LapaVisionTokenizer(LapaVisionTokenizerConfig()).eval().to(args.device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for batch in args.batch_sizes:
        images = torch.rand(batch, 3, 256, 256, device=args.device) * 2 - 1
        candidates = {}
        for name, model in models.items():
            inputs = images.to(model.dtype)
            candidates[name] = lambda model=model, inputs=inputs: model.encode(inputs)
        timings = alternate(candidates, args.rounds, args.device)
        print_table(f"vision tokenizer encode, batch {batch}, {args.threads} threads", timings, batch, "images")


if __name__ == "__main__":
    main()
