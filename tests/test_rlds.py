"""RLDS folders: a real shard, shards written here, checksums, remote files, and clear errors."""

import json
import struct

import numpy as np
import pytest
from shared_files import shared_path
from tfds_files import IMAGE, TEXT, encode_image, example, field, record_positions, varint, write_tfds_folder

from lapa.data.crc32c import crc32c
from lapa.data.rlds import RldsFolder, read_rlds
from lapa.data.schema import Episode
from lapa.data.tfds_example import decode_feature, parse_example

FEATURES = {
    "steps": {
        "action": ("float32", 2),
        "is_first": ("bool",),
        "language_instruction": TEXT,
        "observation": {"front": IMAGE, "wrist": IMAGE, "joints": ("int32", 3), "state": ("float32", 1)},
    },
    "episode_metadata": {"success": ("bool",), "file": ("string",), "number": ("int64",)},
}


def with_steps(**changes):
    return FEATURES | {"steps": FEATURES["steps"] | changes}


def png(pixels):
    return encode_image(pixels)


def record(num_steps=3, seed=0, **changes):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (num_steps, 4, 6, 3), dtype=np.uint8)
    features = {
        "steps/action": np.arange(num_steps * 2, dtype=np.float32) + seed,
        "steps/is_first": np.eye(1, num_steps, dtype=np.int64)[0],
        "steps/language_instruction": [b"push", b" ", b"pull"][:num_steps],
        "steps/observation/front": [png(frame) for frame in frames],
        "steps/observation/wrist": [png(np.zeros((4, 6, 3), dtype=np.uint8))] * num_steps,
        "steps/observation/joints": np.arange(num_steps * 3) - 5,
        "steps/observation/state": np.linspace(0, 1, num_steps, dtype=np.float32),
        "episode_metadata/success": np.array([1]),
        "episode_metadata/file": ["a/ü.npy".encode()],
        "episode_metadata/number": np.array([-7]),
    } | changes
    return frames, example(features)


def toy_folder(path, records, features=FEATURES, **options):
    return write_tfds_folder(path, features, records, **options)


def test_checksum_of_known_strings():
    # Test vectors of RFC 3720, and the usual check value.
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0 and crc32c(b"a") == 0xC1D04330


def test_checksum_of_any_length_equals_the_bytewise_one():
    data = np.random.default_rng(0).integers(0, 256, 1500, dtype=np.uint8).tobytes()
    register, expected = 0xFFFFFFFF, [0]
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
        expected.append(register ^ 0xFFFFFFFF)
    for length in [*range(0, 300), 511, 512, 513, 1000, 1500]:
        assert crc32c(data[:length]) == expected[length], length


def test_example_message():
    numbers = np.array([0, 1, 127, 128, 300, -1, -(2**40), 2**62])
    content = example({"n": numbers, "f": np.array([0.5, -2.0], dtype=np.float32), "b": [b"", b"xy"]})
    features = parse_example(content)
    assert set(features) == {"n", "f", "b"}
    assert decode_feature(features["n"]).tolist() == numbers.tolist()
    assert decode_feature(features["f"]).tolist() == [0.5, -2.0]
    assert decode_feature(features["b"]) == [b"", b"xy"]
    # Unpacked lists are valid protobuf too.
    unpacked = field(3, varint(1 << 3) + varint(5) + varint(1 << 3) + varint(-2))
    assert decode_feature(memoryview(unpacked)).tolist() == [5, -2]
    unpacked = field(2, varint(1 << 3 | 5) + struct.pack("<f", 0.25) + varint(1 << 3 | 5) + struct.pack("<f", 8))
    assert decode_feature(memoryview(unpacked)).tolist() == [0.25, 8.0]
    with pytest.raises(ValueError, match="cut short"):
        parse_example(content[:-1])


