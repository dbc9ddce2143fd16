"""`lapa evaluate --suite STUDY`: trains and plays what a study compares."""

import argparse
import os
import signal
from pathlib import Path


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that only a study takes."""
    group = parser.add_argument_group("studies", "suites that train what they compare; they take no --policy")
    group.add_argument("--quick", action="store_true", help="the small variant")
    group.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="training seeds; the study's by default")
    group.add_argument("--methods", nargs="+", metavar="METHOD", help="a part of the study's methods, or others")
    group.add_argument("--jobs", type=int, help="jobs at a time, each on one core; all cores by default")
    group.add_argument(
        "--simulators",
        type=int,
        help="processes in which a job in MetaWorld records and plays; 1 by default, results are the same",
    )
    group.add_argument(
        "--stages", type=Path, help="folder of finished jobs, which studies may share; OUTPUT/stages by default"
    )


def refuse_study_arguments(args: argparse.Namespace) -> None:
    """Says which argument of a study was given to a suite that trains nothing."""
    for name in ("quick", "seeds", "methods", "jobs", "simulators", "stages"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}` applies to studies only, which take no `policy`; {args.suite!r} with "
                f"`policy` {args.policy!r} is none."
            )


def run_study(args: argparse.Namespace) -> int:
    """
    Does what is left of a study and writes its report.

    Raises:
        ValueError: `--policy`, a number of jobs or simulators below 1, or settings of which there is no model.
    """
    from lapa.evaluation.study import load_study
    from lapa.evaluation.study_checks import check_models
    from lapa.evaluation.study_plan import Machine, Plan
    from lapa.evaluation.study_report import markdown, write_study_report
    from lapa.evaluation.study_runner import Runner, locked

    if args.policy:
        raise ValueError(f"`policy` ({args.policy}) does not apply: the study {args.suite} trains its own.")
    jobs = (os.cpu_count() or 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {jobs}.")
    simulators = 1 if args.simulators is None else args.simulators
    if simulators < 1:
        raise ValueError(f"`simulators` must be at least 1, got {simulators}.")
    study = load_study(args.suite, args.quick, seeds=args.seeds, methods=args.methods)
    check_models(study)
    plan = Plan(study)
    stages = args.stages or args.output / "stages"
    with locked(stages):
        runner = Runner(plan, stages, jobs, Machine(args.device or "cpu", simulators))
        earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            runner.run()
        except KeyboardInterrupt:
            print(markdown(write_study_report(plan, stages, args.output)))
            print(f"interrupted; the same command goes on where it stopped, with what is in {stages}", flush=True)
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)
    print(markdown(write_study_report(plan, stages, args.output)))
    for label, error in runner.failed.items():
        print(f"failed: {label}: {error}")
    print(args.output / "report.html")
    return 1 if runner.failed else 0


__all__ = ["add_study_arguments", "run_study"]
