"""Writes TFDS folders in RLDS form, byte by byte, from the features of a data set and the values of its episodes."""

import io
import json
import struct

import numpy as np
from PIL import Image

from lapa.data.tfrecord import masked_crc32c

IMAGE = "image"
TEXT = "text"


def varint(value):
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number, content):
    """A protobuf field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values):
    """`tf.train.Feature` of a list of bytes, or of an array of numbers."""
    if isinstance(values, list):
        return field(1, b"".join(field(1, value) for value in values))
    values = np.asarray(values)
    if np.issubdtype(values.dtype, np.floating):
        return field(2, field(1, values.astype("<f4").tobytes()))
    return field(3, field(1, b"".join(varint(int(value)) for value in values.reshape(-1))))


def example(features):
    """`tf.train.Example` of features by name; those that are None are left out."""
    entries = [
        field(1, field(1, key.encode()) + field(2, feature(value)))
        for key, value in features.items()
        if value is not None
    ]
    return field(1, b"".join(entries))


def frame_record(content):
    """A TFRecord record."""
    length = struct.pack("<Q", len(content))
    framed = length + struct.pack("<I", masked_crc32c(length)) + content
    return framed + struct.pack("<I", masked_crc32c(content))


def encode_image(pixels, image_format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format)
    return buffer.getvalue()


class Node(dict):
    """A node of `features.json` as it is."""


def tensor(dtype, *shape, encoding="none"):
    """A leaf of `features.json`."""
    dimensions = [str(size) for size in shape]
    return Node(tensor={"shape": {"dimensions": dimensions}, "dtype": dtype, "encoding": encoding})


def dictionary(features):
    return {"featuresDict": {"features": features}}


def features_json(features):
    """
    Nested features as `features.json` has them.

    Args:
        features: By name: `IMAGE`, `TEXT`, (dtype, *shape), a `Node`, or a dictionary of such.
    """
    if features == IMAGE:
        shape = {"dimensions": ["-1", "-1", "3"]}
        return {"image": {"shape": shape, "dtype": "uint8", "encodingFormat": "png"}}
    if features == TEXT:
        return {"text": {}}
    if isinstance(features, tuple):
        return tensor(*features)
    if isinstance(features, Node):
        return features
    return dictionary({name: features_json(child) for name, child in features.items()})


def flatten(tree, prefix=""):
    """Leaves of nested dictionaries by their path."""
    leaves = {}
    for name, child in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        leaves |= flatten(child, path) if isinstance(child, dict) else {path: child}
    return leaves


def encode_episode(values):
    """
    A record.

    Args:
        values: Nested by the features: arrays of numbers (num_steps, ...), lists of text, lists of image arrays, lists of
            bytes as they are. What belongs to the steps lies below `steps`.
    """
    features = {}
    for path, value in flatten(values).items():
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list) and value and isinstance(value[0], str):
            value = [text.encode() for text in value]
        if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
            value = [encode_image(pixels) for pixels in value]
        features[path] = value
    return example(features)


def write_tfds_folder(
    path, features, shards, *, name="toy", split="train", version="1.0.0", lengths=None, other_splits=None
):
    """
    A version folder with one split.

    Args:
        path: Local `Path`; made if it is not there.
        features: Of an episode, `steps` among them, see `features_json`.
        shards: Per file the records in it (`encode_episode`).
        name: Of the data set.
        split: That the files are of.
        version: Of the data set.
        lengths: Numbers of records that are announced, where they are not those of `shards`.
        other_splits: Numbers of records per file of splits that have no files, by name.

    Returns:
        `path`.
    """
    path.mkdir(parents=True, exist_ok=True)
    steps = {"sequence": {"feature": features_json(features["steps"]), "length": "-1"}}
    rest = {key: features_json(value) for key, value in features.items() if key != "steps"}
    (path / "features.json").write_text(json.dumps(dictionary({"steps": steps, **rest})))
    lengths = [len(shard) for shard in shards] if lengths is None else lengths
    splits = [
        {"name": key, "shardLengths": [str(length) for length in value]}
        for key, value in {split: lengths, **(other_splits or {})}.items()
    ]
    info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": splits}
    (path / "dataset_info.json").write_text(json.dumps(info))
    for index, shard in enumerate(shards):
        file = path / f"{name}-{split}.tfrecord-{index:05d}-of-{len(shards):05d}"
        file.write_bytes(b"".join(frame_record(record) for record in shard))
    return path


# A small data set to write: episodes differ by their number.
TOY_FEATURES = {
    "steps": {
        "action": ("float32", 2),
        "is_first": ("bool",),
        "language_instruction": TEXT,
        "observation": {"front": IMAGE, "side": IMAGE},
    },
    "episode_metadata": {"number": ("int64",)},
}


def toy_episode(number=0, num_steps=3, **steps):
    """A record of the small data set; `steps` are features to write in place of its own."""
    frames = np.random.default_rng(number).integers(0, 256, (2, num_steps, 4, 6, 3), dtype=np.uint8)
    values = {
        "action": np.full((num_steps, 2), number, dtype=np.float32),
        "is_first": np.eye(1, num_steps)[0].astype(np.int64),
        "language_instruction": [f"task {number}"] * num_steps,
        "observation": {"front": list(frames[0]), "side": list(frames[1])},
    }
    return encode_episode({"steps": values | steps, "episode_metadata": {"number": np.array([number])}})


def shard_file(folder):
    """The one file of records in a folder."""
    (file,) = folder.glob("*.tfrecord-*")
    return file


def record_positions(file):
    """Bytes at which the records of a file begin."""
    content, found, position = file.read_bytes(), [], 0
    while position < len(content):
        found.append(position)
        position += 16 + struct.unpack_from("<Q", content, position)[0]
    return found


def toy_numbers(source, episodes=None, on_error=None):
    """Numbers of the episodes of the small data set that are read, and the errors on the way."""
    errors = []
    found = [
        (index, read.metadata["number"])
        for index, read in source.read(0, episodes, errors.append if on_error is None else on_error)
    ]
    assert all(index == number for index, number in found)
    return [index for index, _ in found], [str(error) for error in errors]
