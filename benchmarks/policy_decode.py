"""Time from image codes and prompt to latent action codes and to action tokens, with random weights.

    python benchmarks/policy_decode.py --size 200m --threads 2
    python benchmarks/policy_decode.py --size 7b --device cuda --dtype bfloat16 --compile

Prompt: 128 text positions, 256 image codes and the end of the image, and the six ids before the tokens, as the
released models have it; batch 1.
"""

import argparse
from typing import Any

import torch
from timing import alternate, print_table

from lapa import LapaConfig, LapaForActionPrediction

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "200m": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16},
    "7b": {},
}
NUM_TEXT, NUM_IMAGE_TOKENS, NUM_MARKER = 128, 256, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="200m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="also a compiled model with a static cache")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
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
    candidates = {
        "prefill (one forward)": lambda: model(**inputs, logits_to_keep=1),
        "4 latent codes": lambda: model.predict_latent_action(**inputs),
        "7 action tokens": lambda: model.predict_action_tokens(**inputs),
    }
    if args.compile:
        static = {"cache_implementation": "static"}
        candidates |= {
            "4 latent codes, static cache (compiled)": lambda: model.predict_latent_action(**inputs, **static),
            "7 action tokens, static cache (compiled)": lambda: model.predict_action_tokens(**inputs, **static),
        }
    title = f"policy, {parameters / 1e6:.0f}M parameters, {args.dtype}, {args.device}, {args.threads} threads, batch 1"
    print_table(title, alternate(candidates, args.rounds, args.device), 1, "calls")


if __name__ == "__main__":
    main()
