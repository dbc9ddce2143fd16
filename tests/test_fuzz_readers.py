"""
Damaged files through every reader: read, refused by an error that names the file, or skipped.

`benchmarks/fuzz_readers.py` does it at scale, here each target gets a few cases, always the same.
"""

import importlib.util
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import TARGETS
from mutations import AVI, MATROSKA, MP4, PNG, PROTOBUF, TFRECORD
from tfds_files import TOY_FEATURES, encode_image, toy_episode, toy_numbers, write_tfds_folder

from lapa.data import crc32c, encoded_frames
from lapa.data.encoded_frames import EncodedFrames
from lapa.data.folders import FrameFolderSource
from lapa.data.rlds import RldsSource
from lapa.data.schema import ReadError
from lapa.data.tfds_folder import MAX_RECORDS

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_readers.py"
CASES = 25


def fuzz_readers():
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("fuzz_readers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_reader_copes_with_damaged_files():
    """In processes of their own, with limits on time and memory."""
    command = [sys.executable, str(SCRIPT), "--seed", "1", "--cases", str(CASES * len(TARGETS))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    *_, last = run.stdout.splitlines()
    cases, read, refused, skipped, findings = map(int, last.split("|")[2:-1])
    assert cases == CASES * len(TARGETS) == read + refused + skipped and findings == 0
    # Neither is everything refused, nor is the damage without effect.
    assert min(read, refused, skipped) > cases / 20


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_whole_before_they_are_damaged(name, tmp_path):
    target = TARGETS[name]()
    for path, content in target.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert target.read(tmp_path) == []
    generator = random.Random(name)
    assert len({target.damaged(generator) for _ in range(30)}) > 20


def test_formats_are_put_together_as_they_were():
    for name, form in (
        ("h264.mp4", MP4),
        ("av1.mp4", MP4),
        ("mpeg4.avi", AVI),
        ("frames.png", PNG),
        ("tfrecord", TFRECORD),
    ):
        content = next(c for path, c in TARGETS[name]().files.items() if not path.endswith(".json"))
        assert form.build(form.parse(content)) == content
    assert PROTOBUF.build(PROTOBUF.parse(toy_episode())) == toy_episode()
    content = next(iter(TARGETS["vp9.webm"]().files.values()))
    # Sizes are written at full length, so that it comes back the same the second time.
    again = MATROSKA.build(MATROSKA.parse(content))
    assert MATROSKA.build(MATROSKA.parse(again)) == again


def test_what_a_reader_must_not_do_is_found(tmp_path):
    """Each kind of finding, made by a target that misbehaves, is told apart; the cases after it still run."""
    module = fuzz_readers()

    def run(read):
        target = module.Target({"file": b"x" * 100}, [("file", lambda data, generator: data)], read)
        module.TARGETS["bad"] = lambda: target
        try:
            totals, findings = module.run_target("bad", 0, 2)
        finally:
            del module.TARGETS["bad"]
        assert [str(case) for case, *_ in findings] == ["bad:0:0", "bad:0:1"]
        (kind,) = totals
        return kind

    def fail(error):
        raise error

    module.CPU_SECONDS = 0.3
    assert run(lambda root: fail(KeyError("x"))) == "exception"
    assert run(lambda root: "x".encode("ascii").decode("utf-16")) == "exception"
    assert run(lambda root: fail(ReadError("something is wrong"))) == "unnamed"
    assert run(lambda root: np.ones(1 << 40, np.uint8)) == "memory"
    assert run(lambda root: fail(SystemExit(3))) == "crash"
    assert run(lambda root: __import__("os").abort()) == "crash"
    assert run(lambda root: [None for _ in iter(int, 1) if root is None]) == "hang"


@pytest.mark.parametrize("length", [2**63, 2**40, MAX_RECORDS + 1])
def test_more_records_than_a_file_can_hold_are_refused(tmp_path, length):
    folder = write_tfds_folder(tmp_path / "toy", TOY_FEATURES, [[toy_episode(0)]], lengths=[length])
    with pytest.raises(
        ValueError, match=f"{folder} is no RLDS folder .*dataset_info.json lists .* of {length} records"
    ):
        RldsSource(folder)


def test_records_that_are_announced_and_absent_are_told_once(tmp_path):
    folder = write_tfds_folder(tmp_path / "toy", TOY_FEATURES, [[toy_episode(0)]], lengths=[MAX_RECORDS])
    found, errors = toy_numbers(RldsSource(folder))
    assert (
        found == [0]
        and len(errors) == 1
        and f"{MAX_RECORDS - 1} of its {MAX_RECORDS} announced episodes are lost" in errors[0]
    )


def test_a_png_chunk_that_announces_gigabytes_is_no_reason_to_allocate_them(tmp_path):
    content = bytearray(encode_image(np.arange(12 * 8 * 3, dtype=np.uint8).reshape(12, 8, 3)))
    place = content.index(b"IDAT") - 4
    content[place : place + 4] = (0x7FFFFFFF).to_bytes(4, "big")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "1.png").write_bytes(content)
    (episode,) = FrameFolderSource(str(tmp_path))
    tracemalloc.start()
    try:
        # PIL makes do with what there is of the chunk.
        assert episode.read_frames("video", [0])[0].shape == (12, 8, 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_checksums_by_folding_by_bytes_and_in_c_agree(monkeypatch):
    generator = np.random.default_rng(0)
    lengths = [*range(crc32c.SHORT_BYTES - 3, crc32c.SHORT_BYTES + 300), 4095, 4096, 100_003, 1_000_001]
    monkeypatch.setattr(crc32c, "_extension", lambda: None)
    assert crc32c.crc32c(b"123456789") == 0xE3069283
    for length in lengths:
        data = generator.bytes(length)
        folded = crc32c.crc32c(data)
        monkeypatch.setattr(crc32c, "SHORT_BYTES", length + 1)
        if length < 5000:
            assert crc32c.crc32c(data) == folded
        monkeypatch.undo()
        assert crc32c.crc32c(memoryview(data)) == folded  # by the extension, where there is one
        monkeypatch.setattr(crc32c, "_extension", lambda: None)


def test_folding_adds_multiples_of_the_polynomial():
    """Each of `MULTIPLES` has no remainder: x to its powers, added up over bits."""

    def remainder(power):
        value = 1
        for _ in range(power):
            value = value << 1 ^ (0x11EDC6F41 if value >> 31 else 0)
        return value

    for powers in crc32c.MULTIPLES:
        total = 0
        for power in powers:
            total ^= remainder(power)
        assert total == 0 and list(powers) == sorted(powers, reverse=True)


@pytest.mark.parametrize("kind", ["colour", "grey", "progressive", "444", "cmyk", "cut short", "damaged"])
def test_jpeg_is_the_same_with_and_without_simplejpeg(kind, monkeypatch):
    import io

    from PIL import Image

    pytest.importorskip("simplejpeg")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8).repeat(9, 0).repeat(7, 1)
    image = Image.fromarray(pixels).convert({"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, progressive=kind == "progressive", subsampling=0 if kind == "444" else 2)
    content = buffer.getvalue()
    if kind == "cut short":
        content = content[: len(content) // 2]
    if kind == "damaged":
        content = content[:300] + b"\xff\xd9\x00" + content[303:]
    results = []
    for module in (encoded_frames._simplejpeg(), None):
        monkeypatch.setattr(encoded_frames, "_simplejpeg", lambda module=module: module)
        try:
            results.append(EncodedFrames([content], "camera")[0].tolist())
        except ReadError as error:
            results.append(str(error))
    assert results[0] == results[1]
