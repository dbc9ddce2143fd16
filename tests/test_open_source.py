"""Opening data sets of every format by what a path holds, and mixtures of them."""

import json
import pickle
import shutil
import zipfile

import fsspec
import numpy as np
import pytest
import yaml
from PIL import Image
from shared_files import shared_path
from video_files import encode_video, moving_frames

from lapa.data.folders import FrameFolderSource, VideoFolderSource
from lapa.data.frame_pairs import FrameGap
from lapa.data.lerobot_format import LeRobotSource
from lapa.data.open_source import (
    SOURCE_KINDS,
    is_mixture,
    open_mixture,
    open_source,
    read_filters,
    recorded_options,
    source_kind,
    source_options,
)
from lapa.data.pair_filters import BlankFrames, ShotCuts, StaticPairs
from lapa.data.rlds import RldsSource
from lapa.data.something_something import SomethingSomethingSource


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data set of each kind."""
    root = tmp_path_factory.mktemp("sources")
    frames = moving_frames(6)
    video = encode_video(frames)
    (root / "videos" / "deep").mkdir(parents=True)
    (root / "videos" / "deep" / "clip.mp4").write_bytes(video)
    something = root / "something" / "20bn-something-something-v2"
    something.mkdir(parents=True)
    (something / "7.webm").write_bytes(encode_video(frames, "libvpx-vp9", "webm"))
    labels = [{"id": "7", "label": "pushing a block", "template": "Pushing [something]", "placeholders": ["a block"]}]
    (root / "something" / "something-something-v2-train.json").write_text(json.dumps(labels))
    (root / "frames" / "clip").mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(root / "frames" / "clip" / f"img_{number:05d}.png")
    shutil.copytree(shared_path("data/bridge_rlds/1.0.0"), root / "rlds" / "1.0.0")
    return root


def test_options_are_recorded_and_part_of_a_streams_state(folders):
    """Whoever goes on with other options of the same files is told."""
    from lapa.data.action_stream import ActionStepSource, ActionStepStream
    from lapa.data.episode_range import EpisodeRange
    from lapa.data.mixture import FramePairSource, FramePairStream

    path = folders / "frames"
    assert open_source(path).options == {} == open_source(path, frequency=None, cameras=["video"]).options
    slow, fast = (open_source(path, frequency=frequency) for frequency in (5.0, 10.0))
    assert (
        slow.options
        == {"frequency": 5.0}
        == EpisodeRange(slow, 0, 1).options
        == pickle.loads(pickle.dumps(slow)).options
    )
    assert slow.shards_hash == fast.shards_hash != EpisodeRange(open_source(folders / "rlds"), 0, 1).shards_hash
    robot = recorded_options("rlds", {"action_keys": ("action",), "action_transform": np.zeros_like, "dataset": None})
    assert robot == {"action_keys": ["action"], "action_transform": "numpy:zeros_like"}
    assert recorded_options("rlds", {"action_transform": None}) == {"action_transform": None}
    for stream, source in ((FramePairStream, FramePairSource), (ActionStepStream, ActionStepSource)):
        state = stream([source(slow)]).state_dict()
        stream([source(slow)]).load_state_dict(state)
        with pytest.raises(ValueError, match="frequency"):
            stream([source(fast)]).load_state_dict(state)


CLASSES = {
    "rlds/1.0.0": ("rlds", RldsSource),
    "something": ("something_something", SomethingSomethingSource),
    "videos": ("videos", VideoFolderSource),
    "frames": ("frames", FrameFolderSource),
}


@pytest.mark.parametrize("folder", CLASSES)
def test_a_path_tells_its_kind(folder, folders):
    kind, source_class = CLASSES[folder]
    path = folders / folder
    assert source_kind(str(path)) == kind
    for spec in (path, str(path), {"path": str(path)}, {"path": path, "kind": kind}):
        source = open_source(spec)
        assert type(source) is source_class and source.num_episodes == sum(
            shard.num_episodes for shard in source.shards
        )
    assert source_class in [entry.load() for entry in SOURCE_KINDS.values()]
    assert pickle.loads(pickle.dumps(source)).shards == source.shards
    (_, episode), *_ = source.read(0)
    assert episode.read_frames(source.cameras[0], [0])[0].dtype == np.uint8


def test_every_kind_has_the_common_options():
    for kind in SOURCE_KINDS:
        assert {"split", "cameras", "frame_gap_seconds", "embodiment", "unnorm_key"} <= set(source_options(kind))
    assert SOURCE_KINDS["lerobot"].load() is LeRobotSource


def test_options_reach_the_source_and_win_over_the_specification(folders):
    spec = {"path": str(folders / "videos"), "frame_gap_seconds": 1.2, "embodiment": "toddler"}
    source = open_source(spec, frame_gap_seconds=0.8)
    assert source.frame_gap_seconds == 0.8 and source.embodiment == "toddler"
    assert spec["frame_gap_seconds"] == 1.2


def test_what_cannot_be_opened_is_said_in_one_error(folders, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError) as error:
        open_source(tmp_path)
    # What was looked for, per kind.
    for kind, sign in (("rlds", "features.json"), ("lerobot", "meta/info.json"), ("frames", "images in folders")):
        assert f"{kind}: " in str(error.value) and sign in str(error.value)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`kind` must be one of rlds, lerobot, .*got 'video'"):
        open_source(folders / "videos", kind="video")
    with pytest.raises(ValueError, match="`captoins` is no option of .* of kind 'videos'; it has captions,"):
        open_source(folders / "videos", captoins="x")
    with pytest.raises(ValueError, match="must name its `path`"):
        open_source({"kind": "videos"})
    with pytest.raises(ValueError, match="`cameras` must be a list of names, got 'video'"):
        open_source(folders / "videos", cameras="video")
    with pytest.raises(ValueError, match="cannot be opened: "):
        open_source("nosuchprotocol://bucket/data")


def test_a_folder_inside_an_archive(folders, tmp_path):
    """Files beside the videos are told by their own names, whatever the URL ends in."""
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        archive.write(folders / "videos" / "deep" / "clip.mp4", "clips/clip.mp4")
        archive.writestr("clips/captions.csv", "file_name,text\nclip.mp4,push\n")
    source = open_source(f"zip://clips::{tmp_path / 'clips.zip'}")
    (episode,) = source
    assert episode.instruction == "push" and episode.num_steps == 6 and source.warnings == ()


def test_what_a_file_system_raises_is_told_in_one_error():
    class Unreachable(fsspec.AbstractFileSystem):
        protocol = "unreachable"

        def exists(self, path, **kwargs):
            raise RuntimeError("no route to host")

    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(ValueError, match="unreachable://bucket/data cannot be opened: no route to host"):
        open_source("unreachable://bucket/data")


def test_a_mixture_file(folders, tmp_path):
    """Paths are relative to the file; each source has its own weight, camera, gap and filters."""
    entries = [
        {"path": "rlds/1.0.0", "weight": 2, "camera": "image_1", "frame_gap": 3},
        {"path": "videos", "frame_gap_seconds": 0.1, "filters": ["static", {"shot_cut": {"max_distance": 0.4}}]},
        "frames",
    ]
    for name, text in (("mixture.yaml", yaml.safe_dump(entries)), ("mixture.json", json.dumps(entries))):
        (folders / name).write_text(text)
        assert is_mixture(folders / name)
        robot, video, frames = open_mixture(folders / name)
        assert (robot.weight, robot.camera, robot.gap.frames, robot.filters) == (2.0, "image_1", 3, ())
        # What nobody looks at is not read.
        assert robot.source.cameras == ("image_1",)
        assert (video.weight, video.camera, video.gap.seconds) == (1.0, None, 0.1)
        assert video.filters == (StaticPairs(), ShotCuts(0.4))
        assert isinstance(frames.source, FrameFolderSource)
    (single,) = open_mixture([{"path": folders / "frames", "frequency": 5}], filters="blank")
    assert single.source.frequency == 5 and single.filters == (BlankFrames(),)
    assert is_mixture([folders / "frames"]) and not is_mixture(folders / "frames")


@pytest.mark.parametrize(
    ("own", "options", "expected"),
    [
        ({"frame_gap": 3}, {"frame_gap_seconds": 0.6}, FrameGap(3, None)),
        ({"frame_gap_seconds": 0.6}, {"frame_gap": 3}, FrameGap(None, 0.6)),
        ({"frame_gap_seconds": 0.6}, {"frame_gap": None, "frame_gap_seconds": 2.4}, FrameGap(None, 0.6)),
        ({}, {"frame_gap": 3}, FrameGap(3, None)),
    ],
)
def test_a_source_of_a_mixture_has_its_own_gap_in_its_own_unit(own, options, expected, folders):
    (source,) = open_mixture([{"path": folders / "videos", **own}], **options)
    assert source.gap == expected


def test_a_source_of_a_mixture_has_its_own_camera(folders):
    """However it and the option for all sources name it."""
    robot = {"path": folders / "rlds" / "1.0.0"}
    (one,) = open_mixture([{**robot, "cameras": ["image_1"]}], camera="image_0")
    assert one.chosen_camera == "image_1" and one.source.cameras == ("image_1",)
    (one,) = open_mixture([{**robot, "camera": "image_1"}], cameras=["image_0"])
    assert one.chosen_camera == "image_1" and one.source.cameras == ("image_1",)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weight": 1}, r"source 1 of the mixture \(None\): a source must name its `path`"),
        ({"path": "videos", "wieght": 1}, r"source 1 .*videos\): `wieght` is no option"),
        ({"path": "videos", "weight": 0}, "`weight` must be a number above 0, got 0"),
        ({"path": "videos", "weight": True}, "`weight` must be a number above 0, got True"),
        ({"path": "videos", "frame_gap": 1.5}, "`frame_gap` must be a number of frames, got 1.5"),
        ({"path": "videos", "frame_gap": 0}, "`frame_gap` must be at least 1 frame, got 0"),
        ({"path": "videos", "frame_gap": 1, "frame_gap_seconds": 1}, "exclude each other"),
        ({"path": "videos", "frame_gap_seconds": "long"}, "source 1"),
        ({"path": "videos", "camera": "left"}, "'left'"),
        ({"path": "videos", "filters": ["blurred"]}, "`filters` must hold some of static, shot_cut, blank"),
        ({"path": "videos", "filters": [{"static": {"change": 1}}]}, "filter 'static' takes min_change"),
        ({"path": "nowhere"}, "does not exist"),
    ],
)
def test_a_wrong_source_of_a_mixture_is_named(entry, message, folders):
    path = folders / "wrong.yaml"
    path.write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match=message):
        open_mixture(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "must be a list of at least one source, got dict"),
        ("[]", "must be a list of at least one source"),
        ("text", "must be a list of at least one source, got str"),
        ("[", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "cannot be read"),
    ],
)
def test_a_file_that_is_no_mixture(text, message, tmp_path):
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_mixture(tmp_path / "mixture.yaml")
    with pytest.raises(ValueError, match="must end in .yaml, .yml, .json"):
        open_mixture(tmp_path / "mixture.toml")
    with pytest.raises(ValueError, match="does not exist"):
        open_mixture(tmp_path / "none.yaml")


def test_filters_by_name():
    assert read_filters(None) == () and read_filters("static, blank") == (StaticPairs(), BlankFrames())
    assert read_filters([ShotCuts(0.2), {"static": {"min_change": 0.5}}]) == (ShotCuts(0.2), StaticPairs(0.5))
    with pytest.raises(ValueError, match="different names"):
        read_filters(["static", "static"])
