"""`lapa report-quantizer`: is a latent action quantizer good?"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from lapa.evaluation.quantizer_report import DEFAULT_MAX_PAIRS, measure_quantizer
from lapa.evaluation.quantizer_report_sample import TARGETS
from lapa.evaluation.quantizer_report_verdict import LEVELS, reaches
from lapa.training.script_arguments import SourceArguments
from lapa.training.script_tools import check_checkpoint
from lapa.training.scripts import make_parser
from lapa.training.trained_settings import open_as_trained, read_training_settings


@dataclass(kw_only=True)
class ReportArguments(SourceArguments):
    """
    Arguments of `lapa report-quantizer`, beside those of `SourceArguments`.

    What is said of the source nowhere is as the quantizer was trained (`training_settings.json` beside it).

    Args:
        model (`str`): Quantizer folder.
        output (`str`): Folder to write `report.html` and `report.json` into.
        max_pairs (`int`): Pairs to measure on, over all sources.
        last_episodes (`int`, *optional*): Only so many of the last episodes of each source: those that
            `lapa train-quantizer --eval_episodes` holds out.
        target (`str`): What the codes are probed for: `action` (mean over the pair), or where actions are positions rather
            than motions their change, `action_change`, or that of the state, `proprio_change`.
        seed (`int`): Of the pairs that are drawn.
        batch_size (`int`): Pairs at a time.
        device (`str`, *optional*): Where the quantizer runs; a GPU if there is one.
        fail_below (`str`, *optional*): Verdict below which the exit code is 1: `usable` or `good`.
    """

    model: str = field(metadata={"help": "Quantizer folder."})
    output: str = field(metadata={"help": "Folder to write."})
    max_pairs: int = field(default=DEFAULT_MAX_PAIRS, metadata={"help": "Pairs to measure on."})
    last_episodes: int | None = field(default=None, metadata={"help": "Only the last episodes (held out)."})
    target: str = field(default="action", metadata={"help": "What codes are probed for.", "choices": list(TARGETS)})
    seed: int = field(default=0, metadata={"help": "Of the pairs that are drawn."})
    batch_size: int = field(default=32, metadata={"help": "Pairs at a time."})
    device: str | None = field(default=None, metadata={"help": "Where the quantizer runs."})
    fail_below: str | None = field(
        default=None, metadata={"help": "Exit with 1 below this verdict.", "choices": list(LEVELS[1:])}
    )

    def __post_init__(self) -> None:
        for name, least in (("max_pairs", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` must be raise or skip, got {self.on_error!r}.")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command.

    Returns:
        0, or 1 where the verdict is below `--fail_below`.

    Raises:
        ValueError: Bad input.
    """
    (arguments,) = make_parser((ReportArguments,), "lapa report-quantizer").parse_args_and_config(argv)
    return run_report(arguments)


def run_report(arguments: ReportArguments) -> int:
    """Measures, writes, and prints the verdict."""
    import torch

    from lapa.data.episode_source import SkippedEpisodes, raise_error
    from lapa.evaluation.quantizer_report_measures import Runner
    from lapa.evaluation.quantizer_report_page import write_report
    from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer

    check_checkpoint(arguments.model, "lapa_quantizer")
    if Path(arguments.output).is_file():
        raise ValueError(f"`output` is a file: {arguments.output}.")
    sources, notes = open_as_trained(arguments, read_training_settings(arguments.model))
    for note in notes:
        print(f"note: {note}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    quantizer = LapaQuantizer.from_pretrained(arguments.model).to(device).eval()
    runner = Runner(quantizer, device, next(quantizer.parameters()).dtype, arguments.batch_size)
    measured = measure_quantizer(
        runner,
        sources,
        arguments.max_pairs,
        arguments.seed,
        arguments.target,
        arguments.last_episodes,
        SkippedEpisodes(arguments.max_skipped) if arguments.on_error == "skip" else raise_error,
    )
    measured.report = {
        "model": arguments.model,
        "data": arguments.data,
        "notes": notes + [warning for source in sources for warning in source.source.warnings],
        "command": command_line(arguments),
        **measured.report,
    }
    path = write_report(measured, arguments.output)
    verdict = measured.report["verdict"]
    print(f"{path}: {verdict['level']}")
    for reason in verdict["reasons"]:
        print(f"  {reason}")
    return int(arguments.fail_below is not None and not reaches(verdict["level"], arguments.fail_below))


def command_line(arguments: ReportArguments) -> str:
    """The command that makes the same report."""
    parts = ["lapa report-quantizer"]
    for item in fields(arguments):
        value = getattr(arguments, item.name)
        if value is not None and value != item.default:
            parts.append(f"--{item.name} {shlex.quote(str(value))}")
    return " ".join(parts)
