"""The same clip, kept in every format there is a reader for, gives the same pairs: their steps, times and frames."""

import io
import json
import tarfile

import numpy as np
import pytest
from lerobot_files import Recording, write_lerobot
from PIL import Image
from shared_files import shared_path
from tfds_files import IMAGE, TEXT, encode_episode, write_tfds_folder
from video_files import encode_video

from lapa.data.folders import VideoFolderSource
from lapa.data.frame_pairs import FrameGap, episode_frame_pairs
from lapa.data.open_source import open_source
from lapa.data.read_counts import PairCounts

RATE, NUM_FRAMES, INSTRUCTION = 30, 90, "flipping a pancake"
# Most grey levels that a frame may be off on average; half of it is what storing colours at half the size costs.
CODEC_ERROR = 4.0
# The number of a frame stands in it, a block a bit: no codec changes that.
NUMBER_BITS, BLOCK = 8, 16
WEBM = ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "0"})
MP4 = ("libx264", "mp4", {"preset": "ultrafast", "crf": "10"})


@pytest.fixture(scope="module")
def frames():
    """Part of a real clip, (height, width, 3) uint8 each, made smaller."""
    (episode,) = VideoFolderSource(str(shared_path("data/human_video/flipping_a_pancake.mkv")))
    wanted = episode.read_frames("video", range(NUM_FRAMES))
    small = [np.array(Image.fromarray(frame).resize((160, 128))) for frame in wanted]
    for number, frame in enumerate(small):
        for bit in range(NUMBER_BITS):
            frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return small


def number_in(frame):
    """Which of the frames it is."""
    blocks = frame[:BLOCK, : NUMBER_BITS * BLOCK].reshape(BLOCK, NUMBER_BITS, BLOCK, 3)
    return int((blocks.mean((0, 2, 3)) > 127) @ (1 << np.arange(NUMBER_BITS)))


def as_rlds(root, frames):
    features = {"steps": {"action": ("float32", 2), "language_instruction": TEXT, "observation": {"camera": IMAGE}}}
    steps = {
        "action": np.zeros((len(frames), 2), np.float32),
        "language_instruction": [INSTRUCTION] * len(frames),
        "observation": {"camera": frames},
    }
    write_tfds_folder(root / "toy" / "1.0.0", features, [[encode_episode({"steps": steps})]])
    return {"path": root / "toy", "frequency": RATE}


def as_lerobot(version, stored=False, codec="h264"):
    def write(root, frames):
        camera = "observation.images.top"
        recording = Recording({camera: frames}, {"action": np.zeros((len(frames), 2), np.float32)}, [0] * len(frames))
        # An episode before it, so that it does not stand at the start of a v3.0 file.
        other = Recording({camera: frames[:7]}, {"action": np.zeros((7, 2), np.float32)}, [0] * 7)
        write_lerobot(root, version, [other, recording], [INSTRUCTION], codec=codec, stored=[camera] if stored else ())
        return {"path": root}

    return write


def as_video(name, codec, container, options):
    def write(root, frames):
        (root / name).write_bytes(encode_video(frames, codec, container, options, rate=RATE))
        (root / "captions.json").write_text(json.dumps({name: INSTRUCTION}))
        return {"path": root}

    return write


def as_frames(ending):
    def write(root, frames):
        folder = root / "clip"
        folder.mkdir()
        for number, frame in enumerate(frames):
            # Numbers without leading zeros, and not from 0.
            Image.fromarray(frame).save(folder / f"img_{number + 5}.{ending}", quality=95)
        (root / "clip.txt").write_text(INSTRUCTION)
        return {"path": root, "frequency": RATE}

    return write


def write_labels(root):
    labels = [{"id": "7", "label": INSTRUCTION, "template": "flipping [something]", "placeholders": ["a pancake"]}]
    (root / "something-something-v2-train.json").write_text(json.dumps(labels))


def as_something_folder(root, frames):
    (root / "20bn-something-something-v2").mkdir()
    (root / "20bn-something-something-v2" / "7.webm").write_bytes(encode_video(frames, *WEBM, rate=RATE))
    write_labels(root)
    return {"path": root}


def as_something_tar(mode, name):
    def write(root, frames):
        video = encode_video(frames, *WEBM, rate=RATE)
        with tarfile.open(root / name, mode) as archive:
            member = tarfile.TarInfo("7.webm")
            member.size = len(video)
            archive.addfile(member, io.BytesIO(video))
        write_labels(root)
        return {"path": root, "kind": "something_something"}

    return write


