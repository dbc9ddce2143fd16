"""Folders of videos and of frames: what is found in which order, with which instructions, and what is wrong with it."""

import json
import pickle
import shutil

import fsspec
import numpy as np
import pytest
from PIL import Image
from video_files import FRAME_RATE, encode_video, moving_frames

from lapa.data.captions import CAPTION_FILES, match_captions, read_captions
from lapa.data.file_tree import FileTree
from lapa.data.folders import CLIPS_PER_SHARD, FrameFolderSource, VideoFolderSource, by_number
from lapa.data.schema import ReadError

WEBM = {"deadline": "realtime", "cpu-used": "8"}


def write_video(path, count=6, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    container = {".mkv": "matroska"}.get(path.suffix, path.suffix[1:])
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    options.setdefault("options", WEBM if codec == "libvpx-vp9" else {})
    path.write_bytes(encode_video(moving_frames(count, seed=seed), codec, container, **options))
    return path


def write_frames(folder, frames, name="img_{:05d}.png"):
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(folder / name.format(number))


def episodes(source):
    return {episode.episode_id: episode for episode in source}


def test_videos_of_every_kind_are_found_below_a_folder_in_order(tmp_path):
    names = ["b.mp4", "a/z.webm", "a/inner/x.mkv", "a/y.avi", "c.MOV"]
    for seed, name in enumerate(names):
        write_video(tmp_path / name.lower(), count=4 + seed, seed=seed)
    (tmp_path / "c.mov").rename(tmp_path / "c.MOV")
    for clutter in ("notes.md", ".hidden.mp4", "a/._z.webm", "a/picture.jpg"):
        (tmp_path / clutter).write_bytes(b"no video")
    source = VideoFolderSource(str(tmp_path))
    found = episodes(source)
    assert list(found) == sorted(names) == ["a/inner/x.mkv", "a/y.avi", "a/z.webm", "b.mp4", "c.MOV"]
    assert [found[name].num_steps for name in names] == [4, 5, 6, 7, 8]
    assert source.num_episodes == 5
    assert source.name == tmp_path.name
    assert source.warnings == ()
    episode = found["b.mp4"]
    assert (episode.cameras, episode.embodiment, episode.instructions) == (source.cameras, "human", ())
    np.testing.assert_allclose(episode.timestamps, np.arange(4) / FRAME_RATE, atol=1e-3)
    assert source.frame_gap_seconds == 2.4
    flat = VideoFolderSource(str(tmp_path), recursive=False, embodiment="monkey", frame_gap_seconds=0.5)
    assert [(episode.episode_id, episode.embodiment) for episode in flat] == [("b.mp4", "monkey"), ("c.MOV", "monkey")]
    assert flat.frame_gap_seconds == 0.5
    (only,) = VideoFolderSource(str(tmp_path / "a" / "z.webm"))
    assert (only.episode_id, only.num_steps) == ("z.webm", 5)
    (split,) = VideoFolderSource(str(tmp_path / "a"), split="inner")
    assert (split.episode_id, split.source) == ("x.mkv", "a/inner")


def test_times_that_the_file_does_not_have_are_said_to_be_made_up(tmp_path):
    write_video(tmp_path / "a.avi", count=8, options={"bf": "2"})
    write_video(tmp_path / "b.mp4", count=8, options={"bf": "2"})
    first, second = VideoFolderSource(str(tmp_path))
    assert first.metadata == {"times": "from the average frame rate: the file has none"}
    assert second.metadata == {}
    np.testing.assert_allclose(first.timestamps, second.timestamps, atol=1e-6)


def test_shards_are_groups_and_single_episodes_are_read_alone(tmp_path):
    content = encode_video(moving_frames(2))
    for number in range(CLIPS_PER_SHARD + 5):
        (tmp_path / f"{number:03d}.mp4").write_bytes(content)
    source = pickle.loads(pickle.dumps(VideoFolderSource(str(tmp_path))))
    assert [(shard.name, shard.num_episodes) for shard in source.shards] == [
        ("clips-0000000-0000063", 64),
        ("clips-0000064-0000068", 5),
    ]
    # What is not asked for is not touched.
    (tmp_path / "065.mp4").write_bytes(b"damaged")
    assert [(index, episode.episode_id) for index, episode in source.read(1, [4, 0])] == [
        (4, "068.mp4"),
        (0, "064.mp4"),
    ]
    with pytest.raises(ReadError, match=r"065\.mp4 cannot be read as video"):
        list(source.read(1))
    errors = []
    assert [index for index, _ in source.read(1, on_error=errors.append)] == [0, 2, 3, 4]
    assert len(errors) == 1
    with pytest.raises(ValueError, match="`episodes` has 5; shard clips-0000064-0000068 has 5 episodes"):
        list(source.read(1, [5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "`split` 'test' is no folder of {path}; it has train"),
        ({"cameras": ["wrist"]}, "`cameras` ('wrist',) is unknown"),
        ({"captions": "{path}/none.json"}, "`captions` '{path}/none.json' does not exist"),
        ({"frame_gap_seconds": 0.0}, "`frame_gap_seconds` must be positive, got 0.0"),
        ({"path": "{path}/train/empty"}, "`path` '{path}/train/empty' holds no video"),
        ({"path": "{path}/absent"}, "`path` '{path}/absent' is no folder"),
        ({"path": "{path}/absent.mp4"}, "`path` '{path}/absent.mp4' is no folder"),
    ],
)
def test_what_is_asked_for_and_absent_is_refused(tmp_path, arguments, message):
    write_video(tmp_path / "train" / "a.mp4")
    (tmp_path / "train" / "empty").mkdir()
    arguments = {"path": "{path}"} | arguments
    filled = {
        key: value.format(path=tmp_path) if isinstance(value, str) else value for key, value in arguments.items()
    }
    with pytest.raises(ValueError) as error:
        VideoFolderSource(**filled)
    assert message.format(path=tmp_path) in str(error.value)


SIDECARS = {
    "captions.json": json.dumps({"a.mp4": "pick up", "sub/b": ["put down", "lay  down\n"], "c": {"caption": "turn"}}),
    "metadata.json": json.dumps(
        [
            {"video": "a.mp4", "instruction": "pick up"},
            {"video": "sub\\b.mp4", "text": ["put down", "lay down"]},
            {"video": "c.mp4", "label": "turn", "length": 3},
        ]
    ),
    "metadata.jsonl": '{"file_name": "a.mp4", "text": "pick up"}\n\n{"file_name": "sub/b.mp4", "text": "put down"}\n'
    '{"file_name": "sub/b.mp4", "text": "lay down"}\n{"file_name": "./c.mp4", "text": "turn"}\n',
    "captions.csv": 'file_name,frames,caption\na.mp4,3,pick up\nsub/b,3,"put\ndown"\nb,3,lay down\nc,3,turn\n',
    "captions.tsv": "id\tlabel\na\tpick up\nsub/b.mp4\tput down\nsub/b\tlay down\nc\tturn\n",
    "captions.txt": "\ufeffa.mp4 pick up\nsub/b.mp4\tput down\nsub/b.mp4   lay down\nc turn\n",
}
EXPECTED = {"a.mp4": ("pick up",), "sub/b.mp4": ("put down", "lay down"), "c.mp4": ("turn",)}


@pytest.mark.parametrize("name", SIDECARS)
def test_instructions_lie_beside_the_videos(tmp_path, name):
    for video in EXPECTED:
        write_video(tmp_path / video, count=2)
    (tmp_path / name).write_text(SIDECARS[name], encoding="utf-8")
    source = VideoFolderSource(str(tmp_path))
    assert {name: episode.instructions for name, episode in episodes(source).items()} == EXPECTED
    assert source.warnings == ()
    # The same file, named and elsewhere.
    (tmp_path / "other").mkdir()
    (tmp_path / name).rename(tmp_path / "other" / name)
    assert not any(episode.instructions for episode in VideoFolderSource(str(tmp_path)))
    source = VideoFolderSource(str(tmp_path), captions=str(tmp_path / "other" / name))
    assert {name: episode.instructions for name, episode in episodes(source).items()} == EXPECTED


def test_a_video_may_have_a_text_of_its_own(tmp_path):
    write_video(tmp_path / "a.mp4", count=2)
    write_video(tmp_path / "sub" / "b.mp4", count=2)
    (tmp_path / "sub" / "b.txt").write_text("\n fold the cloth \nfold it\nfold it\n")
    (tmp_path / "a.txt").write_text("not used")
    (tmp_path / "captions.json").write_text('{"a": "open the drawer"}')
    found = {name: episode.instructions for name, episode in episodes(VideoFolderSource(str(tmp_path))).items()}
    assert found == {"a.mp4": ("open the drawer",), "sub/b.mp4": ("fold the cloth", "fold it")}
    (tmp_path / "sub" / "b.txt").write_bytes(b"fold \xff")
    with pytest.raises(ReadError, match=r"b\.txt is no UTF-8 text: byte 5"):
        list(VideoFolderSource(str(tmp_path)))


def test_what_matches_nothing_is_a_warning(tmp_path):
    for name in ("a/1.mp4", "b/1.mp4", "b/2.mp4"):
        write_video(tmp_path / name, count=2)
    # Which of the two is meant by "1" cannot be known.
    (tmp_path / "captions.json").write_text(
        json.dumps({"1": "push", "b/2": "pull", **{f"x{i}": "y" for i in range(9)}})
    )
    source = VideoFolderSource(str(tmp_path))
    assert [episode.instructions for episode in source] == [(), (), ("pull",)]
    assert source.warnings == (
        f"10 of 11 names in {tmp_path}/captions.json are no clip here: 1, x0, x1, ...",
        f"2 of 3 clips have no instruction in {tmp_path}/captions.json: a/1.mp4, b/1.mp4",
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions.json", b"{", "captions.json is no valid JSON"),
        ("captions.json", b"[" * 100_000, "captions.json is no valid JSON"),
        ("captions.json", b"3", "must hold a JSON object or list, got int"),
        ("captions.json", b'{"a": 3}', "'a': an instruction must be text or a list of texts, got 3"),
        ("captions.json", b'[{"text": "b"}]', "row 0 names no video; it has text"),
        ("metadata.jsonl", b'{"file_name": "a"}\n[]', "line 2 must be an object with named fields, got list"),
        ("captions.csv", b"caption\nb\n", "line 2 names no video; it has caption"),
        ("captions.txt", b"a \xff", "captions.txt is no UTF-8 text: byte 2"),
        ("captions.xml", b"<a/>", "must end in .json, .jsonl, .csv, .tsv or .txt"),
    ],
)
def test_a_captions_file_that_cannot_be_understood_is_refused(tmp_path, name, content, message):
    write_video(tmp_path / "a.mp4", count=2)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        VideoFolderSource(str(tmp_path), captions=str(tmp_path / name))
    assert message in str(error.value)
    assert name in str(error.value)


def test_captions_are_matched_by_path_before_name():
    matched, unused = match_captions(
        {"a/1.mp4": ("x",), "2": ("y",), "1.mp4": ("z",)}, ["a/1.mp4", "b/2.mp4", "b/1.mp4"]
    )
    assert matched == {"a/1.mp4": ("x",), "b/2.mp4": ("y",)}
    assert unused == ["1.mp4"]


def test_the_first_captions_file_counts(tmp_path):
    for name in reversed(CAPTION_FILES[:3]):
        (tmp_path / name).write_text(json.dumps({"file_name": "v", "text": name.replace(".", "-")}))
    assert CAPTION_FILES[0] == "captions.json"
    (tmp_path / CAPTION_FILES[0]).unlink()
    assert read_captions(FileTree(str(tmp_path))) == ({"v": ("captions-jsonl",)}, str(tmp_path / "captions.jsonl"))


def test_a_folder_behind_a_url_reads_like_one_at_hand(tmp_path):
    for name in ("a.mp4", "sub/b.mp4"):
        write_video(tmp_path / name, count=5, seed=len(name))
    (tmp_path / "captions.csv").write_text("video,caption\na,lift\n")
    here = episodes(VideoFolderSource(str(tmp_path)))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/videos", recursive=True)
    source = pickle.loads(pickle.dumps(VideoFolderSource("memory://videos")))
    there = episodes(source)
    assert source.name == "videos"
    assert VideoFolderSource.recognises("memory://videos")
    assert list(there) == list(here)
    for name, episode in there.items():
        assert episode.instructions == here[name].instructions
        np.testing.assert_array_equal(episode.frame("video", 3), here[name].frame("video", 3))
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "sub")
    (packed,) = VideoFolderSource(f"zip://sub::{tmp_path}/packed.zip")
    np.testing.assert_array_equal(packed.frame("video", 3), here["sub/b.mp4"].frame("video", 3))
    memory.rm("/videos", recursive=True)


