"""Every measurement that needs a GPU, in one command with a time limit; most wanted first.

    python benchmarks/gpu_suite.py --output gpu.jsonl --seconds 390
    python benchmarks/gpu_suite.py --output gpu.jsonl --device cpu --tiny

Each part runs in its own process under its own limit; what it measured before it failed or ran out of time stays in the
output, and the rest goes on. Variants follow from the memory of the card. `lapa` need not be installed: the repository's
folders are linked into a temporary package. `python benchmarks/gpu_table.py gpu.jsonl` makes tables of the output.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = (
    "configuration",
    "processing",
    "modeling_lapa",
    "data",
    "training",
    "evaluation",
    "serving",
    "conversion",
    "hub_cards",
)
# GiB from which a card counts as large.
LARGE_CARD = 100


def parts(gib: float) -> list[tuple[str, int, list[str]]]:
    """Name, seconds at most, and command of each part for a card of `gib` memory."""
    large = gib > LARGE_CARD
    cuda_7b = ["benchmarks/policy_training.py", "--size", "7b", "--rounds", "3", "--halve"]
    full = ["checkpoint/32", "plain/32" if large else "plain/16", "compile/48" if large else "compile/16"]
    full += ["checkpoint+compile/64" if large else "checkpoint+compile/32"]
    lora = ["checkpoint/32", "plain/32" if large else "plain/16", "checkpoint+compile/32"]
    return [
        (
            "quantizer training",
            95,
            ["benchmarks/quantizer_training.py", "--rounds", "5", "--variants", "bf16/64", "autocast/64",
             "bf16+compile/64", "autocast+compile/64", "bf16+compile/256", "--layers", "64"],
        ),
        (
            "label rate",
            55,
            ["benchmarks/encoder_rate.py", "--dtype", "bfloat16", "--rounds", "5", "--batch-sizes", "64", "256", "1024"],
        ),
        ("7B latent pretraining", 110, [*cuda_7b, "--variants", *full]),
        ("7B LoRA", 70, [*cuda_7b, "--method", "lora", "--variants", *lora]),
        (
            "7B decoding",
            75,
            ["benchmarks/policy_decode.py", "--size", "7b", "--dtype", "bfloat16", "--rounds", "7", "--compile"],
        ),
        ("7B QLoRA", 60, [*cuda_7b, "--method", "qlora", "--variants", "checkpoint/32", "plain/16"]),
        (
            "7B latent pretraining, published numerics",
            60,
            [*cuda_7b, "--published-numerics", "--variants", "checkpoint+compile/32"],
        ),
    ]  # fmt: skip


def tiny_parts() -> list[tuple[str, int, list[str]]]:
    """The same scripts at sizes for a CPU, to try the suite itself."""
    policy = ["benchmarks/policy_training.py", "--size", "tiny", "--dtype", "bfloat16", "--rounds", "1", "--halve"]
    quantizer = ["benchmarks/quantizer_training.py", "--size", "tiny", "--rounds", "1", "--variants"]
    return [
        ("quantizer training", 120, [*quantizer, "bf16/2", "autocast/2"]),
        ("label rate", 60, ["benchmarks/encoder_rate.py", "--size", "tiny", "--dtype", "bfloat16", "--no-compile", "--rounds", "1"]),
        *((f"tiny {method}", 90, [*policy, "--method", method, "--variants", "checkpoint/2"]) for method in ("full", "lora", "qlora")),
        ("decoding", 60, ["benchmarks/policy_decode.py", "--size", "tiny", "--dtype", "bfloat16", "--rounds", "1"]),
    ]  # fmt: skip


def link_package(folder: Path) -> None:
    """Lays the repository's folders out as the package `lapa` below `folder`."""
    package = folder / "lapa"
    package.mkdir()
    for file in (REPOSITORY / "lapa").glob("*.py"):
        (package / file.name).symlink_to(file)
    for name in FOLDERS:
        (package / name).symlink_to(REPOSITORY / name)


def run_part(
    name: str, limit: float, command: list[str], args: argparse.Namespace, environment: dict[str, str]
) -> None:
    start = time.monotonic()
    print(f"\n== {name} (at most {limit:.0f} s)", flush=True)
    command = [sys.executable, *command, "--device", args.device, "--output", str(args.output.resolve())]
    try:
        code: int | str = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        code = "timeout"
    with args.output.open("a", encoding="utf-8") as file:
        seconds = round(time.monotonic() - start, 1)
        file.write(json.dumps({"part": "suite", "name": name, "exit": code, "seconds": seconds}) + "\n")
    print(f"== {name}: {seconds} s, exit {code}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--seconds", type=float, default=390, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="parts whose names hold one of these words")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the suite on a CPU")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if args.tiny:
        chosen = tiny_parts()
    else:
        import torch

        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        chosen = parts(torch.cuda.get_device_properties(0).total_memory / 2**30)
    with tempfile.TemporaryDirectory() as folder:
        if importlib.util.find_spec("lapa") is None:
            link_package(Path(folder))
            paths = (folder, os.environ.get("PYTHONPATH"))
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        for name, limit, command in chosen:
            left = deadline - time.monotonic()
            if args.only and not any(word in name for word in args.only):
                continue
            if left < 15:
                print(f"== {name}: left out, no time left", flush=True)
                continue
            run_part(name, min(limit, left), command, args, environment)


if __name__ == "__main__":
    main()
