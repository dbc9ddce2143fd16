"""The collapse benchmark: its numbers by hand, and a shortened run in which ours stays in use where the control falls."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_training_quantizer import moving_square

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# What the training part must do without.
BLOCKED = ("av", "pymunk", "datasets", "gymnasium", "matplotlib", "trl", "bitsandbytes")


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("quantizer_collapse", BENCHMARKS / "quantizer_collapse.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def pairs_file(folder: Path) -> Path:
    """A small file of the benchmark's kind: squares that move one way per episode."""
    episodes = moving_square(num_episodes=24, num_frames=6, size=32)
    first = np.concatenate([6 * episode + np.arange(4) for episode in range(24)])
    ways = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)], np.float32)
    arrays = {
        "frames": episodes.reshape(-1, 32, 32, 3), "first": first, "second": first + 2,
        "episode": np.repeat(np.arange(24), 4), "target": np.repeat(ways[np.arange(24) % 4], 4, axis=0),
    }  # fmt: skip
    path = folder / "pairs.npz"
    np.savez_compressed(path, **{f"tabletop.{name}": value for name, value in arrays.items()})
    return path


def test_probe_and_intervals_by_hand(benchmark):
    episode = np.repeat(np.arange(50), 4)
    codes = np.random.default_rng(0).integers(0, 8, (200, 2))
    pairs = benchmark.Pairs(None, None, None, episode, (codes[:, :1] * 3.0 - codes[:, 1:]).astype(np.float32))
    bootstrap = benchmark.Bootstrap(episode, 0)
    probe = benchmark.r_squared(benchmark.probe_predictions(codes, pairs, 8), pairs, bootstrap)
    assert probe["ci95"][0] > 0.99 and probe["value"] > 0.99
    chance = benchmark.r_squared(benchmark.probe_predictions(codes[::-1].copy(), pairs, 8), pairs, bootstrap)
    assert chance["value"] < 0.05
    ones, twos = np.ones(200), np.full(200, 2.0)
    assert benchmark.ratio(ones, twos, bootstrap) == {"value": 0.5, "ci95": [0.5, 0.5]}
    # Episodes are drawn whole: with one value per episode the interval is as wide as that of 50 values, not of 200.
    spread = np.repeat(np.random.default_rng(1).normal(10, 1, 50), 4)
    low, high = benchmark.ratio(spread, ones, bootstrap)["ci95"]
    assert 0.4 < high - low < 0.7
    assert benchmark.usage(np.array([[0, 0], [1, 1]]), 8) == {"codes_used": 2, "perplexity": pytest.approx(2)}
    assert pairs.held_out().sum() == 40 and not pairs.held_out()[:160].any()


def test_the_recipe_is_what_the_benchmark_calls_ours(benchmark):
    recipe = yaml.safe_load((BENCHMARKS.parent / "training" / "recipes" / "quantizer_small.yaml").read_text())
    layout, loop = benchmark.VARIANTS["ours"]
    assert recipe.pop("quantizer_config") == {**benchmark.SIZES, **layout, "image_size": 64, "patch_size": 8}
    # The benchmark judges what the watchdog would stop.
    watchdog = {"min_perplexity", "min_codes_used"}
    expected = {name: value for name, value in {**benchmark.RECIPE, **loop}.items() if name not in watchdog}
    assert {name: recipe[name] for name in expected} == expected
    assert set(recipe) - set(expected) == {"max_steps", "save_steps", "sample_interval"}


