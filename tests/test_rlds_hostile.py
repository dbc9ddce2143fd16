"""RLDS folders that are damaged or made to harm: an error or a skip, never a crash and never much memory."""

import json
import struct
import zlib

import numpy as np
import pytest
from tfds_files import (
    IMAGE,
    TOY_FEATURES,
    encode_episode,
    encode_image,
    shard_file,
    tensor,
    toy_episode,
    toy_numbers,
    varint,
    write_tfds_folder,
)

from lapa.data.rlds import RldsSource
from lapa.data.schema import ReadError
from lapa.data.tfrecord import masked_crc32c


@pytest.fixture
def folder(tmp_path):
    return write_tfds_folder(tmp_path / "toy" / "1.0.0", TOY_FEATURES, [[toy_episode(n) for n in range(5)]])


@pytest.mark.parametrize(
    "steps, message",
    [
        ({"action": [zlib.compress(bytes(1 << 24))] * 3}, "holds bytes where float32 numbers are announced"),
        (
            {"is_first": np.zeros(0, dtype=np.int64)},
            "the episode has no steps|camera 'front' has 3 frames for 0 steps",
        ),
        ({"language_instruction": [b"\xff\xfe"] * 3}, None),
        (
            {"observation": {"front": [b""] * 3, "side": [b""] * 3}},
            "frame 0 of camera 'front' of .* is no readable image",
        ),
    ],
)
def test_records_that_do_not_fit(tmp_path, steps, message):
    folder = write_tfds_folder(tmp_path / "toy", TOY_FEATURES, [[toy_episode(**steps), toy_episode(1)]])
    found, errors = toy_numbers(RldsSource(folder)) if message else ([1], [])
    assert found == [1]
    if message:
        assert len(errors) == 1 and "record at byte 0" in errors[0]
        with pytest.raises(ReadError, match=message):
            next(iter(RldsSource(folder)))
    else:
        assert next(iter(RldsSource(folder))).instruction == "\N{REPLACEMENT CHARACTER}" * 2


def test_what_is_unpacked_is_bounded(tmp_path):
    features = {"steps": {"action": tensor("float32", 2, encoding="zlib"), "observation": {"image": IMAGE}}}
    huge = bytearray(encode_image(np.zeros((1, 1, 3), np.uint8)))
    # The size in the header of a PNG, with its checksum.
    huge[16:24] = struct.pack(">II", 5000, 5000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    frames = [bytes(huge), encode_image(np.ones((1, 1, 3), np.uint8))]
    small = [zlib.compress(bytes(8))] * 2
    records = [
        encode_episode({"steps": {"action": action, "observation": {"image": frames}}})
        for action in ([zlib.compress(bytes(1 << 26))] * 2, [b"no zlib"] * 2, small)
    ]
    folder = write_tfds_folder(tmp_path / "toy", features, [records])
    errors = []
    ((index, read),) = RldsSource(folder).read(0, None, errors.append)
    assert (
        index == 2 and "has a step that is not of 8 bytes" in str(errors[0]) and "cannot be unpacked" in str(errors[1])
    )
    assert read.frame("image", 1).tolist() == [[[1, 1, 1]]]
    with pytest.raises(ReadError, match="frame 0 of camera 'image' of .*5000 x 5000 pixels"):
        read.frame("image", 0)


def test_a_forged_length_allocates_nothing(folder):
    """A length whose checksum fits, of more than the file has."""
    file = shard_file(folder)
    length = struct.pack("<Q", 1 << 62)
    file.write_bytes(length + struct.pack("<I", masked_crc32c(length)) + b"x" * 100)
    found, errors = toy_numbers(RldsSource(folder))
    assert found == [] and len(errors) == 1 and "ends inside the record at byte 0" in errors[0]


@pytest.mark.parametrize(
    "info, message",
    [
        ({"fileFormat": "array_record"}, "only 'tfrecord' can be read"),
        ({"splits": [{"name": "train", "shardLengths": ["-1"]}]}, "of -1 records, which cannot be"),
        ({"splits": [{"name": "train", "shardLengths": ["x"]}]}, "invalid literal"),
        ({"splits": [{"name": "train"}]}, "not of that form"),
        ({"splits": [{"name": "../../etc/x", "shardLengths": ["1"]}]}, "which cannot be"),
        ({"splits": 3}, "not of that form"),
        ({"splits": []}, "lists no splits"),
    ],
)
def test_dataset_info_that_makes_no_sense(folder, info, message):
    file = folder / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | info))
    with pytest.raises(ValueError, match=message):
        RldsSource(folder)


@pytest.mark.parametrize(
    "features, message",
    [
        ("[" * 100_000, "no valid JSON"),
        ('{"featuresDict": {"features": {"steps": {"sequence": {"feature": 3}}}}}', "not of that form"),
        ('{"featuresDict": []}', "not of that form"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_features_that_make_no_sense(folder, features, message):
    (folder / "features.json").write_text(features)
    with pytest.raises(ValueError, match=message):
        RldsSource(folder)
    assert not RldsSource.recognises(str(folder))


def test_damaged_records_with_checksums_that_fit(tmp_path):
    """Bytes changed before the checksum is made, so that everything behind it has to cope."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(300):
        record = bytearray(toy_episode(number % 3))
        for position in rng.integers(0, len(record), rng.integers(1, 4)):
            record[position] = rng.integers(0, 256)
        if number % 3 == 0:
            del record[rng.integers(0, len(record)) :]
        records.append(bytes(record))
    # A length of 2 ** 63 - 1 inside the message.
    records.append(b"\x0a" + varint(2**63 - 1) + b"x")
    source = RldsSource(write_tfds_folder(tmp_path / "toy", TOY_FEATURES, [records]))
    errors, decoded = [], 0
    for _, read in source.read(0, None, errors.append):
        for frames in read.frames.values():
            for step in range(len(frames)):
                try:
                    assert frames[step].dtype == np.uint8
                    decoded += 1
                except ReadError:
                    pass
    assert len(errors) > 20 and decoded > 100
