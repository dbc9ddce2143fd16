"""Frames of videos: the same as decoding from start to end, in time, and upright."""

import io
import pickle
import random
from dataclasses import replace

import av
import fsspec
import numpy as np
import pytest
from shared_files import shared_path
from video_files import FRAME_RATE, VIDEOS, X264, decode_whole, encode_video, moving_frames

from lapa.data import video_stream
from lapa.data.av1_references import Av1References, UnfollowedError
from lapa.data.schema import ReadError
from lapa.data.video import VideoFrames
from lapa.data.video_index import VideoIndex

NUM_FRAMES = 72


@pytest.fixture(scope="module", params=VIDEOS)
def video(request) -> tuple[bytes, list[np.ndarray], np.ndarray]:
    """A video, all of its frames and their times."""
    codec, container, options = VIDEOS[request.param]
    fragments = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in request.param else None
    frames = moving_frames(NUM_FRAMES)
    # Frames are shown 1 to 3 thirtieths of a second apart.
    times = np.cumsum(np.random.default_rng(1).integers(1, 4, NUM_FRAMES)).tolist()
    content = encode_video(
        frames, codec, container, options, container_options=fragments, times=None if container == "avi" else times
    )
    return content, *decode_whole(content)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        assert one.dtype == np.uint8
        assert one.flags.c_contiguous
        np.testing.assert_array_equal(one, other)


def test_frames_are_those_of_decoding_from_start_to_end(video, request, monkeypatch):
    content, whole, _ = video
    frames = VideoFrames(content)
    if not frames.index.counted and "intra refresh" not in request.node.callspec.id:
        # And they are got at without decoding the whole.
        monkeypatch.setattr(video_stream.OpenVideo, "decode_all", lambda self: pytest.fail("decodes from the start"))
    assert len(frames) == len(whole) == NUM_FRAMES
    assert_same(frames.read(range(NUM_FRAMES)), whole)
    draw = random.Random(0)
    for count in (1, 1, 1, 2, 2, 4, 7):
        steps = [draw.randrange(NUM_FRAMES) for _ in range(count)]
        assert_same(frames.read(steps), [whole[step] for step in steps])
    assert_same([frames[-1]], whole[-1:])
    assert_same(frames[10:14], whole[10:14])


def test_times_are_those_of_the_container(video, request):
    content, _, times = video
    frames = VideoFrames(content)
    assert frames.timestamps.dtype == np.float64
    np.testing.assert_allclose(frames.timestamps, times, atol=1e-9)
    assert frames.index.counted == ("reordered" in request.node.callspec.id)
    if not frames.index.counted and "avi" not in request.node.callspec.id:
        assert len(set(np.diff(frames.timestamps).round(3))) > 2, "no variable frame rate in this test"


def test_a_range_has_the_frames_in_it(video):
    content, whole, times = video
    start, stop = float(times[31]), float(times[50])
    frames = VideoFrames(content, start=start, stop=stop)
    # Half an average interval of tolerance may take in a neighbour where the frame rate varies.
    first = int(np.flatnonzero([np.array_equal(frame, frames[0]) for frame in whole])[0])
    assert abs(first - 31) <= 1
    assert abs(len(frames) - 19) <= 2
    assert_same(frames.read(range(len(frames))), whole[first : first + len(frames)])
    np.testing.assert_allclose(frames.timestamps, times[first : first + len(frames)] - times[first], atol=1e-9)


def test_ranges_share_out_a_video_as_lerobot_lays_episodes_end_to_end():
    content = encode_video(moving_frames(90), options={"g": "2"})
    whole, _ = decode_whole(content)
    lengths, start, collected = [17, 40, 33], 0, []
    for length in lengths:
        stop = start + length
        # Sums of rounded durations are not exact.
        drift = 0.004
        episode = VideoFrames(
            content, start=start / FRAME_RATE + drift, stop=stop / FRAME_RATE + drift, num_frames=length
        )
        assert len(episode) == length
        collected += episode.read(range(length))
        start = stop
    assert_same(collected, whole)


