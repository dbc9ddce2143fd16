"""Sessions of a real robot: order, log, scoring, report; the page and the robot's interface without a browser."""

import http.client
import itertools
import json
import threading
import urllib.parse

import numpy as np
import pytest

from lapa.cli import main
from lapa.evaluation.robot_session import NotNow, RobotSession
from lapa.evaluation.robot_session_file import example_session, load_session
from lapa.evaluation.robot_session_order import counterbalanced_orders, williams_square
from lapa.evaluation.robot_session_policy import BlindPolicy
from lapa.evaluation.robot_session_report import session_report, write_session_report
from lapa.evaluation.robot_session_server import SessionServer

SECRETS = ("secret-alpha", "secret-beta", "models/alpha-folder", "models/beta-folder", "franka")
SESSION = """
name: kitchen
rollouts: 2
seed: 5
policies:
  secret-alpha: models/alpha-folder
  secret-beta: {location: models/beta-folder, unnorm_key: franka}
tasks:
  pick:
    credits: {0.25: reaches it, 0.5: grasps it, 0.75: moves it, 1: it lies in the box}
    types:
      unseen_objects: {instruction: pick the lemon into the box, positions: [lemon left, {text: lemon right}]}
  knock:
    credits: {0.5: reaches it, 1: it lies}
    types:
      unseen_instructions: {instructions: [knock over what one drinks from, knock over the toy]}
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "session.yaml"
    path.write_text(SESSION)
    return path


@pytest.fixture
def session(path, tmp_path):
    with RobotSession(load_session(path), tmp_path / "out") as session:
        yield session


def play(session, score, note=""):
    run = session.current
    session.start(run.name)
    session.score(run.name, score, note)
    return run


# The order of play


@pytest.mark.parametrize("count", range(1, 8))
def test_every_policy_has_every_place_and_follows_every_other_equally_often(count):
    square = williams_square(count)
    for place in range(count):
        assert sorted(row[place] for row in square) == sorted(list(range(count)) * (len(square) // count))
    followers = [pair for row in square for pair in itertools.pairwise(row)]
    assert {followers.count(pair) for pair in itertools.permutations(range(count), 2)} <= {len(square) // count}
    orders = counterbalanced_orders(count, 54, seed=3)
    counts = [[sum(row[place] == policy for row in orders) for policy in range(count)] for place in range(count)]
    assert max(map(max, counts)) - min(map(min, counts)) <= 1
    # A block balances the places, so that 6 rollouts of a task and type do for 1, 2, 3 and 6 policies.
    for start in range(0, 54 - 54 % count, count):
        assert all(len({row[place] for row in orders[start : start + count]}) == count for place in range(count))


def test_the_seed_alone_draws_the_order():
    assert counterbalanced_orders(3, 20, 7) == counterbalanced_orders(3, 20, 7)
    assert counterbalanced_orders(3, 20, 7)[:9] == counterbalanced_orders(3, 9, 7)
    assert len({str(counterbalanced_orders(3, 20, seed)) for seed in range(20)}) == 20
    firsts = [counterbalanced_orders(3, 1, seed)[0][0] for seed in range(300)]
    assert all(70 < firsts.count(policy) < 130 for policy in range(3))


def test_all_policies_play_a_position_before_the_next_one(session):
    assert [run.name for run in session.runs] == ["001A", "001B", "002A", "002B", "003A", "003B", "004A", "004B"]
    for position in range(4):
        pair = session.runs[2 * position : 2 * position + 2]
        assert pair[0].trial == pair[1].trial
        assert {run.policy.name for run in pair} == {"secret-alpha", "secret-beta"}
    assert [run.trial.position for run in session.runs[::2]] == ["lemon left", "lemon right", "", ""]
    assert session.runs[6].trial.instruction == "knock over the toy"


def test_without_a_seed_the_order_is_drawn_once_and_kept(path, tmp_path):
    path.write_text(SESSION.replace("seed: 5\n", ""))
    with RobotSession(load_session(path), tmp_path / "out") as session:
        seed, runs = session.seed, session.runs
    with RobotSession(load_session(path), tmp_path / "out") as session:
        assert (session.seed, session.runs) == (seed, runs)
    with RobotSession(load_session(path), tmp_path / "other") as session:
        assert session.seed != seed


# Scoring


def test_a_run_is_started_scored_taken_back_and_repeated(session):
    with pytest.raises(NotNow, match="001A is not started yet"):
        session.score("001A", 1)
    assert session.robot_view() == {"status": "wait", "reason": "scene"}
    session.start("001A")
    with pytest.raises(NotNow, match="it is the turn of 001A"):
        session.score("001B", 1)
    with pytest.raises(ValueError, match=r"must be one of 0, 0.25, 0.5, 0.75, 1, got 0.3"):
        session.score("001A", 0.3)
    with pytest.raises(ValueError, match="at most 2000 characters"):
        session.score("001A", 0.5, "x" * 2001)
    with pytest.raises(NotNow, match="under way|no score"):
        session.undo()
    session.repeat("001A")
    assert session.robot_view()["reason"] == "scene"
    session.start("001A")
    assert (session.robot_view()["run"], session.robot_view()["attempt"]) == ("001A", 1)
    session.score("001A", 0.5, "slipped")
    assert session.current.name == "001B"
    session.start("001B")
    with pytest.raises(NotNow, match="under way"):
        session.undo()
    session.score("001B", 0)
    session.undo()
    assert session.current.name == "001B"
    # The robot must not play again what was played.
    assert session.robot_view() == {"status": "wait", "reason": "score"}
    session.score("001B", 0.75)
    assert [score.score for score in session.state.scores] == [0.5, 0.75]
    assert (session.state.undone, session.state.repeats) == (1, {"001A": 1})
    session.pause()
    assert session.robot_view() == {"status": "wait", "reason": "paused"}
    with pytest.raises(NotNow, match="paused"):
        session.start("002A")
    session.resume()
    with pytest.raises(NotNow, match="2 of 8 runs are scored"):
        session.end()


def test_every_event_is_on_the_disk_before_it_counts(session, path, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", synced.append)
    play(session, 0.5, "a note\nof two lines")
    assert len(synced) == 2
    monkeypatch.undo()
    play(session, 1)
    session.start("002A")
    session.pause()
    session.close()
    log = tmp_path / "out" / "events.jsonl"
    # As a kill in the middle of a write leaves it.
    with log.open("ab") as file:
        file.write(b'{"event": "score", "run": "002A", "sc')
    with RobotSession(load_session(path), tmp_path / "out") as again:
        assert again.state == session.state
        assert again.state.scores[0].note == "a note\nof two lines"
        assert (again.current.name, again.state.started, again.state.paused) == ("002A", True, True)
    assert log.read_bytes().endswith(b"}\n")
    assert not any(secret in log.read_text() for secret in SECRETS)


def test_other_sessions_and_other_programs_are_refused(session, path, tmp_path):
    with pytest.raises(ValueError, match="is open in another"):
        RobotSession(load_session(path), tmp_path / "out")
    session.close()
    path.write_text(SESSION.replace("lemon left", "lemon far left"))
    with pytest.raises(ValueError, match="another trials"):
        RobotSession(load_session(path), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        RobotSession(load_session(path), tmp_path / "full")


def test_a_model_that_changes_meanwhile_is_refused(path, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"a" * 100)
    path.write_text(SESSION.replace("models/alpha-folder", str(model)))
    RobotSession(load_session(path), tmp_path / "out").close()
    RobotSession(load_session(path), tmp_path / "out").close()
    (model / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    with pytest.raises(ValueError, match="policy number 1 of the session changed"):
        RobotSession(load_session(path), tmp_path / "out")


# The session file


def test_the_example_is_the_papers_protocol(tmp_path, capsys):
    assert main(["robot-session", "--example"]) == 0
    text = capsys.readouterr().out
    assert text == example_session()
    (tmp_path / "example.yaml").write_text(text)
    session = load_session(tmp_path / "example.yaml")
    assert len(session.trials) == 54
    assert {(trial.task, trial.kind) for trial in session.trials} == set(
        itertools.product(("knock", "cover", "pick"), ("unseen_combinations", "unseen_objects", "unseen_instructions"))
    )
    scores = {task: [credit.score for credit in steps] for task, steps in session.credits.items()}
    assert scores == {"knock": [0.5, 1], "cover": [0.33, 0.66, 1], "pick": [0.25, 0.5, 0.75, 1]}
    assert session.published["LAPA (Open-X)"] == 50.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seed: 5", "seed: -1"), "`seed` must be a whole number from 0"),
        (("rollouts: 2", "rollouts: 0"), "`rollouts` must be a whole number from 1"),
        (("policies:", "polices:"), "the file` must be a mapping with policies, tasks"),
        (("unnorm_key: franka", "unnorm: franka"), "`policies.secret-beta` must be a mapping with location"),
        (("unnorm_key: franka", "replan_every: two"), "`policies.secret-beta.replan_every` must be of type int"),
        (("0.25: reaches it, ", "1.5: reaches it, "), "`tasks.pick.credits` must be scores in"),
        (("1: it lies}", "0.9: it lies}"), "`tasks.knock.credits` must be scores in"),
        (("[lemon left, {text: lemon right}]", "[lemon left]"), "`tasks.pick.types.unseen_objects.positions` must be a list of 2"),
        (("knock over the toy]", "knock over the toy, knock]"), "divides 2 rollouts, got 3"),
        (("{text: lemon right}", "{photo: no.jpg}"), "a photo of the session does not exist"),
        (("{text: lemon right}", "{photo: session.yaml}"), "neither PNG nor JPEG"),
        (("instruction: pick", "sentence: pick"), "unseen_objects"),
        (("name: kitchen", "name: [kitchen"), "is no YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_session_file_is_named(change, message, path, tmp_path, capsys):
    assert change[0] in SESSION
    path.write_text(SESSION.replace(*change, 1))
    assert main(["robot-session", "--session", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# The report


def scored(session):
    """Alpha: pick 1, 0.5; knock 1, 1. Beta: pick 0.25, 0.5; knock 0, 0.5."""
    credits = {"secret-alpha": iter((1, 0.5, 1, 1)), "secret-beta": iter((0.25, 0.5, 0, 0.5))}
    while (run := session.current) is not None:
        play(session, next(credits[run.policy.name]))


def test_the_report_has_the_numbers_of_a_session_counted_by_hand(session, tmp_path):
    scored(session)
    with pytest.raises(NotNow, match="would tell which policy is which"):
        write_session_report(session)
    session.end()
    report = session_report(session)
    alpha, beta = report["policies"]["secret-alpha"], report["policies"]["secret-beta"]
    assert alpha["all"]["credit"]["value"] == 3.5 / 4
    assert alpha["all"]["full"] | {"ci95": None} == {"successes": 3, "rollouts": 4, "success": 0.75, "ci95": None}
    # Wilson's interval of 3 of 4.
    assert alpha["all"]["full"]["ci95"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    assert beta["tasks"]["pick"]["credit"]["value"] == 0.375
    assert beta["cells"]["knock"]["unseen_instructions"]["credit"]["value"] == 0.25
    # All 1: no spread was seen, and Wilson's interval of 2 of 2 remains.
    assert alpha["tasks"]["knock"]["credit"]["ci95"] == pytest.approx([0.3424, 1.0], abs=1e-4)
    compared = report["comparisons"]["secret-alpha against secret-beta"]
    assert [compared["all"][key] for key in ("positions", "wins", "ties", "losses", "win_rate")] == [4, 3, 1, 0, 0.875]
    # Differences 0.75, 0, 1, 0.5; three of three: 2 * (1/2)^3.
    assert compared["all"]["difference"]["value"] == pytest.approx(0.5625)
    assert compared["all"]["sign_test_p"] == pytest.approx(0.25)
    assert (compared["all"]["full"]["wins"], compared["all"]["full"]["mcnemar_p"]) == (3, 0.25)
    assert (compared["types"]["unseen_objects"]["wins"], compared["tasks"]["knock"]["losses"]) == (1, 0)
    assert {place: sum(entry["runs"].values()) for place, entry in report["places"].items()} == {"A": 4, "B": 4}
    assert all(count == 2 for entry in report["places"].values() for count in entry["runs"].values())
    page = write_session_report(session)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "| secret-alpha against secret-beta | 3 / 1 / 0 |" in (tmp_path / "out" / "report.md").read_text()
    assert "secret-alpha" in page.read_text() and "3 / 1 / 0" in page.read_text()
    with pytest.raises(NotNow, match="is ended"):
        session.undo()


def test_the_command_reveals_names_only_of_an_ended_session(session, path, tmp_path, capsys):
    arguments = ["robot-session", "--session", str(path), "--output", str(tmp_path / "out"), "--report"]
    play(session, 0.5)
    play(session, 1)
    play(session, 1)
    session.close()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "3 of 8 runs are scored" in error and not any(secret in error for secret in SECRETS)
    assert not (tmp_path / "out" / "report.json").exists()
    assert main([*arguments, "--end-early"]) == 0
    assert "ended before all runs were scored" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # The run whose partner is missing is in the means and in no pair.
    assert (report["complete"], report["runs"]) == (False, 3)
    assert report["comparisons"]["secret-alpha against secret-beta"]["all"]["positions"] == 1
    assert main([*arguments[:-1], "--report", "--output", str(tmp_path / "none")]) == 2
    assert "holds no session" in capsys.readouterr().err


# The page and the robot's interface


@pytest.fixture
def server(session):
    server = SessionServer(session, 0, lambda: write_session_report(session))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, method, path, form=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    body = None if form is None else urllib.parse.urlencode(form) if isinstance(form, dict) else form
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read().decode()
    told = str(response.headers)
    connection.close()
    return response.status, content, told


def press(server, path, **form):
    run = server.session.current
    return ask(server, "POST", path, {"token": server.form_token, "run": run.name if run else "", **form})


def robot(server):
    return {"Authorization": f"Bearer {server.session.robot_token}"}


def test_nothing_that_a_browser_is_sent_says_who_plays(server):
    session, answers, labels = server.session, [], {}
    while (run := session.current) is not None:
        labels.setdefault(run.label, set()).add(run.policy.name)
        answers += [
            ask(server, "GET", path) for path in ("/", "/state", "/photo/1", "/next", "/report", "/session.json")
        ]
        answers += [press(server, "/start"), ask(server, "GET", "/"), press(server, "/score", score="0.3")]
        assert json.loads(ask(server, "GET", "/next", **robot(server))[1])["policy"] == run.policy.location
        answers += [press(server, "/pause"), ask(server, "GET", "/"), press(server, "/resume")]
        answers += [
            press(server, "/score", score="0.5", note="n"),
            press(server, "/undo"),
            ask(server, "GET", "/state"),
        ]
        answers += [press(server, "/score", score="0")]
    answers.append(ask(server, "GET", "/"))
    assert len(answers) == 8 * 16 + 1
    for status, content, headers in answers:
        assert not any(secret in content or secret in headers for secret in SECRETS), (status, content)
    # The letters mean both policies, now and then.
    assert labels == {"A": {"secret-alpha", "secret-beta"}, "B": {"secret-alpha", "secret-beta"}}
    assert press(server, "/end")[0] == 303
    assert "secret-alpha" in ask(server, "GET", "/report")[1]


def test_requests_of_other_sites_are_refused(server):
    server.session.start("001A")
    form = {"token": server.form_token, "run": "001A", "score": "1"}
    place = f"127.0.0.1:{server.server_port}"
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"},
                    {"Sec-Fetch-Site": "cross-site"}, {"Host": f"evil.example:{server.server_port}"}):  # fmt: skip
        assert ask(server, "POST", "/score", form, **headers)[0] == 403, headers
        assert ask(server, "GET", "/next", **{**robot(server), **headers})[0] in (200, 401, 403)
    assert ask(server, "GET", "/", Host="evil.example")[0] == 403
    for token in ("", "x", "é"):
        status, content, _ = ask(server, "POST", "/score", {**form, "token": token})
        assert status == 403 and "opened before the program was started again" in content
    for token in ({}, {"Authorization": "Bearer x"}, {**robot(server), "Origin": f"http://{place}"}):
        assert ask(server, "GET", "/next", **token)[0] == 401
        assert ask(server, "POST", "/finished", '{"run": "001A"}', **token)[0] == 401
    assert server.session.state.scores == []
    assert ask(server, "POST", "/score", form, Origin=f"http://{place}")[0] == 303
    assert [score.score for score in server.session.state.scores] == [1.0]
    policy = ask(server, "GET", "/")[2]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "no-store" in policy
    assert server.server_address[0] == "127.0.0.1"


def test_bad_requests_are_told_and_change_nothing(server):
    session = server.session
    session.start("001A")
    for form, status, message in (
        ({"score": "0.3"}, 400, "`score` must be one of 0, 0.25"),
        ({"score": "much"}, 400, "`score` must be a number"),
        ({"score": "nan"}, 400, "`score` must be one of"),
        ({}, 400, "`score` must be a number"),
        ({"score": "1", "run": "001B"}, 409, "This was about run 001B, but it is the turn of 001A"),
        ({"score": "1", "note": "x" * 2001}, 400, "at most 2000 characters"),
    ):
        answer = press(server, "/score", **form)
        assert answer[0] == status and message in answer[1].replace("&#39;", "'"), answer
    note = press(server, "/score", score="2", note="<script>alert(1)</script>")[1]
    assert "<script>alert" not in note
    assert ask(server, "POST", "/score", "x" * 70000)[0] == 413
    assert ask(server, "POST", "/score")[0] in (403, 413)
    assert ask(server, "POST", "/finished", "[[", **robot(server))[0] == 400
    assert ask(server, "POST", "/finished", '{"run": "002A"}', **robot(server))[0] == 409
    for path in ("/nothing", "/photo/1", "/photo/x", "/photo/99", "/photo/../session.json"):
        assert ask(server, "GET", path)[0] == 404
    assert press(server, "/nothing")[0] == 404
    assert ask(server, "PUT", "/score")[0] == 501
    assert session.state.scores == [] and session.state.started and not session.state.finished


class Constant:
    def __init__(self, value):
        self.value, self.resets = value, 0

    def reset(self):
        self.resets += 1

    def act(self, images, instructions):
        return np.full((len(images), 7), self.value)


def test_one_robot_loop_plays_every_policy_as_its_turn_comes(server):
    session, made = server.session, []

    def load(location, options):
        made.append((location, dict(options)))
        return Constant(1.0 if "alpha" in location else 2.0)

    policy = BlindPolicy(server.url, session.robot_token, load=load)
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="call `wait` first"):
        policy.act([image], ["go"])
    with pytest.raises(TimeoutError, match="waits for the scene"):
        policy.wait(0.01, timeout=0.02)
    while (current := session.current) is not None:
        session.start(current.name)
        run = policy.wait(0.01, timeout=5)
        assert (run.name, run.instruction) == (current.name, current.trial.instruction)
        actions = policy.act([image], [run.instruction])
        assert actions.shape == (1, 7) and actions.dtype == np.float32
        assert actions[0, 0] == (1.0 if current.policy.name == "secret-alpha" else 2.0)
        assert policy.is_playing()
        policy.finished()
        assert session.state.finished and not policy.is_playing()
        session.score(current.name, 0)
        policy.finished()
    assert policy.wait() is None
    assert sorted(made) == [("models/alpha-folder", {}), ("models/beta-folder", {"unnorm_key": "franka"})]
    assert [loaded.resets for loaded in policy._loaded.values()] == [4, 4]
    with pytest.raises(ValueError, match="401"):
        BlindPolicy(server.url, "wrong").wait()


def test_a_robot_with_little_memory_keeps_fewer_models(server):
    made = []
    policy = BlindPolicy(
        server.url,
        server.session.output / "robot-token",
        max_loaded=1,
        load=lambda name, _: made.append(name) or Constant(0),
    )
    for _ in range(4):
        run = server.session.current
        server.session.start(run.name)
        policy.wait(0.01, timeout=5)
        server.session.score(run.name, 1)
        assert len(policy._loaded) == 1
    turns = [run.policy.location for run in server.session.runs[:4]]
    assert made == [turn for turn, _ in itertools.groupby(turns)]
