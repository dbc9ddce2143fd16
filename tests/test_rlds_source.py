"""`RldsSource`: what it takes by default and from its user, local and remote files, damaged ones, and hostile bytes."""

import pickle
import tempfile
import zlib

import fsspec
import numpy as np
import pytest
from shared_files import shared_path
from tfds_files import (
    IMAGE,
    TEXT,
    TOY_FEATURES,
    Node,
    encode_episode,
    encode_image,
    frame_record,
    record_positions,
    shard_file,
    tensor,
    toy_episode,
    toy_numbers,
    write_tfds_folder,
)

from lapa.data.episode_source import SkippedEpisodes
from lapa.data.rlds import RldsFolder, RldsSource
from lapa.data.schema import DELTA_END_EFFECTOR, ReadError

NUM_RECORDS = 5


@pytest.fixture
def folder(tmp_path):
    return write_tfds_folder(tmp_path / "toy" / "1.0.0", TOY_FEATURES, [[toy_episode(n) for n in range(NUM_RECORDS)]])


def change(file, position, value=0xFF):
    content = bytearray(file.read_bytes())
    content[position] ^= value
    file.write_bytes(content)


def remote_copy(folder, name):
    """The folder in fsspec's memory, under a name of its own."""
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe(f"/{name}/{file.name}", file.read_bytes())
    return f"memory://{name}"


def same_episodes(first, second):
    assert first.episode_id == second.episode_id and first.instructions == second.instructions
    assert first.metadata == second.metadata and first.cameras == second.cameras
    np.testing.assert_array_equal(first.action, second.action)
    for camera in first.cameras:
        np.testing.assert_array_equal(first.frames[camera][:], second.frames[camera][:])


def test_real_shard_by_the_table():
    path = shared_path("data/bridge_rlds")
    source = RldsSource(path)
    assert source.name == "bridge_dataset/train" and source.num_episodes == 25 and len(source.shards) == 1
    assert source.frequency == 5 and source.embodiment == "widowx" and source.unnorm_key == "bridge_dataset"
    assert source.frame_gap_seconds == 0.6 and source.action_names == DELTA_END_EFFECTOR
    assert source.cameras == ("image_0", "image_1", "image_2", "image_3")
    # The one thing that is announced and not here.
    assert len(source.warnings) == 1 and "split 'val'" in source.warnings[0]
    assert "bridge_dataset-val.tfrecord-00000-of-00001" in source.warnings[0]
    raw = RldsSource(path, action_transform=None)
    assert raw.action_names is None
    for made, recorded in zip(source, raw, strict=True):
        assert made.action.dtype == np.float32 and made.action_names == DELTA_END_EFFECTOR
        # Motion is that between the poses reached; the last step has the command.
        reached = np.diff(recorded.proprio[:, :6].astype(np.float64), axis=0)
        np.testing.assert_allclose(made.action[:-1, :6], reached, atol=1e-6)
        np.testing.assert_array_equal(made.action[-1, :6], recorded.action[-1, :6])
        assert set(made.action[:, 6]) <= {0.0, 1.0}
        np.testing.assert_allclose(made.timestamps, np.arange(10) / 5)
    with pytest.raises(
        ValueError, match=r"`split` 'val' needs the file .*val\.tfrecord-00000-of-00001, which is missing"
    ):
        RldsSource(path, split="val")


def test_newest_version_is_taken(tmp_path):
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        write_tfds_folder(tmp_path / "toy" / version, TOY_FEATURES, [[toy_episode()]], version=version)
    (tmp_path / "toy" / "incomplete_3.0.0").mkdir()
    assert RldsSource(tmp_path / "toy").folder.version == "1.10.0"
    assert RldsSource(tmp_path / "toy" / "1.9.0").folder.version == "1.9.0"
    assert RldsSource.recognises(str(tmp_path / "toy")) and RldsSource.recognises(str(tmp_path / "toy" / "1.0.0"))
    assert not RldsSource.recognises(str(tmp_path)) and not RldsSource.recognises(str(tmp_path / "absent"))
    system = fsspec.filesystem("memory")
    for version in ("0.9.0", "0.11.0"):
        remote_copy(tmp_path / "toy" / "1.9.0", f"versions/{version}")
    assert RldsSource("memory://versions").folder.path.endswith("0.11.0")
    system.rm("/versions", recursive=True)