@pytest.mark.parametrize("skipped", [30, 45])
def test_frames_before_an_edit_list_starts_are_no_frames(skipped):
    """A copy of a part of a video starts with what its first frame is decoded from, which is not shown."""
    whole_content = encode_video(moving_frames(NUM_FRAMES), options={"g": "60"})
    file = io.BytesIO()
    with av.open(io.BytesIO(whole_content)) as container, av.open(file, "w", format="mp4") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        shift = int(skipped / FRAME_RATE / stream.time_base)
        for packet in container.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                output.mux(packet)
    content = file.getvalue()
    expected = decode_whole(whole_content)[0][skipped:]
    assert_same(decode_whole(content)[0], expected)
    frames = VideoFrames(content)
    assert_same(frames.read(range(len(frames))), expected)
    np.testing.assert_allclose(frames.timestamps, np.arange(len(expected)) / FRAME_RATE, atol=1e-6)
    part = VideoFrames(content, start=10 / FRAME_RATE, stop=20 / FRAME_RATE)
    assert not part.index.counted
    assert_same(part.read(range(len(part))), expected[10:20])


def packets_of(content: bytes) -> list[bytes]:
    """Packets of the video, in the order of the file."""
    with av.open(io.BytesIO(content)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def test_only_the_groups_of_pictures_that_are_asked_for_are_decoded():
    """With the second group of three overwritten, frames of the others are still read."""
    content = encode_video(moving_frames(NUM_FRAMES), options={"g": "24"})
    whole, _ = decode_whole(content)
    frames = VideoFrames(content)
    assert len(frames) == NUM_FRAMES
    damaged = content
    for packet in packets_of(content)[24:48]:
        damaged = damaged.replace(packet, b"\xff" * len(packet))
    frames.file = damaged
    assert_same(frames.read([60, 5, 20]), [whole[60], whole[5], whole[20]])
    with pytest.raises(
        ReadError, match="the frame at .* of a video in memory cannot be decoded|in memory: the frame at"
    ):
        frames.read([30])


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2", "x264-params": X264}], ids=["in order", "reordered"])
def test_frames_that_are_patched_up_by_the_decoder_are_refused(options):
    """libav fills in what is lost of a frame from its neighbours, and says so of that frame, not of those after it."""
    content = encode_video(moving_frames(24, 192, 128), options={"g": "12", "qp": "20"} | options)
    whole, _ = decode_whole(content)
    packets = packets_of(content)
    place = VideoFrames(content).index.frames.tolist().index(4)
    damaged = bytearray(content)
    start = content.index(packets[4]) + len(packets[4]) * 2 // 3
    damaged[start : start + 4] = b"\xff" * 4
    concealed, _ = decode_whole(bytes(damaged))
    assert len(concealed) == 24, "libav gives a frame"
    differ = [step for step in range(24) if not np.array_equal(concealed[step], whole[step])]
    assert place in differ
    assert {place + 1, 11} <= set(differ)
    frames = VideoFrames(bytes(damaged))
    for step in range(24):
        if step in differ:
            with pytest.raises(ReadError, match=r"in memory: the frame at 0\.\d+ s is damaged"):
                frames.read([step])
        elif step in (0, 12, 23):
            assert_same(frames.read([step]), [whole[step]])
    assert_same(frames.read([23, 0]), [whole[23], whole[0]])


def test_packets_that_show_nothing_are_no_frames():
    """VP8's alternate references: a packet whose frame is decoded and not shown."""
    codec, container, options = VIDEOS["vp8"]
    content = encode_video(moving_frames(20), codec, container, options)
    packet = packets_of(content)[7]
    content = content.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:])
    whole, times = decode_whole(content)
    assert len(whole) == 19
    frames = VideoFrames(content)
    np.testing.assert_allclose(frames.timestamps, times, atol=1e-9)
    assert_same(frames.read(range(19)), whole)


