"""Statistics of actions in one pass: equal to those of all in memory, or within the stated bound."""

import json

import numpy as np
import pytest
from memory_source import MemorySource
from shared_files import shared_path

from lapa.data import action_stats
from lapa.data.action_stats import VALUE_ERROR, ActionStatistics, source_statistics
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.open_source import open_source
from lapa.processing.action_tokenization_lapa import ActionTokenizer

PROBABILITIES = [0, 0.001, 0.25, 1 / 3, 0.5, 0.77, 0.999, 1]


def actions_like_a_robot(count, seed=0):
    """Of very different sizes, with ties, a constant and a gripper."""
    generator = np.random.default_rng(seed)
    columns = [
        generator.normal(0, 0.02, count),
        np.round(generator.normal(0, 3, count)),
        generator.standard_cauchy(count) * 1e-3,
        np.zeros(count),
        generator.integers(0, 2, count),
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def of(actions, pieces=1, **options):
    statistics = ActionStatistics(actions.shape[1], **options)
    for piece in np.array_split(actions, pieces):
        statistics.update(piece)
    return statistics


@pytest.mark.parametrize("count", [1, 2, 7, 5000])
def test_exact_while_values_are_few(count, monkeypatch):
    monkeypatch.setattr(action_stats, "PENDING_ROWS", 1000)
    actions = actions_like_a_robot(count)
    statistics = of(actions, pieces=min(count, 13))
    assert statistics.num_steps == count and statistics.is_exact == (True,) * 5
    assert np.array_equal(
        statistics.quantile(PROBABILITIES), np.quantile(actions.astype(np.float64), PROBABILITIES, 0)
    )
    assert np.array_equal(statistics.minimum, actions.min(0)) and np.array_equal(statistics.maximum, actions.max(0))
    assert np.allclose(statistics.mean, actions.astype(np.float64).mean(0), rtol=1e-12, atol=1e-15)
    assert np.allclose(statistics.std, actions.astype(np.float64).std(0), rtol=1e-12, atol=1e-15)
    for num_bins in (1, 10, 256):
        assert statistics.tokenizer(num_bins) == ActionTokenizer.fit(actions, num_bins)
    assert statistics.tokenizer(16, None) == ActionTokenizer.fit(actions, 16, None)


def test_bins_are_those_of_pandas():
    pandas = pytest.importorskip("pandas")
    actions = actions_like_a_robot(3000)
    edges = of(actions, 3).tokenizer(255, None).edges
    for dimension in (0, 1, 2):
        _, expected = pandas.qcut(actions[:, dimension].astype(np.float64), 255, retbins=True, duplicates="drop")
        assert np.array_equal(edges[dimension], expected)


def test_bounded_beyond(monkeypatch):
    monkeypatch.setattr(action_stats, "PENDING_ROWS", 4096)
    actions = actions_like_a_robot(50_000)
    statistics = of(actions, 11, max_values=1000)
    assert statistics.is_exact == (False, True, False, True, True)
    probabilities = np.linspace(0, 1, 4001)
    found, true = statistics.quantile(probabilities), np.quantile(actions.astype(np.float64), probabilities, axis=0)
    for dimension in (0, 2):
        ordered = np.sort(actions[:, dimension].astype(np.float64))
        above = ordered[np.ceil(probabilities * (len(ordered) - 1)).astype(int)]
        below = ordered[np.floor(probabilities * (len(ordered) - 1)).astype(int)]
        error = np.abs(found[:, dimension] - true[:, dimension])
        assert (error < VALUE_ERROR * np.maximum(np.abs(above), np.abs(below))).all()
        assert error.max() > 0
    for dimension in (1, 3, 4):
        assert np.array_equal(found[:, dimension], true[:, dimension])
    assert np.array_equal(found[[0, -1]], true[[0, -1]])


def test_what_few_bits_hold_stays_exact():
    """0, 1 and small whole numbers among more values than are kept."""
    generator = np.random.default_rng(0)
    noise = generator.normal(10, 1, 3000)
    actions = np.concatenate([np.zeros(3000), np.ones(3000), np.full(3000, -4095.0), noise])[:, None]
    statistics = of(actions, max_values=100)
    assert statistics.is_exact == (False,)
    assert statistics.quantile([0.1, 0.3, 0.6]).ravel().tolist() == [-4095, 0, 1]
    subnormal = np.array([[2.0**-149], [2.0**-140], [3e-45]])
    assert (
        np.abs(of(subnormal, max_values=1).quantile([0, 0.5, 1]) - np.quantile(subnormal, [0, 0.5, 1], 0)).max()
        < 2.0**-138
    )


def test_parts_add_up_in_any_order(monkeypatch, tmp_path):
    monkeypatch.setattr(action_stats, "PENDING_ROWS", 500)
    actions = actions_like_a_robot(4000)
    first, second, third = (of(part, max_values=2500) for part in np.array_split(actions, [700, 1900]))
    whole = of(actions, max_values=2500)
    # No part has more than 2500 distinct values, all have.
    assert first.is_exact[0] and third.is_exact[0] and not whole.is_exact[0]
    third.save(tmp_path / "third.npz")
    for sum_ in (
        first + second + third,
        third + (first + second),
        second + ActionStatistics.load(tmp_path / "third.npz") + first,
    ):
        assert np.array_equal(sum_.quantile(PROBABILITIES), whole.quantile(PROBABILITIES))
        assert sum_.is_exact == whole.is_exact and sum_.num_steps == 4000
        assert np.allclose(sum_.mean, whole.mean) and np.allclose(sum_.std, whole.std)
    # What was added is as it was.
    assert first.num_steps == 700 and np.array_equal(
        first.quantile([0.5]), np.quantile(actions[:700].astype(float), [0.5], 0)
    )
    with pytest.raises(ValueError, match="`action_dim` 5 and `max_values` 2500 cannot be added to those with 5 and 7"):
        first + ActionStatistics(5, 7)


def test_saved_and_summarised(tmp_path):
    statistics = of(actions_like_a_robot(300))
    statistics.save(tmp_path / "actions.npz")
    loaded = ActionStatistics.load(tmp_path / "actions.npz")
    assert loaded.to_dict() == statistics.to_dict() == json.loads(json.dumps(statistics.to_dict()))
    assert loaded.to_dict()["num_steps"] == 300 and loaded.to_dict()["quantiles"]["0.5"][3] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["actions.npz"]
    for content in (b"", b"PK\x03\x04", (tmp_path / "actions.npz").read_bytes()[:-100]):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match="damaged.npz holds no action statistics"):
            ActionStatistics.load(tmp_path / "damaged.npz")
    np.savez(tmp_path / "other.npz", sizes=[9, 1, 1])
    with pytest.raises(ValueError, match="version 9, this code reads 1"):
        ActionStatistics.load(tmp_path / "other.npz")


