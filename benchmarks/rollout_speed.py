"""Frames per second of closed-loop rollouts, one at a time against many side by side, on the same starts.

    python benchmarks/rollout_speed.py --threads 1
    python benchmarks/rollout_speed.py --policy outputs/demo/lapa --environments 50 --processes 0
    python benchmarks/rollout_speed.py --profile

The policy has the demo's size and, without `--policy`, random weights; it is greedy, and its world is the demo's. Every
candidate plays the same episodes, in alternating rounds, and must come to the same outcomes: success and number of steps.
Actions are compared, too: where they differ, sums of another order have turned an arg max, and it is said how often.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Records, add_arguments
from timing import alternate, print_table

from lapa import LapaForActionPrediction, LapaImageProcessor, LapaProcessor
from lapa.evaluation import demo_stages
from lapa.evaluation.demo_settings import DemoSettings
from lapa.evaluation.demo_tokenizer import build_tokenizer, simulator_phrases
from lapa.evaluation.environment_pool import EnvironmentPool
from lapa.evaluation.environments.tabletop import TabletopEnvironment
from lapa.evaluation.environments.tabletop_adapter import TabletopEvaluation
from lapa.evaluation.environments.tabletop_physics import TabletopPhysics
from lapa.evaluation.rollout import PolicyController, Rollout, roll_out
from lapa.serving.policy import LapaPolicy

SETTINGS = DemoSettings()
# Far from the starts of recordings and of the demo's evaluation.
FIRST_SEED = 460_000_000


def random_policy(seed: int) -> LapaPolicy:
    """A policy of the demo's size that never trained: it moves, and seldom solves anything."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder) / "tokenizer.model", simulator_phrases())
    vision = demo_stages.load_vision_tokenizer()
    config = demo_stages.policy_config(SETTINGS, len(tokenizer))
    model = demo_stages.fresh_policy(LapaForActionPrediction, config, vision, seed)
    processor = LapaProcessor.from_config(config, LapaImageProcessor(size=SETTINGS.image_size), tokenizer)
    moves = np.random.default_rng(seed).uniform(-1, 1, (1000, 2))
    processor.fit_actions(moves, demo_stages.UNNORM_KEY, num_bins=SETTINGS.num_bins, gripper_dimension=None)
    return LapaPolicy(model, processor, demo_stages.UNNORM_KEY)


class Recorded(PolicyController):
    """Remembers the actions of every episode."""

    def begin(self) -> None:
        """See `Controller`."""
        self.slots: dict[int, list[bytes]] = {}

    def begin_episode(self, slot: int, episode: tuple[str, int]) -> None:
        """See `Controller`."""
        self.slots[slot] = self.actions[episode] = []

    def act(self, pool: EnvironmentPool, slots: Sequence[int], observations: Sequence[Any]) -> Mapping[int, Any]:
        """See `Controller`."""
        actions = super().act(pool, slots, observations)
        for slot, action in actions.items():
            self.slots[slot].append(action.tobytes())
        return actions

    def play(self, pool: EnvironmentPool, episodes: Sequence[tuple[str, int]]) -> list[Rollout]:
        """Rollouts; their actions are in `actions` then."""
        self.actions: dict[tuple[str, int], list[bytes]] = {}
        return roll_out(pool, self, episodes, description=None)


