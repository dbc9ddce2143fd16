"""`lapa inspect`: what it counts, what it says is skipped and why, and how little it decodes."""

import json
import shutil
from dataclasses import asdict

import fsspec
import numpy as np
import pytest
from label_files import label_rows, label_settings, write_label_folder
from lerobot_files import RECORDINGS, TASKS, TOP, VIDEO_PATHS, WRIST, write_lerobot
from PIL import Image
from shared_files import shared_path
from tfds_files import TOY_FEATURES, frame_record, toy_episode, write_tfds_folder
from video_files import encode_video, moving_frames

from lapa.cli import main
from lapa.data import inspection_rows
from lapa.data.contact_sheet import TILE_SIZE, Section, difference, draw_sheet, make_tile
from lapa.data.folders import VideoFolderSource
from lapa.data.inspection import Inspection, InspectOptions, evenly_spaced, inspect_source
from lapa.data.inspection_report import to_text
from lapa.data.inspection_rows import RowTotals, inspect_labels
from lapa.data.number_summary import MAX_ROWS, NumberSummary
from lapa.data.video import VideoFrames

BRIDGE = "data/bridge_rlds/1.0.0"


def inspect(capsys, *arguments):
    """What `lapa inspect --json` prints, one source."""
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    return content


def refused(capsys, *arguments):
    """The one line of an error."""
    assert main(["inspect", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Four clips: one even, one of variable rate in which nothing moves, one of two scenes, one that is cut short."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    folder.mkdir()
    frames = moving_frames(30)
    even = encode_video(frames, rate=10)
    (folder / "a_even.mp4").write_bytes(even)
    times = np.cumsum([1, 1, 1, 3] * 5).tolist()
    (folder / "b_still.mkv").write_bytes(encode_video(frames[:1] * 20, container="matroska", times=times, rate=10))
    dark = [np.full_like(frames[0], 40)] * 10
    (folder / "c_scenes.mp4").write_bytes(encode_video(frames[:10] + dark, rate=10))
    (folder / "d_cut.mp4").write_bytes(even[: len(even) // 2])
    (folder / "captions.csv").write_text("file_name,text\na_even.mp4,push\nc_scenes.mp4,push\nnone.mp4,pull\n")
    return folder


def test_the_bridge_shard(capsys):
    """Listed but absent is a warning; asking for it is an error."""
    path = shared_path(BRIDGE)
    content = inspect(capsys, path)
    assert (content["kind"], content["name"], content["episodes"], content["frames"]) == (
        "rlds", "bridge_dataset/train", 25, 250,
    )  # fmt: skip
    assert content["hours"] == pytest.approx(50 / 3600)
    assert content["frequency"]["hz"] == [{"hz": 5.0, "episodes": 25}]
    formats = [{"codec": "jpeg", "height": 64, "width": 64, "episodes": 25}]
    assert content["cameras"]["image_1"] == {"episodes": 25, "formats": formats, "blank_camera": 0}
    assert content["cameras"]["image_3"] == {"episodes": 0, "formats": [], "blank_camera": 25}
    assert content["instructions"]["distinct"] == 4 and content["instructions"]["episodes_without"] == 0
    assert content["instructions"]["most_common"][0] == {"text": "put carrot on plate", "episodes": 8}
    dimensions = content["action"]["dimensions"]
    assert [entry["name"] for entry in dimensions] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    assert (dimensions[6]["min"], dimensions[6]["max"], dimensions[6]["constant"]) == (0.0, 1.0, False)
    pairs = content["pairs"]
    assert (pairs["count"], pairs["frame_gap_seconds"], pairs["gap_frames"]) == (175, 0.6, {"3": 175})
    assert pairs["skipped_episodes"] == {} and pairs["looked_at"]["pairs"] == 64
    (warning,) = content["warnings"]
    assert "split 'val'" in warning and "absent" in warning
    assert "`split` 'val' needs the file" in refused(capsys, path, "--split", "val")
    assert inspect(capsys, path, "--camera", "image_3")["pairs"]["skipped_episodes"]["blank_camera"]["episodes"] == 25
    assert inspect(capsys, path, "--frame_gap", "4")["pairs"]["gap_frames"] == {"4": 150}


def test_videos_and_what_is_skipped(videos, capsys):
    content = inspect(capsys, videos, "--frame-gap-seconds", "0.5", "--filters", "static", "--num-pairs", "30")
    assert (content["kind"], content["episodes"], content["episodes_read"], content["frames"]) == ("videos", 4, 3, 70)
    assert content["cameras"]["video"]["formats"] == [{"codec": "h264", "height": 64, "width": 96, "episodes": 3}]
    assert content["frequency"]["episodes_of_variable_rate"] == 1
    assert content["frequency"]["hz"] == [{"hz": 10.0, "episodes": 3}]
    assert content["instructions"] | {"most_common": []} == {
        "count": 2, "distinct": 1, "most_common": [], "episodes_without": 1, "episodes_with_several": 0,
    }  # fmt: skip
    assert content["action"] is None and content["embodiment"] == "human"
    pairs = content["pairs"]
    skipped = pairs["skipped_episodes"]
    assert list(skipped) == ["unreadable"] and skipped["unreadable"]["episodes"] == 1
    assert "d_cut.mp4 is cut short" in skipped["unreadable"]["examples"][0]
    # 25 + 15 of the even clips; in the other one a gap of three frames lies beside the half second.
    assert pairs["count"] == 40 + sum(pairs["gap_frames"][gap] for gap in pairs["gap_frames"] if gap != "5")
    filters = pairs["looked_at"]["filters"]
    assert filters["static"]["chosen"] and filters["static"]["drops"] >= 10
    assert not filters["shot_cut"]["chosen"] and filters["shot_cut"]["drops"] >= 2
    assert pairs["looked_at"]["dropped_by_chosen_filters"] == filters["static"]["drops"]
    # A quarter of them would have been of the clip that cannot be read.
    assert pairs["looked_at"]["pairs"] == 22 and len(content["warnings"]) == 2
    assert inspect(capsys, videos)["pairs"]["skipped_episodes"]["too_short"]["examples"] == ["c_scenes.mp4"]
    assert "d_cut.mp4 is cut short" in refused(capsys, videos, "--on_error", "raise")


def test_little_is_decoded(videos, monkeypatch):
    """Sizes, codecs and numbers of frames come from headers; frames are decoded for the pairs that are looked at."""
    decoded, read = [], VideoFrames.read
    monkeypatch.setattr(VideoFrames, "read", lambda self, steps: decoded.extend(steps) or read(self, steps))
    entry = {"path": str(videos), "frame_gap": 1}
    assert inspect_source(entry, InspectOptions(num_pairs=0)).content["frames"] == 70
    assert decoded == []
    found = inspect_source(entry, InspectOptions(num_pairs=6))
    assert len(found.tiles) == 4 and {tile.episode_id for tile in found.tiles} == {
        "a_even.mp4", "b_still.mkv", "c_scenes.mp4",
    }  # fmt: skip
    assert len(decoded) <= 8


def test_a_sample_says_that_it_is_one(videos, capsys):
    source = VideoFolderSource(str(videos))
    assert evenly_spaced(source, 2) == [[1, 3]] and evenly_spaced(source, None) == [[0, 1, 2, 3]]
    content = inspect(capsys, videos, "--max-episodes", "2", "--frame-gap", "5")
    assert (content["episodes"], content["episodes_looked_at"], content["episodes_read"]) == (4, 2, 1)
    assert main(["inspect", str(videos), "--max_episodes", "2", "--frame-gap", "5"]) == 0
    assert "2 of 4 episodes, evenly spaced" in capsys.readouterr().out
    assert main(["inspect", str(videos), "--max-episodes", "all"]) == 0
    assert "evenly spaced" not in capsys.readouterr().out


def test_a_file_that_is_cut_short_loses_all_that_it_announced(tmp_path, capsys):
    records = [toy_episode(number) for number in range(6)]
    folder = write_tfds_folder(tmp_path / "toy", TOY_FEATURES, [records])
    (path,) = folder.glob("*tfrecord*")
    path.write_bytes(path.read_bytes()[: len(frame_record(records[0])) + 20])
    content = inspect(capsys, folder, "--frame-gap", "1")
    assert (content["episodes"], content["episodes_read"]) == (6, 1)
    assert content["pairs"]["skipped_episodes"]["unreadable"]["episodes"] == 5


def test_damage_in_another_camera_skips_nothing(tmp_path, capsys):
    """As a training command reads it: of the cameras only the one that is asked for."""
    root = write_lerobot(tmp_path / "set", "v2.1", RECORDINGS, TASKS)
    videos = [VIDEO_PATHS["v2.1"].format(episode_chunk=0, video_key=key, episode_index=1) for key in (WRIST, TOP)]
    (root / videos[0]).unlink()
    content = inspect(capsys, root, "--frame-gap", "2")
    assert content["episodes_read"] == 5 and content["pairs"]["skipped_episodes"] == {}
    (damage,) = content["unreadable_in_other_cameras"].values()
    assert damage["episodes"] == 1 and "is listed and absent" in damage["examples"][0]
    assert content["cameras"][TOP]["formats"][0] == {"codec": "h264", "height": 64, "width": 96, "episodes": 5}
    content = inspect(capsys, root, "--frame-gap", "2", "--camera", WRIST)
    assert content["episodes_read"] == 4 and content["pairs"]["skipped_episodes"]["unreadable"]["episodes"] == 1
    # A video that opens and has too few frames is found without decoding it.
    (root / videos[1]).write_bytes(encode_video(moving_frames(3)))
    content = inspect(capsys, root, "--frame-gap", "2")
    assert "has no frame at" in content["pairs"]["skipped_episodes"]["unreadable"]["examples"][0]


def test_frames_without_times(tmp_path, capsys):
    clip = tmp_path / "clips" / "clip"
    clip.mkdir(parents=True)
    for number, frame in enumerate(moving_frames(6)):
        Image.fromarray(frame).save(clip / f"img_{number:05d}.png")
    content = inspect(capsys, tmp_path / "clips")
    assert content["pairs"]["count"] is None and "--frequency" in content["pairs"]["unknown_because"]
    assert content["hours"] is None and content["frequency"]["episodes_without_times"] == 1
    (tmp_path / "clips" / "other").mkdir()
    (tmp_path / "clips" / "other" / "0.png").write_text("no image")
    (tmp_path / "clips" / "third").mkdir()
    (tmp_path / "clips" / "third" / "0.png").symlink_to("nowhere")
    content = inspect(capsys, tmp_path / "clips", "--frequency", "2", "--frame-gap-seconds", "1")
    damaged, absent = content["pairs"]["skipped_episodes"]["unreadable"]["examples"]
    assert "other/0.png is no readable image" in damaged and "third/0.png cannot be opened: No such file" in absent
    assert content["pairs"]["gap_frames"] == {"2": 4} and content["hours"] == pytest.approx(3 / 3600)
    assert content["pairs"]["gap_hundredths_of_a_second"] == {"100": 4}


def test_a_mixture_and_what_is_written(videos, tmp_path, capsys):
    """The page shows what the text says; pictures of an earlier run do not stay."""
    (tmp_path / "mixture.yaml").write_text(
        f"- {{path: {videos}, weight: 3, frame_gap: 5}}\n- {{path: {videos / 'a_even.mp4'}, frame_gap_seconds: 1.0}}\n"
    )
    out = tmp_path / "out"
    assert main(["inspect", str(tmp_path / "mixture.yaml"), "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert "weight 3: 75.0% of the pairs" in captured.out and "25.0%" in captured.out
    assert captured.err.endswith("inspection.html, inspection.json, pairs.png\n")
    first, second = json.loads((out / "inspection.json").read_text())
    assert (first["pairs"]["frame_gap"], second["pairs"]["count"]) == (5, 20)
    assert (second["gap_is_default"], second["default_frame_gap_seconds"]) == (False, 2.4)
    assert "1 s apart (2.4 s is the default)" in captured.out
    page = (out / "inspection.html").read_text()
    assert "d_cut.mp4 is cut short" in page and 'src="pairs.png"' in page
    sheet = (out / "pairs.png").read_bytes()
    assert Image.open(out / "pairs.png").width > 6 * TILE_SIZE
    assert main(["inspect", str(tmp_path / "mixture.yaml"), "--output", str(out)]) == 0
    assert (out / "pairs.png").read_bytes() == sheet
    assert main(["inspect", str(videos), "--num-pairs", "0", "--output", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["inspection.html", "inspection.json"]
    capsys.readouterr()
    (tmp_path / "mixture.yaml").write_text(f"- {videos}\n- nowhere\n")
    assert "source 2 of the mixture" in refused(capsys, tmp_path / "mixture.yaml")


def test_a_published_mixture(tmp_path, capsys):
    """The data sets of Open X-Embodiment that are there; those that are not are a warning where they may be missing."""
    (tmp_path / "bridge_dataset").mkdir()
    (tmp_path / "bridge_dataset" / "1.0.0").symlink_to(shared_path(BRIDGE))
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text("- {open_x: magic_soup_plus, path: ., allow_missing: true, camera: secondary}\n")
    content = inspect(capsys, mixture)
    assert (content["weight"], content["pairs"]["camera"], content["pairs"]["count"]) == (1.0, "image_1", 175)
    assert any("are left out, which" in warning for warning in content["warnings"])
    mixture.write_text("- {open_x: magic_soup_plus, path: .}\n")
    assert "source 1 of the mixture" in refused(capsys, mixture)


def test_a_page_shows_names_as_text(tmp_path, capsys):
    (tmp_path / "<b>clips").mkdir()
    (tmp_path / "<b>clips" / "a.mp4").write_bytes(encode_video(moving_frames(3)))
    assert main(["inspect", str(tmp_path / "<b>clips"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "inspection.html").read_text()
    assert "&lt;b&gt;clips" in page and "<b>" not in page


def test_published_rows(tmp_path, capsys):
    rows = [
        {"vision": [1, 2, 3], "instruction": "push", "delta": ["5", "5"], "fields": "[instruction],[vision],delta"},
        {"vision": [1, 2, 9], "instruction": "push", "delta": ["5", "1"], "fields": "[instruction],[vision],delta"},
        {"vision": [1, 2, 3], "instruction": "pull"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A `.json` file may be a mixture or rows: what is in it tells.
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        content = inspect(capsys, tmp_path / name)
        assert (content["kind"], content["rows"]) == ("published latent rows", 2)
        assert content["instructions"]["most_common"] == [{"text": "push", "rows": 2}]
        codes = content["latent_action_codes"]
        assert codes["codes_per_row"] == {"2": 2} and codes["distinct_sequences"] == 2
        assert codes["most_common"] == [{"code": 5, "share": 0.75}, {"code": 1, "share": 0.25}]
        assert codes["perplexity"] == pytest.approx(4 / 3**0.75)
        assert content["vision_codes"]["max"] == 9
        assert content["unreadable"]["unreadable"]["episodes"] == 1
        assert "`delta` is missing" in content["unreadable"]["unreadable"]["examples"][0]
    assert "row 3" in refused(capsys, tmp_path / "rows.json", "--on-error", "raise")
    assert "`frame_gap` is about data sets of episodes" in refused(capsys, tmp_path / "rows.jsonl", "--frame-gap", "2")
    assert "does not exist" in refused(capsys, tmp_path / "none.jsonl")
    actions = [{"image": "a.jpg", "instruction": "push", "raw_actions": [0.5, number]} for number in (1, 2)]
    (tmp_path / "actions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in actions))
    first, second = inspect(capsys, tmp_path / "actions.jsonl")["action"]["dimensions"]
    assert first["constant"] and (second["min"], second["q50"], second["max"]) == (1.0, 1.5, 2.0)


def test_a_folder_of_labels(tmp_path, capsys):
    """Pairs on the sheet are a labelled step and the one of the same episode that its offset leads to."""
    folder, frames = tmp_path / "labels", moving_frames(4)
    settings = label_settings(4, row_group_rows=8)
    write_label_folder(folder, {0: label_rows()}, settings)
    (folder / "data" / "labels-00001-of-00004.parquet").write_bytes(b"PAR1 cut")
    # None of the names that units have.
    shutil.copy(folder / "data" / "labels-00000-of-00004.parquet", folder / "labels-00002-of-00004.parquet")
    shutil.copy(folder / "data" / "labels-00000-of-00004.parquet", folder / "data" / "labels-copy.parquet")
    assert main(["inspect", str(folder), "--output", str(tmp_path / "out"), "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)
    assert (content["kind"], content["rows"], content["episodes"], content["files"]) == ("labels", 8, 2, 2)
    assert content["made_with"] == asdict(settings)
    assert content["warnings"] == [
        "labelling is not complete; this goes on with it: lapa label --again", "2 of 4 files are absent",
    ]  # fmt: skip
    assert content["instructions"]["rows_without"] == 4
    assert content["latent_action_codes"]["most_common"][0] == {"code": 7, "share": 0.5}
    assert content["action"]["dimensions"][0]["constant"] and content["embodiment"] == {"widowx": 8}
    assert "labels-00001-of-00004.parquet" in content["unreadable"]["unreadable"]["examples"][0]
    found = inspect_labels(str(folder), InspectOptions())
    assert [(tile.episode_id, tile.steps, tile.notes) for tile in found.tiles] == [
        (episode, (step, step + 2), (f"codes {step} 7",)) for episode in ("a", "b") for step in (0, 1)
    ]
    assert np.array_equal(found.tiles[1].frames, make_tile(frames[1], frames[3], "", (1, 3)).frames)
    assert (tmp_path / "out" / "pairs.png").is_file()
    assert "labels-00001-of-00004.parquet" in refused(capsys, folder, "--on-error", "raise")


def test_a_folder_of_labels_behind_a_url(tmp_path, capsys):
    write_label_folder(tmp_path / "labels", {0: label_rows()}, label_settings(1))
    here = inspect(capsys, tmp_path / "labels")
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "labels"), "/published", recursive=True)
    try:
        there = inspect(capsys, "memory://published")
    finally:
        system.rm("/published", recursive=True)
    assert there | {"path": "", "name": ""} == here | {"path": "", "name": ""} and there["rows"] == 8


def test_a_listing_that_is_damaged_is_a_warning(tmp_path, capsys):
    write_label_folder(tmp_path / "labels", {0: label_rows()}, label_settings(1))
    (tmp_path / "labels" / "labels.json").write_text("{")
    content = inspect(capsys, tmp_path / "labels")
    assert content["rows"] == 8 and content["made_with"] == {} and "labels.json is damaged" in content["warnings"][0]


def test_rows_of_labels_are_counted_in_bounded_memory(monkeypatch, capsys):
    """However many there are: values beyond a number of different ones are counted together."""
    monkeypatch.setattr(inspection_rows, "MAX_DISTINCT", 3)
    totals = RowTotals()
    for episode in range(100):
        codes = [[episode % 5, 7], [1, 7]]
        totals.add_columns(
            {
                "episode_id": [str(episode)] * 2,
                "source": [f"set {episode}"] * 2,
                "instruction": [f"push {episode}"] * 2,
                "latent_action_codes": codes,
                "vision_codes": [[episode] * 16] * 2,
            },
            2,
        )
    kept = (totals.instructions.counts, totals.latent.sequences.counts, totals.vision.codes.counts)
    assert [len(counts) for counts in (*kept, totals.texts["source"].counts)] == [3] * 4
    assert totals.vision.sequences is None
    content = totals.to_dict()
    assert (content["rows"], content["episodes"], content["vision_codes"]["max"]) == (200, 100, 99)
    instructions = content["instructions"]
    assert instructions["count"] == 200 and instructions["distinct"] == 3 and instructions["distinct_or_more"]
    assert "distinct_sequences" not in content["vision_codes"]
    text = to_text([Inspection({"path": "x", "kind": "labels", "name": "x", "warnings": [], **content})])
    assert "200, 3 or more different" in text and "3 or more different sequences" in text


def test_a_tile_shows_both_frames_and_what_changed():
    first = np.zeros((4, 8, 3), np.uint8)
    second = first.copy()
    second[:2] = (10, 200, 0)
    tile = make_tile(first, second, "clip", (3, 5), 0.4)
    assert tile.frames.shape == (2, TILE_SIZE // 2, TILE_SIZE, 3) and tile.size == (4, 8)
    assert tile.caption == "steps 3 > 5   0.40 s"
    change = difference(tile.frames)
    assert change[0, 0].tolist() == [20, 255, 0] and not change[-1].any()
    sheet = np.asarray(draw_sheet([Section("name", "line", [tile]), Section("none", "no pairs", [])]))
    assert (sheet == (20, 255, 0)).all(axis=2).sum() == TILE_SIZE * TILE_SIZE // 4


def test_quantiles_in_bounded_memory():
    """Range and constants are exact however many rows come; quantiles are those of every second row, and so on."""
    summary = NumberSummary(["rising", "same", "noise"])
    count = 3 * MAX_ROWS
    noise = np.random.default_rng(0).normal(size=count)
    rows = np.stack([np.arange(count), np.full(count, 2.0), noise], axis=1).astype(np.float32)
    rows[5] = np.nan
    for start in range(0, count, 10_007):
        assert summary.add(rows[start : start + 10_007])
    assert not summary.add(np.zeros((2, 4), np.float32))
    assert summary.num_rows == count and summary.num_not_finite == 1 and summary.stride == 4
    rising, same, spread = summary.to_list()
    assert (rising["min"], rising["max"], rising["q50"]) == (0, count - 1, pytest.approx(count / 2, rel=1e-3))
    assert same["constant"] and (same["min"], same["q01"], same["max"]) == (2.0, 2.0, 2.0)
    assert spread["q99"] == pytest.approx(np.quantile(noise, 0.99), abs=0.02) and not spread["constant"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--camera", "left"], "('left',) is unknown"),
        (["--frame-gap", "1", "--frame-gap-seconds", "1"], "exclude each other"),
        (["--max-episodes", "0"], "`max_episodes` must be at least 1"),
        (["--max-episodes", "few"], "must be a number or `all`, got 'few'"),
        (["--num-pairs", "-1"], "`num_pairs` must be at least 0"),
        (["--filters", "blurred"], "`filters` must hold some of static, shot_cut, blank"),
        (["--kind", "films"], "`kind` must be one of rlds, lerobot"),
        (["--frequency", "3"], "`frequency` is no option"),
        (["--output", "{videos}/a_even.mp4"], "`--output` is a file"),
        (["--split", "test"], "`split` 'test' is no folder"),
        (["--frame-gaps", "1"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments, message, videos, capsys):
    assert message in refused(capsys, videos, *(text.format(videos=videos) for text in arguments))
