"""`lapa evaluate`: the table, resuming, comparing, policies behind a server."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hub_folders import save_policy

from lapa.cli import main
from lapa.configuration.configuration_lapa import LapaConfig
from lapa.evaluation import evaluate as evaluate_module
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.gymnasium_adapter import GymnasiumEvaluation
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.evaluate import Evaluation, EvaluationSettings, RolloutLog
from lapa.evaluation.policies import NamedPolicy, open_policy
from lapa.evaluation.rollout import EpisodeDraws, PolicyController, RandomActions
from lapa.evaluation.suites import load_suite, suite_names
from lapa.serving.client import RemotePolicy, decode_action, encode_array

SUITE = """
environment: tabletop
options: {embodiment: arm, image_size: 32, num_blocks: 2}
rollouts: 6
first_seed: 7000
cells:
  seen: {tasks: [reach, block_to_block], options: {split: seen}}
  unseen: {tasks: [reach], options: {split: unseen}}
"""


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    return str(path)


def evaluate(suite, policy, output, *more):
    return main(["evaluate", "--suite", suite, "--policy", policy, "--output", str(output), *more])


def test_the_report_has_cells_with_intervals_and_the_baseline(suite, tmp_path, capsys):
    assert evaluate(suite, "expert", tmp_path / "out", "--num-environments", "4") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["cells"]) == ["seen/reach", "seen/block_to_block", "unseen/reach"]
    cell = report["cells"]["seen/reach"]
    assert (cell["successes"], cell["rollouts"], cell["success"], cell["crashed"], cell["hung"]) == (6, 6, 1.0, 0, 0)
    assert cell["ci95"] == pytest.approx([0.6097, 1.0], abs=1e-4)
    assert report["groups"]["seen"]["rollouts"] == 12
    assert report["do_nothing"]["cells"]["seen/reach"]["successes"] == 0
    assert report["complete"] is True
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("data:image/gif") == 6
    assert "| seen/reach | 100.0 [61.0, 100.0] | 6 | 0.0 | 0 | 0 |" in (tmp_path / "out" / "report.md").read_text()
    assert "seen/reach" in capsys.readouterr().out


def start_and_wait_for(lines, suite, output, *options):
    """A run in a process group of its own, when its log has so many lines."""
    command = [sys.executable, "-m", "lapa.cli", "evaluate", "--suite", suite, "--policy", "random", "--output"]
    process = subprocess.Popen(
        [*command, str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts what it puts into the background with SIGINT ignored, and all its descendants inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log, deadline = output / "rollouts.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("processes", ["0", "2"])
def test_killed_at_any_moment_it_goes_on_to_the_same_result(processes, suite, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--num-environments", "2", "--no-baseline"]
    assert evaluate(suite, "random", whole, *options) == 0
    options += ["--num-processes", processes]
    log = killed / "rollouts.jsonl"
    for lines in (1, 4) if processes == "0" else (3,):
        process = start_and_wait_for(lines, suite, killed, *options)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert log.read_bytes().count(b"\n") < 9
    # As a kill in the middle of a write leaves it.
    with log.open("ab") as file:
        file.write(b'{"cell": "seen/reach", "start": 4, "roll')
    assert evaluate(suite, "random", killed, *options) == 0
    assert log.read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    for name in ("report.json", "report.md"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(("processes", "number", "code"), [("2", signal.SIGINT, 130), ("0", signal.SIGTERM, 143)])
def test_interrupted_it_prints_the_table_so_far_and_goes_on(processes, number, code, suite, tmp_path, capsys):
    # So many episodes that a slow machine cannot play them all before the signal arrives.
    options = ["--num-environments", "2", "--no-baseline", "--rollouts", "60", "--num-processes", processes]
    output = tmp_path / "out"
    process = start_and_wait_for(2, suite, output, *options)
    # Ctrl-C reaches every process of the terminal, a scheduler's signal often the first one alone.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == code
    rows = sum(len(json.loads(line)["rollouts"]) for line in (output / "rollouts.jsonl").read_text().splitlines())
    table = dict(re.findall(r"^(\S+/\S+) .*?\] +(\d+)", printed, re.M))
    # A group of episodes may be counted whose line was just being written.
    assert 4 <= rows <= sum(map(int, table.values())) <= rows + 2
    assert f"the same command goes on where it stopped, with what is in {output}" in printed
    assert "Traceback" not in errors and not (output / "report.json").exists()
    assert evaluate(suite, "random", output, *options) == 0
    assert evaluate(suite, "random", tmp_path / "whole", *options[:5]) == 0
    assert (output / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()


def played_with(suite, output, num_environments, num_shown=0):
    """The report of random actions, all these actions, and how large the pools of environments were."""
    sizes, actions = [], []

    class Counted(EnvironmentPool):
        def __init__(self, make, size, *more):
            sizes.append(size)
            super().__init__(make, size, *more)

    class Noted(RandomActions):
        def act(self, images, instructions, draws):
            drawn = super().act(images, instructions, draws)
            actions.extend(map(tuple, drawn.tolist()))
            return drawn

    draws = EpisodeDraws()
    controller = PolicyController(Noted(2), draws=draws)
    policy = NamedPolicy("random", controller, {"policy": "random"}, lambda seed: None, draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "EnvironmentPool", Counted)
        settings = EvaluationSettings(num_environments=num_environments, num_shown=num_shown)
        evaluation = Evaluation(load_suite(suite), policy, output, settings)
        evaluation.run(show_progress=False)
    return evaluation.report(), sorted(actions), sizes


def test_cells_of_equal_options_are_played_side_by_side(suite, tmp_path):
    *alone, sizes = played_with(suite, tmp_path / "alone", 6)
    assert sizes == [6, 6]
    *together, sizes = played_with(suite, tmp_path / "together", 13)
    assert sizes == [12, 6]
    assert together == alone and together[0]["complete"]
    logs = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("alone", "together")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    # What was lost after the first of two cells that were played together is played again beside it, and nothing twice.
    (tmp_path / "together" / "rollouts.jsonl").write_text(logs[1].splitlines(keepends=True)[0])
    again, _, sizes = played_with(suite, tmp_path / "together", 13)
    assert sizes == [12, 6]
    assert again == alone[0] and (tmp_path / "together" / "rollouts.jsonl").read_text() == logs[0]


def test_animations_of_episodes_that_are_in_the_log_stay(suite, tmp_path):
    played_with(suite, tmp_path / "out", 12, num_shown=1)
    log = tmp_path / "out" / "rollouts.jsonl"
    log.write_text(log.read_text().splitlines(keepends=True)[0])
    pictures = {path.name: path for path in (tmp_path / "out" / "rollouts").iterdir()}
    assert len(pictures) == 3
    for path in pictures.values():
        path.write_bytes(b"as it was")
    played_with(suite, tmp_path / "out", 12, num_shown=1)
    kept = [name for name, path in pictures.items() if path.read_bytes() == b"as it was"]
    assert kept == ["seen-reach-000.gif"]


def test_environments_that_leave_traces_play_one_task_at_a_time(suite, tmp_path, monkeypatch):
    # Gymnasium's, and whatever else draws with the context of the environment that was made last.
    assert not GymnasiumEvaluation.mixes_tasks
    monkeypatch.setattr(TabletopEvaluation, "mixes_tasks", False)
    *_, sizes = played_with(suite, tmp_path / "out", 13)
    assert sizes == [6, 6, 6]


def test_finetuned_policies_and_those_without_weights_mix(tmp_path):
    folder = str(save_policy(tmp_path / "policy", "action"))
    action_dim = LapaConfig.from_pretrained(folder).action_dim
    for options in ({}, {"do_sample": True}):
        assert open_policy(folder, action_dim, **options).mixes
    assert all(open_policy(name, 2).mixes for name in ("expert", "do_nothing", "random", "http://127.0.0.1:1"))
    assert [name for name in suite_names() if load_suite(name).mixes_tasks()] == [
        "metaworld-mt10", "tabletop", "tabletop-demo", "tabletop-gripper",
    ]  # fmt: skip


def test_a_policy_whose_draws_are_of_the_batch_plays_every_cell_by_itself(suite, tmp_path):
    class Still:
        def act(self, images, instructions):
            return np.zeros((len(images), 2), np.float32)

    seeds: list[int] = []
    policy = NamedPolicy("still", PolicyController(Still()), {"policy": "still"}, seeds.append)
    evaluation = Evaluation(load_suite(suite), policy, tmp_path / "out")
    evaluation.run(show_progress=False)
    assert len(set(seeds)) == 3 and evaluation.report()["complete"]


def test_the_number_of_processes_suits_the_environment(suite, tmp_path):
    text = SUITE.replace("rollouts: 6", "rollouts: 6\nprocesses: 3")
    (tmp_path / "three.yaml").write_text(text)
    for name, expected in (
        ("tabletop", 0), ("metaworld-mt10", os.cpu_count()), (str(tmp_path / "three.yaml"), 3), (suite, 0)
    ):  # fmt: skip
        assert load_suite(name).num_processes() == expected
    # Results do not depend on it, so neither does what a folder belongs to.
    three, none = load_suite(str(tmp_path / "three.yaml")).to_dict(), load_suite(suite).to_dict()
    assert {**three, "name": "small"} == none


def test_an_environment_that_crashes_is_in_the_report(suite, tmp_path, monkeypatch):
    from lapa.evaluation import suites

    monkeypatch.setitem(suites.ENVIRONMENTS, "tabletop", ("fragile_environment", "Fragile"))
    monkeypatch.setattr(
        suites.Suite, "episodes", lambda self, cell, rollouts=None: [(cell.task, seed) for seed in range(6)]
    )
    assert evaluate(suite, "expert", tmp_path / "out", "--num-processes", "1", "--no-baseline") == 0
    cell = json.loads((tmp_path / "out" / "report.json").read_text())["cells"]["seen/reach"]
    assert (cell["successes"], cell["rollouts"], cell["crashed"], cell["hung"], cell["restarted"]) == (4, 6, 2, 0, 0)
    assert "| seen/reach | 66.7 [30.0, 90.3] | 6 |  | 2 | 0 |" in (tmp_path / "out" / "report.md").read_text()


def test_another_run_is_refused_the_folder(suite, tmp_path, capsys):
    assert evaluate(suite, "do_nothing", tmp_path / "out") == 0
    assert evaluate(suite, "random", tmp_path / "out") == 2
    assert "holds an evaluation with another policy" in capsys.readouterr().err
    assert evaluate(suite, "do_nothing", tmp_path / "out", "--rollouts", "3") == 2
    assert "another played" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert evaluate(suite, "random", tmp_path / "full") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "no_such", "--policy", "expert"], "`suite` must be one of .*tabletop"),
        (["--suite", "tabletop"], "`policy` must be given"),
        (["--suite", "tabletop", "--policy", "expert", "--rollouts", "0"], "`rollouts` must be at least 1"),
        (["--suite", "tabletop", "--policy", "expert", "--unnorm-key", "x"], "does not apply to the policy 'expert'"),
        (["--suite", "tabletop", "--policy", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path, capsys):
    assert main(["evaluate", *arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_suites_load_and_their_starts_do_not_depend_on_the_table():
    for name in suite_names():
        suite = load_suite(name)
        starts = [tuple(suite.episodes(cell, 5)) for cell in suite.cells]
        assert len(set(starts)) == len(suite.cells)
    small, large = (load_suite("tabletop").episodes(load_suite("tabletop").cells[3], n) for n in (3, 9))
    assert large[:3] == small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("environment: tabletop", "environment: moon"), "`environment` must be one of"),
        (("rollouts: 6", "rollouts: 0"), "`rollouts` must be a whole number from 1"),
        (("tasks: [reach],", ""), "must have a list of `tasks`"),
        (("tasks: [reach],", "tasks: [reach, reach],"), "`cells.unseen.tasks` names a task twice: reach, reach"),
        (("first_seed: 7000", "seed: 1"), "must be a mapping with"),
        (("first_seed: 7000", "first_seed: 7000\nprocesses: -1"), "`processes` must be a whole number from 0, got -1"),
    ],
)
def test_a_suite_file_that_is_wrong_is_named(change, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(SUITE.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_suite(str(path))


def test_methods_are_compared_on_the_same_starts(suite, tmp_path, capsys):
    for policy, name in (("expert", "ours-seed-0"), ("expert", "ours-seed-1"), ("do_nothing", "still-seed-0"),
                         ("random", "still-seed-1")):  # fmt: skip
        assert evaluate(suite, policy, tmp_path / name, "--no-baseline") == 0
    folders = [str(tmp_path / name) for name in ("ours-seed-0", "still-seed-0", "ours-seed-1", "still-seed-1")]
    assert main(["evaluate", "--compare", *folders, "--output", str(tmp_path / "compared")]) == 0
    report = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    assert list(report["methods"]) == ["ours", "still"]
    assert report["methods"]["ours"]["all"]["seeds"] == 2
    assert report["methods"]["ours"]["all"]["over_seeds"]["value"] == 1.0
    assert report["methods"]["ours"]["all"]["standard_error_over_tasks"] == 0.0
    difference = report["comparisons"]["ours against still"]["all"]["difference"]
    # Two trainings: Student's quantile with one degree of freedom is wide.
    assert 0 < difference["ci95"][0] < 0.9
    assert main(["evaluate", "--compare", *folders[:2], "--output", str(tmp_path / "paired")]) == 0
    paired = json.loads((tmp_path / "paired" / "comparison.json").read_text())["comparisons"]["ours against still"]
    assert (paired["all"]["wins"], paired["all"]["ties"], paired["all"]["losses"]) == (18, 0, 0)
    assert main(["evaluate", "--compare", folders[0], folders[2], "--output", str(tmp_path / "one")]) == 2
    assert "at least two methods" in capsys.readouterr().err
    log = tmp_path / "still-seed-0" / "rollouts.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    assert main(["evaluate", "--compare", *folders[:2], "--output", str(tmp_path / "cut")]) == 2
    assert "is not complete: unseen/reach has 0 of 6 rollouts" in capsys.readouterr().err


class OpenVlaServer(BaseHTTPRequestHandler):
    """Answers as OpenVLA's deployment script does: an array in `json_numpy`'s form."""

    seen: list = []  # noqa: RUF012
    answer = None

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(payload)
        body = json.dumps(self.answer if self.answer is not None else encode_array(np.array([0.5, -0.5]))).encode()
        self.send_response(200 if self.path == "/act" else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), OpenVlaServer)
    OpenVlaServer.seen, OpenVlaServer.answer = [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_policy_behind_a_server_is_played(suite, server, tmp_path):
    assert evaluate(suite, server, tmp_path / "out", "--rollouts", "2", "--unnorm-key", "bridge_orig") == 0
    payload = OpenVlaServer.seen[0]
    assert payload["unnorm_key"] == "bridge_orig"
    assert payload["image"]["shape"] == [32, 32, 3]
    assert payload["image"]["dtype"] == "|u1"
    assert "the" in payload["instruction"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["cells"]["seen/reach"]["rollouts"] == 2


def test_answers_of_a_server_are_checked(server):
    policy, image = RemotePolicy(server), np.zeros((4, 4, 3), np.uint8)
    for answer, expected in (
        ([0.25, 1], [0.25, 1.0]),
        (json.dumps(encode_array(np.array([1.0, 2.0], np.float32))), [1.0, 2.0]),
        ([[0.5, 1.0], [9.0, 9.0]], [0.5, 1.0]),
    ):
        OpenVlaServer.answer = answer
        assert policy.act([image], ["go"]).tolist() == [expected]
    for answer in ("error", [float("nan")], {"action": 1}, ["a"], {"__numpy__": "AAAA", "dtype": "|O", "shape": [1]}):
        with pytest.raises(ValueError, match="answer"):
            decode_action(answer)
    with pytest.raises(ValueError, match="gave no answer"):
        RemotePolicy("http://127.0.0.1:9", timeout=2).act([image], ["go"])
    with pytest.raises(ValueError, match="must begin with http"):
        RemotePolicy("ftp://x")


def test_a_log_keeps_the_order_of_starts(tmp_path):
    suite = load_suite("tabletop")
    log = RolloutLog(tmp_path / "log", {"a": 1})
    from lapa.evaluation.rollout import Rollout

    for start in (2, 0):
        rows = [Rollout("reach", start + i, "go", bool(i), 3) for i in range(2)]
        log.add(suite.cells[0], start, rows)
    again = RolloutLog(tmp_path / "log", {"a": 1}).outcomes(suite)
    assert [row["seed"] for row in again["seen/reach"]] == [0, 1, 2, 3]
