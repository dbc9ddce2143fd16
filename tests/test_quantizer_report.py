"""`lapa report-quantizer`: it tells good quantizers from bad ones, also from kinds of bad it was not made for."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from quantizer_worlds import GOOD, HELD_OUT_BAD, KNOWN_BAD, MOVES, BlobWorld, StandIn, copy_first, draw
from shared_files import shared_path

from lapa.cli import main
from lapa.configuration.configuration_lapa_quantizer import LapaQuantizerConfig
from lapa.data.episode_source import SkippedEpisodes
from lapa.data.mixture import FramePairSource
from lapa.data.schema import DELTA_END_EFFECTOR, Episode
from lapa.evaluation.quantizer_report import measure_quantizer
from lapa.evaluation.quantizer_report_directions import confusion
from lapa.evaluation.quantizer_report_measures import Runner, code_statistics
from lapa.evaluation.quantizer_report_motion import global_shift, grey, inner_motion, synthetic_shift
from lapa.evaluation.quantizer_report_page import write_report
from lapa.evaluation.quantizer_report_probes import cross_predict, fit_linear, fold_of, one_hot
from lapa.evaluation.quantizer_report_sample import gripper_changes, group_pairs, pair_target, sample_pairs
from lapa.evaluation.quantizer_report_statistics import mean_cell, mutual_information, r2_cell
from lapa.evaluation.quantizer_report_verdict import CRITERIA, reaches
from lapa.evaluation.quantizer_report_verdict import GOOD as GOOD_LEVEL
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizer

VIDEO = BlobWorld(labelled=False)


def report_on(quantizer: StandIn, *worlds: BlobWorld, max_pairs: int = 200) -> dict:
    sources = [FramePairSource(world, frame_gap=1) for world in worlds or (VIDEO,)]
    return measure_quantizer(Runner(quantizer), sources, max_pairs=max_pairs).report


def levels(report: dict) -> dict[str, str]:
    return {line["name"]: line["level"] for line in report["verdict"]["criteria"]}


@pytest.fixture(scope="module")
def good() -> dict:
    return report_on(GOOD, BlobWorld())


@pytest.fixture(scope="module")
def good_on_video() -> dict:
    return report_on(GOOD)


def test_a_good_quantizer_is_good_with_and_without_actions(good, good_on_video):
    for report in (good, good_on_video):
        assert report["verdict"]["level"] == "good"
        assert report["verdict"]["score"] == 1.0
        assert report["verdict"]["reasons"] == []
    assert good_on_video["probe"]["linear"] is None
    assert good["probe"]["linear"]["r2"]["value"] > 0.99
    assert good["probe"]["mlp"]["r2"]["value"] > 0.9
    assert good["probe"]["linear"]["normalised_mse"]["value"] < 0.01
    assert good["reconstruction"]["model"] < good["reconstruction"]["copy_first_frame"]


# The criterion that finds each of them out.
FOUND_OUT_BY = {
    "collapsed": "usage",
    "copies_the_frame": "decoder_uses_codes",
    "camera_only": "not_the_camera",
    "under_trained": "decoder_uses_codes",
    "random_codes": "tells_motion",
    "background": "independent_of_scene",
    "where_it_starts": "independent_of_scene",
    "permuted_decoder": "decoder_uses_codes",
    "half_collapsed": "usage",
    "spread_over_dead_tokens": "sequence_perplexity",
}


@pytest.mark.parametrize("name", [*KNOWN_BAD, *HELD_OUT_BAD])
def test_bad_quantizers_rank_below_and_are_found_out(name, good_on_video):
    report = report_on({**KNOWN_BAD, **HELD_OUT_BAD}[name])
    assert report["verdict"]["level"] == "bad"
    assert report["verdict"]["score"] < good_on_video["verdict"]["score"]
    assert levels(report)[FOUND_OUT_BY[name]] == "bad"
    reasons = report["verdict"]["reasons"]
    assert len(reasons) == sum(level != GOOD_LEVEL for level in levels(report).values())
    assert any(reason.startswith(f"{FOUND_OUT_BY[name]} is ") for reason in reasons)


@pytest.mark.parametrize("name", ["camera_only", "random_codes", "background"])
def test_actions_find_out_what_the_codes_do_not_tell(name):
    report = report_on({**KNOWN_BAD, **HELD_OUT_BAD}[name], BlobWorld())
    assert levels(report)["tells_motion"] == "bad"
    assert report["probe"]["linear"]["r2"]["value"] < 0.05
    for table in report["confusions"]["actions"]:
        assert table["accuracy"]["value"] < 0.7


def test_directions_of_actions(good):
    tables = {table["dimension"]: table for table in good["confusions"]["actions"]}
    assert set(tables) == {"right", "down"}
    for table in tables.values():
        assert table["accuracy"]["value"] == 1.0
        assert table["table"][0][1] == table["table"][1][0] == 0
        assert table["names"][0].startswith("+")


def test_a_still_camera_is_no_criterion(good):
    report = report_on(GOOD, BlobWorld(camera_moves=False, labelled=False))
    assert report["verdict"]["not_measured"] == ["not_the_camera", "same_for_all_bodies"]
    assert not report["leakage"]["camera_moves"]
    assert good["leakage"]["camera_moves"]
    assert good["leakage"]["camera_share"]["value"] < 0.1
    assert report_on(KNOWN_BAD["camera_only"])["leakage"]["camera_shift"]["r2"]["value"] > 0.9


def test_made_up_shifts_move_only_codes_that_see_the_camera(good):
    camera = report_on(KNOWN_BAD["camera_only"])["leakage"]["shifted_stills"]
    assert camera["responds"]["value"] == 1.0
    assert camera["direction_told"]["value"] > 0.5
    blob = good["leakage"]["shifted_stills"]
    assert blob["responds"]["value"] < 0.3


def test_embodiments_agree_or_do_not():
    worlds = BlobWorld("arm", num_episodes=10), BlobWorld("other", num_episodes=10)
    rows = report_on(GOOD, *worlds)["embodiments"]
    assert [(row["fitted_on"], row["tested_on"]) for row in rows] == [("arm", "other"), ("other", "arm")]
    for row in rows:
        assert row["values"] == "actions"
        assert row["r2"]["value"] > 0.9
        assert row["direction"]["cosine"]["value"] > 0.95
        assert row["direction"]["cosine"]["ci95"][0] > 0.9
    turned = report_on(GOOD, worlds[0], BlobWorld("other", num_episodes=10, turn=4))
    assert turned["embodiments"][0]["direction"]["cosine"]["value"] < -0.9
    assert levels(turned)["same_for_all_bodies"] == "usable"
    unlabelled = report_on(GOOD, worlds[0], BlobWorld("film", num_episodes=10, labelled=False))["embodiments"]
    assert {row["values"] for row in unlabelled} == {"motion in the picture"}
    assert unlabelled[0]["direction"]["cosine"]["value"] > 0.9


def test_the_same_arguments_draw_the_same_pairs_of_all_sources():
    sources = [FramePairSource(BlobWorld(name, num_episodes=20), frame_gap=2) for name in ("one", "another")]
    first, again = (sample_pairs(sources, (32, 32), 60, seed=3) for _ in range(2))
    other = sample_pairs(sources, (32, 32), 60, seed=4)
    np.testing.assert_array_equal(first.frames, again.frames)
    np.testing.assert_array_equal(first.steps, again.steps)
    assert len(first) == 60
    assert np.bincount(first.source).tolist() == [30, 30]
    assert (first.steps[:, 1] - first.steps[:, 0] == 2).all()
    assert len(other) == 60 and not np.array_equal(first.frames, other.frames)
    assert sum(source.num_episodes for source in first.sources) == len(np.unique(first.episode))
    last = sample_pairs(sources, (32, 32), 60, last_episodes=3)
    assert [source.available_episodes for source in last.sources] == [3, 3]
    with pytest.raises(ValueError, match=r"`last_episodes` must lie in \[1, 20\]"):
        sample_pairs(sources, (32, 32), 60, last_episodes=21)
    with pytest.raises(ValueError, match="gives no pair of frames"):
        sample_pairs([FramePairSource(BlobWorld(), frame_gap=16)], (32, 32), 60)


def test_what_cannot_be_read_is_skipped_and_counted_when_asked():
    from memory_source import MemorySource

    source = FramePairSource(MemorySource("some", [[6, 0, 6, 6]], size=8), frame_gap=1)
    with pytest.raises(ValueError, match="record 1: checksum"):
        sample_pairs([source], (8, 8), 100)
    skipped = SkippedEpisodes(max_share=0.5)
    sample = sample_pairs([source], (8, 8), 100, on_error=skipped)
    assert len(sample) == 15 and skipped.num_skipped == 1


def test_few_episodes_are_cut_into_stretches():
    steps = np.stack([np.arange(40), np.arange(40) + 1], axis=1)
    group, name = group_pairs(np.zeros(40, dtype=int), steps)
    assert name == "stretches of episodes"
    assert group.tolist() == sorted(group.tolist()) and np.bincount(group).tolist() == [2] * 20
    episodes = np.repeat(np.arange(10), 4)
    group, name = group_pairs(episodes, steps)
    assert name == "episodes" and group.tolist() == episodes.tolist()


def test_the_target_is_what_happens_between_the_frames():
    action = np.zeros((5, 7), np.float32)
    action[:, 0] = [1, 2, 4, 8, 16]
    action[:, 6] = [1, 1, 0, 0, 1]
    frames = {"image": np.zeros((5, 4, 4, 3), np.uint8)}
    episode = Episode("0", "s", frames, 5, action=action, action_names=DELTA_END_EFFECTOR, proprio=action * 10)
    steps = np.array([[0, 2], [2, 4]])
    assert pair_target(episode, steps, "action")[:, 0].tolist() == [1.5, 6.0]
    assert pair_target(episode, steps, "action_change")[:, 0].tolist() == [3.0, 12.0]
    assert pair_target(episode, steps, "proprio_change")[:, 0].tolist() == [30.0, 120.0]
    # Frame 2 shows the command of step 1; frame 4 that of step 3.
    assert gripper_changes(episode, steps).tolist() == [0.0, -1.0]
    assert pair_target(replace(episode, action=None), steps, "action") is None


def test_code_statistics():
    codes = np.array([[0, 1], [0, 1], [2, 1], [2, 1]])
    found = code_statistics(codes, 4)
    assert (found["num_used"], found["usage"]) == (3, 0.75)
    assert [token["num_used"] for token in found["per_token"]] == [2, 1]
    assert found["per_token"][0]["perplexity"] == pytest.approx(2)
    assert found["sequences"]["num_used"] == 2 and found["sequences"]["possible"] == 16
    assert found["sequences"]["entropy_bits"] == pytest.approx(1)
    assert found["sequences"]["most_frequent"][0] == {"codes": [0, 1], "share": 0.5}


def test_probes_are_scored_on_groups_they_did_not_see():
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(20), 10)
    fold = fold_of(group)
    assert all(len(np.unique(fold[group == g])) == 1 for g in range(20)) and len(np.unique(fold)) == 5
    # A feature that names the group, and a target that is fixed by the group: nothing carries over.
    features, target = np.eye(20)[group], generator.normal(size=(20, 1))[group]
    assert r2_cell(cross_predict(features, target, group, fit_linear), target, group)["value"] < 0.1
    # Nothing to learn: the probe falls back to the mean instead of fitting noise.
    noise, unrelated = generator.normal(size=(200, 60)), generator.normal(size=(200, 1))
    assert r2_cell(cross_predict(noise, unrelated, group, fit_linear), unrelated, group)["value"] > -0.1
    useful = generator.normal(size=(200, 3))
    cell = r2_cell(cross_predict(useful, useful[:, :2] * 3 + 1, group, fit_linear), useful[:, :2] * 3 + 1, group)
    assert cell["value"] > 0.99
    # More features than pairs: the same regression in its other form.
    wide = np.concatenate([useful, np.zeros((200, 400))], axis=1)
    np.testing.assert_allclose(
        fit_linear(wide, useful[:, :1], group)(wide), fit_linear(useful, useful[:, :1], group)(useful), atol=1e-9
    )
    assert one_hot(np.array([[3, 0], [5, 0], [3, 0]]), 8).tolist() == [[1, 0, 1], [0, 1, 1], [1, 0, 1]]


def test_r2_leaves_out_what_does_not_vary():
    target = np.stack([np.arange(10.0), np.full(10, 0.3)], axis=1)
    cell = r2_cell(target, target, np.arange(10))
    assert cell["value"] == pytest.approx(1) and cell["per_dimension"] == [pytest.approx(1), None]
    assert r2_cell(target[:, 1:], target[:, 1:], np.arange(10))["value"] is None


def test_intervals_are_over_groups():
    # Ten groups of ten equal values: a hundred pairs that are ten observations.
    values = np.repeat(np.random.default_rng(0).normal(size=10), 10)
    low, high = mean_cell(values, np.repeat(np.arange(10), 10))["ci95"]
    narrow_low, narrow_high = mean_cell(values, np.arange(100))["ci95"]
    assert low < values.mean() < high
    assert high - low > 2 * (narrow_high - narrow_low)
    assert mean_cell(values, np.zeros(100))["ci95"] == [None, None]


def test_mutual_information_is_free_of_chance():
    generator = np.random.default_rng(0)
    labels, others = generator.integers(8, size=400), generator.integers(50, size=400)
    assert mutual_information(labels, labels) == pytest.approx(1)
    assert mutual_information(labels, others) < 0.05
    assert mutual_information(np.zeros(10, dtype=int), np.arange(10)) == 0


def test_confusion_needs_motion_both_ways():
    codes, group = np.repeat([[0], [1]], 50, axis=0), np.tile(np.arange(10), 10)
    values = np.where(codes[:, 0] == 0, 1.0, -1.0)
    found = confusion(codes, values, group, ("on", "back"))
    assert found["table"] == [[50, 0], [0, 50]] and found["accuracy"]["value"] == 1 and found["chance"] == 0.5
    assert confusion(codes, np.abs(values), group, ("on", "back")) is None
    assert confusion(codes, np.full(100, np.nan), group, ("on", "back")) is None


@pytest.mark.parametrize("move", MOVES[[0, 1, 4, 6]].tolist())
def test_the_camera_is_told_from_what_moves(move):
    texture = np.random.default_rng(0).random((32, 32)) * 0.1
    first = draw(-3, 2, 0, 0, texture, 0.3)
    camera = grey(np.stack([first, draw(-3, 2, 2 * move[0], 2 * move[1], texture, 0.3)]))
    assert global_shift(*camera) == pytest.approx((2 * move[0], 2 * move[1]), abs=0.2)
    blob = grey(np.stack([first, draw(-3 + 4 * move[0], 2 + 4 * move[1], 0, 0, texture, 0.3)]))
    assert global_shift(*blob) == pytest.approx((0, 0), abs=0.2)
    seen = np.array(inner_motion(*blob))
    assert seen @ move >= 0.7 * np.linalg.norm(seen) * np.linalg.norm(move)
    assert (np.hypot(*seen) > 1) == any(move)


def test_synthetic_shift_repeats_the_edge():
    frames = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    moved = synthetic_shift(frames, 1, 0)
    np.testing.assert_array_equal(moved[0, :, 1], frames[0, :, 0])
    np.testing.assert_array_equal(moved[0, :, 0], frames[0, :, 0])


def test_every_criterion_has_ordered_thresholds():
    for criterion in CRITERIA:
        assert criterion.level(criterion.good) == "good"
        worst = -1e9 if criterion.higher_is_better else 1e9
        assert criterion.level(worst) == ("usable" if criterion.usable is None else "bad")
        if criterion.usable is not None:
            assert criterion.level(criterion.usable) in ("usable", "good")
    assert reaches("usable", "usable") and reaches("good", "usable") and not reaches("bad", "usable")


def test_a_target_that_never_varies_is_not_measured(tmp_path):
    class StillArm(BlobWorld):
        def _episode(self, number):
            episode = super()._episode(number)
            return replace(episode, action=np.full_like(episode.action, 0.25))

    measured = measure_quantizer(Runner(GOOD), [FramePairSource(StillArm(), frame_gap=1)], max_pairs=100)
    assert measured.report["probe"]["linear"]["r2"]["value"] is None
    assert "tells_motion" in measured.report["verdict"]["not_measured"]
    assert measured.report["verdict"]["level"] == "good"
    measured.report |= {"model": "quantizer", "data": "still", "notes": [], "command": "lapa report-quantizer"}
    assert "Not measured" in write_report(measured, tmp_path).read_text(encoding="utf-8")


def test_a_lower_end_at_zero_is_zero():
    (criterion,) = (criterion for criterion in CRITERIA if criterion.name == "tells_motion")

    def told(linear, mlp):
        cells = {name: {"r2": {"value": 0.5, "ci95": [low, 0.9]}} for name, low in (("linear", linear), ("mlp", mlp))}
        return criterion.measure({"probe": cells, "leakage": {}})

    assert told(0.0, -0.5) == told(-0.5, 0.0) == 0.0
    assert told(-0.3, -0.5) == -0.3


def test_a_quantizer_without_codes_is_refused_by_name(tmp_path, capsys):
    config = LapaQuantizerConfig(
        hidden_size=32, codebook_dim=8, image_size=32, patch_size=8, num_spatial_layers=1, num_temporal_layers=1,
        num_attention_heads=2, head_dim=16, bottleneck="query", quantizer="continuous",
    )  # fmt: skip
    LapaQuantizer(config).save_pretrained(tmp_path / "quantizer")
    data = str(shared_path("data/bridge_rlds/1.0.0"))
    command = ["report-quantizer", "--model", str(tmp_path / "quantizer"), "--data", data, "--frame-gap", "3"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert '`quantizer="continuous"` has no codes' in error[-1] and "Traceback" not in "".join(error)
    assert not (tmp_path / "out").exists()


def test_the_page_is_one_file_and_says_what_it_is_of(tmp_path, good):
    sources = [FramePairSource(BlobWorld(name, num_episodes=10), frame_gap=1) for name in ("arm", "film")]
    quantizer = replace(GOOD, num_latent_tokens=2)
    measured = measure_quantizer(Runner(quantizer), sources, max_pairs=80)
    measured.report = {
        "model": "m",
        "data": "worlds",
        "notes": [],
        "command": "lapa report-quantizer",
        **measured.report,
    }
    path = write_report(measured, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    assert "80 pairs of" in text and "Brackets are 95% intervals" in text
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert text.count("data:image/png;base64,") == 4  # reconstructions, frequent sequences, two tokens
    for anchor in (
        "verdict",
        "data",
        "codes",
        "reconstruction",
        "effects",
        "probes",
        "scatter",
        "leakage",
        "embodiments",
    ):
        assert f'href="#{anchor}"' in text and f'id="{anchor}"' in text
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["measured_on"]["num_pairs"] == 80
    assert written["codes"]["usage"] == 1.0 and written["codes"]["perplexity"] > 8 / 2
    assert set(written["reconstruction"]) >= {"model", "copy_first_frame", "mean_frame", "shuffled_codes"}
    assert set(written["probe"]) >= {"linear", "mlp"}
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = LapaQuantizerConfig(
        hidden_size=32, codebook_dim=8, codebook_size=8, num_latent_tokens=4, image_size=32, patch_size=8,
        num_spatial_layers=1, num_temporal_layers=1, num_attention_heads=2, head_dim=16, bottleneck="query",
        quantizer="fsq", fsq_levels=[2, 2, 2],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("quantizer")
    LapaQuantizer(config).save_pretrained(folder)
    (folder / "training_settings.json").write_text(json.dumps({"frame_gap": 3, "camera": "image_0"}))
    return str(folder)


def test_the_command_on_real_robot_data(untrained, tmp_path, capsys):
    data = str(shared_path("data/bridge_rlds/1.0.0"))
    command = ["report-quantizer", "--model", untrained, "--data", data, "--max-pairs", "60", "--output"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert main([*command, str(tmp_path / "b"), "--fail-below", "usable", "--last-episodes", "10"]) == 1
    assert ": bad\n" in capsys.readouterr().out
    report, held_out = (json.loads((tmp_path / name / "report.json").read_text()) for name in "ab")
    # As the quantizer was trained.
    assert report["measured_on"]["sources"][0]["frame_gap"] == "3 frames"
    assert report["measured_on"]["num_pairs"] == report["measured_on"]["labelled_pairs"] == 60
    assert report["probe"]["names"] == list(DELTA_END_EFFECTOR)
    assert report["measured_on"]["sources"][0]["episodes_available"] == 25
    assert held_out["measured_on"]["sources"][0]["episodes_available"] == 10
    # An untrained decoder does not do what the codes say.
    assert report["verdict"]["level"] == "bad"


def test_the_command_on_video_of_people(untrained, tmp_path, capsys):
    data = str(shared_path("data/human_video/flipping_a_pancake.mkv"))
    command = [
        "report-quantizer",
        "--model",
        untrained,
        "--data",
        data,
        "--max-pairs",
        "40",
        "--output",
        str(tmp_path),
    ]
    assert main([*command, "--frame-gap-seconds", "1.2"]) == 0
    assert "note: the quantizer was trained with camera image_0" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["measured_on"]["intervals_over"] == "stretches of episodes"
    assert report["measured_on"]["sources"][0]["frame_gap"] == "1.2 s"
    assert report["probe"]["linear"] is None and report["leakage"]["inner_motion"] is not None
    assert "The data have no actions" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-pairs", "1"], "`max_pairs` must be at least 2, got 1"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--fail-below", "bad"], "fail_below"),
        (["--model", "."], "is no model folder"),
    ],
)
def test_bad_input_is_one_line(untrained, tmp_path, capsys, options, message):
    data = str(shared_path("data/bridge_rlds/1.0.0"))
    command = ["report-quantizer", "--model", untrained, "--data", data, "--output", str(tmp_path / "out"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_decoder_that_ignores_codes_has_no_gain(good):
    report = report_on(replace(GOOD, guess=copy_first))
    assert report["reconstruction"]["gain_from_codes"]["value"] == 0
    assert report["reconstruction"]["model"] == pytest.approx(report["reconstruction"]["copy_first_frame"])
