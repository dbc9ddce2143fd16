"""The command line: `lapa <command>`."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError

import lapa


class OneLineParser(argparse.ArgumentParser):
    """A parser, and through it its sub-parsers, whose errors are raised: `main` prints one line, no usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse on bad arguments."""
        raise ValueError(message)


class Command(NamedTuple):
    """Where a command lives: `function(arguments)` in `module`, imported when the command runs.

    With `uses_argparse` the function also takes the `parser_class` to parse its arguments with.
    """

    module: str
    function: str
    help: str
    uses_argparse: bool = False


COMMANDS = {
    "inspect": Command("lapa.data.inspect_cli", "main", "what is in a data set, and what a reader would skip", True),
    "convert": Command("lapa.conversion.cli", "main", "published checkpoints to Hugging Face folders", True),
    "train-quantizer": Command("lapa.training.scripts", "train_quantizer", "stage 1: learn latent actions from video"),
    "label": Command("lapa.training.scripts", "label", "label video with latent actions"),
    "report-quantizer": Command(
        "lapa.evaluation.quantizer_report_cli", "main", "is a quantizer good? numbers, pictures and a verdict"
    ),
    "pretrain": Command("lapa.training.scripts", "pretrain", "stage 2: learn to predict latent actions"),
    "finetune": Command("lapa.training.scripts", "finetune", "stage 3: learn robot actions (fully or with LoRA)"),
    "train-decoder": Command(
        "lapa.evaluation.decoder_cli", "main", "few labels: decode a latent-pretrained model's codes to actions", True
    ),
    "evaluate": Command(
        "lapa.evaluation.evaluate_cli", "main", "closed-loop success of a policy, with intervals", True
    ),
    "robot-session": Command(
        "lapa.evaluation.robot_session_cli", "main", "policies on a real robot, scored blind by partial credit", True
    ),
    "imagine": Command(
        "lapa.evaluation.imagine_cli",
        "main",
        "neural rollouts: the quantizer's decoder draws what a policy would do",
        True,
    ),
    "export": Command("lapa.hub_cards.cli", "main", "a folder ready for the Hub: weights, remote code, card", True),
    "demo": Command(
        "lapa.evaluation.demo", "main", "all three stages and closed loop, in a simulator or on real data", True
    ),
}


def usage() -> str:
    """The text of `lapa --help`."""
    lines = ["usage: lapa <command> [options]", "", "Latent action pretraining: from video to robot policies.", ""]
    lines += [f"  {name:<16} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "`lapa <command> --help` explains a command."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Command and options; `sys.argv[1:]` when None.

    Returns:
        The exit code: 0, 1 where a command says so, 2 on bad input (with one line on standard error).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lapa {lapa.__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        print(f"lapa: unknown command {arguments[0]!r}; accepted: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    options: dict[str, Any] = {"parser_class": OneLineParser} if command.uses_argparse else {}
    try:
        return getattr(importlib.import_module(command.module), command.function)(arguments[1:], **options) or 0
    except (ValueError, OSError, ImportError, StrictDataclassError, HfHubHTTPError) as error:
        print(f"lapa {arguments[0]}: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"lapa {arguments[0]}: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """An error's message on one line, with what was wrong rather than where a validator stood."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    return " ".join(str(cause).split()) or type(cause).__name__


if __name__ == "__main__":
    sys.exit(main())
