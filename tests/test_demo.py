"""The demo: it runs from end to end, resumes, refuses to mix runs, and reports what it measured."""

import json

import numpy as np
import pytest
from PIL import Image
from shared_files import shared_path
from transformers import AutoConfig

from lapa.cli import main
from lapa.configuration.configuration_lapa import LapaConfig
from lapa.evaluation import demo, demo_stages
from lapa.evaluation.demo_report import code_motion, verdict
from lapa.evaluation.demo_settings import EVALUATION_SEEDS, LABELLED_SEEDS, SEED_STRIDE, VIDEO_SEEDS, DemoSettings
from lapa.evaluation.demo_tokenizer import build_tokenizer, simulator_phrases
from lapa.evaluation.statistics import success_cell
from lapa.processing.processing_lapa import PROMPT, LapaProcessor
from lapa.training.label_latent_actions import hash_weights
from lapa.training.lineage import hash_model
from lapa.training.trained_settings import read_training_settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--quick", "--output", str(output)]) == 0
    return output


def test_report_has_the_promised_shape(finished):
    report = json.loads((finished / "report.json").read_text())
    settings = DemoSettings().quick()
    assert set(report["methods"]) == {"lapa", "lapa_decoder", "scratch", "expert", "do_nothing"}
    for table in report["methods"].values():
        assert set(table["families"]) == set(settings.families)
        for cell in [table["pooled"], *table["families"].values()]:
            assert set(cell) == {"successes", "rollouts", "success", "ci95"}
            assert cell["ci95"][0] <= cell["success"] <= cell["ci95"][1]
        assert table["pooled"]["rollouts"] == 2 * len(settings.families)
    assert report["methods"]["expert"]["pooled"]["success"] == 1.0
    assert report["methods"]["do_nothing"]["pooled"]["success"] == 0.0
    assert {"seed", "minutes", "versions"} <= set(report)
    html = (finished / "report.html").read_text()
    assert "data:image/gif" in html
    assert html.count("<svg") == 6


def test_its_models_record_where_their_codes_come_from(finished, tmp_path):
    quantizer = hash_weights(finished / "quantizer")
    pretrained, finetuned, scratch = (
        LapaConfig.from_pretrained(finished / name) for name in ("pretrained", "lapa", "scratch")
    )
    assert (pretrained.quantizer_hash, pretrained.quantizer_name) == (quantizer, "quantizer")
    assert (finetuned.quantizer_hash, finetuned.latent_policy_hash) == (quantizer, hash_model(finished / "pretrained"))
    assert (scratch.quantizer_hash, scratch.latent_policy_hash) == (None, None)
    decoder = AutoConfig.from_pretrained(finished / "lapa_decoder", subfolder="action_decoder")
    assert (decoder.quantizer_hash, decoder.quantizer_name) == (quantizer, "quantizer")
    assert hash_weights(finished / "lapa_decoder") == hash_weights(finished / "pretrained")
    settings = read_training_settings(str(finished / "quantizer"))
    assert (settings["frame_gap"], settings["frequency"]) == (4, 10.0)
    picture = tmp_path / "start.png"
    Image.fromarray(np.load(finished / "video.npz")["frames"][0]).save(picture)
    models = ["--model", str(finished / "pretrained"), "--quantizer", str(finished / "quantizer")]
    arguments = ["--image", str(picture), "--instruction", "reach the red cube", "--output", str(tmp_path / "a.gif")]
    assert main(["imagine", *models, *arguments]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["seconds_per_step"] == 0.4


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    output = tmp_path_factory.mktemp("cross") / "out"
    assert main(["demo", "--quick", "--cross-embodiment", "--output", str(output)]) == 0
    return output


def first_frames(recording, embodiment, families, first_seed):
    """Each episode's first frame, and what an environment of `embodiment` shows at the start it was recorded from."""
    environment = demo_stages.make_environment(DemoSettings().quick(), embodiment)
    shown = [
        environment.reset(seed=first_seed + index, options={"family": family})[0]["image"]
        for index, family in enumerate(families)
    ]
    environment.close()
    return recording.frames[recording.starts], np.stack(shown)


def test_cross_embodiment_takes_the_video_from_the_gripper_and_the_actions_from_the_arm(finished, crossed):
    settings = DemoSettings().quick()
    video, labelled = (demo_stages.Recording.load(crossed / name) for name in ("video.npz", "labelled.npz"))
    own = {name: demo_stages.Recording.load(finished / name) for name in ("video.npz", "labelled.npz")}
    families = [family for family, count in settings.video_episodes.items() for _ in range(count)]
    recorded, shown = first_frames(video, "gripper", families, VIDEO_SEEDS + SEED_STRIDE)
    np.testing.assert_array_equal(recorded, shown)
    arms = own["video.npz"].frames[own["video.npz"].starts]
    assert all((mine != theirs).any() for mine, theirs in zip(recorded, arms))
    assert len(video.actions) == 0
    families = [family for family in settings.families for _ in range(settings.labelled_episodes_per_family)]
    recorded, shown = first_frames(labelled, "arm", families, LABELLED_SEEDS + SEED_STRIDE)
    np.testing.assert_array_equal(recorded, shown)
    # The same seed without --cross-embodiment has the same labelled set, actions included.
    for name in labelled.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(labelled, name), getattr(own["labelled.npz"], name))
    assert len(labelled.actions) == len(labelled.frames) and labelled.actions.any()


