"""`lapa evaluate`: success of a policy in closed loop, with intervals.

    lapa evaluate --suite tabletop --policy expert --output outputs/expert
    lapa evaluate --suite tabletop-demo --policy outputs/demo/lapa --do-sample --output outputs/lapa
    lapa evaluate --suite tabletop --policy http://localhost:8000 --output outputs/remote   # OpenVLA's /act protocol
    lapa evaluate --compare outputs/lapa outputs/scratch --output outputs/comparison
    lapa evaluate --suite tabletop-table1 --output outputs/table1   # trains and plays eight methods

Writes `report.json`, `report.md`, `report.html` and GIFs of the first episodes of every cell. Interrupted or killed, it goes on
where it stopped when it is started again, with the same result; interrupted by Ctrl-C or SIGTERM, it prints the table so far.
"""

import argparse
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa evaluate`."""
    parser = parser_class(
        prog="lapa evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", help="name of a suite, or a YAML file")
    parser.add_argument(
        "--policy", help="model folder or Hub name, expert, do_nothing, random, or the URL of a server"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="DIR", help="compare finished evaluations instead")
    parser.add_argument("--rollouts", type=int, help="episodes per cell; the suite's own number by default")
    parser.add_argument("--seed", type=int, default=0, help="of a sampling policy's draws")
    parser.add_argument("--unnorm-key", help="which action statistics of the model")
    parser.add_argument("--do-sample", action="store_true", help="sample actions instead of choosing greedily")
    parser.add_argument("--temperature", type=float, help="with --do-sample")
    parser.add_argument("--replan-every", type=int, help="steps played of a predicted chunk; all of them by default")
    parser.add_argument("--device", help="of the model; a GPU if there is one")
    parser.add_argument("--num-environments", type=int, default=50, help="played side by side")
    parser.add_argument(
        "--num-processes",
        type=int,
        help="processes of the environments, which a crash or hang of one does not reach; 0 plays them in this one. By "
        "default what the suite says, or one per core where the environment may crash or hang",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        help="seconds after which an environment hangs (not noticed by 0 processes)",
    )
    parser.add_argument("--num-shown", type=int, default=2, help="episodes per cell kept as GIF")
    parser.add_argument("--no-baseline", action="store_true", help="do not play do_nothing on the same starts")
    parser.add_argument("--list", action="store_true", help="name the suites and studies and end")
    from lapa.evaluation.study_cli import add_study_arguments

    add_study_arguments(parser)
    return parser


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run with command-line arguments."""
    arguments = list(arguments or ())
    if "--list" in arguments:
        from lapa.evaluation.study import study_names
        from lapa.evaluation.suites import suite_names

        print("\n".join([*suite_names(), *(f"{name} (trains what it compares)" for name in study_names())]))
        return 0
    args = make_parser(parser_class).parse_args(arguments)
    if args.compare is not None:
        from lapa.evaluation.comparison import write_comparison

        if args.suite or args.policy:
            raise ValueError("`compare` takes finished evaluations; `suite` and `policy` do not apply.")
        return write_comparison(args.compare, args.output)
    from lapa.evaluation.study import is_study
    from lapa.evaluation.study_cli import refuse_study_arguments, run_study
    from lapa.evaluation.suites import suite_names

    # A suite and a study may share a name: what plays a policy that is there, and what trains those it compares.
    plays = args.policy and args.suite in suite_names()
    if args.suite and is_study(args.suite) and not plays:
        return run_study(args)
    refuse_study_arguments(args)
    if not args.suite or not args.policy:
        missing = "suite" if not args.suite else "policy"
        raise ValueError(f"`{missing}` must be given (or `compare`).")
    return _evaluate(args)


def _evaluate(args: argparse.Namespace) -> int:
    from lapa.evaluation.evaluate import Evaluation, EvaluationSettings
    from lapa.evaluation.evaluation_report import print_table, write_report
    from lapa.evaluation.policies import DO_NOTHING, open_policy
    from lapa.evaluation.suites import load_suite

    suite = load_suite(args.suite)
    settings = EvaluationSettings(
        args.rollouts, args.num_environments, args.num_processes, args.timeout, args.seed, args.num_shown
    )
    policy = open_policy(
        args.policy,
        suite.action_dim(),
        args.unnorm_key,
        args.device,
        args.replan_every,
        suite.action_bounds(),
        do_sample=args.do_sample or None,
        temperature=args.temperature,
    )
    evaluation = Evaluation(suite, policy, args.output, settings)
    baseline: Evaluation | None = None
    if not args.no_baseline and args.policy != DO_NOTHING:
        still = open_policy(DO_NOTHING, suite.action_dim())
        options: dict[str, Any] = {**vars(settings), "num_shown": 0}
        baseline = Evaluation(suite, still, args.output / DO_NOTHING, EvaluationSettings(**options))
    try:
        with _terminated_as_interrupted():
            evaluation.run()
            if baseline is not None:
                baseline.run()
    except KeyboardInterrupt as interrupt:
        print_table(evaluation.report(), None if baseline is None else baseline.report())
        print(f"interrupted; the same command goes on where it stopped, with what is in {args.output}", flush=True)
        if isinstance(interrupt, Terminated):
            return 128 + signal.SIGTERM
        raise
    report = write_report(evaluation, baseline)
    print_table(report, report.get(DO_NOTHING))
    print(args.output / "report.html")
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, as from a scheduler whose time is over."""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Raises `Terminated` on SIGTERM, where signals can be handled at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: Any) -> None:
        raise Terminated

    earlier = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


__all__ = ["main", "make_parser"]
