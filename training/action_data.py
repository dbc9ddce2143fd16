"""What `lapa finetune` trains on: steps of any source or mixture, streamed or in memory, and the statistics of their actions."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from tqdm import tqdm

from lapa.data.action_stats import ActionStatistics, SourceStatistics, source_statistics
from lapa.data.action_stream import ActionStepEncoder, ActionStepPart, ActionStepSource, ActionStepStream, ActionWindow
from lapa.data.episode_range import hold_out_last
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.stream_cursor import restore_skipped, skipped_state
from lapa.processing.proprio_lapa import RANGE_QUANTILES, ProprioTokenizer
from lapa.training.script_arguments import FinetuneArguments
from lapa.training.script_tools import data_seed, log_warnings
from lapa.training.sources import StepColumns, action_steps
from lapa.training.stream_training import REPORT_FILE, DataReport, ExampleList, write_json

if TYPE_CHECKING:
    from lapa.processing.processing_lapa import LapaProcessor

logger = logging.getLogger(__name__)

# Data sets of no more steps are kept in memory with their image codes, which then need not be computed in every step.
MAX_CACHED_STEPS = 20_000
STATISTICS_FOLDER, STATISTICS_FILE = "action_statistics", "statistics.json"


@dataclass
class ActionData:
    """
    Steps with actions.

    Args:
        script_args (`FinetuneArguments`): What the user says.
        train, evaluation (`list[ActionStepSource]`): The sources, and the last episodes of each.
        statistics (`dict[str, SourceStatistics]`): Of the steps to train on, per `unnorm_key`.
    """

    script_args: FinetuneArguments
    train: list[ActionStepSource]
    evaluation: list[ActionStepSource]
    statistics: dict[str, SourceStatistics]

    @property
    def action_dim(self) -> int:
        """Most dimensions that an action has."""
        return max(entry.action.action_dim for entry in self.statistics.values())

    def fits_memory(self, window: ActionWindow, use_proprio: bool) -> bool:
        """Whether the steps are kept in memory with their image codes; otherwise they are streamed."""
        args = self.script_args
        simple = len(self.train) == 1 and window.horizon == 1 and not use_proprio
        num_steps = sum(entry.action.num_steps for entry in self.statistics.values())
        return simple and args.cache_vision_codes and not args.augmentation and num_steps <= MAX_CACHED_STEPS

    def stream(
        self, encoder: ActionStepEncoder, window: ActionWindow, use_proprio: bool, training_args: Any
    ) -> tuple[ActionStepStream, ExampleList | None]:
        """What to train on, and a sample of what is held out, seen as the finished policy will see it."""
        args = self.script_args
        options: dict[str, Any] = {
            "action_horizon": window.horizon,
            "past_end": window.past_end,
            "use_proprio": use_proprio,
            "seed": data_seed(training_args),
            "on_error": args.on_error,
            "max_skipped": args.max_skipped,
        }
        stream = ActionStepStream(self.train, encoder, encoder.prepare, buffer_size=args.buffer_size, **options)
        if not self.evaluation:
            return stream, None
        plain = ActionStepEncoder(encoder.processor)
        held = ActionStepStream(self.evaluation, plain, plain.prepare, rank=0, world_size=1, **options)
        examples = held.sample(args.eval_examples)
        if not examples:
            raise ValueError("`eval_episodes` are held out, but they have no steps with an action and an instruction.")
        return stream, ExampleList(examples)

    def columns(self, output_dir: str, is_main: bool) -> tuple[StepColumns, StepColumns | None]:
        """The same in memory; what was left out goes to `data_report.json`, as of a stream."""
        train, report = self._read(self.train[0])
        held = self._read(self.evaluation[0])[0] if self.evaluation else None
        if held is not None and held.actions is None:
            raise ValueError("`eval_episodes` are held out, but they have no steps with an action and an instruction.")
        if is_main:
            write_json(Path(output_dir) / REPORT_FILE, report.to_dict(), indent=2)
            print(f"{Path(output_dir) / REPORT_FILE}: read {report.summary()}")
        return train, held

    def _read(self, source: ActionStepSource) -> tuple[StepColumns, DataReport]:
        part = ActionStepPart(source, ActionWindow(), False, 0, None, None)
        counts, args = part.new_counts(), self.script_args
        skipped = SkippedEpisodes(args.max_skipped)
        columns = action_steps(part, counts, skipped if args.on_error == "skip" else None)
        skipped.check()
        return columns, DataReport({part.name: counts}, {part.name: skipped})

    def set_statistics(self, processor: "LapaProcessor") -> None:
        """Gives the processor the bins (and the range of the states) of every key that it does not know yet."""
        args = self.script_args
        for key, entry in self.statistics.items():
            if args.action_bins is not None:
                processor.load_action_csv(args.action_bins, key)
            elif key not in processor.action_statistics:
                num_bins = processor.action_vocab_size if args.num_bins is None else args.num_bins
                processor.set_action_statistics(key, entry.action.tokenizer(num_bins, gripper_dimension(args)))
            if entry.proprio is not None and key not in processor.proprio_statistics:
                low, high = entry.proprio.quantile(RANGE_QUANTILES).tolist()
                processor.set_proprio_statistics(key, ProprioTokenizer(tuple(low), tuple(high)))


def gripper_dimension(script_args: FinetuneArguments) -> Any:
    """As `ActionTokenizer.fit` takes it."""
    value = script_args.gripper_dimension
    return value if value == "last" else None if value == "none" else int(value)


def open_action_data(script_args: FinetuneArguments, training_args: Any, use_proprio: bool) -> ActionData:
    """
    Opens the sources and goes through their actions once, or takes the statistics of an earlier run of this output folder.

    Raises:
        ValueError: No source has steps with an action and an instruction, or arguments that fit a single source only.
    """
    pairs = script_args.open_sources()
    log_warnings(pair.source for pair in pairs)
    if len(pairs) > 1 and (script_args.unnorm_key is not None or script_args.action_bins is not None):
        raise ValueError(
            "`unnorm_key` and `action_bins` are of a single data set; name each one's key in the mixture."
        )
    sources = [ActionStepSource(pair.source, pair.weight, pair.camera, script_args.unnorm_key) for pair in pairs]
    train, evaluation = [], []
    for source in sources:
        rest, held = hold_out_last(source.source, script_args.eval_episodes)
        train.append(replace(source, source=rest))
        if held is not None:
            evaluation.append(replace(source, source=held))
    return ActionData(script_args, train, evaluation, _statistics(train, script_args, training_args, use_proprio))


def _statistics(
    sources: list[ActionStepSource], script_args: FinetuneArguments, training_args: Any, use_proprio: bool
) -> dict[str, SourceStatistics]:
    folder = Path(training_args.output_dir) / STATISTICS_FOLDER
    parts = [ActionStepPart(source, ActionWindow(), use_proprio, 0, None, None) for source in sources]
    # Weights make no difference to them. Through JSON, as they are compared with what was read from it.
    made_of = json.loads(json.dumps([{**part.description(), "weight": None} for part in parts]))
    found = _saved_statistics(folder, made_of)
    # All or none: where each machine has files of its own, some processes may have found them and others not.
    everywhere = all(gather_object([found is not None]))
    if found is not None and everywhere:
        return found
    found = {}
    for source in sources:
        entry = _count_source(source, script_args, training_args, use_proprio)
        found[source.key] = found[source.key] + entry if source.key in found else entry
    if training_args.process_index == 0:
        _save_statistics(folder, made_of, found)
    return found


def _count_source(
    source: ActionStepSource, script_args: FinetuneArguments, training_args: Any, use_proprio: bool
) -> SourceStatistics:
    """Each process goes through its share of the shards, and all learn the sum."""
    rank, world_size = training_args.process_index, training_args.world_size
    shards = range(len(source.source.shards))[rank::world_size]
    skipped = SkippedEpisodes(script_args.max_skipped)
    progress = tqdm(
        shards, desc=f"actions of {source.name}", unit="file", disable=rank > 0 or training_args.disable_tqdm
    )
    mine = source_statistics(
        source.source,
        skipped if script_args.on_error == "skip" else None,
        progress,
        camera=source.chosen_camera,
        with_proprio=use_proprio,
    )
    gathered = gather_object([(mine, skipped_state(skipped))])
    total_skipped = SkippedEpisodes(script_args.max_skipped)
    for _, state in gathered:
        restore_skipped(total_skipped, state)
    total_skipped.check()
    shares = [entry for entry, _ in gathered if entry is not None]
    if not shares:
        state = " and a state of the robot" if use_proprio else ""
        raise ValueError(
            f"`data` ({source.name}) has no actions to finetune on: no episode has actions{state}, an instruction and "
            f"frames of camera {source.chosen_camera!r}."
        )
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    return total


def _save_statistics(folder: Path, made_of: Any, found: dict[str, SourceStatistics]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    keys = {}
    for number, (key, entry) in enumerate(found.items()):
        keys[key] = {name: value.to_dict() for name, value in entry._asdict().items() if value is not None}
        for name, value in entry._asdict().items():
            if value is not None:
                value.save(folder / f"{number:03d}_{name}.npz")
    # Last: the files before it are complete then.
    write_json(folder / STATISTICS_FILE, {"sources": made_of, "keys": keys}, indent=2)


def _saved_statistics(folder: Path, made_of: Any) -> dict[str, SourceStatistics] | None:
    """Those of an earlier run, where they are of the same sources."""
    try:
        content = json.loads((folder / STATISTICS_FILE).read_text(encoding="utf-8"))
        if content["sources"] != made_of:
            return None
        found = {}
        for number, (key, names) in enumerate(content["keys"].items()):
            entries = {name: ActionStatistics.load(folder / f"{number:03d}_{name}.npz") for name in names}
            found[key] = SourceStatistics(**entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    logger.info("The statistics of the actions are those of %s.", folder)
    return found


__all__ = ["MAX_CACHED_STEPS", "ActionData", "gripper_dimension", "open_action_data"]
