"""Tables of what `gpu_suite.py` measured, as Markdown.

python benchmarks/gpu_table.py gpu.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def cell(value: Any) -> str:
    """A number at three digits, a switch as yes or no, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(title: str, records: Sequence[Record], columns: dict[str, str]) -> None:
    """Prints a table: one row per record, `columns` from heading to key; nothing without records."""
    if not records:
        return
    print(f"\n**{title}**\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for record in records:
        cells = [cell(record.get(key)) for key in columns.values()]
        if record.get("out_of_memory"):
            cells[-1] = "out of memory"
        print("| " + " | ".join(cells) + " |")


def scaled(records: list[Record], key: str, new: str, factor: float) -> list[Record]:
    """The records with `new = factor * key`."""
    return [{**r, new: factor * r[key] if r.get(key) is not None else None} for r in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    lines = parser.parse_args().records.read_text(encoding="utf-8").splitlines()
    records: list[Record] = [json.loads(line) for line in lines if line.strip()]
    machines = sorted({f"{r['device']}, torch {r['torch']}" for r in records if "device" in r})
    print("Measured on " + "; ".join(machines) + ".")
    records = scaled(records, "utilisation", "percent", 100)
    quantizer = [r for r in records if r["part"] == "quantizer training"]
    speed = {"samples/s": "samples_per_second", "step s": "step_seconds", "MFU %": "percent", "peak GiB": "peak_gib"}
    table(
        "Quantizer training, full size",
        [r for r in quantizer if "precision" in r],
        {"precision": "precision", "compiled": "compile", "batch": "batch", **speed},
    )
    layers = scaled([r for r in quantizer if "layer" in r], "forward_seconds", "forward_ms", 1e3)
    table(
        "Single layers, bf16",
        scaled(layers, "forward_backward_seconds", "both_ms", 1e3),
        {"layer": "layer", "batch": "batch", "forward ms": "forward_ms", "forward and backward ms": "both_ms"},
    )
    labels = [r for r in records if r["part"] == "label rate"]
    table(
        "Labelling, full size, bf16",
        [r for r in labels if "batch" in r],
        {
            "compiled": "compile",
            "batch": "batch",
            "encode pairs/s": "encode_pairs_per_second",
            "with copy pairs/s": "copy_and_encode_pairs_per_second",
            "copy alone pairs/s": "copy_pairs_per_second",
            "MFU %": "percent",
            "peak GiB": "peak_gib",
        },
    )
    table(
        "JPEG decoding on the host",
        [r for r in labels if "decode_threads" in r],
        {"threads": "decode_threads", "pairs/s": "jpeg_decode_pairs_per_second"},
    )
    table(
        "Policy training",
        [r for r in records if r["part"] == "policy training" and "method" in r],
        {
            "size": "size",
            "method": "method",
            "fp32 residual": "published_numerics",
            "checkpointing": "checkpoint",
            "compiled": "compile",
            "batch": "batch",
            "tokens/s": "tokens_per_second",
            **speed,
            "hours for 70k x 256": "hours_for_published",
        },
    )
    table(
        "Decoding, batch 1",
        [r for r in records if r["part"] == "policy decode"],
        {"size": "size", "mode": "mode", "call": "candidate", "ms": "milliseconds", "peak GiB": "peak_gib"},
    )
    table(
        "Parts of the run",
        [r for r in records if r["part"] == "suite"],
        {"part": "name", "seconds": "seconds", "exit": "exit"},
    )


if __name__ == "__main__":
    main()
