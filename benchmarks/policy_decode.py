"""Time from image codes and prompt to latent action codes and to action tokens, with random weights.

    python benchmarks/policy_decode.py --size 200m --threads 2
    python benchmarks/policy_decode.py --size 7b --device cuda --dtype bfloat16 --compile

Prompt: 128 text positions, 256 image codes and the end of the image, and the six ids before the tokens, as the
released models have it; batch 1.
"""

import argparse

import torch
from measuring import Records, add_arguments, peak_gib, reset_peak
from policy_training import SIZES
from timing import alternate, print_table

from lapa import LapaConfig, LapaForActionPrediction

NUM_TEXT, NUM_IMAGE_TOKENS, NUM_MARKER = 128, 256, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="200m")
    add_arguments(parser, rounds=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="also a compiled model with a static cache")
    args = parser.parse_args()
    records = Records("policy decode", args)
    config = LapaConfig(text_config=SIZES[args.size], keep_latent_head=True)
    config.dtype = getattr(torch, args.dtype)
    with torch.device(args.device):
        model = LapaForActionPrediction._from_config(config, dtype=config.dtype).eval()
    parameters = sum(p.numel() for p in model.parameters())
    image = [config.vision_offset] * NUM_IMAGE_TOKENS + [config.vision_offset + config.end_of_vision_id]
    ids = torch.tensor([[1, *range(100, 99 + NUM_TEXT), *image, *range(300, 300 + NUM_MARKER)]], device=args.device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "vision_codes": torch.randint(0, 8192, (1, NUM_IMAGE_TOKENS), device=args.device),
    }
    static = {"cache_implementation": "static"}
    groups = {
        "eager": {
            "prefill (one forward)": lambda: model(**inputs, logits_to_keep=1),
            "4 latent codes": lambda: model.predict_latent_action(**inputs),
            "7 action tokens": lambda: model.predict_action_tokens(**inputs),
        },
        "static cache, compiled": {
            "4 latent codes": lambda: model.predict_latent_action(**inputs, **static),
            "7 action tokens": lambda: model.predict_action_tokens(**inputs, **static),
        },
    }
    for group, candidates in groups.items():
        if group != "eager" and not args.compile:
            continue
        reset_peak(args.device)
        timings = alternate(candidates, args.rounds, args.device)
        title = f"policy, {parameters / 1e6:.0f}M parameters, {args.dtype}, {args.device}, {group}, batch 1"
        print_table(title, timings, 1, "calls")
        for name, timing in timings.items():
            records.add(
                size=args.size, dtype=args.dtype, mode=group, candidate=name, length=ids.shape[1],
                milliseconds=1e3 * timing.wall, peak_gib=peak_gib(args.device),
            )  # fmt: skip


if __name__ == "__main__":
    main()
