"""Unfinished files: whose they are, and when they are cleared away."""

import os
import subprocess
import sys
import time

from lapa.data import atomic_files
from lapa.data.atomic_files import STALE_SECONDS, partial_path, remove_stale


def other_place(monkeypatch, name, content):
    """The partial path of a process of the same number where `name` of the system tells something else."""
    read = {"boot": "/proc/sys/kernel/random/boot_id", "namespace": "/proc/self/ns/pid"}[name]
    real_read, real_link = atomic_files.Path.read_text, os.readlink
    with monkeypatch.context() as patch:
        patch.setattr(
            atomic_files.Path,
            "read_text",
            lambda path, **more: content if str(path) == read else real_read(path, **more),
        )
        patch.setattr(atomic_files.os, "readlink", lambda path: content if path == read else real_link(path))
        atomic_files._place.cache_clear()
        found = partial_path(atomic_files.Path("x"))
    atomic_files._place.cache_clear()
    return found.name


def test_files_of_other_places_go_by_their_age_and_own_ones_by_their_process(tmp_path, monkeypatch):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    own = partial_path(tmp_path / "x").name
    stem = own.rpartition("-")[0]
    # The same host name, after a start or in another container: its processes are not the ones here.
    foreign = [other_place(monkeypatch, name, "another") for name in ("boot", "namespace")]
    foreign = [name.rpartition("-")[0] + f"-{dead.stdout.strip()}" for name in foreign] + [".x.partial-elsewhere-1"]
    assert len({stem, *(name.rpartition("-")[0] for name in foreign)}) == 4
    for name in (*foreign, f"{stem}-{dead.stdout.strip()}", f"{stem}-{os.getppid()}", "x"):
        (tmp_path / name).write_bytes(b"")
    assert remove_stale(tmp_path) == [f"{stem}-{dead.stdout.strip()}"], "young files of others and of the living stay"
    now = time.time()
    for name, age in zip(foreign, (STALE_SECONDS + 60, STALE_SECONDS - 60, STALE_SECONDS + 60)):
        os.utime(tmp_path / name, (now - age, now - age))
    assert remove_stale(tmp_path) == sorted([foreign[0], foreign[2]])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([foreign[1], f"{stem}-{os.getppid()}", "x"])
    assert remove_stale(tmp_path / "nowhere") == []
