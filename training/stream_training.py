"""Training on a `ShuffledStream`: its own loader, its state in every checkpoint, what was read in log and report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lapa.data.atomic_files import write_atomically
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.read_counts import ReadCounts
from lapa.data.shuffled_stream import ShuffledStream
from lapa.data.stream_cursor import restore_skipped, skipped_state
from lapa.data.stream_loader import StreamLoader

# Of one rank, in a checkpoint.
STATE_FILE, STATE_FILES = "stream_state_{rank:05d}_of_{world_size:05d}.json", "stream_state_*.json"
REPORT_FILE = "data_report.json"


def write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Writes a JSON file that appears when it is complete."""
    write_atomically(path, json.dumps(values, indent=indent).encode())


class DataReport:
    """
    What the streams of all ranks have read and left out, per source.

    Args:
        counts (`dict[str, ReadCounts]`): Per source.
        skipped (`dict[str, SkippedEpisodes]`): Per source.
    """

    def __init__(self, counts: dict[str, ReadCounts], skipped: dict[str, SkippedEpisodes]) -> None:
        self.counts, self.skipped = counts, skipped

    @classmethod
    def gather(cls, stream: ShuffledStream) -> "DataReport":
        """Of all ranks, on all ranks: each of them must call it."""
        mine = {
            name: (counts.to_dict(), skipped_state(stream.skipped()[name])) for name, counts in stream.counts().items()
        }
        counts = {part.name: part.new_counts() for part in stream.parts}
        skipped = {part.name: SkippedEpisodes(stream.options.max_skipped) for part in stream.parts}
        for rank in gather_object([mine]):
            for name, (some_counts, some_skipped) in rank.items():
                counts[name] += type(counts[name]).from_dict(some_counts)
                restore_skipped(skipped[name], some_skipped)
        return cls(counts, skipped)

    @property
    def total(self) -> ReadCounts:
        """Of all sources."""
        first, *others = self.counts.values()
        for other in others:
            first = first + other
        return first

    def metrics(self) -> dict[str, float]:
        """Numbers for a log: the totals, and of several sources how many items each gave."""
        logs = {f"data/{name}": float(value) for name, value in self.total.metrics().items()}
        if len(self.counts) > 1:
            logs |= {f"data/{counts.item_name}/{name}": float(counts.items) for name, counts in self.counts.items()}
        return logs

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable: `total`, and per source its counts (gap histogram included) and what was skipped, why."""
        sources = {
            name: counts.to_dict() | {"skipped": skipped_state(self.skipped[name])}
            for name, counts in self.counts.items()
        }
        return {"total": self.total.metrics(), "sources": sources}

    def summary(self) -> str:
        """One line for people."""
        return ", ".join(f"{name} {value:g}" for name, value in self.total.metrics().items())

    def check(self, final: bool = False) -> None:
        """Raises `ReadError` where a source skipped more than its share; until the end only once there is enough to judge."""
        for skipped in self.skipped.values():
            if final or skipped.num_seen >= skipped.min_episodes:
                skipped.check()


class ExampleList(Dataset[dict[str, Any]]):
    """Examples in memory."""

    def __init__(self, examples: Sequence[dict[str, Any]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.examples[item]


class _StreamEpoch(TrainerCallback):
    """A stream has no epochs that a training could count: `epoch` is the share of the steps, in a resumed run too."""

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


class StreamTrainer(Trainer):
    r"""
    Trainer whose `train_dataset` may be a [`ShuffledStream`].

    Every rank reads its own share of the stream through a `StreamLoader`, with the workers, the prefetching and the pinned
    memory that the arguments name. Each checkpoint holds the state of every rank's stream, and a training that is resumed
    goes on with the very next batch, without reading what came before; with the same number of ranks and workers it ends
    where an uninterrupted one does, bit for bit.

    What was read, dropped and skipped goes to the logs (`data/...`) and, with the gap histogram, to `data_report.json` in
    the output folder. A run that skipped more than the stream's `max_skipped` fails.

    A stream needs `max_steps`, and must repeat. Other data sets are trained on as by [`~transformers.Trainer`].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What a training on a stream has read, once it has ended.
        self.data_report: DataReport | None = None
        super().__init__(*args, **kwargs)
        if self.stream is not None:
            # First, so that logs and checkpoints see it.
            self.callback_handler.callbacks.insert(0, _StreamEpoch())

    @property
    def stream(self) -> ShuffledStream | None:
        """`train_dataset` where it is a stream."""
        return self.train_dataset if isinstance(self.train_dataset, ShuffledStream) else None

    def _validate_args(self) -> None:
        stream, args = self.stream, self.args
        if stream is not None:
            if args.max_steps <= 0:
                raise ValueError(
                    f"`max_steps` must be given to train on a stream, which has no end, got {args.max_steps}."
                )
            if not stream.options.repeat:
                raise ValueError("`train_dataset` must be a stream with `repeat=True`: `max_steps` ends a training.")
            if (stream.rank, stream.world_size) != (args.process_index, args.world_size):
                raise ValueError(
                    f"`train_dataset` reads share {stream.rank} of {stream.world_size}, but this is process "
                    f"{args.process_index} of {args.world_size}: give the stream that `rank` and `world_size`."
                )
            for name, wanted in (("dataloader_in_order", True), ("auto_find_batch_size", False)):
                if getattr(args, name) is not wanted:
                    raise ValueError(f"`{name}` must be {wanted} to train on a stream, got {getattr(args, name)}.")
        super()._validate_args()

    def get_train_dataloader(self) -> DataLoader:
        """As in [`~transformers.Trainer`]; a stream has its own loader, which accelerate leaves alone."""
        stream, args = self.stream, self.args
        if stream is None:
            return super().get_train_dataloader()
        return StreamLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="Training"),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def _inner_training_loop(
        self, batch_size: Any = None, args: Any = None, resume_from_checkpoint: str | None = None, **kwargs: Any
    ) -> Any:
        stream = self.stream
        if resume_from_checkpoint is not None:
            self._load_stream(Path(resume_from_checkpoint))
        ignored = self.args.ignore_data_skip
        # The stream stands where it has to be; Trainer's way to get there is to read everything again.
        self.args.ignore_data_skip = ignored or stream is not None
        try:
            output = super()._inner_training_loop(batch_size, args, resume_from_checkpoint, **kwargs)
        finally:
            self.args.ignore_data_skip = ignored
        if stream is not None:
            self._report_data(stream, DataReport.gather(stream), final=True)
        return output

    def _load_stream(self, checkpoint: Path) -> None:
        stream = self.stream
        if stream is None:
            if any(checkpoint.glob(STATE_FILES)):
                raise ValueError(
                    f"{checkpoint} is of a training on a stream, but `train_dataset` is none: it cannot be resumed."
                )
            return
        path = checkpoint / STATE_FILE.format(rank=stream.rank, world_size=stream.world_size)
        if not path.is_file():
            found = sorted(file.name for file in checkpoint.glob(STATE_FILES))
            raise ValueError(
                f"{checkpoint} cannot be resumed on this stream: it has no {path.name} "
                f"({'it has ' + ', '.join(found) if found else 'no state of a stream at all'})."
            )
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(state, dict):
                raise ValueError("it holds no JSON object")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        try:
            stream.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"{checkpoint} cannot be resumed on this stream: {error}") from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the rest: a checkpoint that has a trainer state is then complete, on all ranks.
        stream = self.stream
        if stream is not None:
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            name = STATE_FILE.format(rank=stream.rank, world_size=stream.world_size)
            write_json(folder / name, stream.state_dict())
            self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in [`~transformers.Trainer`]; logs of a training on a stream say what was read."""
        stream = self.stream
        if stream is not None and ("loss" in logs or "train_loss" in logs):
            report = DataReport.gather(stream)
            logs |= report.metrics()
            self._report_data(stream, report)
        super().log(logs, start_time)

    def _report_data(self, stream: ShuffledStream, report: DataReport, final: bool = False) -> None:
        if self.is_world_process_zero():
            values = report.to_dict() | {"stream": stream.description()}
            write_json(Path(self.args.output_dir) / REPORT_FILE, values, indent=2)
        report.check(final)
        if final:
            self.data_report = report


__all__ = ["REPORT_FILE", "STATE_FILE", "DataReport", "ExampleList", "StreamTrainer", "write_json"]