def test_single_episodes_in_any_order(folder):
    source = RldsSource(folder)
    assert toy_numbers(source, [3, 0, 3]) == ([3, 0, 3], [])
    assert toy_numbers(source) == ([0, 1, 2, 3, 4], [])
    assert toy_numbers(source, []) == ([], [])
    with pytest.raises(ValueError, match="`episodes` has 5; shard toy-train.* has 5 episodes"):
        next(source.read(0, [5]))
    # The others are not read: their contents may be damaged.
    change(shard_file(folder), record_positions(shard_file(folder))[1] + 20)
    assert toy_numbers(RldsSource(folder), [2]) == ([2], [])
    # What is known about a file is not carried along, and does not change what is read.
    same_episodes(next(source.read(0, [4]))[1], next(pickle.loads(pickle.dumps(source)).read(0, [4]))[1])


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_content_costs_one_episode(folder, remote):
    start = record_positions(shard_file(folder))[1]
    change(shard_file(folder), start + 20)
    path = remote_copy(folder, "damaged_content") if remote else folder
    source = RldsSource(path)
    with pytest.raises(ReadError, match=f"is corrupt at byte {start}: the checksum of a record does not fit"):
        list(source)
    found, errors = toy_numbers(source)
    assert found == [0, 2, 3, 4] and len(errors) == 1 and f"byte {start}" in errors[0]
    assert toy_numbers(source, [4, 1, 0])[0] == [4, 0]
    skipped = SkippedEpisodes(max_share=0.5)
    assert toy_numbers(source, on_error=skipped)[0] == [0, 2, 3, 4] and skipped.num_skipped == 1


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("offset", [0, 9])
def test_damaged_length_ends_the_file(folder, remote, offset):
    start = record_positions(shard_file(folder))[2]
    change(shard_file(folder), start + offset)
    path = remote_copy(folder, "damaged_length") if remote else folder
    source = RldsSource(path)
    found, errors = toy_numbers(source)
    assert found == [0, 1] and len(errors) == 1
    assert f"byte {start}" in errors[0] and "3 of its 5 announced episodes are lost" in errors[0]
    found, errors = toy_numbers(source, [4, 1, 3, 0])
    assert found == [1, 0] and len(errors) == 1


@pytest.mark.parametrize("remote", [False, True])
def test_cut_and_surplus_files(folder, tmp_path, remote):
    file = shard_file(folder)
    content, start = file.read_bytes(), record_positions(file)[4]
    for size, message in (
        (start, "has 4 records, dataset_info.json announces 5; 1 of its 5 announced"),
        (start + 5, f"ends inside a record header at byte {start}"),
        (len(content) - 1, f"ends inside the record at byte {start}"),
        (0, "has 0 records, dataset_info.json announces 5; 5 of its 5"),
    ):
        file.write_bytes(content[:size])
        source = RldsSource(remote_copy(folder, "cut") if remote else folder)
        found, errors = toy_numbers(source)
        assert found == list(range(4 if size else 0)) and len(errors) == 1 and message in errors[0]
    file.write_bytes(content + frame_record(toy_episode(9)))
    source = RldsSource(remote_copy(folder, "cut") if remote else folder)
    found, errors = toy_numbers(source)
    assert found == [0, 1, 2, 3, 4] and len(errors) == 1 and "goes on after the 5 records" in errors[0]
    assert toy_numbers(source, [4]) == ([4], [])


