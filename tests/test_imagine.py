"""`lapa imagine`: frames are fed back, codes are those that are drawn, and the comparison with a simulator has exact numbers."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import policy_config, quantizer_config

from lapa import LapaForActionPrediction, LapaForLatentAction, LapaQuantizer
from lapa.cli import main
from lapa.configuration.configuration_lapa import LapaConfig
from lapa.data.frame_pairs import resize_frame
from lapa.evaluation import report
from lapa.evaluation.demo_tokenizer import build_tokenizer
from lapa.evaluation.imagine import QuantizerWorld, imagine, open_imagination, play_codes
from lapa.evaluation.imagine_cli import suite_frame_gap
from lapa.evaluation.imagine_measures import (
    ALL_PIXELS,
    CHANGED_PIXELS,
    agreement,
    can_judge,
    frame_errors,
    horizon_table,
    judge_score,
    tells_more_than_chance,
)
from lapa.evaluation.imagine_report import side_by_side, write_report
from lapa.evaluation.imagine_suite import ImagineSuite, ImagineSuiteSettings, _prediction_sentence
from lapa.evaluation.policies import open_policy
from lapa.evaluation.suites import load_suite
from lapa.processing.image_processing_lapa import LapaImageProcessor
from lapa.processing.processing_lapa import LapaProcessor
from lapa.training.label_latent_actions import hash_weights

SENTENCE = "reach the red cube"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny quantizer of 32 pixels, and a policy of 8 pixels that records it."""
    folder = tmp_path_factory.mktemp("imagine")
    torch.manual_seed(1)
    quantizer = LapaQuantizer(quantizer_config())
    quantizer.save_pretrained(folder / "quantizer")
    tokenizer = build_tokenizer(folder / "tokenizer.model", ["reach the", "red cube"])
    config = policy_config(text_config={"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
                                        "num_hidden_layers": 1, "num_attention_heads": 4})  # fmt: skip
    config.quantizer_hash, config.quantizer_name = hash_weights(folder / "quantizer"), "quantizer"
    policy = LapaForLatentAction(config)
    policy.save_pretrained(folder / "policy")
    LapaProcessor.from_config(config, LapaImageProcessor(size=8), tokenizer).save_pretrained(folder / "policy")
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "start.png"
    values = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def run(folders, *more, model="policy", quantizer="quantizer"):
    arguments = ["--model", str(folders / model), "--quantizer", str(folders / quantizer), *map(str, more)]
    return main(["imagine", *arguments])


class Adding:
    """A world that adds the first code to every pixel."""

    size = (2, 2)

    def next_frames(self, frames, codes, instructions):
        return frames + codes[:, :1, None, None].astype(np.uint8)


class Looking:
    """A policy that names the level of the first pixel it sees, and remembers what it saw."""

    def __init__(self):
        self.seen = []

    def codes(self, images, instructions):
        self.seen.append([np.array(image) for image in images])
        codes = np.array([[image[0, 0, 0]] for image in images], dtype=np.int64)
        return codes, np.full(codes.shape, 0.5, np.float32)


def test_every_drawn_frame_is_fed_back_to_policy_and_decoder():
    policy, starts = Looking(), [np.full((4, 6, 3), 1, np.uint8), np.full((2, 2, 3), 3, np.uint8)]
    rollouts = imagine(policy, Adding(), starts, ["a", "b"], steps=3)
    assert rollouts.codes[..., 0].tolist() == [[1, 2, 4], [3, 6, 12]]
    assert rollouts.frames.shape == (2, 4, 2, 2, 3)
    assert rollouts.frames[:, :, 0, 0, 0].tolist() == [[1, 2, 4, 8], [3, 6, 12, 24]]
    # The given picture itself first, then what was drawn.
    assert [len(images) for images in policy.seen] == [2, 2, 2]
    assert policy.seen[0][0].shape == (4, 6, 3)
    assert policy.seen[1][0].shape == (2, 2, 3)
    assert (policy.seen[2][1] == 12).all()
    assert (play_codes(Adding(), rollouts.frames[:, 0], rollouts.codes, ["a", "b"]) == rollouts.frames).all()


