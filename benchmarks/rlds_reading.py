"""
Episodes and frames per second out of an RLDS data set, against TensorFlow Datasets reading the same files.

    python3.11 -m venv /tmp/tfds && /tmp/tfds/bin/pip install tensorflow-cpu tensorflow-datasets
    python benchmarks/rlds_reading.py --tfds-python /tmp/tfds/bin/python --gigabytes 1 --rounds 5 [--core 0]

The records of the Bridge shard are repeated, with sums that fit, into a folder of several files. Two processes, each with one
core (the same), read all of it in turn: once without decoding images, once with those of one camera, once with all
cameras. TensorFlow Datasets is read as its guide for RLDS has it (a data set of steps in each episode), and at its best, as
training code for Open-X does: the steps of an episode as they are stored, images decoded inside its graph. Both check sums.
Three of the four cameras of the shard are blank: `RldsSource` finds that out and leaves them out. Imports are not timed.
"""

import argparse
import json
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CAMERAS = ("image_0", "image_1", "image_2", "image_3")
# What is decoded, by mode; all modes read actions, states and instructions.
MODES: dict[str, tuple[str, ...]] = {"no image": (), "one camera": CAMERAS[:1], "all cameras": CAMERAS}
FILE_BYTES = 100 << 20


def repeat_records(source: Path, target: Path, num_bytes: int) -> int:
    """Writes a data set of the records of another, over and over; returns its size in bytes."""
    (shard,) = source.glob("*-train.tfrecord-*")
    records = shard.read_bytes()
    info = json.loads((source / "dataset_info.json").read_text())
    (split,) = (entry for entry in info["splits"] if entry["name"] == "train")
    num_files = max(1, round(num_bytes / FILE_BYTES))
    per_file = max(1, -(-num_bytes // (num_files * len(records))))
    lengths = [str(per_file * _count(records))] * num_files
    info["splits"] = [{**split, "shardLengths": lengths, "numBytes": str(per_file * len(records) * num_files)}]
    target.mkdir(parents=True, exist_ok=True)
    (target / "features.json").write_bytes((source / "features.json").read_bytes())
    (target / "dataset_info.json").write_text(json.dumps(info))
    for number in range(num_files):
        name = f"{info['name']}-train.tfrecord-{number:05d}-of-{num_files:05d}"
        with open(target / name, "wb") as file:
            for _ in range(per_file):
                file.write(records)
    return per_file * len(records) * num_files


def _count(records: bytes) -> int:
    count = place = 0
    while place < len(records):
        place += 16 + struct.unpack_from("<Q", records, place)[0]
        count += 1
    return count


def with_lapa(folder: str, mode: str) -> Iterator[int]:
    """Number of frames of each episode, read by `RldsSource`."""
    from lapa.data.rlds import RldsSource

    cameras = list(MODES[mode])
    for episode in RldsSource(folder, split="train", cameras=cameras or CAMERAS[:1]):
        assert episode.action is not None and episode.proprio is not None and episode.instructions is not None
        frames = [
            episode.read_frames(camera, range(episode.num_steps)) for camera in cameras if camera in episode.frames
        ]
        assert all(len(read) == episode.num_steps for read in frames)
        yield episode.num_steps


def with_tfds(folder: str, mode: str) -> Iterator[int]:
    """The same by TensorFlow Datasets at its best: steps as they are stored, images decoded in the graph."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    def select(episode: Any) -> Any:
        steps = episode["steps"]
        read = {name: steps[name] for name in ("action", "language_instruction")}
        read["state"] = steps["observation"]["state"]
        for camera in MODES[mode] or CAMERAS[:1]:
            images = steps["observation"][camera]
            decode = tf.io.decode_jpeg if MODES[mode] else tf.identity
            read[camera] = tf.map_fn(decode, images, fn_output_signature=tf.uint8) if MODES[mode] else images
        return read

    data = tfds_episodes(folder, {"steps": tfds.decode.SkipDecoding()}).map(select)
    for steps in data.as_numpy_iterator():
        yield len(steps["action"])


def with_tfds_guide(folder: str, mode: str) -> Iterator[int]:
    """The same by TensorFlow Datasets as its guide has it: a data set of steps per episode."""
    import tensorflow_datasets as tfds

    left = {camera: tfds.decode.SkipDecoding() for camera in CAMERAS if camera not in MODES[mode]}
    for episode in tfds_episodes(folder, {"steps": {"observation": left}} if left else None):
        yield sum(1 for _ in episode["steps"].as_numpy_iterator())


def tfds_episodes(folder: str, decoders: Any) -> Any:
    """Episodes, on one thread."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    read = tfds.ReadConfig(
        options=options,
        try_autocache=False,
        interleave_cycle_length=1,
        num_parallel_calls_for_decode=1,
        num_parallel_calls_for_interleave_files=1,
    )
    return tfds.builder_from_directory(folder).as_dataset(split="train", decoders=decoders, read_config=read)


READERS: dict[str, Callable[[str, str], Iterator[int]]] = {
    "lapa": with_lapa,
    "tfds": with_tfds,
    "tfds, guide": with_tfds_guide,
}


def serve(folder: str) -> None:
    """Reads for a line of reader and mode at a time; answers with the times and counts."""
    for line in sys.stdin:
        reader, mode = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        lengths = list(READERS[reader](folder, mode))
        seconds = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps([*seconds, len(lengths), sum(lengths)]), flush=True)


