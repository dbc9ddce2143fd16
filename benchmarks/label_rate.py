"""Pairs per second of `lapa label` from end to end, beside what its quantizer does alone, in one run.

    python benchmarks/label_rate.py --data bridge_rlds/1.0.0 --repeat 40
    python benchmarks/label_rate.py --data bridge_rlds/1.0.0 --repeat 400 --released-sizes --device cuda --dtype bfloat16 \
        --compile --batch-size 128 --num-workers 12

The quantizer has random weights: speed does not depend on them. It encodes the very batches that labelling encodes, from
memory. `--repeat` reads the files of an RLDS folder (one split, by hard links) so many times over. Rounds alternate;
medians are printed. Loading models is not counted, starting the reader processes is.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

import torch

from lapa import LapaQuantizer, LapaQuantizerConfig
from lapa.training.label_reader import LabelBatches
from lapa.training.label_run import PairEncoder
from lapa.training.label_script import make_labeller, open_label_sources
from lapa.training.script_arguments import LabelArguments

# Small enough that decoding is a good part of the work, if it is not hidden.
SMALL = {"hidden_size": 128, "num_spatial_layers": 2, "num_temporal_layers": 2, "num_attention_heads": 4,
         "head_dim": 32, "image_size": 64, "patch_size": 8}  # fmt: skip


def repeated_folder(data: Path, output: Path, repeat: int) -> Path:
    """An RLDS folder with every file of the training split `repeat` times."""
    from lapa.data.tfds_folder import RldsFolder

    folder = RldsFolder(str(data))
    files, _ = folder.split_files("train")
    info = json.loads((data / "dataset_info.json").read_text())
    splits = [split for split in info["splits"] if split["name"] == "train"]
    lengths = [str(file.num_records) for file in files] * repeat
    info["splits"] = [{**splits[0], "shardLengths": lengths}]
    target = output / data.name
    target.mkdir(parents=True)
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "features.json").write_bytes((data / "features.json").read_bytes())
    stem = files[0].name.rpartition("-of-")[0].rpartition("-")[0]
    for number in range(len(lengths)):
        source = (data / files[number % len(files)].name).resolve()
        place = target / f"{stem}-{number:05d}-of-{len(lengths):05d}"
        try:
            os.link(source, place)
        except OSError:
            place.symlink_to(source)
    return target


def encode_rate(encoder: PairEncoder, batches: list, num_pairs: int) -> float:
    """Pairs per second of the quantizer alone."""
    start, done, before = time.perf_counter(), 0, None
    for batch in cycle(batches):
        launched = encoder.launch(batch)
        if before is not None:
            before.wait()
        before, done = launched, done + len(batch.pairs)
        if done >= num_pairs:
            break
    before.wait()
    return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="RLDS version folder, or with --repeat 1 any source")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--sizes", type=json.loads, default=SMALL, help="LapaQuantizerConfig fields, JSON")
    parser.add_argument("--released-sizes", action="store_true", help="the sizes of the released quantizer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--episodes-per-unit", type=int, default=64)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        scratch = Path(name)
        LapaQuantizer(LapaQuantizerConfig(**({} if args.released_sizes else args.sizes))).save_pretrained(
            scratch / "q"
        )
        data = args.data if args.repeat == 1 else repeated_folder(args.data, scratch / "data", args.repeat)
        ends, alone = [], []
        encoder = None
        for number in range(args.rounds):
            script_args = LabelArguments(
                model=str(scratch / "q"), data=str(data), output=str(scratch / f"labels{number}"),
                batch_size=args.batch_size, num_workers=args.num_workers, num_threads=args.num_threads,
                episodes_per_unit=args.episodes_per_unit, image_size=args.image_size, device=args.device,
                dtype=args.dtype, compile=args.compile,
            )  # fmt: skip
            sources = open_label_sources(script_args)
            labeller, fresh = make_labeller(script_args, sources)
            if encoder is None:
                encoder = fresh
                held = list(islice(LabelBatches(sources, labeller.units, labeller.reader_options), 8))
                batches = [batch for batch in held if len(batch.pairs) == args.batch_size]
                # Compiles, and warms up.
                encode_rate(encoder, batches, args.batch_size * 3)
            labeller.prepare()
            start = time.perf_counter()
            labeller.run(encoder, labeller.pending())
            seconds = time.perf_counter() - start
            num_pairs = labeller.seen.rows
            ends.append(num_pairs / seconds)
            alone.append(encode_rate(encoder, batches, min(num_pairs, int(seconds * ends[-1]))))
            print(f"round {number + 1}: {num_pairs} pairs, end to end {ends[-1]:.1f}/s, alone {alone[-1]:.1f}/s")
        files = list((scratch / "labels0" / "data").glob("*.parquet"))
        size = sum(path.stat().st_size for path in files) / labeller.seen.rows
    print(f"\n| | pairs/s |\n|---|---|\n| quantizer alone | {statistics.median(alone):.1f} |")
    print(
        f"| end to end | {statistics.median(ends):.1f} |\n| ratio | {statistics.median(ends) / statistics.median(alone):.3f} |"
    )
    print(f"\n{size:.0f} bytes of Parquet a pair; {args}")


if __name__ == "__main__":
    main()
