"""Suites of the tabletop: the same starts everywhere, and bodies and cameras as options."""

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("pymunk")

from lapa.evaluation.environments.tabletop import EMBODIMENTS
from lapa.evaluation.suites import load_suite


def evaluation_digest(suite_name: str) -> str:
    """Hash of the first start of every cell of a suite and of some steps of its expert, as an evaluation sees them."""
    suite, digest = load_suite(suite_name), hashlib.sha256()
    for cell in suite.cells:
        with suite.make(cell)() as environment:
            observation = environment.start(*suite.episodes(cell, 1)[0])
            for _ in range(4):
                digest.update(observation["image"].tobytes() + observation["instruction"].encode())
                observation = environment.step(environment.expert_action()).observation
    return digest.hexdigest()


def test_suites_have_the_same_starts_in_other_processes_and_under_other_hash_seeds() -> None:
    code = "import test_tabletop_suites as t; print(t.evaluation_digest('tabletop'), t.evaluation_digest('tabletop-gripper'))"
    here = [evaluation_digest("tabletop"), evaluation_digest("tabletop-gripper")]
    assert here[0] != here[1]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    for hash_seed in ("0", "1234"):
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()
        assert found == here


def test_embodiments_and_cameras_are_options_of_a_suite(tmp_path) -> None:
    (tmp_path / "bodies.yaml").write_text(
        "environment: tabletop\noptions: {image_size: 32}\nrollouts: 2\nfirst_seed: 5\ncells:\n"
        + "".join(f"  {name}: {{tasks: [reach], options: {{embodiment: {name}}}}}\n" for name in EMBODIMENTS)
    )
    suite, pictures = load_suite(str(tmp_path / "bodies.yaml")), []
    for cell in suite.cells:
        with suite.make(cell)() as environment:
            first = environment.start("reach", 5)["image"]
            for _ in range(15):
                last = environment.step(np.zeros(2, np.float32)).observation["image"]
            moves = not np.array_equal(first, last)
            assert moves == (cell.group == "human_video"), "only a camera that is held by hand shakes"
            pictures.append(first.astype(float))
    for first, second in itertools.combinations(pictures, 2):
        assert np.abs(first - second).mean() > 25
    arm, gripper = load_suite("tabletop"), load_suite("tabletop-gripper")
    assert [arm.episodes(cell) for cell in arm.cells] == [gripper.episodes(cell) for cell in gripper.cells]
    assert {cell.options["embodiment"] for cell in gripper.cells} == {"gripper"}