def test_the_codes_in_the_file_are_those_that_were_drawn(folders, picture, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(report, "gif_bytes", lambda frames, *more: drawn.append(np.stack(frames)) or b"GIF89a")
    output = tmp_path / "out" / "rollout.gif"
    assert run(folders, "--image", picture, "--instruction", SENTENCE, "--output", output, "--steps", "5") == 0
    told = json.loads(output.with_suffix(".json").read_text())
    assert (told["instruction"], told["quantizer_is_the_policys"], told["image_size"]) == (SENTENCE, "same", [32, 32])
    assert np.shape(told["codes"]) == np.shape(told["probabilities"]) == (5, 4)
    assert (np.array(told["probabilities"]) >= 1 / 8).all(), "greedy codes are the likeliest of eight"
    frames = [resize_frame(np.asarray(Image.open(picture)), (32, 32))]
    quantizer = LapaQuantizer.from_pretrained(folders / "quantizer").eval()
    for codes in told["codes"]:
        pixels = torch.tensor(frames[-1]).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            image = quantizer.decode(pixels, torch.tensor([codes]))[0].clamp(0, 1)
        frames.append((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    assert (drawn[0] == np.stack(frames)).all()
    line = "-".join(map(str, told["codes"][0]))
    assert f"{output}  codes {line} " in capsys.readouterr().out
    assert [path.name for path in sorted(output.parent.iterdir())] == ["rollout.gif", "rollout.json"]


def test_draws_depend_on_the_seed_alone(folders, picture, tmp_path):
    def codes(name, *more):
        output = tmp_path / f"{name}.gif"
        assert run(folders, "--image", picture, "--instruction", SENTENCE, "--output", output, *more) == 0
        return output.read_bytes(), json.loads(output.with_suffix(".json").read_text())

    (first, told), (again, told_again) = (codes(name, "--do-sample", "--seed", "3") for name in ("a", "b"))
    assert first == again
    assert told == told_again
    assert len(told["codes"]) == 16
    assert told["seed"] == 3
    _, other = codes("c", "--do-sample", "--seed", "4")
    assert other["codes"] != told["codes"]
    greedy = [codes(f"g{seed}", "--seed", seed)[1]["codes"] for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    # Only the likeliest code is left to draw.
    assert codes("k", "--do-sample", "--top-k", "1", "--seed", "5")[1]["codes"] == greedy[0]


def test_a_folder_of_pictures_is_imagined_together(folders, picture, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("b.png", "a.png"):
        Image.open(picture).save(pictures / name)
    (pictures / "notes.txt").write_text("no picture")
    output = tmp_path / "out"
    arguments = ["--image", pictures, "--steps", "2", "--scale", "3", "--output", output]
    assert run(folders, *arguments, "--instruction", SENTENCE, "touch the red cube") == 0
    assert sorted(path.name for path in output.iterdir()) == ["a.gif", "a.json", "b.gif", "b.json"]
    assert json.loads((output / "b.json").read_text())["instruction"] == "touch the red cube"
    with Image.open(output / "a.gif") as animation:
        assert (animation.size, animation.n_frames) == ((96, 96), 3)


def test_another_quantizer_is_refused_unless_allowed(folders, picture, tmp_path, capsys):
    torch.manual_seed(2)
    LapaQuantizer(quantizer_config()).save_pretrained(folders / "other")
    arguments = ["--image", picture, "--instruction", SENTENCE, "--steps", "1", "--output", tmp_path / "a.gif"]
    capsys.readouterr()
    assert run(folders, *arguments, quantizer="other") == 2
    error = capsys.readouterr().err
    assert "was trained on the codes of quantizer" in error
    assert "`allow_mismatch`" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "a.gif").exists()
    assert run(folders, *arguments, "--allow-mismatch", quantizer="other") == 0
    assert "another quantizer" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["quantizer_is_the_policys"] == "other"
    for change in ({"codebook_size": 16}, {"num_latent_tokens": 1}):
        LapaQuantizer(quantizer_config(**change)).save_pretrained(folders / "sizes")
        assert run(folders, *arguments, "--allow-mismatch", quantizer="sizes") == 2
        assert next(iter(change)) in capsys.readouterr().err


def test_an_action_model_with_a_retired_head_is_refused(folders, picture, tmp_path, capsys):
    model = LapaForActionPrediction.from_pretrained(folders / "policy")
    model.config.latent_policy_name = "policy"
    model.save_pretrained(folders / "finetuned")
    arguments = ["--image", picture, "--instruction", SENTENCE, "--output", tmp_path / "a.gif"]
    assert run(folders, *arguments, model="finetuned") == 2
    assert "its latent head is retired: name the latent-pretrained model that it came from (policy)" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--image": ["nowhere.png"]}, "`image` (nowhere.png) does not exist"),
        ({"--instruction": ["one", "two"]}, "`instruction` must be one for all or one per image, got 2 for 1"),
        ({"--steps": ["0"]}, "`steps` must be at least 1, got 0"),
        ({"--temperature": ["0.5"]}, "`temperature` needs `do_sample`"),
        ({"--rollouts": ["3"]}, "`rollouts` does not apply without `suite`"),
        ({"--suite": ["tabletop"]}, "`image` does not apply with `suite`"),
        ({"--quantizer": ["nowhere"]}, "`quantizer` (nowhere) is no model folder"),
        ({"--output": ["out.txt"], "--image": ["{picture}", "{picture}"]}, "`image` names start twice"),
        ({"--image": ["{picture}", "{picture}"]}, "is one file for 2 images: name a folder"),
    ],
)
def test_bad_arguments_are_one_line(folders, picture, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    options = {
        "--model": [str(folders / "policy")], "--quantizer": [str(folders / "quantizer")], "--image": ["{picture}"],
        "--instruction": [SENTENCE], "--output": ["out.gif"], **change,
    }  # fmt: skip
    arguments = [text.format(picture=picture) for name, values in options.items() for text in (name, *values)]
    assert main(["imagine", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_policy_that_records_nothing_is_only_noted(folders, picture, tmp_path, capsys):
    config = LapaConfig.from_pretrained(folders / "policy")
    config.quantizer_hash = None
    model = LapaForLatentAction.from_pretrained(folders / "policy", config=config)
    model.save_pretrained(folders / "unrecorded")
    LapaProcessor.from_pretrained(folders / "policy").save_pretrained(folders / "unrecorded")
    arguments = ["--image", picture, "--instruction", SENTENCE, "--steps", "1", "--output", tmp_path / "a.gif"]
    assert run(folders, *arguments, model="unrecorded") == 0
    assert "does not record whose codes it learned" in capsys.readouterr().out


def test_a_quantizer_that_was_told_instructions_is_told_them(folders):
    torch.manual_seed(0)
    world = QuantizerWorld(LapaQuantizer(quantizer_config(instruction_vocab_size=50, interleave_latent_tokens=False)))
    frames, codes = np.full((1, 32, 32, 3), 128, np.uint8), np.zeros((1, 4), np.int64)
    first, second = (world.next_frames(frames, codes, [text]) for text in ("push left", "push right"))
    assert (first != second).any()
    with pytest.raises(ValueError, match="no codes"):
        QuantizerWorld(LapaQuantizer(quantizer_config(quantizer="continuous", interleave_latent_tokens=False)))


def test_the_gap_is_the_trainings_in_the_simulators_steps():
    assert suite_frame_gap({"frame_gap": 3, "frequency": 5.0}, 10.0, None) == 6
    assert suite_frame_gap({"frame_gap_seconds": 0.6}, 10.0, None) == 6
    assert suite_frame_gap({"frame_gap": 3}, 10.0, None) == 3
    assert suite_frame_gap({"frame_gap": 3}, 10.0, 7) == 7
    with pytest.raises(ValueError, match="`frame_gap` must be given"):
        suite_frame_gap({}, 10.0, None)


def test_errors_of_all_pixels_and_of_those_that_change():
    true = np.zeros((3, 2, 2, 3), np.uint8)
    true[1:, 0, 0] = 255  # one pixel of four changes
    drawn = np.zeros((2, 2, 2, 3), np.uint8)
    drawn[1, 0, 0] = 255
    drawn[1, 1, 1] = 51
    errors = frame_errors(drawn, true)
    assert errors[ALL_PIXELS].tolist() == pytest.approx([0.25, 0.04 / 4])
    assert errors[CHANGED_PIXELS].tolist() == pytest.approx([1.0, 0.0])
    assert np.isnan(frame_errors(drawn[:1], true[[0, 0]])[CHANGED_PIXELS]).all()


def test_the_horizon_has_only_the_episodes_that_reach_it():
    copies = [np.array([4.0, 8.0]), np.array([2.0]), np.array([np.nan, 4.0])]
    table = horizon_table({"imagined": [rows / 2 for rows in copies], "copy_first_frame": copies})
    assert [(row["step"], row["episodes"]) for row in table] == [(1, 2), (2, 2)]
    assert table[0]["imagined"]["value"] == 1.5
    assert table[0]["imagined"]["ci95"] == pytest.approx([1.0, 2.0])
    assert [row["gain"]["imagined"]["value"] for row in table] == [0.5, 0.5]


def test_agreement_has_a_table_and_a_base_rate():
    told, actual = [True, True, False, False, False], [True, False, True, False, False]
    found = agreement(told, actual)
    assert list(found["table"].values()) == [1, 1, 1, 2]
    assert (found["accuracy"]["successes"], found["accuracy"]["rollouts"]) == (3, 5)
    assert found["accuracy"]["ci95"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    assert found["balanced_accuracy"]["value"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["majority"] == 0.6
    assert tells_more_than_chance(found) is False
    assert tells_more_than_chance(agreement([True, False] * 20, [True, False] * 20)) is True
    # Right about which cell is easy, wrong within each: that is no better than chance.
    cells = ["easy"] * 4 + ["hard"] * 4
    told, actual = [True] * 4 + [False] * 4, [True, True, True, False, False, False, False, True]
    assert agreement(told, actual)["balanced_accuracy"]["value"] == 0.75
    assert agreement(told, actual, cells)["balanced_accuracy"]["value"] == 0.5
    assert agreement(actual, actual, cells)["balanced_accuracy"]["value"] == 1.0
    assert agreement(told, told, cells)["balanced_accuracy"] is None
    assert _prediction_sentence(agreement(told, told, cells)).startswith("In no cell do episodes end differently")
    alike = agreement([True, False], [False, False])
    assert (alike["balanced_accuracy"], alike["sensitivity"], tells_more_than_chance(alike)) == (None, None, None)
    score = judge_score([True, None, False], [True, True, False])
    assert (score["lost"], can_judge(score)) == (1, False)
    assert can_judge(judge_score([True, False], [True, False]))


SUITE = """
environment: tabletop
options: {embodiment: arm, image_size: 32, num_blocks: 2}
rollouts: 3
first_seed: 7000
cells:
  seen: {tasks: [reach, separate]}
"""


class Copying:
    """A world where nothing ever changes."""

    size = (32, 32)

    def next_frames(self, frames, codes, instructions):
        return frames.copy()

    def encode(self, pairs):
        return np.zeros((len(pairs), 1), np.int64)


class Remembering(Copying):
    """A world whose codes number the frames that they lead to: it draws true codes without error."""

    def __init__(self):
        self.frames = []

    def encode(self, pairs):
        self.frames += list(pairs[:, 1])
        return np.arange(len(self.frames) - len(pairs), len(self.frames))[:, None]

    def next_frames(self, frames, codes, instructions):
        return np.stack([self.frames[code] for code in codes[:, 0]])


class Naming:
    def codes(self, images, instructions):
        return np.zeros((len(images), 1), np.int64), np.ones((len(images), 1), np.float32)


def compare(tmp_path, world, player="expert", **settings):
    path = tmp_path / "small.yaml"
    path.write_text(SUITE)
    options = {"frame_gap": 4, "judge_rollouts": 4, "num_shown": 1, **settings}
    chosen = ImagineSuiteSettings(**options)
    return ImagineSuite(load_suite(str(path)), Naming(), world, open_policy(player, 2), chosen, show_progress=False)


def test_a_world_that_copies_has_the_error_of_copying_and_tells_no_success(tmp_path):
    run = compare(tmp_path, Copying())
    report = run.report()
    for kind in (ALL_PIXELS, CHANGED_PIXELS):
        for row in report["all"]["horizon"][kind]:
            for name in ("imagined", "true_codes"):
                assert row[name] == row["copy_first_frame"]
                assert row["gain"][name]["value"] == 0
    assert report["all"]["horizon"][ALL_PIXELS][0]["episodes"] == 6
    assert report["all"]["simulator"]["successes"] == 6
    # The expert solves everything, the first frame shows nothing solved, the judge sees it in the true frames.
    ways = report["all"]["prediction"]
    assert list(ways["last"]["table"].values()) == list(ways["any"]["table"].values()) == [0, 0, 6, 0]
    assert ways["last"]["accuracy"]["success"] == 0
    assert ways["true_last"]["accuracy"]["success"] >= 5 / 6
    assert "second_play" not in ways, "the expert plays the same start alike"
    # Nothing moves for 40 and 80 steps of 4.
    assert {name: cell["steps"] for name, cell in report["cells"].items()} == {"seen/reach": 10, "seen/separate": 20}
    judge = report["cells"]["seen/reach"]["judge"]
    assert (judge["can_judge"], judge["true_frames"]["accuracy"]["rollouts"]) == (True, 12)
    assert judge["drawn_frames"]["table"]["both"] == 0
    assert report["summary"][0] == (
        "Imagined frames are not closer to the truth than the first frame, not even after one step."
    )


def test_a_world_that_knows_tells_policy_and_decoder_apart(tmp_path):
    report = compare(tmp_path, Remembering()).report()
    first = report["all"]["horizon"][ALL_PIXELS][0]
    assert first["true_codes"]["value"] == first["one_step"]["value"] == 0
    assert first["gain"]["true_codes"]["value"] == 1
    assert first["imagined"]["value"] > 0
    assert report["all"]["prediction"]["true_codes_last"] == report["all"]["prediction"]["true_last"]
    drawn, true = (report["cells"]["seen/separate"]["judge"][f"{name}_frames"] for name in ("drawn", "true"))
    assert drawn == true


def test_true_frames_stand_at_every_gap_and_at_the_end(tmp_path):
    run = compare(tmp_path, Copying(), player="do_nothing", frame_gap=7, rollouts=1, steps=3)
    run.run()
    episode = run.episodes[0]
    assert episode.rollout.num_steps == 40
    assert (len(episode.true), episode.whole, len(episode.true_codes)) == (7, 5, 6)
    assert len(episode.imagined) == 4
    assert all(len(values) == 3 for kinds in episode.errors().values() for values in kinds.values())
    assert run.report()["all"]["horizon"][CHANGED_PIXELS] == [], "nothing changes"


def test_a_second_play_has_other_draws():
    policy, actions = open_policy("random", 2), []
    for seed in (1, 2, 1):
        policy.reseed(seed)
        policy.controller.begin_episode(0, ("reach", 3))
        actions.append(policy.controller.act(None, [0], [{"image": None, "instruction": ""}])[0])
    assert np.array_equal(actions[0], actions[2])
    assert not np.array_equal(actions[0], actions[1])


def test_the_report_is_written_and_the_same_again(tmp_path):
    reports = []
    for name in ("a", "b"):
        run = compare(tmp_path, Copying(), player="random")
        told = {"model": "m", "quantizer": "q", "quantizer_is_the_policys": "same"}
        write_report(run, run.report() | told, tmp_path / name)
        reports.append((tmp_path / name / "report.json").read_text())
    assert reports[0] == reports[1]
    assert "second_play" in json.loads(reports[0])["all"]["prediction"], "random actions are drawn anew"
    html, markdown = ((tmp_path / "a" / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert html.count("data:image/gif") == 2
    assert html.count("<svg") == 2
    assert "| all that can be judged | last imagined frame |" in markdown
    rows = [json.loads(line) for line in (tmp_path / "a" / "episodes.jsonl").read_text().splitlines()]
    assert [row["cell"] for row in rows] == ["seen/reach"] * 3 + ["seen/separate"] * 3
    assert len(list((tmp_path / "a" / "rollouts").glob("*.gif"))) == 2


def test_imagined_stands_left_and_the_simulator_right(tmp_path):
    run = compare(tmp_path, Copying(), rollouts=1)
    run.run()
    episode = run.episodes[0]
    frames = side_by_side(episode, 0.4)
    assert len(frames) == len(episode.imagined) == 11
    height, width = frames[0].shape[:2]
    assert (height, width) == (160 + 32, 3 * 160 + 12)
    last = frames[-1][16:-16]
    assert (last[::5, :160:5] == episode.imagined[-1]).all()
    assert (last[::5, 332::5] == episode.true[-1]).all()


def test_without_a_judge_only_errors_are_reported(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SUITE.replace("reach, separate", "reach"))
    settings = ImagineSuiteSettings(frame_gap=4, rollouts=2)
    run = ImagineSuite(
        load_suite(str(path)), Naming(), Copying(), open_policy("expert", 2), settings,
        judge_of=lambda *about: "no judge here", show_progress=False,
    )  # fmt: skip
    report = run.report()
    assert report["cells"]["seen/reach"]["judge"] == {"not_judged": "no judge here"}
    assert report["all"]["prediction"] == {}
    assert "Success cannot be judged from pictures in seen/reach." in report["summary"]
    told = {"model": "m", "quantizer": "q", "quantizer_is_the_policys": "same"}
    assert "no: no judge here" in write_report(run, report | told, tmp_path / "out").read_text()


def test_the_command_compares_real_models_with_a_suite(folders, tmp_path, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(SUITE.replace("reach, separate", "reach"))
    output = tmp_path / "out"
    arguments = ["--suite", path, "--policy", "random", "--rollouts", "2", "--judge-rollouts", "2", "--output", output]
    assert run(folders, *arguments) == 2
    assert "`frame_gap` must be given" in capsys.readouterr().err
    assert run(folders, *arguments, "--frame-gap", "8", "--steps", "2", "--do-sample") == 0
    told = json.loads((output / "report.json").read_text())
    assert (told["frame_gap"], told["seconds_per_step"], told["quantizer_is_the_policys"]) == (8, 0.8, "same")
    assert np.shape(json.loads((output / "episodes.jsonl").read_text().splitlines()[0])["codes"]) == (2, 4)
    assert str(output / "report.html") in capsys.readouterr().out


def test_opening_gives_the_decoder_alone_where_that_is_enough(folders):
    _, world, pairing = open_imagination(str(folders / "policy"), str(folders / "quantizer"))
    assert pairing == "same"
    assert type(world.quantizer).__name__ == "LapaQuantizerDecoder"
    _, whole, _ = open_imagination(str(folders / "policy"), str(folders / "quantizer"), whole_quantizer=True)
    frames, codes = np.full((2, 32, 32, 3), 90, np.uint8), np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
    drawn = [each.next_frames(frames, codes, ["", ""]) for each in (world, whole)]
    assert (drawn[0] == drawn[1]).all()
    assert whole.encode(np.stack([frames, frames], 1)).shape == (2, 4)


def test_an_animation_that_cannot_be_written_leaves_the_old_one(folders, picture, tmp_path, monkeypatch):
    output = tmp_path / "a.gif"
    output.write_bytes(b"old")

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(report, "gif_bytes", fail)
    assert run(folders, "--image", picture, "--instruction", SENTENCE, "--steps", "1", "--output", output) == 2
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_gifs_hold_every_frame():
    frames = [np.full((4, 4, 3), level, np.uint8) for level in (0, 100, 200)]
    with Image.open(io.BytesIO(report.gif_bytes(frames, 2, 400))) as animation:
        assert (animation.size, animation.n_frames, animation.info["duration"]) == ((8, 8), 3, 400)