def test_what_a_frame_is_decoded_from():
    """Packets 3 and 4 are the leading pictures of an open GOP: in the file after the keyframe 2, in time before it."""
    index = VideoIndex(np.array([0, 1, 4, 2, 3, 5, 6, 7]), np.array([0, 2, 6]), np.arange(8), np.arange(8.0))
    assert [index.keyframe_before(position) for position in range(8)] == [0, 0, 1, 0, 0, 1, 2, 2]
    assert index.runs([0, 1, 4, 5]) == [[0, 1, 4, 5]]
    assert index.runs([0, 5, 7]) == [[0], [5, 7]]
    assert index.runs([0, 7]) == [[0], [7]]


def test_unreferenced_frames_of_hevc_are_left_out_only_without_layers():
    extradata = {}
    for name in ("hevc open GOP", "hevc layers"):
        codec, container, options = VIDEOS[name]
        with av.open(io.BytesIO(encode_video(moving_frames(5), codec, container, options))) as video:
            extradata[name] = video.streams.video[0].codec_context.extradata
    assert video_stream._skips_unreferenced("hevc", extradata["hevc open GOP"])
    assert not video_stream._skips_unreferenced("hevc", extradata["hevc layers"])
    assert not video_stream._skips_unreferenced("hevc", None)
    assert not video_stream._skips_unreferenced("vp9", None)


def test_frames_that_nothing_refers_to_are_not_decoded(monkeypatch):
    """In a stream of every second frame unreferenced, as many are left out of what the decoder gives."""
    given = []
    decode = video_stream.OpenVideo._decode
    monkeypatch.setattr(
        video_stream.OpenVideo, "_decode", lambda self, packet: given.extend(out := decode(self, packet)) or out
    )
    options = {"g": "250", "x264-params": f"{X264}:bframes=1:keyint=250"}
    content = encode_video(moving_frames(NUM_FRAMES), options=options)
    frames = VideoFrames(content)
    frames.read([NUM_FRAMES - 2])
    assert len(given) < 0.6 * NUM_FRAMES


def test_of_av1_only_what_a_frame_refers_to_is_decoded(monkeypatch):
    codec, container, options = VIDEOS["av1 pyramid"]
    content = encode_video(moving_frames(NUM_FRAMES), codec, container, options)
    whole, _ = decode_whole(content)
    frames = VideoFrames(content)
    sources = frames.index.sources
    assert sources[0] == ()
    assert all(sources[1:]), "only the first is decoded from nothing"
    assert all(source < position for position, packet in enumerate(sources) for source in packet)
    sent = []
    decode = video_stream.OpenVideo._decode
    monkeypatch.setattr(
        video_stream.OpenVideo, "_decode", lambda self, packet: sent.append(packet) or decode(self, packet)
    )
    assert_same(frames.read([NUM_FRAMES - 3]), [whole[NUM_FRAMES - 3]])
    assert len(sent) < NUM_FRAMES / 4


def test_av1_that_cannot_be_followed_is_decoded_in_order():
    """Headers that are cut, or say nothing of the stream, or name a frame that was not seen, are not guessed at."""
    codec, container, options = VIDEOS["av1"]
    content = encode_video(moving_frames(8), codec, container, options)
    with av.open(io.BytesIO(content)) as video:
        extradata = video.streams.video[0].codec_context.extradata
    first, second, *_ = packets_of(content)
    followed = Av1References(extradata)
    assert [followed.add(0, memoryview(first)), followed.add(1, memoryview(second))] == [(), (0,)]
    with pytest.raises(UnfollowedError, match="before the start"):
        Av1References(extradata).add(0, memoryview(second))
    with pytest.raises(UnfollowedError, match="before any sequence header"):
        Av1References(None).add(0, memoryview(second))
    for packet in (first[:20], b"\x16\xff\xff", b"\x0c", first[:3] + b"\xff" * 9):
        references = Av1References(extradata)
        with pytest.raises(UnfollowedError):
            references.add(0, memoryview(packet))
            references.add(1, memoryview(second))
    frames = VideoFrames(content)
    frames._index = replace(frames.index, sources=None)
    assert_same(frames.read([6]), decode_whole(content)[0][6:7])


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda frame: frame),
        ((0, -1, 1, 0), lambda frame: np.rot90(frame)),
        ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
        ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
        ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
        ((1, 0, 0, -1), lambda frame: frame[::-1]),
        ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda frame: np.rot90(frame.transpose(1, 0, 2), 2)),
    ],
)
def test_frames_are_turned_upright(matrix, turn):
    content = encode_video(moving_frames(4), matrix=matrix)
    whole, _ = decode_whole(content)
    assert_same(VideoFrames(content).read([2]), [turn(whole[2])])
    # The point (x, y) of the frame is shown at (a x + c y, b x + d y), moved to where both are positive.
    a, b, c, d = matrix
    x, y = 70, 20
    columns, rows = a * x + c * y, b * x + d * y
    columns += (95 if a < 0 else 0) + (63 if c < 0 else 0)
    rows += (95 if b < 0 else 0) + (63 if d < 0 else 0)
    np.testing.assert_array_equal(VideoFrames(content).read([2])[0][rows, columns], whole[2][y, x])


