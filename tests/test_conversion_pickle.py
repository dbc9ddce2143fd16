"""The VQGAN's pickle is read through an allow-list: arrays in dictionaries, and nothing a hostile file names runs."""

import builtins
import collections
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from shared_files import shared_path

from lapa.conversion.restricted_pickle import load_arrays

PROTOCOLS = range(6)


def write(tmp_path, content: bytes):
    path = tmp_path / "vqgan"
    path.write_bytes(content)
    return path


class Calls:
    """Pickles into a call."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_protocol_are_read(tmp_path, protocol, order):
    array = np.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32), order=order)
    tree = {"encoder": {"kernel": array, "empty": np.empty((0, 3), np.float16)}, "double": np.ones(1)}
    arrays = load_arrays(write(tmp_path, pickle.dumps(tree, protocol=protocol)))
    assert list(arrays) == ["encoder/kernel", "encoder/empty", "double"]
    assert torch.equal(arrays["encoder/kernel"], torch.from_numpy(np.ascontiguousarray(array)))
    assert arrays["encoder/empty"].shape == (0, 3) and arrays["double"].dtype == torch.float64


@pytest.mark.parametrize("name", ["base", "alt"])
def test_recorded_files_equal_an_ordinary_unpickling(name):
    path = shared_path(f"fixtures/vqgan/{name}.pkl")

    def flatten(tree, prefix=""):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else [(prefix + key, value)]

    expected = dict(flatten(pickle.loads(path.read_bytes())))
    arrays = load_arrays(path)
    assert list(arrays) == list(expected)
    assert all(torch.equal(arrays[key], torch.from_numpy(array)) for key, array in expected.items())


def test_jax_and_flax_pickle_is_read_without_jax_and_flax(monkeypatch):
    for module in ("jax", "jax._src", "jaxlib", "flax", "flax.core"):
        monkeypatch.setitem(sys.modules, module, None)
    jax = load_arrays(shared_path("fixtures/vqgan/alt.frozen_jax.pkl"))
    plain = load_arrays(shared_path("fixtures/vqgan/alt.pkl"))
    assert jax.keys() == plain.keys() and len(jax) > 20
    assert all(torch.equal(jax[key], plain[key]) for key in jax)


HOSTILE = {
    "os.system": Calls(os.system, "touch {marker}"),
    "builtins.eval": Calls(eval, "open({marker!r}, 'w')"),
    "builtins.exec": Calls(exec, "open({marker!r}, 'w')"),
    "builtins.open": Calls(open, "{marker}", "w"),
    "builtins.getattr": Calls(getattr, np.ndarray, "tofile"),
    "subprocess.Popen": Calls(subprocess.Popen, ["touch", "{marker}"]),
    "functools.partial": Calls(__import__("functools").partial, os.mkdir, "{marker}"),
    "operator.attrgetter": Calls(__import__("operator").attrgetter, "system"),
    "copyreg._reconstructor": Calls(copyreg._reconstructor, Calls, object, None),
    "collections.OrderedDict": collections.OrderedDict(a=1),
    "numpy.load": Calls(np.load, "{marker}", None, True),
    "numpy.ctypeslib.load_library": Calls(np.ctypeslib.load_library, "{marker}", "/"),
    "numpy.save": Calls(np.save, "{marker}", 1),
    "torch.load": Calls(torch.load, "{marker}"),
}
# Written by hand: they need no module to exist, and numpy.f2py imports slowly.
HOSTILE_BYTES = {
    "numpy.f2py.diagnose.run_command": b"cnumpy.f2py.diagnose\nrun_command\n(Vtouch x\ntR.",
    "numpy.testing._private.utils.runstring": b"cnumpy.testing._private.utils\nrunstring\n(Vx\n}tR.",
    "posix.system": b"cposix\nsystem\n(Vtouch x\ntR.",
    "builtins.__import__": b"c__builtin__\n__import__\n(Vos\ntR.",
    "numpy.ndarray.tofile": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "numpy.core.multiarray._reconstruct.__globals__": (
        b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93."
    ),
    "numpy.dtype.__class__": b"\x80\x04\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
    "lapa.conversion.restricted_pickle.load_arrays": b"clapa.conversion.restricted_pickle\nload_arrays\n(Vx\ntR.",
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_nothing_runs(tmp_path, name, protocol):
    marker = str(tmp_path / "marker")

    def placed(value):
        if isinstance(value, list):
            return [placed(item) for item in value]
        return (
            value.replace("{marker!r}", repr(marker)).replace("{marker}", marker) if isinstance(value, str) else value
        )

    hostile = HOSTILE[name]
    if isinstance(hostile, Calls):
        hostile = Calls(hostile.reduced[0], *(placed(argument) for argument in hostile.reduced[1]))
    # Hidden below honest arrays.
    content = pickle.dumps({"encoder": {"kernel": np.ones(3), "bias": hostile}}, protocol=protocol)
    # Where a function lives differs between protocols (os.system is posix.system); its name does not.
    with pytest.raises(ValueError, match=rf"asks for [\w.]+\.{name.rpartition('.')[2]}, and only arrays"):
        load_arrays(write(tmp_path, content))
    assert not os.path.exists(marker)


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_globals_are_refused_by_name(tmp_path, name):
    shown = name.replace("builtins.", "__builtin__.")
    with pytest.raises(ValueError, match=f"asks for {shown}, and only"):
        load_arrays(write(tmp_path, HOSTILE_BYTES[name]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # A persistent id, the extension registry, an object built by class, a list.
        (b"Pos.system\n.", "opcode PERSID"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "must be a type"),
        (b"\x80\x02cnumpy\nndarray\n)}\x92.", "must be a type"),
        (b"(i__main__\nx\n.", "asks for __main__.x"),
        (b"(c__main__\nx\no.", "asks for __main__.x"),
        (b"(inumpy\nndarray\n.", "only names a type"),
        (b"]\x94.", "neither an array nor a dictionary"),
        (b"cnumpy\nndarray\nI1\na.", "append"),
        # Calls and edits of what is allowed.
        (b"cnumpy\nndarray\n(tR.", "only names a type"),
        (b"cnumpy\ndtype\n(VO8\nI00\nI01\ntR.", "dtype 'O8'"),
        (b"cnumpy\ndtype\n(VV1000000\nI00\nI01\ntR.", "dtype 'V1000000'"),
        (b"cnumpy\ndtype\n}V__call__\nVx\nsb.", "tries to change numpy.dtype"),
        (b"c_codecs\nencode\n}V_function\nc_codecs\nencode\nsb.", "tries to change _codecs.encode"),
        (b"c_codecs\nencode\n(Vabc\nVunicode_escape\ntR.", "unicode_escape"),
        (b"cflax.core.frozen_dict\nFrozenDict\n(I1\ntR.", "no dictionary"),
        (b"cnumpy.core.multiarray\n_reconstruct\n(tR.", "neither an array nor a dictionary"),
        (b"I5\n.", "neither an array nor a dictionary"),
        (b"}I5\n}s.", "neither an array nor a dictionary"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<html>", "web page"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        load_arrays(write(tmp_path, content))


def test_object_arrays_are_refused(tmp_path):
    for protocol in PROTOCOLS:
        with pytest.raises(ValueError):
            load_arrays(write(tmp_path, pickle.dumps({"a": np.array([1, "x"], dtype=object)}, protocol=protocol)))
    with pytest.raises(ValueError, match="not a plain little-endian"):
        load_arrays(write(tmp_path, pickle.dumps({"a": np.ones(2, dtype=">f4")})))


def test_truncated_pickle_is_refused(tmp_path):
    content = pickle.dumps({"a": np.arange(20.0), "b": {"c": np.arange(3.0)}})
    for length in range(len(content)):
        with pytest.raises(ValueError):
            load_arrays(write(tmp_path, content[:length]))


def array_pickle(shape: tuple, raw: bytes) -> bytes:
    """A protocol 2 pickle of an array whose shape and bytes are free to disagree."""
    out = io.BytesIO()
    out.write(b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U")
    content = out.getvalue()[:-1] + b"c_codecs\nencode\nX\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87R(K\x01("
    for size in shape:
        content += b"\x8a\x08" + struct.pack("<q", size)
    content += b"tcnumpy\ndtype\nX\x02\x00\x00\x00f4K\x00K\x01\x87R(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    content += b"\x89B" + struct.pack("<I", len(raw)) + raw + b"tbs."
    return content


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (-1,), (2**20, 2**20, 2**20), (2,), (0,)])
def test_shapes_that_the_bytes_do_not_fill_allocate_nothing(tmp_path, shape):
    assert load_arrays(write(tmp_path, array_pickle((1,), b"\0\0\x80?")))["a"].tolist() == [1.0]
    tracemalloc.start()
    with pytest.raises(ValueError, match="shape"):
        load_arrays(write(tmp_path, array_pickle(shape, b"\0\0\x80?")))
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


def test_lengths_beyond_the_file_exhaust_no_memory(tmp_path):
    contents = [
        b"\x80\x04}r\xff\xff\xff\x7f.",  # a memo number of two billion
        b"\x80\x04}p4000000000\n.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**45) + b"x.",  # bytes of 32 TiB
        b"\x80\x04\x8d" + struct.pack("<Q", 2**45) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**45) + b"x.",
        b"\x80\x04B\xff\xff\xff\xffx.",
    ]
    for index, content in enumerate(contents):
        (tmp_path / str(index)).write_bytes(content)
    code = (
        "import pathlib, resource, sys\n"
        "from lapa.conversion.restricted_pickle import load_arrays\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try:\n        load_arrays(path)\n"
        "    except ValueError:\n        continue\n"
        "    sys.exit(f'{path} was accepted')\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "sys.exit(f'grew by {grown} KiB' if grown > 50_000 else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_dictionaries_that_hold_each_other_end(tmp_path):
    loop: dict = {}
    loop["a"] = loop
    with pytest.raises(ValueError, match="nested"):
        load_arrays(write(tmp_path, pickle.dumps(loop)))
    tree: dict = {"x": {}}
    for _ in range(13):
        tree = {str(i): tree for i in range(10)}
    with pytest.raises(ValueError, match="more than"):
        load_arrays(write(tmp_path, pickle.dumps(tree)))


def test_pickle_cannot_replace_builtins(tmp_path):
    before = dict(vars(builtins))
    with pytest.raises(ValueError):
        load_arrays(write(tmp_path, b"c__builtin__\n__dict__\nVprint\nI1\ns."))
    assert dict(vars(builtins)) == before
