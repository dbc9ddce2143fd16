"""Writes a model folder without ever holding the model: shard by shard, into a staging folder that is renamed."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# Small enough that a shard, its source and its serialised form together stay far under the promised 4 GB.
MAX_SHARD_BYTES = 10**9
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Written into every folder that a conversion made; only such a folder is ever overwritten.
RECORD_NAME = "conversion.json"


@dataclass(frozen=True)
class TensorSpec:
    """Shape and stored dtype of one parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the data."""
        return self.num_parameters * self.dtype.itemsize


ReadTensor = Callable[[str], torch.Tensor]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_stale(output: Path) -> None:
    for folder in output.parent.glob(f"{escape(output.name)}.partial-*"):
        pid = folder.name.rpartition("-")[2].removesuffix(".old")
        if not pid.isdigit():
            continue
        if int(pid) != os.getpid() and _is_running(int(pid)):
            raise ValueError(f"{folder} belongs to a conversion that is still running (process {pid}).")
        shutil.rmtree(folder)


def check_output(output: Path, overwrite: bool) -> None:
    """Raises a `ValueError` if a folder is taken: only empty ones and, on request, earlier conversions are not."""
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"`output` is a file: {output}.")
    if any(output.iterdir()):
        if not (output / RECORD_NAME).exists():
            raise ValueError(f"`output` is not empty and holds no earlier conversion: {output}.")
        if not overwrite:
            raise ValueError(f"`output` holds an earlier conversion: {output}. Say --overwrite to replace it.")


@contextmanager
def staged_folder(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """
    A folder beside `output` that becomes `output` when the block ends well and vanishes when it does not.

    What a killed run left behind is removed first.

    Args:
        output (`str` or `Path`): Final folder; absent, empty, or with `overwrite` an earlier conversion.
        overwrite (`bool`, *optional*): Whether an earlier conversion is replaced.

    Raises:
        ValueError: If `output` is taken.
        OSError: If the disk is full or not writable.
    """
    output = Path(output).resolve()
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(output)
    staging = output.with_name(f"{output.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        _swap(staging, output)
    except (SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOSPC:
            raise
        # safetensors reports a full disk in its own words.
        raise OSError(f"Writing {output} failed, nothing was left behind: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(staging: Path, output: Path) -> None:
    old = staging.with_name(f"{staging.name}.old")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(staging, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _split_into_shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.num_bytes
    return shards


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raises an `OSError` if a folder's disk cannot take `num_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the conversion needs {num_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
            str(folder),
        )


def write_weights(
    folder: Path, specs: Mapping[str, TensorSpec], read: ReadTensor, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """
    Writes safetensors shards, holding one shard in memory at a time, and their index.

    Args:
        folder (`Path`): Where to.
        specs (`Mapping[str, TensorSpec]`): Every parameter, in the order of writing.
        read (`Callable`): Gives a parameter by name, of the stated shape and dtype.
        max_shard_bytes (`int`, *optional*): Size of a shard; a single larger tensor has a shard of its own.
    """
    check_free_space(folder, sum(spec.num_bytes for spec in specs.values()))
    shards = _split_into_shards(specs, max_shard_bytes)
    weight_map = {}
    with tqdm(total=len(specs), desc="writing", unit="tensor") as progress:
        for index, names in enumerate(shards):
            file_name = WEIGHTS_NAME if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = read(name).contiguous()
                assert (tuple(tensors[name].shape), tensors[name].dtype) == (specs[name].shape, specs[name].dtype)
                progress.update()
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        metadata = {
            "total_parameters": sum(spec.num_parameters for spec in specs.values()),
            "total_size": sum(spec.num_bytes for spec in specs.values()),
        }
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n")


def verify_weights(folder: Path, specs: Mapping[str, TensorSpec], read: ReadTensor) -> None:
    """
    Reads every written tensor again and compares it, bit for bit, with the source, read again.

    Raises:
        ValueError: If a tensor is missing, left over or differs; it names the first one.
    """
    seen = set()
    with tqdm(total=len(specs), desc="verifying", unit="tensor") as progress:
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                    written = shard.get_tensor(name)
                    if name not in specs or not _same_bits(written, read(name)):
                        raise ValueError(f"{path.name}: {name} differs from its source; the conversion is discarded.")
                    seen.add(name)
                    progress.update()
    if missing := specs.keys() - seen:
        raise ValueError(f"{len(missing)} tensors were not written: {', '.join(sorted(missing))}.")


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    # As bytes, so that NaN equals NaN.
    return torch.equal(first.contiguous().flatten().view(torch.uint8), second.contiguous().flatten().view(torch.uint8))


def write_record(folder: Path, source: str | Path, specs: Mapping[str, TensorSpec], notes: list[str]) -> None:
    """Writes what was converted and what was checked."""
    record = {
        "source": Path(source).name,
        "verified_tensors": len(specs),
        "verified_parameters": sum(spec.num_parameters for spec in specs.values()),
        "verified_bytes": sum(spec.num_bytes for spec in specs.values()),
        "notes": notes,
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