class Parts:
    """Seconds inside some functions, a function within another one counted once, there."""

    def __init__(self, parts: Mapping[str, tuple[Any, str]]) -> None:
        self.seconds = dict.fromkeys(parts, 0.0)
        self._inner: list[float] = []
        for name, (owner, attribute) in parts.items():
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def _timed(self, name: str, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self.seconds[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed


def profile(policy: LapaPolicy, sizes: Sequence[int], episodes: Sequence[tuple[str, int]]) -> None:
    """Milliseconds per frame by part, environments in this process."""
    model = policy.model
    parts = Parts(
        {
            "processor: images": (LapaImageProcessor, "preprocess"),
            "processor: text": (LapaProcessor, "_prompt_ids"),
            "processor: the rest": (LapaProcessor, "__call__"),
            "image tokens": (model.model.vision_tokenizer, "encode"),
            "trunk": (model.model, "forward"),
            "decoding around the trunk": (model, "predict_action_tokens"),
            "bins to actions": (LapaProcessor, "decode_actions"),
            "rendering": (TabletopEnvironment, "render"),
            "physics": (TabletopPhysics, "move"),
            "start of an episode": (TabletopEvaluation, "start"),
            "step around physics and rendering": (TabletopEvaluation, "step"),
        }
    )
    columns = []
    for size in sizes:
        with EnvironmentPool(make_environment(), size) as pool:
            play = partial(roll_out, pool, PolicyController(policy), episodes, description=None)
            play()
            parts.seconds |= dict.fromkeys(parts.seconds, 0.0)
            start = time.perf_counter()
            frames = sum(rollout.num_steps for rollout in play())
            whole = time.perf_counter() - start
        rest = whole - sum(parts.seconds.values())
        columns.append(
            {name: 1000 * s / frames for name, s in (*parts.seconds.items(), ("the rest", rest), ("all", whole))}
        )
    print("\nmilliseconds per frame\n\n| part | " + " | ".join(f"{size} environments" for size in sizes) + " |")
    print("|---" * (len(sizes) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |")


def make_environment() -> partial[TabletopEvaluation]:
    """The demo's world."""
    return partial(TabletopEvaluation, **demo_stages.environment_options(SETTINGS))


def compare(name: str, reference: list[Rollout], found: list[Rollout], first: dict, second: dict) -> dict[str, int]:
    """How many episodes differ from one at a time: in their outcome, in their actions."""
    outcomes = sum(one != other for one, other in zip(reference, found, strict=True))
    actions = sum(first[episode] != second[episode] for episode in first)
    if outcomes:
        print(f"{name}: {outcomes} of {len(reference)} episodes come to another outcome.")
    return {"other_outcomes": outcomes, "other_actions": actions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=3)
    parser.add_argument("--policy", help="folder of a finetuned demo policy; random weights by default")
    parser.add_argument("--environments", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--episodes", type=int, default=100, help="in turn of each family")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead")
    args = parser.parse_args()
    records = Records("rollout speed", args)
    policy = LapaPolicy.from_pretrained(args.policy) if args.policy else random_policy(args.seed)
    policy.model.to(args.device)
    families = SETTINGS.families
    # Families in turn, so that what is played side by side ends at different times.
    episodes = [(families[i % len(families)], FIRST_SEED + i) for i in range(args.episodes)]
    if args.profile:
        profile(policy, [1, *args.environments], episodes)
        return
    pools = {
        (size, processes): EnvironmentPool(make_environment(), size, processes)
        for processes in args.processes
        for size in args.environments
        # One environment in another process is no candidate: it would wait for its pictures.
        if size > 1
    }
    candidates, results = {}, {}
    for (size, processes), pool in {(1, 0): EnvironmentPool(make_environment(), 1), **pools}.items():
        name = "one at a time" if (size, processes) == (1, 0) else f"{size} side by side, {processes} processes"

        def play(name: str = name, pool: EnvironmentPool = pool) -> None:
            controller = Recorded(policy)
            results[name] = (controller.play(pool, episodes), controller.actions)

        candidates[name] = play
    timings = alternate(candidates, args.rounds, args.device)
    reference, actions = results["one at a time"]
    frames = sum(rollout.num_steps for rollout in reference)
    solved = sum(rollout.success for rollout in reference)
    print_table(
        f"{len(episodes)} episodes, {solved} solved, greedy, {args.threads} threads", timings, frames, "frames"
    )
    different = {}
    for name, timing in timings.items():
        different[name] = compare(name, reference, results[name][0], actions, results[name][1])
        factor = timings["one at a time"].wall / timing.wall
        records.add(candidate=name, frames_per_second=frames / timing.wall, factor=factor, **different[name])
    for pool in pools.values():
        pool.close()
    assert not any(counts["other_outcomes"] for counts in different.values()), "outcomes differ"


if __name__ == "__main__":
    main()
