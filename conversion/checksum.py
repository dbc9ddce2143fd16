"""Checksums of large files."""

import hashlib
from pathlib import Path
from typing import Any

BLOCK_BYTES = 2**24


def hash_file(path: Path, digest: Any = None) -> str:
    """Hexadecimal digest of a file, read in blocks; SHA-256 unless a `hashlib` object is given."""
    digest = hashlib.sha256() if digest is None else digest
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
