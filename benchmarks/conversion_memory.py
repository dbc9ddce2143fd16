"""Peak memory of `lapa convert policy` on a synthetic `params` file; the default sizes are the released 7B.

    python benchmarks/conversion_memory.py --folder /tmp/conversion

It writes a file of the published layout (random blocks, arrays above 1 GiB in Flax's chunked form), converts it in a
process of its own, and prints JSON: size of the file, seconds, that process's peak resident memory, and how much of it
was there after its imports. The released sizes need 28 GB of disk.
"""

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ITEM_BYTES = 2  # bfloat16
FLAX_MAX_CHUNK_BYTES = 2**30
BLOCK = os.urandom(2**22)

CONVERT = """
import json, resource, sys
from lapa.conversion.convert_checkpoints import convert_policy
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(convert_policy(**json.loads(sys.argv[1])), file=sys.stderr)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"peak_bytes": 1024 * peak, "imports_bytes": 1024 * imported}))
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder; removed at the end")
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--intermediate-size", type=int, default=11008)
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--text-vocab-size", type=int, default=32000)
    parser.add_argument("--vision-vocab-size", type=int, default=8448)
    parser.add_argument("--latent-vocab-size", type=int, default=8)
    parser.add_argument("--max-shard-bytes", type=int, default=10**9)
    parser.add_argument("--chunk-bytes", type=int, default=FLAX_MAX_CHUNK_BYTES, help="arrays above it are chunked")
    return parser


def published_shapes(args: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of every array of a published policy."""
    hidden, inner, layers = args.hidden_size, args.intermediate_size, args.num_layers
    for table, head, rows in (
        ("wte", "lm_head", args.text_vocab_size),
        ("vte", "vision_head", args.vision_vocab_size),
        ("dte", "delta_head", args.latent_vocab_size),
    ):
        yield f"transformer/{table}/embedding", (rows, hidden)
        yield f"{head}/kernel", (hidden, rows)
    stack = "transformer/h/scan_decoder"
    for name in ("wq", "wk", "wv", "wo"):
        yield f"{stack}/attention/{name}/kernel", (layers, hidden, hidden)
    yield f"{stack}/feed_forward/w1/kernel", (layers, hidden, inner)
    yield f"{stack}/feed_forward/w2/kernel", (layers, inner, hidden)
    yield f"{stack}/feed_forward/w3/kernel", (layers, hidden, inner)
    for name in ("attention_norm", "ffn_norm"):
        yield f"{stack}/{name}/kernel", (layers, hidden)
    yield "transformer/ln_f/kernel", (hidden,)


def _text(text: str) -> bytes:
    return b"\xd9" + struct.pack(">B", len(text)) + text.encode()


def _number(number: int) -> bytes:
    return b"\xce" + struct.pack(">I", number)


def _array_head(shape: tuple[int, ...], num_bytes: int) -> bytes:
    """An extension of type 1: (shape, dtype name, buffer), up to the buffer."""
    body = b"\x93" + bytes([0x90 + len(shape)]) + b"".join(map(_number, shape)) + _text("bfloat16")
    body += b"\xc6" + struct.pack(">I", num_bytes)
    return b"\xc9" + struct.pack(">I", len(body) + num_bytes) + b"\x01" + body


def _write_random(file: BinaryIO, num_bytes: int) -> None:
    for _ in range(num_bytes // len(BLOCK)):
        file.write(BLOCK)
    file.write(BLOCK[: num_bytes % len(BLOCK)])


def _write_array(file: BinaryIO, key: str, shape: tuple[int, ...], chunk_bytes: int) -> None:
    num_items = 1
    for size in shape:
        num_items *= size
    per_chunk = max(1, chunk_bytes // ITEM_BYTES)
    if num_items <= per_chunk:
        parts = [(_array_head(shape, num_items * ITEM_BYTES), num_items * ITEM_BYTES)]
    else:
        counts = [min(per_chunk, num_items - begin) for begin in range(0, num_items, per_chunk)]
        head = b"\x83" + _text("__msgpack_chunked_array__") + b"\xc3" + _text("shape") + bytes([0x80 + len(shape)])
        head += b"".join(_text(str(axis)) + _number(size) for axis, size in enumerate(shape))
        head += _text("chunks") + b"\xde" + struct.pack(">H", len(counts))
        parts = [(head, 0)]
        for index, count in enumerate(counts):
            array = _array_head((count,), count * ITEM_BYTES)
            parts.append((_text(str(index)) + array, count * ITEM_BYTES))
    names = key.split("/")
    file.write(b"\x92" + bytes([0x90 + len(names)]) + b"".join(map(_text, names)))
    file.write(b"\xc6" + struct.pack(">I", sum(len(head) + num_bytes for head, num_bytes in parts)))
    for head, num_bytes in parts:
        file.write(head)
        _write_random(file, num_bytes)


def write_params(path: Path, args: argparse.Namespace) -> None:
    """Writes a stream of the published layout."""
    with path.open("wb") as file:
        for key, shape in published_shapes(args):
            _write_array(file, key, shape, args.chunk_bytes)


def main() -> None:
    args = make_parser().parse_args()
    args.folder.mkdir(parents=True)
    try:
        params = args.folder / "params"
        write_params(params, args)
        options = {
            "params": str(params),
            "output": str(args.folder / "policy"),
            "config": {"text_config": {"num_attention_heads": args.num_heads}},
            "max_shard_bytes": args.max_shard_bytes,
        }
        begin = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", CONVERT, json.dumps(options)], check=True, stdout=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - begin
        report = {"file_bytes": params.stat().st_size, "seconds": round(seconds, 1), **json.loads(process.stdout)}
        print(json.dumps(report))
    finally:
        shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
