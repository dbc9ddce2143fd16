"""The scorer's page of a real-robot evaluation: never a word of which policy plays."""

from typing import Any

from lapa.evaluation import report
from lapa.evaluation.robot_session import RobotSession
from lapa.evaluation.robot_session_file import type_title

NOTHING = "nothing of these"


def stage(session: RobotSession) -> str:
    """What the page shows: `paused`, `ended`, `complete`, `prepare` (the scene is to be set) or `score`."""
    state = session.state
    if state.ended:
        return "ended"
    if state.paused:
        return "paused"
    if session.current is None:
        return "complete"
    return "score" if state.started else "prepare"


def page_state(session: RobotSession) -> dict[str, str]:
    """What a page that is open asks for: `version` changes when it must load anew, `robot` is a line of text."""
    with session.steady() as state:
        numbers = (len(state.scores), state.undone, sum(state.repeats.values()))
        return {"version": "-".join(map(str, (*numbers, stage(session)))), "robot": _robot_line(session)}


def _robot_line(session: RobotSession) -> str:
    state, run = session.state, session.current
    if run is None or not state.started:
        return ""
    if state.finished:
        return "The robot has finished this run."
    if session.taken == (run.name, state.repeats.get(run.name, 0)):
        return "The robot’s program has taken this run."
    return "The robot’s program has not asked for this run yet."


def render_page(session: RobotSession, token: str, nonce: str, message: str = "") -> str:
    """
    The page as HTML.

    Args:
        session: What is scored.
        token: For the forms.
        nonce: Of the page's own style and script.
        message: What went wrong with the last request, shown on top.
    """
    with session.steady() as state:
        run, done = session.current, len(state.scores)
        credits = [] if run is None else session.session.credits[run.trial.task]
        last = None
        if done:
            before, score = session.runs[done - 1], state.scores[-1]
            texts = {credit.score: credit.text for credit in session.session.credits[before.trial.task]}
            last = {"run": before, "score": score.score, "text": texts.get(score.score, NOTHING), "note": score.note}
        context: dict[str, Any] = {
            "name": session.session.name,
            "stage": stage(session),
            "run": run,
            "kind": "" if run is None else type_title(run.trial.kind),
            "choices": [{"score": 0.0, "text": NOTHING}, *({"score": c.score, "text": c.text} for c in credits)],
            "num_done": done,
            "num_runs": len(session.runs),
            "num_positions": len(session.session.trials),
            "num_policies": len(session.session.policies),
            "last": last,
            "repeats": 0 if run is None else state.repeats.get(run.name, 0),
            "live": page_state(session),
            "new_position": run is not None and run.label == "A",
        }
    return report.render("robot_session.html", **context, token=token, nonce=nonce, message=message)


__all__ = ["page_state", "render_page", "stage"]
