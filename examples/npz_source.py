"""
A reader of one's own: a folder of NumPy archives, an episode each, as robomimic or ALOHA keep theirs in HDF5.

    PYTHONPATH=examples lapa inspect EPISODES --kind npz_source:NpzSource
    PYTHONPATH=examples lapa train-quantizer --data EPISODES --kind npz_source:NpzSource --output_dir quantizer ...

`EPISODES/*.npz` hold `frames` (num_steps, height, width, 3) uint8, and may hold `action` (num_steps, action_dim),
`proprio` (num_steps, proprio_dim) and `instruction` (a text).
"""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lapa.data.episode_source import EpisodeSource, OnError, SourceShard, raise_error
from lapa.data.schema import Episode, ReadError


class NpzSource(EpisodeSource):
    """Every file is a shard of one episode; options are keyword-only, and those that every kind of source has come first."""

    cameras = ("frames",)

    def __init__(
        self,
        path: str,
        *,
        split: str | None = None,
        cameras: Sequence[str] | None = None,
        frame_gap_seconds: float | None = None,
        embodiment: str | None = None,
        unnorm_key: str | None = None,
        frequency: float = 20.0,
    ) -> None:
        folder = Path(path, split or "")
        self.files = sorted(folder.glob("*.npz"))
        if not self.files or tuple(cameras or self.cameras) != self.cameras:
            raise ValueError(f"{folder} has {len(self.files)} .npz files, and the camera 'frames'; got {cameras}.")
        self.name, self.embodiment, self.frequency = folder.name, embodiment, frequency
        self.frame_gap_seconds = frame_gap_seconds or 0.6
        self.unnorm_key = unnorm_key or folder.name

    @property
    def shards(self) -> tuple[SourceShard, ...]:
        return tuple(SourceShard(file.name, 1) for file in self.files)

    def read(
        self, shard: int, episodes: Sequence[int] | None = None, on_error: OnError = raise_error
    ) -> Iterator[tuple[int, Episode]]:
        for index in self.wanted(shard, episodes):
            try:
                episode = self.read_file(self.files[shard])
            except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
                on_error(ReadError(f"{self.files[shard]}: {error}"))
            else:
                yield index, episode

    def read_file(self, file: Path) -> Episode:
        with np.load(file, allow_pickle=False) as content:
            frames = content["frames"]
            numbers = {key: content[key].astype(np.float32) for key in ("action", "proprio") if key in content}
            instructions = (str(content["instruction"]),) if "instruction" in content else ()
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                f"`frames` must be (num_steps, height, width, 3) uint8, got {frames.dtype} {frames.shape}"
            )
        return Episode(
            episode_id=file.stem,
            source=self.name,
            frames={"frames": frames},
            num_steps=len(frames),
            instructions=instructions,
            timestamps=np.arange(len(frames)) / self.frequency,
            embodiment=self.embodiment,
            **numbers,
        )