def test_bad_actions():
    statistics = ActionStatistics(2)
    with pytest.raises(ValueError, match="statistics of no actions"):
        statistics.quantile([0.5])
    for actions, message in (
        ([[0, 1], [2, np.nan]], r"actions\[1, 1\] is nan"),
        ([[1e39, 0]], r"actions\[0, 0\] is inf"),
        ([[1, 2, 3]], r"must be \(num_steps, 2\), got shape \(1, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.update(actions)
    statistics.update([[0.5, 7]])
    with pytest.raises(ValueError, match=r"of the gripper .* they span \[7.0, 7.0\]"):
        statistics.tokenizer(4)
    with pytest.raises(ValueError, match="`probabilities`"):
        statistics.quantile([1.5])
    with pytest.raises(ValueError, match="`num_bins`"):
        statistics.tokenizer(0)
    assert statistics.num_steps == 1


def test_of_a_source():
    source = MemorySource("robot", [[4, 3], [0, 6]], action_dim=3)
    with pytest.raises(ValueError, match="record 0: checksum"):
        source_statistics(source)
    skipped = SkippedEpisodes(0.5)
    statistics = source_statistics(source, skipped).action
    actions = np.concatenate(
        [episode.action for shard in (0, 1) for _, episode in source.read(shard, None, lambda _: None)]
    )
    assert statistics.num_steps == 13 and (skipped.num_skipped, skipped.num_seen) == (1, 4)
    assert np.array_equal(statistics.quantile([0.5]), np.quantile(actions.astype(np.float64), [0.5], 0))
    parts = [source_statistics(source, skipped, [shard]) for shard in (0, 1)]
    assert (parts[0] + parts[1]).action.to_dict()["quantiles"] == statistics.to_dict()["quantiles"]
    assert source_statistics(MemorySource("video", [[4]])) is None


def test_of_the_bridge_shard():
    source = open_source(shared_path("data/bridge_rlds/1.0.0"))
    episodes = [episode for episode in source if episode.instructions]
    actions = np.concatenate([episode.action for episode in episodes])
    statistics = source_statistics(source, with_proprio=True)
    assert statistics.proprio.action_dim == 7
    statistics = statistics.action
    assert statistics.num_steps == len(actions) > 100
    assert statistics.tokenizer(32) == ActionTokenizer.fit(actions, 32)