def test_cross_embodiment_is_what_the_report_says_and_what_the_stages_saw(finished, crossed):
    reports = [json.loads((folder / "report.json").read_text()) for folder in (finished, crossed)]
    assert [report["video_embodiment"] for report in reports] == ["arm", "gripper"]
    html = (crossed / "report.html").read_text()
    assert "episodes of the gripper without actions" in html and "episodes of the arm." in html
    assert "--cross-embodiment" in html and "--cross-embodiment" not in (finished / "report.html").read_text()
    # Stages 1 and 2 see the video, the Scratch baseline does not.
    losses = [json.loads((folder / "progress.json").read_text())["stages"] for folder in (finished, crossed)]
    for stage in ("train the quantizer", "pretrain", "finetune scratch"):
        own, other = ([row["loss"] for row in stages[stage]["result"]] for stages in losses)
        assert (own == other) == (stage == "finetune scratch"), stage


@pytest.mark.parametrize("name", ["pretrained", "lapa", "scratch"])
def test_its_models_know_how_prompts_end(finished, name):
    processor = LapaProcessor.from_pretrained(finished / name)
    assert processor.target == ("latent" if name == "pretrained" else "action")
    assert LapaConfig.from_pretrained(finished / name).prompt_tails == processor.prompt_tails


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    from lapa.evaluation import demo_stages

    def fail(*args, **kwargs):
        raise AssertionError("a finished stage ran again")

    for name in ("record", "train_quantizer", "pretrain", "finetune", "play", "play_decoder"):
        monkeypatch.setattr(demo_stages, name, fail)
    before = (finished / "report.json").read_text()
    assert main(["demo", "--quick", "--output", str(finished)]) == 0
    assert json.loads((finished / "report.json").read_text()) == json.loads(before)


def test_an_interrupted_run_goes_on_and_gives_the_same(finished, tmp_path, monkeypatch):
    from lapa.evaluation import demo_stages

    output = tmp_path / "out"
    original = demo_stages.pretrain
    monkeypatch.setattr(demo_stages, "pretrain", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["demo", "--quick", "--output", str(output)]) == 130
    assert not (output / "report.json").exists()
    monkeypatch.setattr(demo_stages, "pretrain", original)
    assert main(["demo", "--quick", "--output", str(output)]) == 0
    resumed = json.loads((output / "report.json").read_text())
    uninterrupted = json.loads((finished / "report.json").read_text())
    assert resumed["methods"] == uninterrupted["methods"]
    assert resumed["quantizer"] == uninterrupted["quantizer"]


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    assert main(["demo", "--quick", "--seed", "2", "--output", str(finished)]) == 2
    assert "--restart" in capsys.readouterr().err


