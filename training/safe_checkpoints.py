"""Checkpoints that are whole or absent: written under another name, renamed when complete."""

import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

logger = logging.getLogger(__name__)

# Folder in the output folder that holds what is being written. Whatever lies there is incomplete.
STAGING_FOLDER = ".partial"
STATE_FILE = "trainer_state.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json")


def why_incomplete(checkpoint: str | Path) -> str | None:
    """What a checkpoint folder lacks to go on from it; None where it is whole. Weights are told by their length."""
    folder = Path(checkpoint)
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except (OSError, ValueError):
        return f"its {STATE_FILE} is damaged"
    # Sharded states of FSDP lie in folders of their own.
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model_fsdp*")]
    if not weights:
        return "it has no weights"
    for path in weights:
        if path.suffix == ".safetensors" and not _is_whole(path):
            return f"its {path.name} is cut off"
    index = folder / WEIGHT_FILES[2]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"its {index.name} is damaged"
        if absent := sorted(name for name in names if not (folder / name).is_file()):
            return f"it lacks {absent[0]}"
    return None


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return False
        (length,) = struct.unpack("<Q", prefix)
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)


def last_checkpoint(output_dir: str | Path) -> str | None:
    """Newest whole checkpoint of an output folder; incomplete ones are named in the log and passed over."""
    folder = Path(output_dir)
    names = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()] if folder.is_dir() else []
    numbered = [(int(number), path) for path in names if (number := path.name.rpartition("-")[2]).isdigit()]
    for _, path in sorted(numbered, reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is passed over: %s.", path, reason)
    return None


class SafeCheckpoints(Trainer):
    """
    Trainer whose checkpoints and saved models appear when they are complete.

    A process that is killed while it saves leaves the earlier checkpoints as they were and the unfinished one in
    `output_dir/.partial`, which the next save clears away. A full disk ends the run with an `OSError` that says so. The
    output folder must be one file system, shared by all processes.
    """

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._staged(run_dir, name) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).parent == staging:
                self.state.best_model_checkpoint = str(run_dir / name)
                if self.args.should_save:
                    self.state.save_to_json(str(staging / name / STATE_FILE))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _replace_folder(staging / name, run_dir / name)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / name))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Later, when the folder has its name."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in [`~transformers.Trainer`]; every file of the folder is the old one or the new one, never half of it."""
        if self._staging is not None:
            super().save_model(output_dir, _internal_call)
            return
        target = Path(self.args.output_dir if output_dir is None else output_dir)
        with self._staged(target, "model") as staging:
            super().save_model(str(staging), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _replace_files(staging, target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _staged(self, folder: Path, what: str) -> Iterator[Path]:
        staging = folder / STAGING_FOLDER
        try:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            yield staging
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _failed_to_write(error):
                raise
            last = last_checkpoint(self.args.output_dir)
            kept = "there is no earlier checkpoint" if last is None else f"{last} is whole"
            raise OSError(f"{folder / what} could not be written ({error}); nothing was changed, {kept}.") from error
        finally:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _failed_to_write(error: Exception) -> bool:
    # torch and safetensors have errors of their own for what the system refused to write.
    return isinstance(error, (OSError, SafetensorError)) or "writ" in str(error)


def _replace_folder(source: Path, target: Path) -> None:
    """Puts a folder in the place of another of the same name, if there is one."""
    if target.exists():
        os.replace(target, source.with_name("replaced"))
    os.replace(source, target)


def _replace_files(source: Path, target: Path) -> None:
    """Moves the files of a folder over those of another; what is no longer part of the model, such as an adapter, goes."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    names = {path.name for path in files}
    # The config comes last: until it is there the folder is no model of the new kind.
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        os.replace(path, target / path.name)
    # A config of an adapter that is gone would have the merged model loaded as one.
    stale = [*target.glob("*.safetensors"), *target.glob("*.safetensors.index.json"), target / ADAPTER_CONFIG]
    for path in stale:
        if path.name not in names and path.exists():
            path.unlink()


__all__ = ["SafeCheckpoints", "last_checkpoint", "why_incomplete"]
