"""Folders of policies that are made of two models."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_foreign(output: Path, inner: str, name: str) -> None:
    """
    Says before the work that a folder will not be overwritten.

    Raises:
        ValueError: `output` exists and was not written by `new_folder` with this `inner`.
    """
    if output.exists() and not (output / inner / "config.json").is_file():
        raise ValueError(f"`output` ({output}) exists and holds no {name}: name a new folder.")


@contextmanager
def new_folder(output: Path, inner: str, name: str) -> Iterator[Path]:
    """
    A folder to write into that takes the place of `output` when all is written; the body makes it.

    Args:
        output: Where the policy is to be; one that was written like this before is replaced.
        inner: Folder of the second model inside, by which that is known.
        name: What the policy is called in messages.

    Raises:
        ValueError: `output` holds something else.
    """
    refuse_foreign(output, inner, name)
    partial, earlier = (output.with_name(f".{output.name}.{ending}") for ending in ("partial", "earlier"))
    for left in (partial, earlier):
        shutil.rmtree(left, ignore_errors=True)
    try:
        yield partial
        if output.exists():
            os.replace(output, earlier)
        os.replace(partial, output)
    finally:
        for left in (partial, earlier):
            shutil.rmtree(left, ignore_errors=True)


__all__ = ["new_folder", "refuse_foreign"]