def test_remote_files(folder, tmp_path, monkeypatch):
    path = remote_copy(folder, "whole")
    local, remote = RldsSource(folder), RldsSource(path)
    assert remote.name == local.name and remote.shards == local.shards and remote.cameras == local.cameras
    for first, second in zip(local, remote, strict=True):
        same_episodes(first, second)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    # Out of order the file is copied, and the copy goes away, even where reading stops half-way.
    reader = remote.read(0, [3, 1])
    assert next(reader)[0] == 3 and list(temporary.iterdir())
    reader.close()
    assert not list(temporary.iterdir())
    assert toy_numbers(remote, [3, 1]) == ([3, 1], []) and not list(temporary.iterdir())
    # In order nothing is copied.
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert toy_numbers(remote, [1, 3]) == ([1, 3], [])
    same_episodes(next(local.read(0, [1]))[1], next(pickle.loads(pickle.dumps(remote)).read(0, [1]))[1])


def test_files_of_a_server_that_lists_nothing(folder, monkeypatch):
    """As plain HTTP servers are: what is missing is found out when it is read."""
    path = remote_copy(folder, "unlisted")
    system = fsspec.filesystem("memory")

    def no_list(*args, **kwargs):
        raise PermissionError("403")

    monkeypatch.setattr(type(system), "ls", no_list)
    source = RldsSource(path, split="train")
    assert toy_numbers(source) == ([0, 1, 2, 3, 4], [])
    system.rm_file(f"/unlisted/{shard_file(folder).name}")
    found, errors = toy_numbers(source)
    assert found == [] and len(errors) == 1 and "is missing; its 5 announced episodes are lost" in errors[0]
    with pytest.raises(ValueError, match="is no RLDS folder: features.json is missing"):
        RldsSource("memory://nothing/here")


def test_a_file_that_cannot_be_sought_in(folder, monkeypatch):
    path = remote_copy(folder, "stream_only")
    source = RldsSource(path)
    open_file = source.folder._files.open

    def open_stream(name):
        file = open_file(name)
        monkeypatch.setattr(file, "seekable", lambda: False, raising=False)
        monkeypatch.setattr(file, "seek", None, raising=False)
        return file

    monkeypatch.setattr(source.folder._files, "open", open_stream)
    monkeypatch.setattr(source.folder._files, "size", lambda name: None)
    assert toy_numbers(source, [1, 4]) == ([1, 4], [])


def test_absent_files(tmp_path):
    shards = [[toy_episode(10 * shard + n) for n in range(2)] for shard in range(3)]
    folder = write_tfds_folder(tmp_path / "toy", TOY_FEATURES, shards, other_splits={"val": [4], "test": [1, 1, 1, 1]})
    source = RldsSource(folder)
    assert len(source.warnings) == 3 and "not in the table" in source.warnings[0]
    assert "split 'val' lacks its only file" in source.warnings[1] and "and 1 more" in source.warnings[2]
    (folder / "toy-train.tfrecord-00001-of-00003").unlink()
    partial = RldsSource(folder)
    assert any("split 'train' lacks 1 of its files" in warning for warning in partial.warnings)
    # The others keep their names and ids.
    ids = [read.episode_id for read in partial]
    assert ids == ["00000-00000", "00000-00001", "00002-00000", "00002-00001"]
    assert [shard.name[-14:] for shard in partial.shards] == ["00000-of-00003", "00002-of-00003"]
    with pytest.raises(ValueError, match="`split` 'train' needs the file .*00001-of-00003, which is missing"):
        RldsSource(folder, split="train")
    with pytest.raises(
        ValueError, match="`split` 'test' needs the file .*00002-of-00004 and 1 more, which are missing"
    ):
        RldsSource(folder, split="test")
    with pytest.raises(ValueError, match="`split` 'dev' is unknown; .* lists train, val, test"):
        RldsSource(folder, split="dev")
    for file in folder.glob("*-train*"):
        file.unlink()
    with pytest.raises(ValueError, match="`split` 'train' needs the file"):
        RldsSource(folder)