def test_folders_of_frames_are_read_as_the_published_loader_expects_them(tmp_path):
    clips = {"12": moving_frames(12, seed=1), "7": moving_frames(3, seed=2)}
    write_frames(tmp_path / "12", clips["12"])
    # Without leading zeros the order of names is not the order of frames.
    write_frames(tmp_path / "7", clips["7"] * 4, name="img_{}.png")
    (tmp_path / "12" / "notes.txt").write_text("no frame")
    (tmp_path / "captions.json").write_text('{"12": "move", "7": ["turn", "rotate"]}')
    source = FrameFolderSource(str(tmp_path), frequency=12)
    found = episodes(pickle.loads(pickle.dumps(source)))
    assert list(found) == ["12", "7"]
    assert found["7"].instructions == ("turn", "rotate")
    for name, frames in (("12", clips["12"]), ("7", clips["7"] * 4)):
        np.testing.assert_array_equal(np.stack(found[name].read_frames("video", range(12))), np.stack(frames))
    np.testing.assert_allclose(found["12"].timestamps, np.arange(12) / 12)
    assert next(iter(FrameFolderSource(str(tmp_path)))).timestamps is None
    (tmp_path / "captions.json").unlink()
    (tmp_path / "7.txt").write_text("spin")
    assert [episode.instructions for episode in FrameFolderSource(str(tmp_path))] == [(), ("spin",)]


