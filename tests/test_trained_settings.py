"""What a training records, and what is taken up where data are paired again."""

import json

import pytest
from label_processes import make_clips
from shared_files import shared_path
from tiny_models import TINY_QUANTIZER
from video_files import encode_video, moving_frames

from lapa.data.mixture import FramePairStream
from lapa.training import scripts
from lapa.training.script_arguments import LabelArguments, QuantizerArguments
from lapa.training.trained_settings import open_as_trained, read_training_settings, training_settings

NAMES = ("frame_gap", "frame_gap_seconds", "frequency", "camera", "different")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_clips(folder / "clips", 2, 6)
    make_clips(folder / "more", 2, 6)
    (folder / "videos").mkdir()
    (folder / "videos" / "clip.mp4").write_bytes(encode_video(moving_frames(6)))
    return folder


def recorded(data, **options):
    arguments = QuantizerArguments(data=str(data), **options)
    settings = training_settings(arguments, FramePairStream(arguments.open_sources(), 8))
    return [settings[name] for name in NAMES]


def opened(data, settings, **options):
    sources, notes = open_as_trained(LabelArguments(model="", output="", data=str(data), **options), settings)
    return [
        (source.gap.frames, source.gap.seconds, source.source.options.get("frequency")) for source in sources
    ], notes


def mixture(folder, name, *lines):
    (folder / name).write_text("".join(f"- {line}\n" for line in lines))
    return folder / name


def test_what_was_used_is_recorded(place):
    # A default of the data set, too.
    assert recorded(place / "clips", frequency=5.0) == [None, 2.4, 5.0, "video", []]
    assert recorded(place / "clips", frame_gap=2) == [2, None, None, "video", []]
    same = mixture(
        place,
        "same.yaml",
        "{path: clips, frame_gap_seconds: 1.2, frequency: 5}",
        "{path: more, frame_gap_seconds: 1.2, frequency: 5}",
    )
    assert recorded(same) == [None, 1.2, 5, "video", []]
    other = mixture(
        place, "other.yaml", "{path: clips, frame_gap: 2}", "{path: more, frame_gap_seconds: 1.2, frequency: 5}"
    )
    assert recorded(other) == [None, None, None, "video", ["gap", "frequency"]]
    bridge = str(shared_path("data/bridge_rlds/1.0.0"))
    assert recorded(bridge) == [None, 0.6, None, "image_0", []]
    cameras = mixture(place, "cameras.yaml", bridge, f"{{path: {bridge}, camera: image_1}}")
    assert recorded(cameras) == [None, 0.6, None, None, ["camera"]]
    roles = mixture(place, "roles.yaml", bridge, str(place / "clips"))
    assert recorded(roles, frame_gap=1)[3:] == [None, ["camera"]]


def test_each_option_is_taken_where_it_fits(place):
    """A frequency that videos do not take costs a robot neither its camera nor the frame folders their frequency."""
    bridge = str(shared_path("data/bridge_rlds/1.0.0"))
    settings = {"frame_gap_seconds": 1.2, "frequency": 5.0, "camera": "image_1"}
    data = mixture(place, "all.yaml", "clips", "videos", bridge)
    found, notes = opened(data, settings)
    assert found == [(None, 1.2, 5.0), (None, 1.2, None), (None, 1.2, 5.0)]
    assert len(notes) == 3 and "frequency 5.0" in notes[1]
    assert "camera image_1" in notes[0] and "camera image_1" in notes[2]
    (robot,), notes = open_as_trained(
        LabelArguments(model="", output="", data=bridge), {**settings, "camera": "primary"}
    )
    assert robot.chosen_camera == "image_0" and notes == []
    (robot,), notes = open_as_trained(LabelArguments(model="", output="", data=bridge), settings)
    assert robot.chosen_camera == "image_1" and notes == []
    # What is said wins, in whichever unit; an error of it is not taken for something that does not fit.
    assert opened(place / "clips", settings, frame_gap=3, frequency=10.0)[0] == [(3, None, 10.0)]
    with pytest.raises(ValueError, match="`frequency` must be positive, got -1"):
        opened(place / "clips", settings, frequency=-1.0)
    with pytest.raises(ValueError, match="source 1 of the mixture .*must name its `path`"):
        opened(mixture(place, "none.yaml", "{kind: frames}"), settings)


def test_what_differed_is_said(place):
    found, notes = opened(place / "videos", {"frame_gap": None, "different": ["gap", "frequency"]})
    assert found == [(None, 2.4, None)]
    assert notes == ["the quantizer was trained with several gaps; videos is paired by its own, 2.4 s"]
    assert opened(place / "videos", {"different": ["gap"]}, frame_gap=2) == ([(2, None, None)], [])
    (note,) = opened(place / "clips", {"frame_gap": 2, "different": ["frequency"]})[1]
    assert "several frequencies" in note
    # Settings of before this was recorded.
    assert opened(place / "videos", {"frame_gap": None}) == ([(None, 2.4, None)], [])


def test_settings_stand_beside_the_quantizer_from_its_first_step_on(place, tmp_path, monkeypatch):
    from lapa.training.quantizer_trainer import LapaQuantizerTrainer

    def stop(*arguments, **more):
        raise ValueError("stopped")

    monkeypatch.setattr(LapaQuantizerTrainer, "training_step", stop)
    command = ["--data", str(place / "clips"), "--frequency", "1.25", "--output_dir", str(tmp_path / "q"), "--use_cpu"]
    sizes = ["--quantizer_config", json.dumps(TINY_QUANTIZER), "--report_to", "none", "--max_steps", "1"]
    assert scripts.train_quantizer([*command, *sizes]) == 2
    settings = read_training_settings(str(tmp_path / "q"))
    assert (settings["frame_gap_seconds"], settings["frequency"]) == (2.4, 1.25)
    assert read_training_settings(str(tmp_path)) == {}
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "training_settings.json").write_text(content)
        with pytest.raises(ValueError, match=r"training_settings.json is damaged"):
            read_training_settings(str(tmp_path))
