"""`lapa robot-session`: policies on a real robot, scored blind by partial credit.

    lapa robot-session --example > session.yaml                              # the paper's protocol, to be edited
    lapa robot-session --session session.yaml --output outputs/robot         # the scorer's page and the robot's interface
    lapa robot-session --session session.yaml --output outputs/robot --report
    lapa robot-session --session session.yaml --output outputs/robot --report --end-early

Serves a page on this machine, on which a person sets scenes and scores runs without knowing which policy plays; the robot's
program learns it at `/next`. Every score is on the disk before it is shown: killed, the same command goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lapa.evaluation.robot_session import RobotSession


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa robot-session`."""
    parser = parser_class(
        prog="lapa robot-session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--session", type=Path, help="session file (YAML)")
    parser.add_argument("--output", type=Path, help="folder of the session; the same one goes on")
    parser.add_argument(
        "--port", type=int, default=8080, help="of the page and the robot's interface; 0 takes a free one"
    )
    parser.add_argument("--example", action="store_true", help="print a session file and end")
    parser.add_argument("--report", action="store_true", help="end a session that is scored, and write its report")
    parser.add_argument("--end-early", action="store_true", help="with --report: end it though runs are missing")
    return parser


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run with command-line arguments."""
    args = make_parser(parser_class).parse_args(list(arguments or ()))
    if args.example:
        from lapa.evaluation.robot_session_file import example_session

        print(example_session(), end="")
        return 0
    for name in ("session", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` must be given (or `example`).")
    if args.end_early and not args.report:
        raise ValueError("`end_early` goes with `report`.")
    from lapa.evaluation.robot_session import SETTINGS_FILE, RobotSession
    from lapa.evaluation.robot_session_file import load_session

    if args.report and not (args.output / SETTINGS_FILE).is_file():
        raise ValueError(f"`output` ({args.output}) holds no session.")
    with RobotSession(load_session(args.session), args.output) as session:
        return _report(session, args.end_early) if args.report else _serve(session, args.port)


def _report(session: "RobotSession", early: bool) -> int:
    from lapa.evaluation.robot_session import NotNow
    from lapa.evaluation.robot_session_report import session_markdown, session_report, write_session_report

    try:
        session.end(early)
    except NotNow as error:
        raise ValueError(f"{error} `end_early` ends the session here; nothing can be scored after that.") from error
    page = write_session_report(session)
    print(session_markdown(session_report(session)))
    print(page)
    return 0


def _serve(session: "RobotSession", port: int) -> int:
    from lapa.evaluation.robot_session import TOKEN_FILE
    from lapa.evaluation.robot_session_report import write_session_report
    from lapa.evaluation.robot_session_server import SessionServer

    with SessionServer(session, port, lambda: write_session_report(session)) as server:
        print(f"scorer's page:     {server.url}")
        print(f"robot's interface: {server.url}next")
        print(f"robot's token:     {session.robot_token}   (also in {session.output / TOKEN_FILE})")
        print(
            f"{len(session.state.scores)} of {len(session.runs)} runs are scored; Ctrl-C stops, the same command goes on",
            flush=True,
        )
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on")
    return 0


__all__ = ["main", "make_parser"]
