"""Neural rollouts of a suite beside the simulator's rollouts of the policy that was finetuned from the same model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from lapa.data.frame_pairs import resize_frame
from lapa.evaluation import imagine_measures as measures
from lapa.evaluation.environment_pool import EnvironmentPool, Start
from lapa.evaluation.imagine import LatentPolicy, World, imagine, play_codes
from lapa.evaluation.policies import DO_NOTHING, EXPERT, RANDOM, NamedPolicy, open_policy
from lapa.evaluation.rollout import NOT_SOLVED, SOLVED, Rollout, roll_out
from lapa.evaluation.statistics import success_cell
from lapa.evaluation.suites import Cell, Suite

Frames = NDArray[np.uint8]
# Starts on which the judge is tested, so many seeds behind those of the episodes.
JUDGE_SEEDS = 100_000_000
JUDGED_PLAYERS = (EXPERT, DO_NOTHING, RANDOM)
# How success is predicted, in the order of the tables; the first is the one that counts.
LAST, ANY, OF_TRUE_CODES, OF_TRUE, SECOND = "last", "any", "true_codes_last", "true_last", "second_play"


class Judge(Protocol):
    """Tells from pictures alone by how much a task is missed, see `TabletopJudge.miss`."""

    def miss(self, instruction: str, first: Frames, last: Frames) -> float | None: ...


class EncodingWorld(World, Protocol):
    """A world model that also tells the codes of true frame pairs."""

    def encode(self, pairs: Frames) -> NDArray[np.int64]: ...


def open_judge(suite: Suite, cell: Cell, size: tuple[int, int]) -> Judge | str:
    """The judge of a cell's pictures at some size, or in words why there is none."""
    if suite.environment != "tabletop":
        return f"no judge of pictures for the environment {suite.environment}"
    from lapa.evaluation.tabletop_judge import TabletopJudge

    try:
        return TabletopJudge(cell.options, size)
    except ValueError as error:
        return str(error)


@dataclass(frozen=True)
class ImagineSuiteSettings:
    """
    How rollouts are compared.

    Args:
        frame_gap (`int`): Simulator steps per drawn frame.
        rollouts (`int`, *optional*): Episodes per cell; the suite's own number when None.
        steps (`int`, *optional*): Frames to draw; as many as an episode of somebody who does nothing lasts when None.
        num_environments (`int`): Played and imagined side by side. With the seed it fixes all draws.
        seed (`int`): Of the draws of codes and of actions.
        num_shown (`int`): Episodes per cell that are kept as animation.
        judge_rollouts (`int`): Episodes per cell of each of `JUDGED_PLAYERS` that test the judge.
    """

    frame_gap: int
    rollouts: int | None = None
    steps: int | None = None
    num_environments: int = 50
    seed: int = 0
    num_shown: int = 2
    judge_rollouts: int = 30

    def __post_init__(self) -> None:
        least = {"frame_gap": 1, "rollouts": 1, "steps": 1, "num_environments": 1, "num_shown": 0, "judge_rollouts": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"`{name}` must be at least {lowest}, got {value}.")