def test_other_turns_are_refused():
    content = encode_video(moving_frames(2), matrix=(1, 1, -1, 1))
    with pytest.raises(ReadError, match=r"frame 1 \(0.033 s\) .* is to be shown turned by no multiple of 90 degrees"):
        VideoFrames(content).read([1])


def test_real_video_in_every_format(tmp_path):
    """A person handling a pan, re-encoded: frames and times agree within what the codecs lose."""
    path = shared_path("data/human_video/flipping_a_pancake.mkv")
    original = VideoFrames(str(path))
    assert len(original) >= 300
    assert original.timestamps[-1] == pytest.approx((len(original) - 1) / 30, abs=0.05)
    frames = original.read(range(60))
    pair = (7, 55)
    for codec, container in (("libx264", "mp4"), ("libsvtav1", "mp4"), ("libvpx-vp9", "webm"), ("libx265", "mov")):
        options = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {"preset": "12"}
        options = {"preset": "ultrafast"} if codec.startswith("libx26") else options
        copy = VideoFrames(encode_video(frames, codec, container, options))
        np.testing.assert_allclose(copy.timestamps, np.arange(60) / FRAME_RATE, atol=1e-3)
        for step, frame in zip(pair, copy.read(pair)):
            error = np.abs(frame.astype(int) - frames[step]).mean()
            assert error < 6, f"{codec}: mean difference {error}"


def test_bytes_paths_and_urls_give_the_same(tmp_path, monkeypatch):
    content = encode_video(moving_frames(12))
    # What looks like a protocol in a name, or a list of files, is a name.
    path = tmp_path / "concat:a|b, with blanks.mp4"
    path.write_bytes(content)
    with fsspec.open("memory://clips/one.mp4", "wb") as file:
        file.write(content)
    expected = VideoFrames(content).read([3, 9])
    monkeypatch.chdir(tmp_path)
    for source in (str(path), path.name, "memory://clips/one.mp4"):
        assert_same(VideoFrames(source).read([3, 9]), expected)
    assert_same(VideoFrames(content, thread_count=2).read([3, 9]), expected)


def test_a_pickle_carries_the_index_and_no_open_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(moving_frames(12)))
    frames = VideoFrames(str(path))
    expected = frames.read([5])
    copy = pickle.loads(pickle.dumps(frames))
    path.rename(tmp_path / "elsewhere.mp4")
    assert len(copy) == 12
    np.testing.assert_array_equal(copy.timestamps, frames.timestamps)
    with pytest.raises(ReadError, match=r"clip\.mp4 cannot be read as video: No such file"):
        copy.read([5])
    (tmp_path / "elsewhere.mp4").rename(path)
    assert_same(copy.read([5]), expected)


def test_nothing_is_opened_before_it_is_needed():
    frames = VideoFrames("/no/such/file.mp4", num_frames=7)
    assert len(frames) == 7
    assert frames.read([]) == []
    with pytest.raises(ReadError, match="/no/such/file.mp4"):
        frames.read([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": -1.0}, "`start` must be at least 0 seconds, got -1.0"),
        ({"start": 2.0, "stop": 2.0}, "`stop` must lie after `start` (2 s), got 2.0"),
        ({"num_frames": 0}, "`num_frames` must be at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        VideoFrames("clip.mp4", **arguments)
    assert message in str(error.value)
