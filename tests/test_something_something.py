"""Something-Something v2 as it is distributed: folder, archive parts and tar files, with their label files."""

import gzip
import io
import json
import pickle
import random
import tarfile

import numpy as np
import pytest
from video_files import encode_video, moving_frames

from lapa.data import something_something
from lapa.data.episode_range import EpisodeRange
from lapa.data.episode_source import SkippedEpisodes, read_or_skip
from lapa.data.file_tree import FileTree
from lapa.data.mixture import FramePairSource, FramePairStream
from lapa.data.schema import ReadError
from lapa.data.something_something import VIDEO_FOLDER, SomethingSomethingSource
from lapa.data.tar_files import stream_members, tar_members

TRAIN = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "9", "label": "pushing mug", "template": "Pushing [something]", "placeholders": ["mug"]},
    {"id": "100", "label": "lifting a pen", "template": "Lifting [something]", "placeholders": ["a pen"]},
]
LABELS = {
    "train": TRAIN,
    "validation": [{"id": "5", "label": "turning cup", "template": "Turning [something]", "placeholders": ["cup"]}],
    "test": [{"id": "3"}, {"id": "4"}],
}
# 77 is listed nowhere, 100 and 4 are listed and absent.
PRESENT = ("78687", "9", "5", "3", "77")


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    options = {"deadline": "realtime", "cpu-used": "8"}
    return {
        video: encode_video(moving_frames(4 + number, seed=number), "libvpx-vp9", "webm", options)
        for number, video in enumerate(PRESENT)
    }


def write_labels(folder, pattern="something-something-v2-{}.json"):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in LABELS.items():
        (folder / pattern.format(split)).write_text(json.dumps(rows))


def tar(files: dict[str, bytes], **arguments) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **arguments) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def as_folder(path, contents):
    (path / VIDEO_FOLDER).mkdir()
    for video, content in contents.items():
        (path / VIDEO_FOLDER / f"{video}.webm").write_bytes(content)


def as_parts(path, contents):
    packed = gzip.compress(tar({f"{VIDEO_FOLDER}/{video}.webm": content for video, content in contents.items()}))
    third = len(packed) // 3
    for number in range(3):
        stop = None if number == 2 else third * (number + 1)
        (path / f"{VIDEO_FOLDER}-{number:02d}").write_bytes(packed[third * number : stop])