def test_real_shard():
    episodes = list(read_rlds(shared_path("data/bridge_rlds/1.0.0"), frequency=5.0, embodiment="widowx"))
    assert len(episodes) == 25
    assert len({episode.episode_id for episode in episodes}) == 25
    first = episodes[0]
    assert isinstance(first, Episode) and first.num_steps == 10 and first.source == "bridge_dataset/train"
    assert first.instruction == "put cup from counter or drying rack into sink"
    assert first.action.shape == (10, 7) and first.action.dtype == np.float32
    np.testing.assert_allclose(
        first.action[1], [-0.0017841698, 0.00015979254, 0.0024016541, 0.033817787, -0.014594038, -0.19557068, 1.0]
    )
    assert first.proprio.shape == (10, 7)
    np.testing.assert_allclose(first.timestamps, np.arange(10) / 5)
    assert first.embodiment == "widowx" and first.metadata["episode_id"] == 5
    for episode in episodes:
        # Camera 3 is black throughout; the has_image flags of this shard are all False, even of cameras that record.
        assert episode.cameras == ("image_0", "image_1", "image_2")
        assert np.isfinite(episode.action).all() and episode.instruction
        frame = episode.frame("image_0", 9)
        assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8 and frame.std() > 10
    assert next(read_rlds(shared_path("data/bridge_rlds/1.0.0"), cameras=["image_3"])).cameras == ()


def test_listed_split_without_its_file():
    with pytest.raises(
        ValueError, match=r"`split` 'val' needs the file .*bridge_dataset-val\.tfrecord-00000-of-00001"
    ):
        read_rlds(shared_path("data/bridge_rlds/1.0.0"), split="val")
    with pytest.raises(ValueError, match=r"`split` 'test' is unknown; .* lists train, val"):
        read_rlds(shared_path("data/bridge_rlds/1.0.0"), split="test")
    with pytest.raises(ValueError, match=r"did you mean .*1\.0\.0"):
        read_rlds(shared_path("data/bridge_rlds"))


def test_written_folder(tmp_path):
    frames, one = record(seed=1)
    _, two = record(num_steps=1, seed=2)
    _, three = record(num_steps=2, seed=3)
    folder = toy_folder(tmp_path / "toy", [[one, two], [three]])
    assert RldsFolder(folder).cameras == ("front", "wrist") and RldsFolder(folder).splits == ("train",)
    episodes = list(read_rlds(folder))
    assert [episode.episode_id for episode in episodes] == ["00000-00000", "00000-00001", "00001-00000"]
    assert [episode.num_steps for episode in episodes] == [3, 1, 2]
    first = episodes[0]
    assert first.cameras == ("front",) and first.timestamps is None
    for step in range(3):
        np.testing.assert_array_equal(first.frame("front", step), frames[step])
    assert [frame.shape for frame in first.frames["front"][1:]] == [(4, 6, 3)] * 2
    assert first.instructions == ("push", "pull")
    assert first.action.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert first.proprio.tolist() == [[0.0], [0.5], [1.0]]
    assert first.metadata == {"success": True, "file": "a/ü.npy", "number": -7}
    chosen = next(read_rlds(folder, proprio_keys=["observation/state", "observation/joints"], action_keys=[]))
    assert chosen.action is None
    assert chosen.proprio.tolist() == [[0.0, -5, -4, -3], [0.5, -2, -1, 0], [1.0, 1, 2, 3]]
    with pytest.raises(ValueError, match="`camera` 'wrist' is unknown; this episode has front"):
        first.frame("wrist", 0)
    with pytest.raises(ValueError, match=r"`step` must lie in \[0, 2\], got 3"):
        first.frame("front", 3)