def test_a_folder_with_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("do not touch")
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert main(["demo", "--quick", "--restart", "--output", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "do not touch"


def test_real_data(tmp_path):
    data = shared_path("data/bridge_rlds/1.0.0")
    output = tmp_path / "bridge"
    assert main(["demo", "--quick", "--data", str(data), "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["train_episodes"] + report["held_out_episodes"] <= 25
    assert report["frame_gap"] == 3
    for name in ("pretrained", "lapa", "scratch"):
        tails = LapaProcessor.from_pretrained(output / name).prompt_tails
        assert LapaConfig.from_pretrained(output / name).prompt_tails == tails
    for method in ("lapa", "scratch", "mean_action"):
        metrics = report["methods"][method]
        assert 0 <= metrics["token_accuracy"] <= 1
        assert metrics["action_error"] > 0
        assert len(metrics["action_error_per_dimension"]) == 7
    assert "<svg" in (output / "report.html").read_text()


def test_recordings_and_evaluation_never_share_a_seed():
    settings = DemoSettings()
    longest = max(sum(settings.video_episodes.values()), settings.rollouts_per_family)
    assert longest < SEED_STRIDE
    assert VIDEO_SEEDS + 100 * SEED_STRIDE <= LABELLED_SEEDS
    assert LABELLED_SEEDS + 100 * SEED_STRIDE <= EVALUATION_SEEDS


def test_simulator_prompts_are_short(tmp_path):
    tokenizer = build_tokenizer(tmp_path / "tokenizer.model", simulator_phrases())
    prompt = PROMPT.format(instruction="push the red cube slightly up and to the left")
    assert len(tokenizer.encode(prompt, add_special_tokens=False)) < 12
    assert tokenizer.unk_token_id not in tokenizer.encode("schließe die Schublade", add_special_tokens=False)[1:]


def test_code_motion_knows_telling_codes_from_silent_ones():
    generator = np.random.default_rng(0)
    motion = generator.normal(size=(2000, 2))
    telling = (motion[:, :1] > 0).astype(int)
    assert 0.25 < code_motion(telling, motion, 2) < 0.4
    assert abs(code_motion(generator.integers(2, size=(2000, 1)), motion, 2)) < 0.05


def test_the_verdict_says_what_the_table_says():
    def methods(lapa, scratch, decoder=200):
        cells = {
            "lapa_decoder": [True] * decoder + [False] * (300 - decoder),
            "lapa": [True] * lapa + [False] * (300 - lapa),
            "scratch": [True] * scratch + [False] * (300 - scratch),
        }
        return {name: {"pooled": success_cell(outcomes)} for name, outcomes in cells.items()}

    assert "LAPA 150 of 300 (50.0%): above Scratch, and the 95% intervals do not overlap" in verdict(methods(150, 50))
    assert "LAPA 50 of 300 (16.7%): not above Scratch, and the 95% intervals overlap" in verdict(methods(50, 55))
    assert "solved 200 of 300 (66.7%): above Scratch, and the 95% intervals do not overlap." in verdict(
        methods(50, 55)
    )


def test_progress_survives_a_crash_between_stages(tmp_path):
    progress = demo.Progress(tmp_path / "out", {"seed": 0}, restart=False)
    assert progress.stage("one", lambda: {"value": 1}) == {"value": 1}
    again = demo.Progress(tmp_path / "out", {"seed": 0}, restart=False)
    assert again.stage("one", lambda: pytest.fail("ran again")) == {"value": 1}
    with pytest.raises(ValueError, match="other settings"):
        demo.Progress(tmp_path / "out", {"seed": 1}, restart=False)


def test_a_collapsed_quantizer_is_started_again_from_another_seed(tmp_path, monkeypatch):
    seeds = []

    def train(settings, seed, video, output, frequency, device):
        seeds.append(seed)
        output.mkdir(parents=True, exist_ok=True)
        if seed == 5:
            raise demo_stages.CodebookCollapse("the codebook collapsed: perplexity 1.00")
        (output / "model.safetensors").write_bytes(b"weights")
        return [{"loss": 0.1}]

    monkeypatch.setattr(demo_stages, "_train_quantizer", train)
    output = tmp_path / "quantizer"
    assert demo_stages.train_quantizer(DemoSettings(), 5, None, output) == [{"loss": 0.1}]
    assert seeds == [5, 1005]
    assert (output / "model.safetensors").is_file()
    # An interrupted run does not try the collapsed seed again.
    output.rename(tmp_path / "elsewhere")
    demo_stages.train_quantizer(DemoSettings(), 5, None, output)
    assert seeds == [5, 1005, 1005]
    monkeypatch.setattr(
        demo_stages, "_train_quantizer", lambda *args, **options: train(args[0], 5, *args[2:], **options)
    )
    with pytest.raises(demo_stages.CodebookCollapse, match="all 3 attempts"):
        demo_stages.train_quantizer(DemoSettings(), 5, None, tmp_path / "never" / "quantizer")
