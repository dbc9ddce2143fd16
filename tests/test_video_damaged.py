"""Videos that are cut short, damaged, or made to do harm: refused, or read as far as they are whole."""

import io
import random
import struct

import av
import numpy as np
import pytest
from video_files import VIDEOS, encode_video, moving_frames

from lapa.data import video_stream
from lapa.data.schema import ReadError
from lapa.data.video import VideoFrames
from lapa.data.video_container import check_container


def test_fewer_frames_than_announced_are_an_error():
    content = encode_video(moving_frames(12))
    assert len(VideoFrames(content, num_frames=10).read(range(10))) == 10
    with pytest.raises(ReadError, match="12 frames from 0 s, 13 expected"):
        VideoFrames(content, num_frames=13).read([0])
    with pytest.raises(ReadError, match="0 frames from 5 s"):
        len(VideoFrames(content, start=5.0))
    with pytest.raises(IndexError, match="frame 12 of 12"):
        VideoFrames(content).read([12])
    with pytest.raises(ReadError, match="1 video streams; `stream` 3"):
        len(VideoFrames(content, stream=3))


@pytest.mark.parametrize("kind", ["mp4", "mp4 index first", "matroska", "webm", "avi"])
@pytest.mark.parametrize("share", [0.03, 0.4, 0.8, 0.999])
def test_a_video_that_is_cut_short_is_an_error(kind, share, tmp_path):
    codec = "libvpx-vp9" if kind == "webm" else "mpeg4" if kind == "avi" else "libx264"
    options = {"deadline": "realtime", "cpu-used": "8"} if kind == "webm" else {}
    path = tmp_path / f"clip.{kind.split()[0]}"
    content = encode_video(moving_frames(40), codec, kind.split()[0], options)
    if "first" in kind:
        content = _index_first(content)
    path.write_bytes(content)
    assert len(VideoFrames(str(path))) == 40
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ReadError, match=str(path)) as error:
        VideoFrames(str(path)).read([0])
    assert share < 0.4 or f"bytes, it has {int(len(content) * share)}" in str(error.value)


