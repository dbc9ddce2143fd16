"""
Writes a small data set of every format that lapa reads, to try commands on and to see what a format looks like.

    python examples/small_datasets.py small

makes `small/rlds/1.0.0`, `small/lerobot`, `small/ssv2`, `small/videos`, `small/clips` (frame folders), `small/npz` (for
`npz_source.py`), `small/latent.jsonl`, `small/action.jsonl` and `small/mixture.yaml`. All show the same thing: a block that
is pushed over a table.
"""

import io
import json
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from lapa.data.jsonl import PublishedRow, write_action_rows, write_latent_rows
from lapa.data.tfrecord import masked_crc32c

HEIGHT, WIDTH, NUM_EPISODES, NUM_STEPS, FREQUENCY = 64, 96, 4, 30, 10
INSTRUCTIONS = ("push the block to the right", "push the block down")
Frames = NDArray[np.uint8]


def main(root: Path) -> None:
    """Writes all of them below `root`."""
    episodes = [record(number) for number in range(NUM_EPISODES)]
    for number, (frames, actions, instruction) in enumerate(episodes):
        write(root / f"videos/clip_{number}.mp4", video(frames, "libx264", "mp4"))
        write(root / f"ssv2/20bn-something-something-v2/{number + 1}.webm", video(frames, "libvpx-vp9", "webm"))
        for step, frame in enumerate(frames):
            write(root / f"clips/clip_{number}/img_{step + 1:05d}.jpg", image(frame, "JPEG"))
        (root / "npz").mkdir(exist_ok=True)
        np.savez_compressed(root / f"npz/{number}.npz", frames=frames, action=actions, instruction=instruction)
    captions = "".join(f"clip_{number}.mp4,{text}\n" for number, (*_, text) in enumerate(episodes))
    write(root / "videos/captions.csv", f"file_name,text\n{captions}")
    labels = [
        {"id": str(number + 1), "label": text, "template": text.replace("the block", "[something]"), "placeholders": ["the block"]}
        for number, (*_, text) in enumerate(episodes)
    ]  # fmt: skip
    write(root / "ssv2/something-something-v2-train.json", json.dumps(labels))
    write_lerobot(root / "lerobot", episodes)
    write_rlds(root / "rlds/1.0.0", episodes)
    write_rows(root, episodes)
    mixture = "- {path: rlds/1.0.0, weight: 2, frequency: 10}\n- {path: videos, frame_gap_seconds: 1.2, filters: [static, shot_cut]}\n"
    write(root / "mixture.yaml", mixture)