def test_a_data_set_that_is_not_in_the_table(folder):
    source = RldsSource(folder)
    assert source.warnings == (
        "toy is not in the table of Open X-Embodiment data sets: it is read with its actions as they are recorded, and "
        "without timestamps as its `frequency` is not known",
    )
    read = next(iter(source))
    assert read.timestamps is None and read.embodiment is None and read.action_names is None
    assert source.unnorm_key == "toy" and source.frame_gap_seconds == 0.6 and read.instruction == "task 0"
    with pytest.raises(ValueError, match="`dataset` 'bridgge' is not in the table"):
        RldsSource(folder, dataset="bridgge")


def doubled(steps):
    return np.concatenate([steps["action"]] * 3 + [steps["action"][:, :1]], axis=1) * 2


def test_what_the_user_passes_wins(tmp_path):
    features = TOY_FEATURES | {
        "steps": {
            "action": {"world_vector": ("float32", 3), "rotation_delta": ("float32", 3), "open_gripper": ("bool",)},
            "observation": {"image": IMAGE, "wrist_image": IMAGE, "natural_language_instruction": TEXT, "other": TEXT},
            "note": TEXT,
        }
    }
    frames = [np.full((2, 2, 3), 9, np.uint8), np.zeros((2, 2, 3), np.uint8)]
    steps = {
        "action": {
            "world_vector": np.arange(6, dtype=np.float32).reshape(2, 3),
            "rotation_delta": np.zeros((2, 3), dtype=np.float32),
            "open_gripper": np.array([1, 0]),
        },
        "observation": {
            "image": frames,
            "wrist_image": frames,
            "natural_language_instruction": ["put", "put"],
            "other": ["set", "lay"],
        },
        "note": ["n", "n"],
    }
    folder = write_tfds_folder(
        tmp_path / "toto", features, [[encode_episode({"steps": steps})]], name="toto", version="2.0.0"
    )
    source = RldsSource(folder)
    assert source.frequency == 30 and source.embodiment == "franka" and source.cameras == ("image", "wrist_image")
    assert source.warnings == ("toto is of version 2.0.0; the table's actions are those of version 0.1.0",)
    read = next(iter(source))
    assert read.instructions == ("put",) and read.action[:, 6].tolist() == [1, 0]
    source = RldsSource(
        folder,
        cameras=["wrist_image", "primary"],
        frequency=2,
        embodiment="arm",
        unnorm_key="key",
        frame_gap_seconds=1.5,
        instruction_key=["note", "observation/other"],
        action_transform=None,
    )
    assert (
        source.cameras == ("wrist_image", "image") and source.unnorm_key == "key" and source.frame_gap_seconds == 1.5
    )
    read = next(iter(source))
    assert read.embodiment == "arm" and read.timestamps.tolist() == [0, 0.5]
    assert read.instructions == ("n", "set", "lay")
    # All numbers of the action as they are recorded, with their names.
    assert read.action_names == (
        "open_gripper",
        *(f"rotation_delta[{i}]" for i in range(3)),
        *(f"world_vector[{i}]" for i in range(3)),
    )
    assert read.action.tolist() == [[1, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 3, 4, 5]]
    chosen = next(iter(RldsSource(folder, action_keys=["action/world_vector"])))
    assert chosen.action.tolist() == [[0, 1, 2], [3, 4, 5]] and chosen.action_names is None
    assert next(iter(RldsSource(folder, action_keys=[]))).action is None
    for options, message in (
        ({"cameras": ["side"]}, "`cameras` has 'side', which .* lacks; it has image, wrist_image"),
        ({"instruction_key": "nothing"}, "`instruction_key` has 'nothing'"),
        ({"proprio_keys": ["observation/state"]}, "`proprio_keys` has 'observation/state'"),
        ({"action_keys": ["action"]}, "`action_keys` has 'action'"),
        ({"frequency": 0}, "`frequency` must be positive, got 0"),
        ({"frame_gap_seconds": -1}, "`frame_gap_seconds` must be positive"),
        ({"action_transform": "toto"}, "`action_transform` must be 'auto', None or a function, got 'toto'"),
        ({"action_transform": doubled}, "has no step feature 'action'"),
    ):
        with pytest.raises(ValueError, match=message):
            RldsSource(folder, **options)