def test_a_frame_that_is_cut_off_is_an_error():
    """The boxes agree with the file's size, its last frames lie beyond it."""
    content = _index_first(encode_video(moving_frames(40)))
    place = content.index(b"mdat") - 4
    short = bytearray(content[: (place + len(content)) // 2])
    short[place : place + 4] = (len(short) - place).to_bytes(4, "big")
    with pytest.raises(ReadError, match=r"in memory: the frame at \d.\d+ s is cut off"):
        len(VideoFrames(bytes(short)))


def _index_first(content: bytes) -> bytes:
    """An MP4 file with its index moved before the frames, as files for the web have it."""
    boxes, position = {}, 0
    while position < len(content):
        (size,) = struct.unpack(">I", content[position : position + 4])
        boxes[content[position + 4 : position + 8]] = content[position : position + size]
        position += size
    moov = bytearray(boxes[b"moov"])
    place = moov.index(b"stco") + 8
    for entry in range(struct.unpack(">I", moov[place : place + 4])[0]):
        at = place + 4 + 4 * entry
        moov[at : at + 4] = struct.pack(">I", struct.unpack(">I", moov[at : at + 4])[0] + len(moov))
    return boxes.pop(b"ftyp") + bytes(moov) + b"".join(box for name, box in boxes.items() if name != b"moov")


def test_what_does_not_tell_its_size_passes():
    for content in (b"", b"RIFF", b"\x1a\x45\xdf\xa3\x01\xff", b"\x1a\x45\xdf\xa3\x00", b"\0" * 64, b"\xff" * 64):
        check_container(io.BytesIO(content), "file")
    live = bytearray(encode_video(moving_frames(3), container="matroska"))
    place = live.index(b"\x18\x53\x80\x67") + 4
    with pytest.raises(ReadError, match=f"file is cut short: it announces {len(live)} bytes, it has {len(live) - 1}"):
        check_container(io.BytesIO(live[:-1]), "file")
    live[place : place + 8] = b"\x01" + b"\xff" * 7
    check_container(io.BytesIO(live[:-1]), "file")


@pytest.mark.parametrize(
    ("table", "offset", "value"),
    [
        (b"stsz", 12, 1 << 28),
        (b"stts", 12, 1 << 28),
        (b"ctts", 12, 1 << 28),
        (b"elst", 8, 1 << 24),
        (b"trun", 8, 1 << 28),
    ],
)
def test_tables_that_announce_more_than_the_file_holds_are_refused(table, offset, value):
    """libav would allocate gigabytes for a few bytes."""
    fragments = {"movflags": "frag_keyframe+empty_moov"} if table == b"trun" else None
    content = bytearray(encode_video(moving_frames(12), container_options=fragments))
    check_container(io.BytesIO(content), "file")
    place = content.index(table) + offset
    content[place : place + 4] = value.to_bytes(4, "big")
    with pytest.raises(ReadError, match=rf"announces \d+ samples.* in {len(content)} bytes"):
        VideoFrames(bytes(content)).read([0])


def test_a_file_cannot_make_another_be_opened(tmp_path):
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(encode_video(moving_frames(6)))
    for name, content in {
        "playlist.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
        "script.mp4": f"ffconcat version 1.0\nfile {secret.name}\n",
        "session.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }.items():
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(ReadError, match=f"{name} cannot be read as video"):
            len(VideoFrames(str(path)))
    transport = encode_video(moving_frames(6), container="mpegts")
    with pytest.raises(ReadError, match="it is not MP4, MOV, Matroska, WebM or AVI"):
        len(VideoFrames(transport))


def test_frames_beyond_the_limit_are_not_decoded(monkeypatch):
    content = encode_video(moving_frames(4))
    monkeypatch.setattr(video_stream, "MAX_FRAME_PIXELS", 96 * 64 - 1)
    with pytest.raises(ReadError, match="frames of 96 x 64 pixels; at most 6143"):
        len(VideoFrames(content))


def test_more_frames_than_the_limit_are_not_read(monkeypatch):
    content = encode_video(moving_frames(4))
    monkeypatch.setattr(video_stream, "MAX_PACKETS", 3)
    with pytest.raises(ReadError, match="more than 3 frames"):
        len(VideoFrames(content))


def test_a_stream_larger_than_its_container_says_is_not_decoded(monkeypatch):
    """The container's size is not the decoder's: libav gets the limit too."""
    content = encode_video(moving_frames(4))
    monkeypatch.setattr(video_stream.OpenVideo, "_pick_stream", lambda self: self._container.streams.video[0])
    monkeypatch.setattr(video_stream, "MAX_FRAME_PIXELS", 96 * 64 - 1)
    with pytest.raises(ReadError):
        VideoFrames(content).read([0])


def test_a_sound_file_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 160), np.int16), layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(ReadError, match="holds no video"):
        len(VideoFrames(file.getvalue()))


def mutated(content: bytes, draw: random.Random) -> bytes:
    """The file with some bytes changed, a piece left out, doubled or cut off."""
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 3, 30))):
        place = draw.randrange(len(damaged) if draw.random() < 0.5 else min(len(damaged), 700))
        damaged[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    if draw.random() < 0.2:
        place, length = draw.randrange(len(damaged)), draw.randrange(1, 64)
        piece = damaged[place : place + length]
        damaged[place : place + length] = draw.choice((b"", piece * 2, bytes(length)))
    return bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.1 else damaged)


def fuzz(count: int, seed: int) -> int:
    """Reads damaged videos; whatever happens but frames or a `ReadError` ends the test. Returns how many were refused."""
    draw = random.Random(seed)
    small = moving_frames(10, 64, 48)
    kinds = [VIDEOS[name] for name in ("h264", "hevc open GOP", "av1", "vp9", "vp8", "mpeg4", "mpeg4 in avi")]
    contents = [encode_video(small, *kind) for kind in kinds]
    contents.append(
        encode_video(small, matrix=(0, 1, -1, 0), container_options={"movflags": "frag_keyframe+empty_moov"})
    )
    refused = 0
    for _ in range(count):
        frames = VideoFrames(mutated(draw.choice(contents), draw), start=draw.choice((0.0, 0.0, 0.1)))
        try:
            for frame in frames.read([draw.randrange(len(frames)), 0]):
                assert frame.dtype == np.uint8
                assert frame.size <= 3 * video_stream.MAX_FRAME_PIXELS
        except ReadError:
            refused += 1
    return refused


def test_damaged_videos_give_frames_or_an_error():
    assert 20 < fuzz(300, seed=0) < 300


@pytest.mark.slow
def test_many_damaged_videos_give_frames_or_an_error():
    assert fuzz(20_000, seed=1) > 1000