@dataclass
class Compared:
    """
    One episode: what was imagined of it and what happened.

    Args:
        cell (`str`): Name of its cell.
        rollout (`Rollout`): Of the finetuned policy, without frames.
        imagined (`NDArray`): (steps + 1, height, width, 3) uint8.
        codes, true_codes (`NDArray`): (steps, num_latent_tokens) of the policy; (true steps, ...) of the true frames.
        true (`NDArray`): (true steps + 1, height, width, 3) uint8 at every `frame_gap`-th step and at the last one.
        told (`NDArray`): What the decoder draws from the true codes, of the shape of `true`.
        one_step (`NDArray`): What it draws from each true frame and code, (true steps, height, width, 3).
        whole (`int`): True steps that are a whole `frame_gap` long; a last shorter one is judged but not measured.
        predicted (`dict`): By way of prediction whether it is solved; None where there is no judge or nothing was found.
    """

    cell: str
    rollout: Rollout
    imagined: Frames
    codes: NDArray[np.int64]
    true_codes: NDArray[np.int64]
    true: Frames
    told: Frames
    one_step: Frames
    whole: int
    predicted: dict[str, bool | None] = field(default_factory=dict)

    def errors(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Errors (steps,) by predictor and kind of pixels, of the steps that both rollouts have."""
        steps = min(self.whole, len(self.imagined) - 1)
        true = self.true[: steps + 1]
        copied = np.repeat(true[:1], steps, 0)
        drawn = (self.imagined[1 : steps + 1], self.told[1 : steps + 1], self.one_step[:steps], copied)
        return {name: measures.frame_errors(frames, true) for name, frames in zip(measures.PREDICTORS, drawn)}

    def row(self) -> dict[str, Any]:
        """JSON-serialisable form without frames."""
        names = ("family", "seed", "instruction", "success", "num_steps", "ending")
        return {
            "cell": self.cell,
            **{name: getattr(self.rollout, name) for name in names},
            "codes": self.codes.tolist(),
            "true_codes": self.true_codes.tolist(),
            "predicted": self.predicted,
        }


class ImagineSuite:
    """
    Plays and imagines the episodes of a suite.

    Args:
        suite: Which episodes.
        policy: Names the codes of the neural rollouts.
        world: Draws them, and encodes the true ones.
        player: Plays in the simulator.
        settings: How.
        judge_of: Opens the judge of a cell; `open_judge` by default.
        show_progress: Whether bars are shown.
    """

    def __init__(
        self,
        suite: Suite,
        policy: LatentPolicy,
        world: EncodingWorld,
        player: NamedPolicy,
        settings: ImagineSuiteSettings,
        judge_of: Callable[[Suite, Cell, tuple[int, int]], Judge | str] = open_judge,
        show_progress: bool = True,
    ) -> None:
        self.suite, self.policy, self.world, self.player, self.settings = suite, policy, world, player, settings
        self.judge_of, self.show_progress = judge_of, show_progress
        self.episodes: list[Compared] = []
        self.broken: dict[str, int] = {}
        self.judging: dict[str, Any] = {}
        self.steps: dict[str, int] = {}

    def run(self) -> None:
        """Everything, cell by cell."""
        for cell in self.suite.cells:
            episodes = self.suite.episodes(cell, self.settings.rollouts)
            size = min(self.settings.num_environments, max(len(episodes), self.settings.judge_rollouts))
            with (
                EnvironmentPool(self.suite.make(cell), size) as pool,
                tqdm(total=len(episodes), desc=cell.name, disable=not self.show_progress) as bar,
            ):
                judge = self._prepare(pool, cell)
                for start in range(0, len(episodes), size):
                    part = episodes[start : start + size]
                    self._compare(pool, cell, start, part, judge)
                    bar.update(len(part))

    def _prepare(self, pool: EnvironmentPool, cell: Cell) -> Judge | None:
        """Tests the judge, and finds out how long an episode lasts."""
        judge = self.judge_of(self.suite, cell, self.world.size)
        starts = [(task, seed + JUDGE_SEEDS) for task, seed in self.suite.episodes(cell, self.settings.judge_rollouts)]
        players: Sequence[str] = JUDGED_PLAYERS
        if isinstance(judge, str):
            players, starts = (DO_NOTHING,), starts[:1]
        played = {name: self._play_named(pool, cell, name, starts) for name in players}
        longest = max(rollout.num_steps for rollout in played[DO_NOTHING])
        self.steps[cell.name] = self.settings.steps or max(1, -(-longest // self.settings.frame_gap))
        if isinstance(judge, str):
            self.judging[cell.name] = {"not_judged": judge}
            return None
        self.judging[cell.name] = self._test(judge, [r for rollouts in played.values() for r in rollouts])
        return judge

    def _play_named(self, pool: EnvironmentPool, cell: Cell, name: str, starts: list[Start]) -> list[Rollout]:
        player = open_policy(name, self.suite.action_dim())
        player.reseed(self._seed(cell, "judge"))
        rollouts = roll_out(pool, player.controller, starts, range(len(starts)), description=None)
        return [rollout for rollout in rollouts if rollout.ending in (SOLVED, NOT_SOLVED)]

    def _test(self, judge: Judge, rollouts: list[Rollout]) -> dict[str, Any]:
        """The judge's score on true last frames, and on those that the decoder draws of them from a true frame before."""
        gap = self.settings.frame_gap
        firsts, lasts = ([self._resized(r.frames[index]) for r in rollouts] for index in (0, -1))
        before = np.stack([self._resized(r.frames[max(0, r.num_steps - gap)]) for r in rollouts])
        sentences = [rollout.instruction for rollout in rollouts]
        drawn = self.world.next_frames(before, self.world.encode(np.stack([before, np.stack(lasts)], 1)), sentences)
        truth = [rollout.success for rollout in rollouts]
        scores = {
            name: measures.judge_score([_word(judge, *three) for three in zip(sentences, firsts, pictures)], truth)
            for name, pictures in (("true_frames", lasts), ("drawn_frames", drawn))
        }
        return scores | {"can_judge": measures.can_judge(scores["true_frames"])}

    def _seed(self, cell: Cell, what: str) -> int:
        digest = hashlib.sha256(f"{self.settings.seed}/{cell.name}/{what}".encode()).digest()
        return int.from_bytes(digest[:4])

    def _resized(self, frame: Frames) -> Frames:
        return resize_frame(frame, self.world.size)

    def _compare(self, pool: EnvironmentPool, cell: Cell, start: int, part: list[Start], judge: Judge | None) -> None:
        self.player.reseed(self._seed(cell, f"{start}"))
        rollouts = roll_out(pool, self.player.controller, part, range(len(part)), description=None)
        again: list[Rollout] = []
        if self._player_draws():
            self.player.reseed(self._seed(cell, f"{start}/again"))
            again = roll_out(pool, self.player.controller, part, description=None)
        whole = [number for number, r in enumerate(rollouts) if r.ending in (SOLVED, NOT_SOLVED)]
        if len(whole) < len(part):
            self.broken[cell.name] = self.broken.get(cell.name, 0) + len(part) - len(whole)
        if not whole:
            return
        images, sentences = [rollouts[n].frames[0] for n in whole], [rollouts[n].instruction for n in whole]
        seed = self._seed(cell, f"{start}/codes")
        imagined = imagine(self.policy, self.world, images, sentences, self.steps[cell.name], seed)
        sampled = [self._sampled(rollouts[number].frames) for number in whole]
        codes, told, drawn = self._from_true_codes(sampled, sentences)
        for place, number in enumerate(whole):
            rollout = rollouts[number]
            episode = Compared(
                cell.name, _without_frames(rollout), imagined.frames[place], imagined.codes[place], codes[place],
                sampled[place], told[place], drawn[place], rollout.num_steps // self.settings.frame_gap,
            )  # fmt: skip
            if judge is not None:
                episode.predicted = self._predictions(judge, episode)
            if again and again[number].ending in (SOLVED, NOT_SOLVED):
                episode.predicted[SECOND] = again[number].success
            self.episodes.append(episode)

    def _player_draws(self) -> bool:
        """Whether another play of the same starts can end otherwise."""
        return self.player.name == RANDOM or bool(self.player.identity.get("generation", {}).get("do_sample"))

    def _sampled(self, frames: Sequence[Frames]) -> Frames:
        """Every `frame_gap`-th frame, and the last one."""
        steps = [*range(0, len(frames), self.settings.frame_gap)]
        if steps[-1] != len(frames) - 1:
            steps.append(len(frames) - 1)
        return np.stack([self._resized(frames[step]) for step in steps])

    def _from_true_codes(
        self, sampled: Sequence[Frames], sentences: Sequence[str]
    ) -> tuple[list[NDArray[np.int64]], list[Frames], list[Frames]]:
        """Codes of true frames, what the decoder draws from them alone, and what from each true frame."""
        codes, drawn = [], []
        for frames, sentence in zip(sampled, sentences):
            pairs = np.stack([frames[:-1], frames[1:]], 1)
            codes.append(self.world.encode(pairs))
            drawn.append(self.world.next_frames(frames[:-1], codes[-1], [sentence] * len(pairs)))
        longest = max(map(len, codes))
        # Episodes of one batch end at different steps; what is drawn behind an end is cut off again.
        filled = np.stack([np.pad(rows, ((0, longest - len(rows)), (0, 0)), mode="edge") for rows in codes])
        played = play_codes(self.world, np.stack([frames[0] for frames in sampled]), filled, sentences)
        return codes, [frames[: len(rows) + 1] for frames, rows in zip(played, codes)], drawn

    def _predictions(self, judge: Judge, episode: Compared) -> dict[str, bool | None]:
        first, sentence = episode.true[0], episode.rollout.instruction
        words = [_word(judge, sentence, first, frame) for frame in episode.imagined[1:]]
        return {
            LAST: words[-1],
            ANY: None if all(word is None for word in words) else any(words),
            OF_TRUE_CODES: _word(judge, sentence, first, episode.told[-1]),
            OF_TRUE: _word(judge, sentence, first, episode.true[-1]),
        }

    def report(self) -> dict[str, Any]:
        """
        Runs what has not run, and sums up.

        Returns:
            `cells` (success in the simulator, horizon, judge, prediction of each), `all` (the same together; prediction over
            the cells that can be judged), `summary` in sentences, and what was run.
        """
        if not self.episodes:
            self.run()
        if not self.episodes:
            raise ValueError(f"`suite` {self.suite.name}: every episode crashed or hung.")
        cells = {}
        for cell in self.suite.cells:
            own = [episode for episode in self.episodes if episode.cell == cell.name]
            if own:
                judged = own if self.judging[cell.name].get("can_judge") else []
                about = {"judge": self.judging[cell.name], "steps": self.steps[cell.name]}
                cells[cell.name] = about | {"broken": self.broken.get(cell.name, 0), **summary_of(own, judged)}
        judged = [episode for episode in self.episodes if self.judging[episode.cell].get("can_judge")]
        pooled = summary_of(self.episodes, judged)
        return {
            "suite": self.suite.name,
            "policy": self.player.name,
            "frame_gap": self.settings.frame_gap,
            "seconds_per_step": self.settings.frame_gap / self.suite.frequency,
            "seed": self.settings.seed,
            "num_environments": self.settings.num_environments,
            "image_size": list(self.world.size),
            "judge_rollouts": self.settings.judge_rollouts,
            "judge_threshold": measures.JUDGE_THRESHOLD,
            "cells": cells,
            "all": pooled,
            "summary": sentences(pooled, cells),
        }


def _word(judge: Judge, instruction: str, first: Frames, last: Frames) -> bool | None:
    miss = judge.miss(instruction, first, last)
    return None if miss is None else miss <= 0


def _without_frames(rollout: Rollout) -> Rollout:
    return Rollout(
        rollout.family, rollout.seed, rollout.instruction, rollout.success, rollout.num_steps, rollout.ending,
        rollout.progress,
    )  # fmt: skip


def summary_of(episodes: Sequence[Compared], judged: Sequence[Compared]) -> dict[str, Any]:
    """
    Numbers of some episodes.

    Args:
        episodes: Those that are measured.
        judged: Those of them whose pictures can be judged.
    """
    errors = [episode.errors() for episode in episodes]
    horizon = {
        kind: measures.horizon_table({name: [each[name][kind] for each in errors] for name in measures.PREDICTORS})
        for kind in (measures.ALL_PIXELS, measures.CHANGED_PIXELS)
    }
    found: dict[str, Any] = {
        "simulator": success_cell(episode.rollout.success for episode in episodes),
        "horizon": horizon,
        "prediction": {way: _prediction(judged, way) for way in (LAST, ANY, OF_TRUE_CODES, OF_TRUE)} if judged else {},
    }
    second = [episode for episode in (judged or episodes) if episode.predicted.get(SECOND) is not None]
    if second:
        found["prediction"][SECOND] = _prediction(second, SECOND)
    return found


def _prediction(episodes: Sequence[Compared], way: str) -> dict[str, Any]:
    words = [episode.predicted[way] for episode in episodes]
    outcomes, cells = [episode.rollout.success for episode in episodes], [episode.cell for episode in episodes]
    return measures.judge_score(words, outcomes, cells)


def sentences(pooled: Mapping[str, Any], cells: Mapping[str, Any]) -> list[str]:
    """What the numbers say, in words."""
    table = pooled["horizon"][measures.ALL_PIXELS]
    lines = [_horizon_sentence(table, name) for name in (measures.IMAGINED, measures.TRUE_CODES)]
    if table:
        lines.append(_share_sentence(table))
    refused = [name for name, cell in cells.items() if not cell["judge"].get("can_judge")]
    if refused:
        lines.append(f"Success cannot be judged from pictures in {', '.join(refused)}.")
    if LAST in pooled["prediction"]:
        lines.append(_prediction_sentence(pooled["prediction"][LAST]))
    drawn = [
        100 * balanced["value"]
        for cell in cells.values()
        if cell["judge"].get("can_judge") and (balanced := cell["judge"]["drawn_frames"]["balanced_accuracy"])
    ]
    if drawn:
        lines.append(
            f"In frames drawn one step from a true frame the judge tells solved from unsolved with {min(drawn):.0f} to "
            f"{max(drawn):.0f}% balanced accuracy (by cell): what the decoder does not draw, no rollout can show."
        )
    return lines


def _horizon_sentence(table: Sequence[Mapping[str, Any]], name: str) -> str:
    who = "Imagined frames" if name == measures.IMAGINED else "Frames drawn from the true codes"
    better = 0
    for row in table:
        low = row["gain"][name]["ci95"][0]
        if low is None or low <= 0:
            break
        better = row["step"]
    if better == 0:
        return f"{who} are not closer to the truth than the first frame, not even after one step."
    until = "for all" if better == table[-1]["step"] else "for the first"
    return f"{who} are closer to the truth than the first frame {until} {better} steps."


def _share_sentence(table: Sequence[Mapping[str, Any]]) -> str:
    """Whose errors they are, at the last step that half of the episodes reach."""
    row = [row for row in table if 2 * row["episodes"] >= table[0]["episodes"]][-1]
    whole = row[measures.IMAGINED]["value"] or 1.0
    shares = [100 * row[name]["value"] / whole for name in (measures.TRUE_CODES, measures.ONE_STEP)]
    return (
        f"At step {row['step']} the decoder alone, told the true codes, has {shares[0]:.0f}% of the error of imagined frames, "
        f"and {shares[1]:.0f}% where it need not feed its own frames back."
    )


def _prediction_sentence(found: Mapping[str, Any]) -> str:
    accuracy = found["accuracy"]
    words = {
        True: "The last imagined frame tells more than chance which episodes are solved",
        False: "There is no evidence that the last imagined frame tells which episodes are solved",
        None: "In no cell do episodes end differently, so whether the last imagined frame tells success cannot be said",
    }[measures.tells_more_than_chance(found)]
    balanced = found["balanced_accuracy"]
    more = "" if balanced is None else f", balanced accuracy within cells {100 * balanced['value']:.1f}%"
    return (
        f"{words}: {accuracy['successes']} of {accuracy['rollouts']} right, where always guessing the commoner ending is right "
        f"in {100 * found['majority']:.1f}%{more}."
    )


__all__ = [
    "ANY", "LAST", "OF_TRUE", "OF_TRUE_CODES", "SECOND", "Compared", "ImagineSuite", "ImagineSuiteSettings", "Judge",
    "open_judge", "sentences", "summary_of",
]  # fmt: skip