def test_actions_in_parts_must_be_chosen(tmp_path):
    features = with_steps(action={"arm": ("float32", 2), "grip": ("float32",)})
    content = record(
        **{"steps/action": None, "steps/action/arm": np.arange(6.0), "steps/action/grip": np.array([1.0, 0.0, 1.0])}
    )[1]
    folder = toy_folder(tmp_path / "toy", [[content]], features)
    with pytest.raises(ValueError, match="choose by `action_keys` among action/arm, action/grip"):
        read_rlds(folder)
    episode = next(read_rlds(folder, action_keys=["action/arm", "action/grip"]))
    assert episode.action.tolist() == [[0, 1, 1], [2, 3, 0], [4, 5, 1]]
    with pytest.raises(ValueError, match="`action_keys` has 'action/leg'"):
        read_rlds(folder, action_keys=["action/leg"])
    with pytest.raises(ValueError, match=r"`cameras` has 'side', which .* lacks; it has front, wrist"):
        read_rlds(folder, cameras=["side"], action_keys=[])


def test_frames_are_decoded_only_when_read(tmp_path):
    broken = [b"no image", png(np.full((4, 6, 3), 9, dtype=np.uint8)), b"no image"]
    folder = toy_folder(tmp_path / "toy", [[record(**{"steps/observation/front": broken})[1]]])
    episode = next(read_rlds(folder))
    assert episode.frame("front", 1)[0, 0, 0] == 9
    with pytest.raises(ValueError, match="frame 2 of camera 'front'"):
        episode.frame("front", 2)


@pytest.mark.parametrize(
    "offset, part", [(0, "record length"), (9, "record length"), (40, "a record does"), (-2, "a record")]
)
def test_corrupt_record_is_named(tmp_path, offset, part):
    folder = toy_folder(tmp_path / "toy", [[record(seed=seed)[1] for seed in range(2)]])
    (file,) = folder.glob("*.tfrecord-*")
    second = record_positions(file)[1]
    content = bytearray(file.read_bytes())
    content[second + offset if offset >= 0 else offset] ^= 0x10
    file.write_bytes(content)
    episodes = read_rlds(folder)
    assert next(episodes).num_steps == 3
    with pytest.raises(ValueError, match=rf"tfrecord-00000-of-00001 is corrupt at byte {second}: .*{part}"):
        next(episodes)


def test_cut_files(tmp_path):
    folder = toy_folder(tmp_path / "toy", [[record(seed=seed)[1] for seed in range(2)]])
    (file,) = folder.glob("*.tfrecord-*")
    content = file.read_bytes()
    start = record_positions(file)[1]
    for cut, message in (
        (-1, f"ends inside the record at byte {start}"),
        (start + 5, f"record header at byte {start}"),
    ):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=message):
            list(read_rlds(folder))
    file.write_bytes(content[:start])
    with pytest.raises(ValueError, match=r"has 1 records, dataset_info.json announces 2"):
        list(read_rlds(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps/action": None}, "no feature 'steps/action'"),
        ({"steps/action": np.arange(5.0)}, "holds 5 numbers, no multiple"),
        ({"steps/action": np.arange(8.0)}, "`action` has 4 rows for 3 steps|camera 'front' has 3 frames for 4 steps"),
        ({"steps/action": [b"x"]}, "holds bytes"),
        ({"steps/language_instruction": np.arange(3)}, "where text is announced"),
        ({"steps/observation/front": np.arange(3)}, "where encoded images are announced"),
    ],
)
def test_records_that_do_not_fit_features_json(tmp_path, changes, message):
    folder = toy_folder(tmp_path / "toy", [[record(**changes)[1]]])
    with pytest.raises(ValueError, match=rf"record at byte 0: .*({message})"):
        next(read_rlds(folder))


def test_no_rlds_folder(tmp_path):
    with pytest.raises(ValueError, match=r"features\.json is missing"):
        read_rlds(tmp_path)
    (tmp_path / "features.json").write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        read_rlds(tmp_path)
    (tmp_path / "features.json").write_text(json.dumps({"featuresDict": {"features": {}}}))
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="no `steps`"):
        read_rlds(tmp_path)
    with pytest.raises(ValueError, match="`frequency`"):
        read_rlds(toy_folder(tmp_path / "toy", [[record()[1]]]), frequency=0)