def test_a_transform_of_the_user(folder):
    source = pickle.loads(pickle.dumps(RldsSource(folder, action_transform=doubled)))
    ((_, read),) = source.read(0, [3])
    assert read.action.shape == (3, 7) and (read.action == 6).all() and read.action_names == DELTA_END_EFFECTOR
    with pytest.raises(ValueError, match="`action_transform` makes \\(2, 2\\) of two steps, \\(2, 7\\) is needed"):
        RldsSource(folder, action_transform=lambda steps: steps["action"])


def test_a_table_that_does_not_fit_is_said(folder):
    """A re-processed data set keeps its name but not its features: it is still read, and the warnings say how."""
    source = RldsSource(folder, dataset="droid")
    assert source.frequency == 15 and source.action_names is None and source.cameras == ("front", "side")
    said = "\n".join(source.warnings)
    assert "lacks the camera 'exterior_image_1_left'" in said
    assert "actions are as recorded, since those of the table do not fit" in said
    assert next(iter(source)).action.shape == (3, 2)


def test_kinds_of_features(tmp_path):
    features = {
        "steps": {
            "action": ("float64", 2),
            "flag": ("bool",),
            "label": Node(classLabel={"numClasses": "3"}),
            "matrix": ("int16", 2, 2),
            "packed": tensor("float32", 2, encoding="zlib"),
            "raw": tensor("uint8", 3, encoding="bytes"),
            # Sequences of varying length, depth and audio are left out.
            "points": Node(sequence={"feature": tensor("float32", 3), "length": "-1"}),
            "open": ("float32", -1),
            "depth": Node(image={"shape": {"dimensions": ["4", "4", "1"]}, "dtype": "float32"}),
            "sound": Node(audio={}),
            "observation": {"image": IMAGE, "natural_language_instruction": TEXT},
        },
        "episode_id": ("string",),
        "success": ("bool",),
        "aspects": {"score": ("float32",)},
    }
    values = {
        "steps": {
            "action": np.array([[0.5, 1], [2, 3]]),
            "flag": np.array([1, 0]),
            "label": np.array([2, 0]),
            "matrix": np.arange(-4, 4).reshape(2, 2, 2),
            "packed": [zlib.compress(np.array(row, dtype="<f4").tobytes()) for row in ([1, 2], [3, 4])],
            "raw": [b"\x00\x01\x02", b"\xff\xfe\xfd"],
            "points/ragged_flat_values": np.arange(9.0),
            "points/ragged_row_lengths_0": np.array([1, 2]),
            "observation": {
                "image": [
                    encode_image(np.full((4, 4, 3), 40 * n, np.uint8), "JPEG" if n else "PNG") for n in range(2)
                ],
                "natural_language_instruction": ["läuft", "läuft"],
            },
        },
        "episode_id": "abc",
        "success": np.array([1]),
        "aspects": {"score": np.array([0.5], dtype=np.float32)},
    }
    folder = write_tfds_folder(tmp_path / "toy", features, [[encode_episode(values)]])
    known = RldsFolder(folder).step_features
    assert not known.keys() & {"points", "sound"} and not known["open"].is_numeric
    assert RldsFolder(folder).cameras == ("image",)
    keys = ["flag", "label", "matrix", "packed", "raw"]
    read = next(iter(RldsSource(folder, proprio_keys=keys)))
    assert read.proprio.tolist() == [[1, 2, -4, -3, -2, -1, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3, 3, 4, 255, 254, 253]]
    assert read.action.tolist() == [[0.5, 1], [2, 3]] and read.instruction == "läuft"
    assert read.metadata == {"episode_id": "abc", "success": True, "aspects/score": 0.5}
    np.testing.assert_allclose(read.frame("image", 1), 40, atol=2)
    with pytest.raises(
        ValueError, match="`proprio_keys` has 'open', which .* lacks; it has action, flag, label, matrix"
    ):
        RldsSource(folder, proprio_keys=["open"])
    with pytest.raises(ValueError, match="`instruction_key` has 'matrix'"):
        RldsSource(folder, instruction_key="matrix")
