"""Finds the recordings and real data that lie beside the checkout."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(relative: str) -> Path:
    """Path of a recorded file; skips the test where the recordings are not beside the checkout (a user's clone)."""
    if not SHARED.is_dir():
        pytest.skip(f"recordings not found: {SHARED} is absent")
    path = SHARED / relative
    assert path.exists(), f"{path} is missing from the recordings"
    return path
