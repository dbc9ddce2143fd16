"""`lapa label` in processes of its own that start quickly and may be killed, and clips for it to label."""

import json
import multiprocessing
import os
import resource
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["lapa.training.scripts", "lapa.training.label_run", "lapa.data.folders", "trl", "pyarrow.parquet"]
)


def make_clips(
    folder: Path, num_clips: int = 12, num_frames: int = 8, size: int = 24, distinct: int | None = None
) -> Path:
    """Folders of PNG frames with captions; after `distinct` clips the files repeat."""
    for clip in range(num_clips):
        path = folder / f"clip{clip:04d}"
        path.mkdir(parents=True)
        for step in range(num_frames):
            file = path / f"img_{step:05d}.png"
            if distinct is not None and clip >= distinct:
                os.link(folder / f"clip{clip % distinct:04d}" / file.name, file)
                continue
            generator = np.random.default_rng((clip, step))
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    captions = {f"clip{clip:04d}": f"do {clip % 3}" for clip in range(num_clips) if clip % 4 != 3}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def label_process(argv: list[str], environment: dict[str, str], report: str | None) -> None:
    """Target of a process: the command, then what it says of its memory."""
    os.environ.update(environment)
    # Of the readers: by a second server they would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    from lapa.training import scripts

    code = scripts.label(argv)
    if report is not None:
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        Path(report).write_text(json.dumps(peaks))
    sys.stdout.flush()
    os._exit(code)


def start_label(argv: list[str], report: Path | None = None, **environment: str):
    """Starts the command; `RANK` and `WORLD_SIZE` are what torchrun sets."""
    process = CONTEXT.Process(target=label_process, args=(argv, environment, None if report is None else str(report)))
    process.start()
    return process


def run_label(argv: list[str], **environment: str) -> int:
    """Runs the command to its end."""
    process = start_label(argv, **environment)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