class Server:
    """A process that reads, on one core."""

    def __init__(self, python: str, folder: str, core: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TF_NUM_INTRAOP_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        environment |= {"TF_NUM_INTEROP_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            ["taskset", "--cpu-list", str(core), python, __file__, "--serve", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(self, reader: str, mode: str) -> list[float]:
        """Wall and processor seconds, episodes and frames."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([reader, mode]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{reader} ended while it read {mode!r}; run {self.process.args} to see why")
        return list(json.loads(answer))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def versions(python: str) -> str:
    script = "import tensorflow, tensorflow_datasets as t; print(tensorflow.__version__, t.__version__)"
    run = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return "TensorFlow {}, TensorFlow Datasets {}".format(*run.stdout.split()[-2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared/data/bridge_rlds/1.0.0"
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", help="where the repeated data set is kept; a temporary folder when not given")
    parser.add_argument("--tfds-python", help="Python with tensorflow-datasets; only lapa is timed when not given")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="that both are pinned to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    with tempfile.TemporaryDirectory(prefix="rlds-") as temporary:
        folder = Path(arguments.folder or temporary) / "bridge_dataset" / "1.0.0"
        size = repeat_records(arguments.data, folder, int(arguments.gigabytes * 1e9))
        print(f"{size / 1e9:.2f} GB in {len(list(folder.glob('*.tfrecord-*')))} files")
        pythons = {"lapa": sys.executable}
        if arguments.tfds_python:
            print(versions(arguments.tfds_python))
            pythons |= dict.fromkeys(("tfds", "tfds, guide"), arguments.tfds_python)
        readers = [reader for reader in arguments.readers if reader in pythons]
        servers = {
            python: Server(python, str(folder), arguments.core) for python in {pythons[name] for name in readers}
        }
        for mode in arguments.modes:
            runs: dict[str, list[list[float]]] = {reader: [] for reader in readers}
            for number in range(arguments.rounds + 1):
                for reader in readers:
                    run = servers[pythons[reader]].run(reader, mode)
                    # The first round fills caches.
                    if number or arguments.rounds == 0:
                        runs[reader].append(run)
            print_modes(mode, runs, size)
        for server in servers.values():
            server.close()


def print_modes(mode: str, runs: dict[str, list[list[float]]], size: int) -> None:
    """One Markdown row per reader: rates, and how many times as fast lapa is."""
    medians = {reader: [statistics.median(column) for column in zip(*times)] for reader, times in runs.items()}
    print(
        f"\n{mode}\n\n| reader | episodes/s | frames/s | MB/s | wall s | CPU s | lapa is (wall) | (CPU) |\n|---|---|---|---|---|---|---|---|"
    )
    base = medians["lapa"] if "lapa" in medians else next(iter(medians.values()))
    for reader, (wall, cpu, episodes, frames) in medians.items():
        rates = f"{episodes / wall:.0f} | {frames / wall:.0f} | {size / wall / 1e6:.0f} | {wall:.2f} | {cpu:.2f}"
        print(f"| {reader} | {rates} | {wall / base[0]:.2f} | {cpu / base[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
