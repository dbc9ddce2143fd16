"""The `params` stream is read without jax, flax or msgpack, slice by slice, and broken files are named."""

import ast
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
from flax_files import flax_array, read_with_msgpack, write_stream
from shared_files import shared_path

import lapa.conversion.flax_stream
from lapa.conversion.flax_stream import FlaxStream

TREES = ["delta", "delta_action"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp32.chunked"])
@pytest.mark.parametrize("tree", TREES)
def test_arrays_and_layers_equal_those_of_the_msgpack_package(tree, dtype):
    if (tree, dtype) == ("delta_action", "fp32.chunked"):
        pytest.skip("not recorded")
    path = shared_path(f"fixtures/delta_llama/{tree}.params.{dtype}")
    stream, expected = FlaxStream(path), read_with_msgpack(path)
    assert set(stream.entries) == set(expected)
    assert any(len(entry.chunks) > 1 for entry in stream.entries.values()) == dtype.endswith("chunked")
    for key, array in expected.items():
        assert stream.entries[key].dtype == array.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        assert torch.equal(stream.read(key), array), key
        for layer in range(len(array)):
            assert torch.equal(stream.read(key, layer), array[layer]), (key, layer)


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 13, 1000])
def test_layers_are_cut_out_across_chunks(tmp_path, chunk):
    array = np.arange(4 * 3 * 4, dtype=np.float32).reshape(4, 3, 4)
    scalar = np.float32(7).reshape(())
    stream = FlaxStream(write_stream(tmp_path / "params", {"a/b": array, "c": scalar}, chunk))
    assert stream.entries["a/b"].shape == (4, 3, 4) and stream.entries["c"].shape == ()
    for layer in range(4):
        assert torch.equal(stream.read("a/b", layer), torch.from_numpy(array[layer]))
    assert torch.equal(stream.read("a/b"), torch.from_numpy(array))
    assert stream.read("c").item() == 7


def test_reading_a_layer_reads_no_other_bytes(tmp_path, monkeypatch):
    """The index reads headers, a layer reads its own bytes: payloads are skipped."""
    count = 0
    real_open = Path.open

    class Counting:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            nonlocal count
            data = self.file.read(size)
            count += len(data)
            return data

        def readinto(self, buffer):
            nonlocal count
            read = self.file.readinto(buffer)
            count += read
            return read

    array = np.zeros((10, 100_000), dtype=np.float32)
    path = write_stream(tmp_path / "params", {"stack": array, "other": array}, chunk=150_000)
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: Counting(real_open(self, *args, **kwargs)))
    stream = FlaxStream(path)
    assert count < 2000
    count = 0
    stream.read("stack", 3)
    assert count == 400_000


def test_keys_below_params_lose_that_prefix(tmp_path):
    stream = FlaxStream(write_stream(tmp_path / "params", {"params/params/a": np.ones(2, dtype=np.float32)}))
    assert list(stream.entries) == ["a"]


def test_truncated_file_names_file_position_and_key(tmp_path):
    whole = write_stream(
        tmp_path / "whole", {"first/kernel": np.ones(40, np.float32), "second/kernel": np.ones(40, np.float32)}
    ).read_bytes()
    second = whole.index(b"second")
    assert FlaxStream(tmp_path / "whole")
    broken = tmp_path / "params"
    for length in range(1, len(whole)):
        broken.write_bytes(whole[:length])
        if length == second - 3:
            continue  # exactly one pair: indistinguishable from a whole file
        with pytest.raises(ValueError, match=f"truncated: it ends at byte {length}") as caught:
            FlaxStream(broken)
        assert str(broken) in str(caught.value)
        if length > second + 14:
            assert "'second/kernel'" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04rest", "zip or torch archive"),
        (b"\x80\x04}.", "not a stream of Flax arrays"),
        (msgpack.packb((("a",), b"\xc0")), "unexpected byte 0xc0"),
        (msgpack.packb((("a",), msgpack.packb("text"))), "expected ext"),
        (msgpack.packb((("a",), msgpack.packb(msgpack.ExtType(2, b"")))), "extension type 2"),
        (msgpack.packb((("a",), msgpack.packb({"b": 1}))), "unexpected field 'b'"),
        (msgpack.packb((("a",), msgpack.packb({}))), "chunked array"),
        (msgpack.packb((("a",), msgpack.packb(flax_array(np.ones(2, np.int32))))), "dtype int32"),
        (
            msgpack.packb((("a",), msgpack.packb(msgpack.ExtType(1, msgpack.packb(([9], "float32", b"1234")))))),
            r"shape \(9,\) and dtype float32 has 4 bytes",
        ),
        (
            msgpack.packb((("a",), msgpack.packb(msgpack.ExtType(1, msgpack.packb(([-1], "float32", b"")))))),
            r"shape \(-1,\)",
        ),
        (msgpack.packb((("a",), msgpack.packb(flax_array(np.ones(1, np.float32))))) * 2, "'a' occurs twice"),
    ],
)
def test_wrong_files_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "params"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FlaxStream(path)


def test_bits_of_bfloat16_are_kept(tmp_path):
    bits = np.array([0x7FC1, 0xFF80, 0x0001, 0x3F80], dtype=np.uint16)
    stream = FlaxStream(write_stream(tmp_path / "params", {"a": (bits, "bfloat16")}))
    assert stream.read("a").view(torch.uint16).tolist() == bits.tolist()


def test_reader_imports_neither_jax_nor_msgpack():
    tree = ast.parse(Path(lapa.conversion.flax_stream.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not imported & {"jax", "flax", "msgpack", "ml_dtypes"}