def as_tars(path, contents):
    videos = sorted(contents)
    for number, group in enumerate((videos[:2], videos[2:])):
        # Long names stand in headers of their own.
        folder = "x" * 120 * number
        files = {f"{folder}/{video}.webm": contents[video] for video in group}
        (path / f"shard-{number:05d}.tar").write_bytes(
            tar(files, format=(tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[number])
        )


LAYOUTS = {"folder": as_folder, "parts": as_parts, "tars": as_tars}


@pytest.fixture(params=LAYOUTS)
def layout(request, tmp_path, contents):
    LAYOUTS[request.param](tmp_path, contents)
    write_labels(tmp_path)
    return request.param


def test_every_layout_gives_the_same_episodes(layout, tmp_path, contents):
    source = pickle.loads(pickle.dumps(SomethingSomethingSource(str(tmp_path))))
    errors, found = [], {}
    for shard in range(len(source.shards)):
        for index, episode in source.read(shard, on_error=errors.append):
            assert source.clips[shard][index] == episode.episode_id
            found[episode.episode_id] = episode
    assert set(found) == {"78687", "9"}
    first = found["78687"]
    assert first.instructions == ("holding potato next to vicks vaporub bottle",)
    assert first.metadata == {
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    }
    assert (first.embodiment, source.frame_gap_seconds, source.cameras) == ("human", 2.4, ("video",))
    assert first.source == source.name
    assert source.name.endswith("/train")
    for video, episode in found.items():
        assert episode.num_steps == 4 + PRESENT.index(video)
        np.testing.assert_allclose(episode.timestamps, np.arange(episode.num_steps) / 30, atol=2e-3)
        expected = moving_frames(4 + PRESENT.index(video), seed=PRESENT.index(video))[3]
        assert np.abs(episode.frame("video", 3).astype(int) - expected).mean() < 12
    place = f"{tmp_path}/something-something-v2-train.json"
    if layout == "parts":
        assert [str(error) for error in errors] == [
            f"video 100 in {tmp_path / VIDEO_FOLDER}-00 is listed, but was not found there."
        ]
        assert len(source.warnings) == 1
        assert "unpack it: cat 20bn-something-something-v2-?? | tar xz" in source.warnings[0]
    else:
        assert errors == []
        assert source.warnings == (
            f"1 of 3 videos that {place} lists are not here: 100",
            "1 of 5 videos are in no label file: 77",
        )


def test_archive_parts_are_read_through_but_not_streamed(tmp_path, contents):
    """A stream shuffles, and what comes in another order than it asks for would count as lost."""
    as_parts(tmp_path, contents)
    write_labels(tmp_path)
    source = SomethingSomethingSource(str(tmp_path), split=None)
    for entry in (source, EpisodeRange(source, 2)):
        with pytest.raises(ValueError, match=r"archive in parts, .* Unpack it \(`cat PARTS-\?\? \| tar xz`\)"):
            FramePairStream([FramePairSource(entry, frame_gap=1)], on_error="skip")
    skipped = SkippedEpisodes(1.0)
    read = [source.clips[0][index] for index, _ in read_or_skip(source, 0, skipped)]
    # As they lie in the archive; 100 and 4 are listed and not in it.
    assert read == ["78687", "9", "5", "3"] and skipped.num_skipped == 2
    for part in tmp_path.glob(f"{VIDEO_FOLDER}-??"):
        part.unlink()
    as_folder(tmp_path, contents)
    source = SomethingSomethingSource(str(tmp_path), split=None)
    stream = FramePairStream([FramePairSource(source, frame_gap=1)], repeat=False)
    assert {example["episode_id"] for example in stream} == {"78687", "9", "5", "3", "77"}


def test_splits_are_those_of_the_label_files(layout, tmp_path):
    if layout == "parts":
        names = [episode.episode_id for episode in SomethingSomethingSource(str(tmp_path), split="validation")]
        assert names == ["5"]
        everything = SomethingSomethingSource(str(tmp_path), split=None)
        errors = []
        assert {e.episode_id for _, e in everything.read(0, on_error=errors.append)} == set(PRESENT) - {"77"}
        assert len(errors) == 2
        return
    assert [(e.episode_id, e.instruction) for e in SomethingSomethingSource(str(tmp_path), split="validation")] == [
        ("5", "turning cup")
    ]
    ((test),) = SomethingSomethingSource(str(tmp_path), split="test")
    assert (test.episode_id, test.instructions, test.metadata) == ("3", (), {})
    everything = list(SomethingSomethingSource(str(tmp_path), split=None))
    assert {episode.episode_id for episode in everything} == set(PRESENT)
    assert {episode.instruction for episode in everything} == {
        "holding potato next to vicks vaporub bottle", "pushing mug", "turning cup", None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="`split` 'val' is unknown; there are train, validation, test"):
        SomethingSomethingSource(str(tmp_path), split="val")


@pytest.mark.parametrize("pattern", ["labels/{}.json", "labels/something-something-v2-{}.json", "{}.json"])
def test_label_files_are_found_where_they_lie(tmp_path, contents, pattern):
    as_folder(tmp_path, contents)
    write_labels((tmp_path / pattern).parent, pattern.rpartition("/")[2])
    for arguments in (
        {"path": str(tmp_path)},
        {"path": str(tmp_path / VIDEO_FOLDER)},
        {"path": str(tmp_path), "labels": str((tmp_path / pattern).parent)},
        {"path": str(tmp_path), "labels": str(tmp_path / pattern.format("train"))},
    ):
        assert [episode.episode_id for episode in SomethingSomethingSource(**arguments)] == ["9", "78687"]


def test_without_labels_there_are_no_splits(tmp_path, contents):
    as_folder(tmp_path, contents)
    with pytest.raises(ValueError, match="`split` 'train' needs its label file, which is not in"):
        SomethingSomethingSource(str(tmp_path))
    source = SomethingSomethingSource(str(tmp_path), split=None)
    assert [episode.episode_id for episode in source] == ["3", "5", "9", "77", "78687"]
    assert source.warnings == ()


def test_tars_may_carry_their_own_labels_and_splits(tmp_path, contents):
    row = json.dumps(TRAIN[0]).encode()
    (tmp_path / "ssv2-train-000.tar").write_bytes(
        tar({"78687.webm": contents["78687"], "78687.json": row, "9.txt": b"pushing mug\n", "9.webm": contents["9"]})
    )
    (tmp_path / "ssv2-validation-000.tar").write_bytes(tar({"5.webm": contents["5"]}))
    source = SomethingSomethingSource(str(tmp_path))
    assert [shard.name for shard in source.shards] == ["ssv2-train-000.tar"]
    first, second = source
    assert (first.instruction, second.instruction) == (TRAIN[0]["label"], "pushing mug")
    assert first.metadata["placeholders"] == TRAIN[0]["placeholders"]
    (only,) = SomethingSomethingSource(str(tmp_path / "ssv2-validation-000.tar"), split=None)
    assert (only.episode_id, only.instruction) == ("5", None)
    with pytest.raises(ValueError, match="`split` 'test' needs a label file .* has ssv2-train-000.tar"):
        SomethingSomethingSource(str(tmp_path), split="test")
    (tmp_path / "bad.tar").write_bytes(tar({"1.webm": contents["5"], "1.json": b"{"}))
    with pytest.raises(ReadError, match="the label beside video 1 cannot be read"):
        list(SomethingSomethingSource(str(tmp_path / "bad.tar"), split=None))


def test_single_videos_are_read_out_of_tars(tmp_path, contents, monkeypatch):
    as_tars(tmp_path, contents)
    source = SomethingSomethingSource(str(tmp_path), split=None)
    assert [shard.num_episodes for shard in source.shards] == [2, 3]
    read = []
    original = FileTree.open
    monkeypatch.setattr(FileTree, "open", lambda self, name: read.append(name) or original(self, name))
    ((index, episode),) = source.read(1, [2])
    assert (index, episode.episode_id) == (2, "9")
    assert read == ["shard-00001.tar"]


def test_an_archive_is_read_only_as_far_as_it_is_needed(tmp_path, contents):
    as_parts(tmp_path, contents)
    write_labels(tmp_path)
    (tmp_path / f"{VIDEO_FOLDER}-02").write_bytes(b"damaged")
    source = SomethingSomethingSource(str(tmp_path))
    place = source.clips[0].index("78687")
    ((index, episode),) = source.read(0, [place])
    assert (index, episode.episode_id) == (place, "78687")
    with pytest.raises(ReadError, match=f"{VIDEO_FOLDER}-00 cannot be read after"):
        list(source)


def test_missing_parts_are_named(tmp_path, contents):
    as_parts(tmp_path, contents)
    write_labels(tmp_path)
    (tmp_path / f"{VIDEO_FOLDER}-01").unlink()
    with pytest.raises(ValueError, match=f"lacks part 01 of the archive; it has {VIDEO_FOLDER}-00, {VIDEO_FOLDER}-02"):
        SomethingSomethingSource(str(tmp_path))
    for path in tmp_path.glob(f"{VIDEO_FOLDER}-*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no videos: no .webm files, no .tar files, no 20bn-something"):
        SomethingSomethingSource(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is no valid JSON"),
        (b"{}", "must hold a list of rows, got dict"),
        (b"[3]", "row 0 must be an object, got int"),
        (b'[{"id": "1"}, {"label": "x"}]', "row 1 has no `id`"),
        (b'[{"id": "1", "label": 3}]', "`label` and `template` must be text, got 3"),
        (b'[{"id": "1", "placeholders": [1]}]', "`placeholders` must be a list of texts"),
    ],
)
def test_label_files_that_cannot_be_understood_are_refused(tmp_path, contents, content, message):
    as_folder(tmp_path, contents)
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        SomethingSomethingSource(str(tmp_path), labels=str(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="`labels` .*none.json' does not exist"):
        SomethingSomethingSource(str(tmp_path), labels=str(tmp_path / "none.json"))


def test_damaged_videos_are_errors_and_the_others_are_read(layout, tmp_path, contents, monkeypatch):
    damaged = contents | {"9": contents["9"][: len(contents["9"]) // 2]}
    for path in tmp_path.rglob("*.tar"):
        path.unlink()
    for path in tmp_path.rglob("*.webm"):
        path.unlink()
    if layout == "folder":
        (tmp_path / VIDEO_FOLDER).rmdir()
    LAYOUTS[layout](tmp_path, damaged)
    source, errors = SomethingSomethingSource(str(tmp_path)), []
    found = [e.episode_id for shard in range(len(source.shards)) for _, e in source.read(shard, None, errors.append)]
    assert found == ["78687"]
    assert "is cut short" in str(errors[0])
    assert "9" in str(errors[0])
    if layout == "folder":
        return
    monkeypatch.setattr(something_something, "MAX_VIDEO_BYTES", 10)
    source, errors = SomethingSomethingSource(str(tmp_path)), []
    assert not [e for shard in range(len(source.shards)) for e in source.read(shard, None, errors.append)]
    assert any("more than 10" in str(error) for error in errors)


def test_tars_that_are_cut_or_damaged_are_read_as_far_as_they_are_whole(tmp_path, contents):
    whole = tar({f"{video}.webm": content for video, content in contents.items()})
    path = tmp_path / "a.tar"
    offsets = [place for place in range(0, len(whole), 512) if whole[place : place + 512].find(b"ustar") == 257]
    path.write_bytes(whole[: offsets[3] + 600])
    source = SomethingSomethingSource(str(path), split=None)
    assert source.warnings == (
        f"{path} is cut short or damaged at byte {offsets[3] + 600} of {offsets[3] + 600}; the 4 files before are read.",
    )
    errors = []
    assert len(list(source.read(0, None, errors.append))) == 3
    assert "cut short" in str(errors[0])
    broken = bytearray(whole)
    broken[offsets[2] + 10] ^= 0xFF
    path.write_bytes(broken)
    source = SomethingSomethingSource(str(path), split=None)
    assert f"damaged at byte {offsets[2]} of {len(whole)}; the 2 files before are read" in source.warnings[0]
    assert len(list(source)) == 2


def test_hostile_headers_are_refused(tmp_path):
    """Names of gigabytes, and sizes that lead backwards."""
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "a.tar").write_bytes(name.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    back = tarfile.TarInfo("1.webm")
    header = bytearray(back.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    (tmp_path / "b.tar").write_bytes(bytes(header) + bytes(2048))
    far = tarfile.TarInfo("1.webm")
    far.pax_headers = {"size": str(1 << 60)}
    (tmp_path / "c.tar").write_bytes(far.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    tree = FileTree(str(tmp_path))
    for file in ("a.tar", "b.tar", "c.tar"):
        members, fault = tar_members(tree, file)
        assert (members, fault is not None) == ([], True), file
        with pytest.raises(ReadError):
            list(stream_members(tree, [file], 1 << 20))


def test_damaged_archives_give_files_or_an_error(tmp_path, contents):
    draw = random.Random(0)
    whole = tar({f"x/{video}.webm": content[:3000] for video, content in contents.items()}, format=tarfile.PAX_FORMAT)
    packed = gzip.compress(whole)
    tree = FileTree(str(tmp_path))
    refused = 0
    for round_number in range(300):
        damaged = bytearray(draw.choice((whole, packed)))
        for _ in range(draw.choice((1, 5, 40))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "t").write_bytes(damaged[: draw.randrange(1, len(damaged))] if round_number % 3 else damaged)
        refused += tar_members(tree, "t")[1] is not None
        try:
            for _, content in stream_members(tree, ["t"], 1 << 16):
                assert content is None or len(content) <= 1 << 16
        except ReadError:
            refused += 1
    assert refused > 200


def test_it_is_recognised_by_the_names_it_is_distributed_with(tmp_path, contents):
    (tmp_path / "empty").mkdir()
    for name, write in LAYOUTS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, contents)
    names = ("folder", "parts", "tars", "empty", "absent")
    recognised = [SomethingSomethingSource.recognises(str(tmp_path / name)) for name in names]
    assert recognised == [True, True, False, False, False]
    write_labels(tmp_path / "tars")
    assert SomethingSomethingSource.recognises(str(tmp_path / "tars"))
