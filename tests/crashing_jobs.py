"""Jobs of a study that take their process with them, as a simulator with native code may."""

import json
import os
import time
from pathlib import Path
from typing import Any


def do(folder: Path, kind: str, settings: Any, inputs: Any, machine: Any) -> None:
    """Crashes the first time where the kind is `video`, always where it is `labelled`; does nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    first = not (folder / "begun").exists()
    (folder / "begun").touch()
    if kind == "labelled" and first:
        # The video is given to a worker beside this one. Had that not begun it yet, it would crash alone afterwards, and be blamed.
        deadline = time.monotonic() + 60
        while not list(folder.parent.glob("video-*/begun")) and time.monotonic() < deadline:
            time.sleep(0.05)
    if kind == "labelled" or (kind == "video" and first):
        time.sleep(0.3)
        os._exit(9)
    (folder / "done.json").write_text(json.dumps({"result": {}, "seconds": 0.0}), encoding="utf-8")


def start() -> None:
    """In place of what prepares a worker: nothing has to be imported."""