def record(number: int) -> tuple[Frames, NDArray[np.float32], str]:
    """Frames (num_steps, height, width, 3), actions (num_steps, 7) in metres, and what is done."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(120, 160, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    frames = np.stack([coarse.repeat(8, 0).repeat(8, 1)] * NUM_STEPS)
    actions = np.zeros((NUM_STEPS, 7), np.float32)
    place, direction = np.array([10.0, 10.0]), np.eye(2)[1 - number % 2]
    for step in range(NUM_STEPS):
        y, x = place.astype(int)
        frames[step, y : y + 14, x : x + 14] = (200, 50, 40 + 40 * number)
        move = direction * generator.uniform(0.5, 1.6)
        place = place + move
        actions[step, :2], actions[step, 6] = move / 100, step < NUM_STEPS - 5
    return frames, actions, INSTRUCTIONS[number % 2]


def write(path: Path, content: bytes | str) -> None:
    """Writes a file, and makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def image(frame: Frames, image_format: str) -> bytes:
    """Content of an image file."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, format=image_format)
    return file.getvalue()


def video(frames: Frames, codec: str, container: str) -> bytes:
    """Content of a video file."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=FREQUENCY)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FREQUENCY)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def write_lerobot(root: Path, episodes: list[tuple[Frames, NDArray[np.float32], str]]) -> None:
    """Version 2.1: a parquet file and a video per episode."""
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    camera = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {
        "observation.images.front": camera,
        "action": {"dtype": "float32", "shape": [7], "names": names},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    }
    features |= {
        f"{key}_index": {"dtype": "int64", "shape": [1], "names": None} for key in ("frame", "episode", "task")
    }
    info = {
        "codebase_version": "v2.1",
        "robot_type": "so100",
        "fps": FREQUENCY,
        "total_episodes": len(episodes),
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": features,
    }
    write(root / "meta/info.json", json.dumps(info, indent=2))
    tasks = [json.dumps({"task_index": index, "task": text}) for index, text in enumerate(INSTRUCTIONS)]
    write(root / "meta/tasks.jsonl", "\n".join(tasks))
    lines = []
    for number, (frames, actions, text) in enumerate(episodes):
        lines.append(json.dumps({"episode_index": number, "tasks": [text], "length": NUM_STEPS}))
        write(
            root / f"videos/chunk-000/observation.images.front/episode_{number:06d}.mp4",
            video(frames, "libx264", "mp4"),
        )
        steps = np.arange(NUM_STEPS)
        columns = {
            "action": actions.tolist(),
            "timestamp": (steps / FREQUENCY).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(NUM_STEPS, number),
            "task_index": np.full(NUM_STEPS, INSTRUCTIONS.index(text)),
        }
        (root / "data/chunk-000").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), root / f"data/chunk-000/episode_{number:06d}.parquet")
    write(root / "meta/episodes.jsonl", "\n".join(lines))


def write_rlds(root: Path, episodes: list[tuple[Frames, NDArray[np.float32], str]]) -> None:
    """One TFRecord file of `tf.train.Example`s, an episode each, with the two files of TFDS that describe them."""

    def tensor(dtype: str, *shape: int) -> dict[str, Any]:
        return {"tensor": {"shape": {"dimensions": list(map(str, shape))}, "dtype": dtype, "encoding": "none"}}

    picture = {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}}
    observation = {"featuresDict": {"features": {"front": picture}}}
    step = {"action": tensor("float32", 7), "language_instruction": {"text": {}}, "observation": observation}
    steps = {"sequence": {"feature": {"featuresDict": {"features": step}}, "length": "-1"}}
    write(root / "features.json", json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    split = {"name": "train", "shardLengths": [str(len(episodes))]}
    write(root / "dataset_info.json", json.dumps({"name": "blocks", "version": "1.0.0", "splits": [split]}))
    records = []
    for frames, actions, text in episodes:
        features = {
            "steps/action": field(2, field(1, actions.astype("<f4").tobytes())),
            "steps/language_instruction": field(1, field(1, text.encode()) * NUM_STEPS),
            "steps/observation/front": field(1, b"".join(field(1, image(frame, "JPEG")) for frame in frames)),
        }
        entries = [field(1, field(1, key.encode()) + field(2, value)) for key, value in features.items()]
        content = field(1, b"".join(entries))
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        records.append(length + sums[0] + content + sums[1])
    write(root / "blocks-train.tfrecord-00000-of-00001", b"".join(records))


def field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    size, length = len(content), b""
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def write_rows(root: Path, episodes: list[tuple[Frames, NDArray[np.float32], str]]) -> None:
    """The published files: image codes with latent action codes, and with actions. The codes here mean nothing."""
    generator = np.random.default_rng(0)
    rows = [
        PublishedRow(
            instruction=text,
            vision_codes=generator.integers(0, 64, 64),
            latent_action_codes=generator.integers(0, 8, 4),
            action=action,
            action_tokens=np.arange(7),
        )
        for _, actions, text in episodes
        for action in actions[:5]
    ]
    write_latent_rows(root / "latent.jsonl", rows)
    write_action_rows(root / "action.jsonl", rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/small_datasets.py FOLDER")
    main(Path(sys.argv[1]))