def test_folders_of_frames_may_lie_deeper(tmp_path):
    write_frames(tmp_path / "train" / "robot.1" / "a", moving_frames(2))
    write_frames(tmp_path / "train" / "robot.2" / "a", moving_frames(3))
    write_frames(tmp_path / "test" / "a", moving_frames(4))
    (tmp_path / "train" / "robot.2" / "a.txt").write_text("grasp")
    assert [
        (episode.episode_id, episode.num_steps, episode.instructions) for episode in FrameFolderSource(str(tmp_path))
    ] == [
        ("test/a", 4, ()),
        ("train/robot.1/a", 2, ()),
        ("train/robot.2/a", 3, ("grasp",)),
    ]
    assert [episode.episode_id for episode in FrameFolderSource(str(tmp_path), split="test")] == ["a"]


def test_frames_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    frames = moving_frames(4)
    write_frames(tmp_path / "clip", frames)
    write_frames(tmp_path / "empty", [])
    (tmp_path / "clip" / "img_00002.png").write_bytes((tmp_path / "clip" / "img_00002.png").read_bytes()[:200])
    (tmp_path / "clip" / "img_00003.png").write_bytes(b"no image")
    Image.fromarray(frames[0][:32]).save(tmp_path / "clip" / "img_00004.png")
    source = FrameFolderSource(str(tmp_path))
    errors = []
    ((_, episode),) = source.read(0, on_error=errors.append)
    assert [str(error) for error in errors] == [f"{tmp_path}/empty has no images."]
    assert episode.frame("video", 0).shape == (64, 96, 3)
    for step, name in ((1, "img_00002.png"), (2, "img_00003.png")):
        with pytest.raises(ReadError, match=f"{name} is no readable image"):
            episode.frame("video", step)
    with pytest.raises(ReadError, match=r"different sizes in one clip: 96 x 64 \(.*1.png\) and 96 x 32 \(.*4.png\)"):
        episode.read_frames("video", [0, 3])
    monkeypatch.setattr("lapa.data.encoded_frames.MAX_FRAME_PIXELS", 100)
    with pytest.raises(ReadError, match=r"img_00001.png has 96 x 64 pixels, more than 100"):
        episode.frame("video", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"frequency": 0.0}, "`frequency` must be positive, got 0.0"), ({}, "has no folder of images")],
)
def test_folders_without_frames_are_refused(tmp_path, arguments, message):
    Image.fromarray(moving_frames(1)[0]).save(tmp_path / "loose.png")
    with pytest.raises(ValueError) as error:
        FrameFolderSource(str(tmp_path), **arguments)
    assert message in str(error.value)


def test_folders_are_recognised_by_what_is_in_them(tmp_path):
    write_video(tmp_path / "videos" / "a" / "b" / "clip.mp4")
    write_frames(tmp_path / "frames" / "clip", moving_frames(2))
    (tmp_path / "loose").mkdir()
    Image.fromarray(moving_frames(1)[0]).save(tmp_path / "loose" / "one.png")
    names = ("videos", "frames", "loose", "absent", "videos/a/b/clip.mp4")
    assert [VideoFolderSource.recognises(str(tmp_path / name)) for name in names] == [True, False, False, False, True]
    assert [FrameFolderSource.recognises(str(tmp_path / name)) for name in names] == [False, True, False, False, False]


def test_names_are_sorted_by_their_numbers():
    names = ["img_2.jpg", "img_10.jpg", "img_1.jpg", "10", "9", "x"]
    assert sorted(names, key=by_number) == ["9", "10", "img_1.jpg", "img_2.jpg", "img_10.jpg", "x"]
