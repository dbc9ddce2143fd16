"""What a processor knows of the robots it serves: bins of their actions and ranges of their states, by `unnorm_key`."""

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from lapa.processing.action_tokenization_lapa import ActionTokenizer
from lapa.processing.proprio_lapa import ProprioTokenizer


class RobotStatistics:
    """The part of `LapaProcessor` that turns actions into bins and back, and states into text."""

    action_dim: int
    action_vocab_size: int
    action_statistics: dict[str, dict[str, Any]]
    proprio_statistics: dict[str, dict[str, Any]]

    def action_tokenizer(self, unnorm_key: str | None = None) -> ActionTokenizer:
        """
        Bins of one set of statistics.

        Args:
            unnorm_key: Which; None is allowed where there is exactly one.

        Raises:
            ValueError: An unknown key, or None where there are none or several; the known ones are listed.
        """
        known = ", ".join(repr(key) for key in sorted(self.action_statistics)) or "none"
        if unnorm_key is None:
            if len(self.action_statistics) != 1:
                raise ValueError(f"`unnorm_key` must be given unless there is exactly one; known keys: {known}.")
            (unnorm_key,) = self.action_statistics
        if unnorm_key not in self.action_statistics:
            raise ValueError(f"`unnorm_key` {unnorm_key!r} is unknown; known keys: {known}.")
        return ActionTokenizer.from_dict(self.action_statistics[unnorm_key])

    def set_action_statistics(self, unnorm_key: str, statistics: ActionTokenizer) -> None:
        """
        Adds or replaces the bins of a key.

        Raises:
            ValueError: More dimensions than `action_dim`, more bins than `action_vocab_size`, or an empty key.
        """
        if not isinstance(unnorm_key, str) or not unnorm_key:
            raise ValueError(f"`unnorm_key` must be a non-empty string, got {unnorm_key!r}.")
        if statistics.action_dim > self.action_dim:
            raise ValueError(
                f"statistics of {unnorm_key!r} have {statistics.action_dim} dimensions, `action_dim` is {self.action_dim}."
            )
        if max(statistics.num_bins) > self.action_vocab_size:
            raise ValueError(
                f"statistics of {unnorm_key!r} have up to {max(statistics.num_bins)} bins, `action_vocab_size` is "
                f"{self.action_vocab_size}."
            )
        self.action_statistics = {**self.action_statistics, unnorm_key: statistics.to_dict()}

    def load_action_csv(self, path: str | os.PathLike[str], unnorm_key: str) -> ActionTokenizer:
        """Adds the bins of a csv in the published layout under a key."""
        statistics = ActionTokenizer.from_csv(path)
        self.set_action_statistics(unnorm_key, statistics)
        return statistics

    def fit_actions(
        self,
        actions: ArrayLike,
        unnorm_key: str,
        num_bins: int | None = None,
        gripper_dimension: str | int | None = "last",
    ) -> ActionTokenizer:
        """
        Fits equal-frequency bins and adds them under a key.

        Args:
            actions: (num_steps, action_dim), physical units.
            unnorm_key: Name of the statistics.
            num_bins: Most bins per dimension; `action_vocab_size` when None.
            gripper_dimension: See `ActionTokenizer.fit`.
        """
        bins = self.action_vocab_size if num_bins is None else num_bins
        statistics = ActionTokenizer.fit(actions, num_bins=bins, gripper_dimension=gripper_dimension)
        self.set_action_statistics(unnorm_key, statistics)
        return statistics

    def proprio_tokenizer(self, unnorm_key: str | None = None) -> ProprioTokenizer:
        """
        Range of one set of proprio statistics.

        Args:
            unnorm_key: Which; None is allowed where there is exactly one.

        Raises:
            ValueError: An unknown key, or None where there are none or several; the known ones are listed.
        """
        known = ", ".join(repr(key) for key in sorted(self.proprio_statistics)) or "none"
        if unnorm_key is None and len(self.proprio_statistics) == 1:
            (unnorm_key,) = self.proprio_statistics
        if unnorm_key not in self.proprio_statistics:
            raise ValueError(f"`unnorm_key` {unnorm_key!r} has no proprio statistics; known keys: {known}.")
        return ProprioTokenizer.from_dict(self.proprio_statistics[unnorm_key])

    def set_proprio_statistics(self, unnorm_key: str, statistics: ProprioTokenizer) -> None:
        """Adds or replaces the proprio range of a key."""
        if not isinstance(unnorm_key, str) or not unnorm_key:
            raise ValueError(f"`unnorm_key` must be a non-empty string, got {unnorm_key!r}.")
        self.proprio_statistics = {**self.proprio_statistics, unnorm_key: statistics.to_dict()}

    def fit_proprio(self, proprio: ArrayLike, unnorm_key: str) -> ProprioTokenizer:
        """Fits the range of states (num_steps, proprio_dim) in physical units and adds it under a key."""
        statistics = ProprioTokenizer.fit(proprio)
        self.set_proprio_statistics(unnorm_key, statistics)
        return statistics

    def encode_actions(self, actions: Any, unnorm_key: str | None = None) -> Any:
        """(..., action_dim) physical units -> int64 bins, as a tensor where a tensor is given, else as an array."""
        if isinstance(actions, torch.Tensor):
            return torch.from_numpy(self.action_tokenizer(unnorm_key).encode(actions.detach().cpu().numpy()))
        return self.action_tokenizer(unnorm_key).encode(actions)

    def decode_actions(self, tokens: Any, unnorm_key: str | None = None) -> Any:
        """
        Bins to actions.

        Args:
            tokens: (batch, action_dim) bins, or (batch, action_horizon, action_dim), an integer tensor or array. Further
                dimensions, which another embodiment of the batch has, must be -1.
            unnorm_key: Which statistics; None is allowed where there is exactly one.

        Returns:
            (..., action_dim) float32 in physical units, with the dimensions that the key has; a tensor where a tensor is
            given, else an array.

        Raises:
            ValueError: An unknown key (the known ones are listed), or a bin that its dimension lacks.
        """
        tokenizer = self.action_tokenizer(unnorm_key)
        if isinstance(tokens, torch.Tensor):
            return torch.from_numpy(self.decode_actions(tokens.detach().cpu().numpy(), unnorm_key))
        bins = np.asarray(tokens)
        if bins.ndim and (bins[..., tokenizer.action_dim :] == -1).all():
            bins = bins[..., : tokenizer.action_dim]
        return tokenizer.decode(bins)


__all__ = ["RobotStatistics"]