def judged(**changes):
    """A line of the output in which every condition holds, by a little."""
    line = {
        "codebook_size": 10,
        "train": {"codes_used": 9, "perplexity": 5.0},
        "reconstruction": {"value": 0.50, "ci95": [0.45, 0.55]},
        "shuffled": {"value": 0.60, "ci95": [0.56, 0.64]},
        "held_out_gain": {"value": 0.05, "ci95": [0.01, 0.09]},
        "probe": {"value": 0.2, "ci95": [-0.1, 0.3]},
    }
    return line | changes


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, set()),
        ({"train": {"codes_used": 8, "perplexity": 5.0}}, {"codes used"}),
        ({"train": {"codes_used": 9, "perplexity": 4.9}}, {"perplexity"}),
        # Better, with intervals that touch.
        ({"shuffled": {"value": 0.60, "ci95": [0.55, 0.64]}}, {"codes matter"}),
        ({"reconstruction": {"value": 0.70, "ci95": [0.65, 0.75]}}, {"codes matter"}),
        ({"held_out_gain": {"value": 0.05, "ci95": [0.0, 0.1]}}, {"codes matter on held-out pairs"}),
        ({"probe": {"value": 0.15, "ci95": [0.1, 0.3]}}, {"beats control"}),
        ({"probe": {"value": 0.1, "ci95": [0.1, 0.3]}}, {"beats control"}),
    ],
)
def test_conditions_by_hand(benchmark, changes, fails):
    found = benchmark.conditions(judged(**changes), judged(probe={"value": 0.15, "ci95": [0.1, 0.2]}))
    assert set(found) == {
        "codes used", "perplexity", "codes matter", "codes matter on held-out pairs", "beats control",
    }  # fmt: skip
    assert {name for name, holds in found.items() if not holds} == fails


def test_the_summary_fails_where_one_condition_does(benchmark, capsys):
    names = {"source": "bridge", "seed": 0, "random_probe": {"value": 0.0}}
    names |= {f"held_out_{name}": {"value": 0.5} for name in ("reconstruction", "shuffled")}
    ours, control = judged(variant="ours", **names), judged(variant="published", **names)
    control["probe"] = {"value": 0.1, "ci95": [0.0, 0.2]}
    assert benchmark.summarise([ours, control], "published")
    assert "all hold" in capsys.readouterr().out
    control["probe"] = {"value": 0.3, "ci95": [0.0, 0.4]}
    assert not benchmark.summarise([ours, control], "published")
    assert "FAILS: beats control |" in capsys.readouterr().out
    # Without the control there is nothing to beat.
    assert benchmark.summarise([ours], "published") and "beats control" not in benchmark.conditions(ours, None)


@pytest.mark.slow  # of a benchmark that no command of the package uses
def test_short_runs_without_simulator_and_readers(tmp_path):
    """A process in which what a GPU machine may lack cannot be imported; finished runs are not repeated."""
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(
        "import importlib.metadata as metadata, importlib.util, sys\n"
        f"blocked = {BLOCKED!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        # Libraries look whether others are installed: they are not.
        "find_spec, distributions = importlib.util.find_spec, metadata.packages_distributions\n"
        "importlib.util.find_spec = lambda n, p=None: None if n.split('.')[0] in blocked else find_spec(n, p)\n"
        "metadata.packages_distributions = lambda: {k: v for k, v in distributions().items() if k not in blocked}\n"
    )
    output = tmp_path / "runs.jsonl"
    command = [sys.executable, str(BENCHMARKS / "quantizer_collapse.py"), "--data", str(pairs_file(tmp_path)),
               "--output", str(output), "--sources", "tabletop", "--seeds", "0", "--steps", "30",
               "--variants", "ours", "published-rule"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    first = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = {line["variant"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert set(lines) == {"ours", "published-rule"}, first.stderr[-2000:]
    ours, control = lines["ours"], lines["published-rule"]
    assert ours["train"]["codes_used"] == 8 and ours["train"]["perplexity"] >= 4
    assert control["train"]["codes_used"] < 4
    assert {"held_out_gain", "probe", "random_probe"} <= set(ours)
    assert "| tabletop | ours | 0 | 8/8 |" in first.stdout
    with output.open("a") as file:
        file.write('{"source": "tabletop", "vari')  # cut off
    second = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert len(output.read_text().splitlines()) == 3
    assert "cut off" in second.stdout
