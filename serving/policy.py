"""One interface for whatever chooses actions from images and instructions."""

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from lapa.modeling_lapa.modeling_lapa import LapaForActionPrediction
from lapa.processing.processing_lapa import LapaProcessor
from lapa.serving.row_sampling import RowSamplingLogitsProcessor


class Policy(Protocol):
    """Chooses an action for each of a batch of robots."""

    def act(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], proprio: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """Actions (batch, action_dim) float32 in physical units.

        Args:
            images: One (height, width, 3) uint8 image per robot.
            instructions: One sentence per robot.
            proprio: One state (proprio_dim,) per robot, in physical units, for a policy that reads it.
        """


class ChunkPolicy(Protocol):
    """Chooses several actions at once for each of a batch of robots."""

    @property
    def action_horizon(self) -> int:
        """Steps that one prediction holds."""

    def act_chunk(
        self, images: Sequence[np.ndarray], instructions: Sequence[str], proprio: Sequence[np.ndarray] | None = None
    ) -> np.ndarray:
        """All steps of a prediction, (batch, action_horizon, action_dim) float32; arguments as in [`Policy`]."""


def policy_inputs(
    policy: Any,
    target: str,
    images: Sequence[np.ndarray],
    instructions: Sequence[str],
    proprio: Sequence[np.ndarray] | None,
    **options: Any,
) -> Any:
    """
    What a policy's model reads, on the model's device.

    Args:
        policy: With a `model` and a `processor`.
        target: `latent` or `action`.
        images, instructions, proprio: See [`Policy`].
        options: Further arguments of the processor.
    """
    return policy.processor(
        images=list(images),
        instruction=list(instructions),
        target=target,
        padding="longest",
        proprio=proprio,
        return_tensors="pt",
        **options,
    ).to(policy.model.device)


class LapaPolicy:
    """A finetuned model with its processor as a [`Policy`].

    Args:
        model: The finetuned model.
        processor: Holds the action statistics.
        unnorm_key: Which of them to use; may be None when there is one.
        generation: Arguments of `generate`, for example `{"do_sample": True, "temperature": 0.5}`; greedy when empty.
    """

    def __init__(
        self,
        model: LapaForActionPrediction,
        processor: LapaProcessor,
        unnorm_key: str | None = None,
        **generation: Any,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.unnorm_key, self.generation = unnorm_key, generation

    @classmethod
    def from_pretrained(cls, folder: str, unnorm_key: str | None = None, **generation: Any) -> "LapaPolicy":
        """Load model and processor of a finetuned folder or Hub repository."""
        model = LapaForActionPrediction.from_pretrained(folder)
        return cls(model, LapaProcessor.from_pretrained(folder), unnorm_key, **generation)

    @property
    def action_horizon(self) -> int:
        """Steps that one prediction holds."""
        return self.model.config.action_horizon

    @torch.inference_mode()
    def act_chunk(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
        draws: Sequence[np.random.Generator] | None = None,
    ) -> np.ndarray:
        """All steps of a prediction, (batch, action_horizon, action_dim) float32.

        Args:
            images, instructions, proprio: See [`Policy`].
            draws: For a policy that samples, a generator per robot: what a robot draws is independent of the others in
                the batch. torch's generator, which serves all rows together, when None.
        """
        inputs = policy_inputs(self, "action", images, instructions, proprio, unnorm_key=self.unnorm_key)
        options = RowSamplingLogitsProcessor.options(self.model, "action", self.generation, draws)
        tokens = self.model.predict_action_tokens(**inputs, **options)
        actions = self.processor.decode_actions(tokens.cpu().numpy(), unnorm_key=self.unnorm_key)
        return np.asarray(actions, dtype=np.float32).reshape(len(actions), self.action_horizon, -1)

    def act(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
        draws: Sequence[np.random.Generator] | None = None,
    ) -> np.ndarray:
        """See [`Policy`] and `act_chunk`; the first step of every prediction."""
        return self.act_chunk(images, instructions, proprio, draws)[:, 0]


class ChunkPlayer:
    """Plays the chunks of a policy: predicts for the robots that have nothing left to do, and lets the others go on.

    Args:
        policy: Predicts chunks.
        replan_every: Steps that are played of a chunk before the next prediction, 1 to `action_horizon`; all of them
            (open loop) when None. 1 looks at the newest image at every step.
        gripper_patience: Steps in a row that must ask for the other state of the gripper before it changes; 1 follows at
            once. Predictions that flicker between open and closed then leave it as it is.
        gripper_dimension: Index of the gripper among the dimensions. Its bins are its states.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        replan_every: int | None = None,
        gripper_patience: int = 1,
        gripper_dimension: int = -1,
    ) -> None:
        horizon = policy.action_horizon
        if replan_every is not None and not 1 <= replan_every <= horizon:
            raise ValueError(f"`replan_every` must lie in [1, {horizon}] (`action_horizon`), got {replan_every}.")
        if gripper_patience < 1:
            raise ValueError(f"`gripper_patience` must be at least 1, got {gripper_patience}.")
        self.policy = policy
        self.replan_every = horizon if replan_every is None else replan_every
        self.gripper_patience, self.gripper_dimension = gripper_patience, gripper_dimension
        self._queues: dict[Hashable, deque[np.ndarray]] = {}
        self._grippers: dict[Hashable, tuple[float, int]] = {}

    def reset(self, robots: Sequence[Hashable] | None = None) -> None:
        """Forgets what is left of the chunks of these robots, at the start of an episode; of all when None."""
        for name in list(self._queues) if robots is None else robots:
            self._queues.pop(name, None)
            self._grippers.pop(name, None)

    def act(
        self,
        images: Sequence[np.ndarray],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
        robots: Sequence[Hashable] | None = None,
        draws: Sequence[np.random.Generator] | None = None,
    ) -> np.ndarray:
        """Actions (batch, action_dim), see [`Policy`].

        Args:
            images, instructions, proprio: See [`Policy`].
            robots: A name for each robot, by which its chunk is remembered; its place in the batch when None.
            draws: See [`LapaPolicy.act_chunk`].
        """
        names: list[Hashable] = list(range(len(images))) if robots is None else list(robots)
        idle = [row for row, name in enumerate(names) if not self._queues.get(name)]
        if idle:
            more = {} if draws is None else {"draws": [draws[row] for row in idle]}
            chunks = self.policy.act_chunk(
                [images[row] for row in idle],
                [instructions[row] for row in idle],
                None if proprio is None else [proprio[row] for row in idle],
                **more,
            )
            for row, chunk in zip(idle, chunks):
                self._queues[names[row]] = deque(chunk[: self.replan_every])
        actions = np.stack([self._queues[name].popleft() for name in names])
        if self.gripper_patience > 1:
            for name, action in zip(names, actions):
                action[self.gripper_dimension] = self._hold(name, float(action[self.gripper_dimension]))
        return actions

    def _hold(self, name: Hashable, asked: float) -> float:
        """The gripper's value: the one it has until another was asked for `gripper_patience` times in a row."""
        held, changes = self._grippers.get(name, (asked, 0))
        changes = 0 if asked == held else changes + 1
        if changes >= self.gripper_patience:
            held, changes = asked, 0
        self._grippers[name] = (held, changes)
        return held


__all__ = ["ChunkPlayer", "ChunkPolicy", "LapaPolicy", "Policy", "policy_inputs"]