# How the clip is kept, and whether nothing is lost by it.
FORMATS = {
    "rlds": (as_rlds, True),
    "lerobot v2.1, images": (as_lerobot("v2.1", stored=True), True),
    "lerobot v3.0, images": (as_lerobot("v3.0", stored=True), True),
    "lerobot v2.1, h264": (as_lerobot("v2.1"), False),
    "lerobot v3.0, h264": (as_lerobot("v3.0"), False),
    "lerobot v3.0, av1": (as_lerobot("v3.0", codec="av1"), False),
    "frames, png": (as_frames("png"), True),
    "frames, bmp": (as_frames("bmp"), True),
    "frames, jpg": (as_frames("jpg"), False),
    "mp4, h264": (as_video("clip.mp4", *MP4), False),
    "mkv, h264": (as_video("clip.mkv", MP4[0], "matroska", MP4[2]), False),
    "mkv, ffv1": (as_video("clip.mkv", "ffv1", "matroska", {}), False),
    "avi, mpeg4": (as_video("clip.avi", "mpeg4", "avi", {"qmin": "1", "qmax": "2"}), False),
    "webm, vp9": (as_video("clip.webm", *WEBM), False),
    "something-something v2, folder": (as_something_folder, False),
    "something-something v2, tar": (as_something_tar("w", "train-000.tar"), False),
    "something-something v2, archive part": (as_something_tar("w:gz", "20bn-something-something-v2-00"), False),
}


def all_pairs(spec, gap):
    """The pairs of the last episode of a source, what was counted, and the episode."""
    source = open_source(spec)
    *_, episode = source
    counts = PairCounts()
    pairs = list(episode_frame_pairs(episode, source.cameras[0], gap, counts=counts))
    return pairs, counts, episode


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_clip_gives_the_same_pairs(name, frames, tmp_path):
    write, is_lossless = FORMATS[name]
    gap = FrameGap(seconds=0.6)
    pairs, counts, episode = all_pairs(write(tmp_path, frames), gap)
    assert episode.num_steps == NUM_FRAMES and episode.instructions == (INSTRUCTION,)
    np.testing.assert_allclose(episode.timestamps, np.arange(NUM_FRAMES) / RATE, atol=1.1e-3)
    # 0.6 s at 30 Hz.
    assert [pair.steps for pair in pairs] == [(step, step + 18) for step in range(NUM_FRAMES - 18)]
    np.testing.assert_allclose([pair.seconds for pair in pairs], 0.6, atol=2.1e-3)
    assert counts.items == len(pairs) == 72 and not counts.dropped_items and not counts.skipped_groups
    assert counts.gaps.frames == {18: 72}
    for pair in pairs:
        expected = np.stack([frames[step] for step in pair.steps])
        assert tuple(map(number_in, pair.frames)) == pair.steps
        if is_lossless:
            np.testing.assert_array_equal(pair.frames, expected)
        else:
            error = np.abs(pair.frames.astype(int) - expected).mean()
            assert error < CODEC_ERROR, f"steps {pair.steps}: {error:.2f} grey levels off"


def test_a_gap_in_frames_gives_the_pairs_of_the_gap_in_seconds(frames, tmp_path):
    spec = as_video("clip.mp4", *MP4)(tmp_path, frames)
    by_time, _, _ = all_pairs(spec, FrameGap(seconds=0.6))
    by_frames, _, _ = all_pairs(spec, FrameGap(frames=18))
    assert [pair.steps for pair in by_time] == [pair.steps for pair in by_frames]
    assert all(np.array_equal(one.frames, other.frames) for one, other in zip(by_time, by_frames))


@pytest.mark.parametrize(
    "name, kept", [("clip.mp4", MP4), ("clip.webm", WEBM), ("clip.mkv", ("libx264", "matroska", MP4[2]))]
)
def test_a_variable_frame_rate_gives_the_same_pairs_in_every_container(name, kept, frames, tmp_path):
    """Every third frame left out, and half a second missing: pairs follow the times, and each frame is its own."""
    numbers = [n for n in range(NUM_FRAMES) if n % 3 and not 40 <= n < 55]
    chosen = [frames[number] for number in numbers]
    codec, container, options = kept
    content = encode_video(chosen, codec, container, options, times=[n - numbers[0] for n in numbers], rate=RATE)
    (tmp_path / name).write_bytes(content)
    pairs, counts, episode = all_pairs({"path": tmp_path}, FrameGap(seconds=0.2))
    np.testing.assert_allclose(episode.timestamps, (np.array(numbers) - numbers[0]) / RATE, atol=1.1e-3)
    # Six frames of 30 Hz on, what is neither a third nor missing has a partner; what is missing has none.
    expected = [(n, n + 6) for n in numbers if n + 6 in numbers]
    assert [tuple(numbers[step] for step in pair.steps) for pair in pairs] == expected
    assert counts.dropped_items["no_frame_at_gap"] == sum(
        n + 6 not in numbers and n + 6 <= numbers[-1] for n in numbers
    )
    assert [tuple(map(number_in, pair.frames)) for pair in pairs] == expected
