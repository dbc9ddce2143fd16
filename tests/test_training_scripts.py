"""The four commands chain on real data, and say what is wrong in one line."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_errors import error_of
from shared_files import shared_path
from tfds_files import record_positions, shard_file
from tiny_models import TINY_QUANTIZER, TINY_VISION_TOKENIZER

from lapa import (
    LapaForActionPrediction,
    LapaForLatentAction,
    LapaProcessor,
    LapaQuantizer,
    LapaVisionTokenizer,
    LapaVisionTokenizerConfig,
)
from lapa.data.open_source import open_source
from lapa.hub_cards.export import export
from lapa.processing.action_tokenization_lapa import ActionTokenizer
from lapa.training import scripts
from lapa.training.label_latent_actions import hash_weights, read_labels

CPU = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def bridge():
    return str(shared_path("data/bridge_rlds/1.0.0"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory, bridge):
    """quantizer -> labels -> policy, by the commands."""
    folder = tmp_path_factory.mktemp("chain")
    torch.manual_seed(0)
    LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY_VISION_TOKENIZER)).save_pretrained(folder / "vision")
    recipe = folder / "quantizer.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "quantizer_config": TINY_QUANTIZER,
                "frame_gap": 3,
                "max_steps": 50,
                "per_device_train_batch_size": 4,
                "eval_episodes": 2,
            }
        )
    )
    quantizer = ["--config", str(recipe), "--data", bridge, "--output_dir", str(folder / "quantizer")]
    # The command line wins over the recipe.
    assert scripts.train_quantizer([*quantizer, "--max_steps", "3", "--num_sample_reconstructions", "1", *CPU]) == 0
    label = ["--model", str(folder / "quantizer"), "--data", bridge, "--output", str(folder / "labels")]
    assert scripts.label([*label, "--episodes_per_unit", "10", "--device", "cpu"]) == 0
    pretrain = [
        "--data", str(folder / "labels"), "--output_dir", str(folder / "policy"),
        "--policy_config", json.dumps({"text_config": TEXT}), "--vision_tokenizer", str(folder / "vision"),
        "--tokenizer", str(shared_path("fixtures/tokenizer/tiny.tokenizer.model")),
        "--max_steps", "3", "--per_device_train_batch_size", "4", "--eval_episodes", "2",
    ]  # fmt: skip
    assert scripts.pretrain([*pretrain, *CPU]) == 0
    return folder


def finetune(chain, bridge, output, *more):
    arguments = ["--model", str(chain / "policy"), "--data", bridge, "--output_dir", str(output), "--num_bins", "16"]
    return scripts.finetune([*arguments, "--max_steps", "3", "--per_device_train_batch_size", "4", *CPU, *more])


def test_quantizer_folder(chain):
    quantizer = LapaQuantizer.from_pretrained(chain / "quantizer")
    assert quantizer.config.hidden_size == TINY_QUANTIZER["hidden_size"]
    assert [path.name for path in (chain / "quantizer" / "samples").iterdir()] == ["step-0000003.png"]
    metrics = json.loads((chain / "quantizer" / "eval_results.json").read_text())
    assert {"eval_loss", "eval_perplexity", "eval_codes_used"} <= set(metrics)
    settings = json.loads((chain / "quantizer" / "training_settings.json").read_text())
    assert settings["frame_gap"] == 3 and settings["camera"] == "image_0"
    (described,) = settings["mixture"]["sources"]
    assert described["name"] == "bridge_dataset/train" and described["filters"] == []
    report = json.loads((chain / "quantizer" / "data_report.json").read_text())
    assert set(report["sources"]["bridge_dataset/train"]["gap_frames"]) == {"3"} and report["total"]["pairs"] > 12


def test_labels_cover_every_step_with_a_frame_gap_later(chain):
    table = read_labels(chain / "labels")
    assert len(list((chain / "labels").glob("data/labels-*.parquet"))) == 3
    # 25 episodes of 10 steps; the last 3 frames of an episode have no partner.
    assert len(table) == 25 * 7
    codes = np.asarray(table["latent_action_codes"][:])
    assert codes.shape == (175, 4) and codes.min() >= 0 and codes.max() < 8
    assert table[6]["step_index"] == 6 and table[7]["step_index"] == 0
    assert np.asarray(table[0]["image"]).shape == (64, 64, 3)


def test_labels_are_the_quantizers_codes(chain, bridge):
    from lapa.data.frame_pairs import FramePairDataset
    from lapa.training.label_latent_actions import label_latent_actions

    episode = list(open_source(bridge))[1]
    pairs = FramePairDataset([episode.frames["image_0"]], 3, 32)
    codes = label_latent_actions(LapaQuantizer.from_pretrained(chain / "quantizer"), pairs, show_progress=False)
    rows = [row for row in read_labels(chain / "labels") if row["episode_id"] == episode.episode_id]
    assert [row["latent_action_codes"] for row in rows] == codes.tolist()


def test_pretrained_policy_records_its_quantizer(chain):
    policy = LapaForLatentAction.from_pretrained(chain / "policy")
    assert policy.config.quantizer_hash == hash_weights(chain / "quantizer")
    assert policy.model.vision_tokenizer is not None
    assert LapaProcessor.from_pretrained(chain / "policy").target == "latent"
    metrics = json.loads((chain / "policy" / "eval_results.json").read_text())
    assert {"eval_loss", "eval_latent_loss", "eval_text_loss", "eval_latent_accuracy"} <= set(metrics)


STREAMED = ["--cache_vision_codes", "false", "--dataloader_num_workers", "2"]
CHUNKS = ["--action_horizon", "3", "--past_end", "mask", "--use_proprio", "true"]


@pytest.mark.parametrize(
    "lora",
    [[], ["--use_peft", "--lora_r", "4"], ["--use_peft", "--use_dora"], STREAMED, CHUNKS],
    ids=["full", "lora", "dora", "streamed", "chunks"],
)
def test_finetuned_policy_acts(chain, bridge, tmp_path, lora):
    assert finetune(chain, bridge, tmp_path / "robot", "--eval_episodes", "2", *lora) == 0
    policy = LapaForActionPrediction.from_pretrained(tmp_path / "robot")
    assert policy.config.prompt_tails is not None
    assert json.loads((tmp_path / "robot" / "trainer_state.json").read_text())["global_step"] == 3
    processor = LapaProcessor.from_pretrained(tmp_path / "robot")
    (key,) = processor.action_statistics
    assert policy.config.action_num_bins == list(processor.action_tokenizer(key).num_bins)
    image = np.zeros((64, 64, 3), np.uint8)
    proprio = {"proprio": np.zeros(7)} if lora is CHUNKS else {}
    tokens = policy.predict_action_tokens(
        **processor(images=image, instruction="put the carrot on the plate", **proprio)
    )
    assert processor.decode_actions(tokens).shape == ((1, 3, 7) if lora is CHUNKS else (1, 7))
    # The bins are those of all steps that are not held out, however they are read.
    episodes = [episode for episode in list(open_source(bridge))[:-2] if episode.instruction]
    expected = ActionTokenizer.fit(np.concatenate([episode.action for episode in episodes]), 16)
    assert key == "bridge_dataset" and processor.action_tokenizer(key) == expected
    report = json.loads((tmp_path / "robot" / "data_report.json").read_text())
    assert report["total"]["steps"] >= 12
    metrics = json.loads((tmp_path / "robot" / "eval_results.json").read_text())
    assert {"eval_token_accuracy/6", "eval_action_error/0", "eval_mean_action_error/0"} <= set(metrics)


def test_several_robots_in_one_run(chain, bridge, tmp_path):
    """Each data set of a mixture has its own bins; statistics are counted once."""
    mixture = tmp_path / "mixture.yaml"
    entries = [
        {"path": bridge, "unnorm_key": "one", "weight": 2},
        {"path": bridge, "camera": "image_1", "unnorm_key": "two"},
    ]
    mixture.write_text(yaml.safe_dump(entries))
    output = tmp_path / "robot"
    assert finetune(chain, str(mixture), output, "--eval_episodes", "2", "--eval_examples", "9") == 0
    assert set(LapaProcessor.from_pretrained(output).action_statistics) == {"one", "two"}
    metrics = json.loads((output / "eval_results.json").read_text())
    assert {"eval_one/action_error", "eval_two/mean_action_error/0", "eval_token_accuracy"} <= set(metrics)
    statistics = json.loads((output / "action_statistics" / "statistics.json").read_text())
    assert set(statistics["keys"]) == {"one", "two"} and statistics["keys"]["one"]["action"]["num_steps"] > 100
    # The second run takes them from there: the files are not looked at.
    times = [path.stat().st_mtime_ns for path in sorted((output / "action_statistics").iterdir())]
    assert finetune(chain, str(mixture), output, "--eval_episodes", "2") == 0
    assert times == [path.stat().st_mtime_ns for path in sorted((output / "action_statistics").iterdir())]
    # Other actions of the same files have statistics of their own.
    entries[1] |= {"action_keys": ["observation/state"], "action_transform": None}
    mixture.write_text(yaml.safe_dump(entries))
    assert finetune(chain, str(mixture), output, "--eval_episodes", "2", "--gripper_dimension", "none") == 0
    recounted = json.loads((output / "action_statistics" / "statistics.json").read_text())
    assert recounted["sources"][1]["options"]["action_keys"] == ["observation/state"]
    assert (
        recounted["keys"]["two"] != statistics["keys"]["two"] and recounted["keys"]["one"] == statistics["keys"]["one"]
    )


def test_streamed_finetuning_resumes_exactly(chain, bridge, tmp_path):
    steps = ["--save_strategy", "steps", "--save_steps", "2", "--cache_vision_codes", "false", "--augmentation"]
    last = ["--resume_from_checkpoint", "last"]
    assert finetune(chain, bridge, tmp_path / "whole", *steps, "--max_steps", "4") == 0
    assert finetune(chain, bridge, tmp_path / "parts", *steps, "--max_steps", "2", *last) == 0
    # What a killed run left of a checkpoint is passed over.
    (tmp_path / "parts" / "checkpoint-3").mkdir()
    assert finetune(chain, bridge, tmp_path / "parts", *steps, "--max_steps", "4", *last) == 0
    assert hash_weights(tmp_path / "whole") == hash_weights(tmp_path / "parts")


@pytest.fixture
def damaged(bridge, tmp_path):
    """The Bridge shard with a wrong byte in the content of record 3, and cut short inside record 20."""
    folder = Path(shutil.copytree(bridge, tmp_path / "damaged" / "1.0.0"))
    file = shard_file(folder)
    positions, content = record_positions(file), bytearray(file.read_bytes())
    content[positions[3] + 100] ^= 1
    file.write_bytes(content[: positions[20] + 1000])
    return str(folder)


def test_damaged_data_stop_a_run_or_are_counted(chain, damaged, tmp_path, capsys):
    output = tmp_path / "quantizer"
    base = ["--data", damaged, "--output_dir", str(output), "--quantizer_config", json.dumps(TINY_QUANTIZER)]
    base += ["--max_steps", "20", "--per_device_train_batch_size", "16", "--num_sample_reconstructions", "0", *CPU]
    base += ["--buffer_size", "64"]
    for workers in ("0", "2"):
        error = error_of(capsys, scripts.train_quantizer([*base, "--dataloader_num_workers", workers]))
        assert "bridge_dataset-train.tfrecord-00000-of-00001 " in error
        assert "is corrupt at byte" in error or "ends inside the record at byte" in error
        # 6 of 25 episodes are lost: more than the share that may be.
        skipping = [*base, "--dataloader_num_workers", workers, "--on_error", "skip"]
        error = error_of(capsys, scripts.train_quantizer(skipping))
        assert "episodes could not be read, more than the share of 0.05 that `max_skipped` allows" in error
        assert scripts.train_quantizer([*skipping, "--max_skipped", "0.5"]) == 0
        source = json.loads((output / "data_report.json").read_text())["sources"]["bridge_dataset/train"]
        # Every episode that is lost is counted, although one error tells of the five behind the cut.
        share = source["skipped_groups"]["unreadable"] / source["groups"]
        assert 0.15 < share < 0.35 and source["skipped"]["num_skipped"] == source["skipped_groups"]["unreadable"]
        assert len(source["skipped"]["reasons"]) == 2
        assert "skipped_episodes/unreadable" in capsys.readouterr().out


def test_damaged_actions_are_counted(chain, damaged, tmp_path, capsys):
    error = error_of(capsys, finetune(chain, damaged, tmp_path / "robot"))
    assert "is corrupt at byte" in error
    error = error_of(capsys, finetune(chain, damaged, tmp_path / "robot", "--on_error", "skip"))
    assert "6 of 25 episodes could not be read, more than the share of 0.05" in error
    assert finetune(chain, damaged, tmp_path / "robot", "--on_error", "skip", "--max_skipped", "0.5") == 0
    source = json.loads((tmp_path / "robot" / "data_report.json").read_text())["sources"]["bridge_dataset/train"]
    assert (
        source["groups"] == 25
        and source["skipped_groups"]["unreadable"] == 6
        and source["skipped"]["num_skipped"] == 6
    )


def test_the_latent_head_is_kept_on_request(chain, tmp_path):
    rows = [{"instruction": "push", "vision": [n] * 16, "raw_actions": [0.1 * n] * 6 + [n % 2]} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = LapaProcessor.from_pretrained(chain / "policy")
    inputs = processor(vision_codes=[3] * 16, instruction="push")
    # A folder from before `prompt_tails`.
    old = shutil.copytree(chain / "policy", tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    del config["prompt_tails"]
    (old / "config.json").write_text(json.dumps(config))
    common = ["--data", str(data), "--max_steps", "1", "--num_bins", "16", *CPU]
    # The folder remembers it; saying nothing changes nothing.
    for model, output, options, kept in (
        (old, "fresh", [], False),
        (old, "kept", ["--keep_latent_head", "true"], True),
        (tmp_path / "kept", "again", [], True),
        (tmp_path / "kept", "dropped", ["--keep_latent_head", "false"], False),
    ):
        output = tmp_path / output
        assert scripts.finetune(["--model", str(model), "--output_dir", str(output), *common, *options]) == 0
        policy = LapaForActionPrediction.from_pretrained(output)
        assert policy.config.keep_latent_head is kept
        assert policy.config.prompt_tails == processor.prompt_tails
        if kept:
            assert policy.predict_latent_action(**inputs).shape == (1, 4)
        else:
            with pytest.raises(ValueError, match="retired"):
                policy.predict_latent_action(**inputs)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
@pytest.mark.parametrize("kind", ["latent", "action", "conversations"])
def test_every_published_file_trains_where_its_rows_have_codes(kind, ending, chain, tmp_path, capsys):
    rows = [{"instruction": "push", "vision": [number] * 16} for number in range(3)]
    for number, row in enumerate(rows):
        raw = [0.1 * number] * 6 + [number % 2]
        if kind == "latent":
            row["delta"] = [number] * 4
        elif kind == "action":
            row["raw_actions"] = raw
        else:
            row["conversations"] = [{"value": "push"}, {"raw_actions": raw}]
    options = ["--model", str(chain / "policy"), "--max_steps", "1", "--per_device_train_batch_size", "2", *CPU]

    def train(content, name):
        path = tmp_path / f"{name}{ending}"
        lines = [json.dumps(row) for row in content]
        text = "\n".join(lines) if "jsonl" in ending else f"[{','.join(lines)}]"
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
        command = scripts.pretrain if kind == "latent" else scripts.finetune
        return command(["--data", str(path), "--output_dir", str(tmp_path / f"{name}_out"), *options])

    assert train(rows, "codes") == 0, capsys.readouterr().err
    for row in rows:
        row["image"] = "a.jpg"
    del rows[1]["vision"]
    capsys.readouterr()
    assert f"images{ending}, row 2: `vision` is missing" in error_of(capsys, train(rows, "images"))


def test_augmented_finetuning_leaves_a_policy_that_crops(chain, bridge, tmp_path, capsys):
    assert finetune(chain, bridge, tmp_path / "robot", "--eval_episodes", "2", "--augmentation") == 0
    assert LapaProcessor.from_pretrained(tmp_path / "robot").image_processor.do_center_crop
    assert not LapaProcessor.from_pretrained(chain / "policy").image_processor.do_center_crop
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "push", "vision": [1] * 16, "raw_actions": [0.1] * 7}) + "\n")
    assert finetune(chain, str(data), tmp_path / "codes", "--augmentation") == 2
    assert "`augmentation` needs images" in capsys.readouterr().err


def test_a_prompt_for_the_other_target_is_refused(chain):
    policy = LapaForLatentAction.from_pretrained(chain / "policy")
    processor = LapaProcessor.from_pretrained(chain / "policy")
    inputs = {"images": np.zeros((64, 64, 3), np.uint8), "instruction": "push"}
    assert policy.predict_latent_action(**processor(**inputs)).shape == (1, 4)
    with pytest.raises(ValueError, match='call the processor with `target="latent"`'):
        policy.predict_latent_action(**processor(**inputs, target="action"))
    # An action model made from the folder knows it, too, although the folder's processor asks for latent codes.
    policy = LapaForActionPrediction.from_pretrained(chain / "policy")
    with pytest.raises(ValueError, match='call the processor with `target="action"`'):
        policy.predict_action_tokens(**processor(**inputs))
    assert policy.predict_action_tokens(**processor(**inputs, target="action")).shape == (1, 7)


def test_the_log_of_the_run_stays_with_the_model_and_out_of_its_export(chain, tmp_path):
    for name, metric in (("quantizer", "eval_perplexity"), ("policy", "eval_latent_loss")):
        state = json.loads((chain / name / "trainer_state.json").read_text())
        assert state["global_step"] == 3
        assert any("train_loss" in row for row in state["log_history"])
        assert any(metric in row for row in state["log_history"])
        files = {path.name for path in export(chain / name, tmp_path / name).iterdir()}
        assert "model.safetensors" in files and not {"trainer_state.json", "eval_results.json"} & files


def test_published_rows(tmp_path, capsys):
    """Published JSONL files train both stages of a policy that has no vision tokenizer."""
    rows = shared_path("fixtures/data/latent.jsonl").read_text().splitlines()
    assert rows
    from recordings import end_to_end_folder

    # Image codes of the recorded rows come in 16 per image, the end-to-end model takes 256: repeat them.
    data = tmp_path / "rows.jsonl"
    actions = tmp_path / "actions.jsonl"
    with data.open("w") as file, actions.open("w") as action_file:
        for number, line in enumerate(rows[:4]):
            row = json.loads(line)
            model = LapaForLatentAction.config_class.from_pretrained(end_to_end_folder("latent"))
            count = model.vision_tokenizer_config.num_image_tokens
            row["vision"] = [code % 8 for code in (row["vision"] * count)[:count]]
            row.pop("fields")
            file.write(json.dumps(row) + "\n")
            raw = [str(0.1 * number)] * 6 + [number % 2]
            action_file.write(json.dumps({**row, "raw_actions": raw}) + "\n")
    policy = tmp_path / "policy"
    common = ["--max_steps", "1", "--per_device_train_batch_size", "2", *CPU]
    arguments = ["--data", str(data), "--model", str(end_to_end_folder("latent")), "--output_dir", str(policy)]
    assert scripts.pretrain([*arguments, *common]) == 0, capsys.readouterr().err
    arguments = ["--data", str(actions), "--model", str(policy), "--output_dir", str(tmp_path / "robot")]
    assert scripts.finetune([*arguments, *common]) == 0, capsys.readouterr().err
    assert list(LapaProcessor.from_pretrained(tmp_path / "robot").action_statistics) == ["actions"]
    # Every name that such a file may have is taken by both, and rows that cannot be trained on are refused by both.
    commands = {"pretrain": (data, end_to_end_folder("latent")), "finetune": (actions, policy)}
    for command, (source, model) in commands.items():
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        (tmp_path / "x.json").write_text(json.dumps(rows))
        for name, path in (("x.json.gz", tmp_path / "x.json"), ("x.jsonl.gz", source)):
            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
        for name in ("x.json", "x.json.gz", "x.jsonl.gz"):
            arguments = [
                "--data",
                str(tmp_path / name),
                "--model",
                str(model),
                "--output_dir",
                str(tmp_path / command),
            ]
            assert getattr(scripts, command)([*arguments, *common]) == 0, (name, capsys.readouterr().err)
        images = [{**row, "image": "a.jpg"} for row in rows]
        for row in images:
            del row["vision"]
        (tmp_path / "x.json").write_text(json.dumps(images))
        arguments[1] = str(tmp_path / "x.json")
        assert "row 1: `vision` is missing" in error_of(capsys, getattr(scripts, command)([*arguments, *common]))


def test_a_loss_that_is_no_number_names_its_examples_in_every_stage(chain, bridge, tmp_path, capsys):
    """A step so long that the next loss overflows; the data sets are those of the commands."""
    too_long = ["--learning_rate", "1e30", "--logging_steps", "50", "--save_strategy", "no", "--warmup_steps", "0"]
    sizes = ["--quantizer_config", json.dumps(TINY_QUANTIZER), "--per_device_train_batch_size", "2"]
    more = [*too_long, "--max_grad_norm", "1", *CPU]
    quantizer = ["--data", bridge, "--output_dir", str(tmp_path / "q"), "--frame_gap", "3", "--max_steps", "5"]
    error = error_of(capsys, scripts.train_quantizer([*quantizer, *sizes, *more, "--num_sample_reconstructions", "0"]))
    pair = r"bridge_dataset/train \S+ steps \d+ and \d+"
    assert re.search(rf"the loss is (nan|inf) at step [2-5], on {pair}, {pair}\. The weights", error), error
    pretrain = ["--model", str(chain / "policy"), "--data", str(chain / "labels"), "--output_dir", str(tmp_path / "p")]
    pretrain += ["--max_steps", "5", "--per_device_train_batch_size", "2", *more]
    error = error_of(capsys, scripts.pretrain(pretrain))
    row = r"labels/data/\S+\.parquet row \d+"
    assert re.search(rf"the loss is (nan|inf) at step [2-5], on {row}, {row}\. The weights", error), error
    error = error_of(capsys, finetune(chain, bridge, tmp_path / "robot", *too_long))
    step = r"bridge_dataset/train \S+ step \d+"
    assert re.search(rf"the loss is (nan|inf) at step [2-5], on {step}, {step}, ", error), error


def test_wrong_checkpoint_for_a_stage_is_refused(chain, bridge, tmp_path, capsys):
    arguments = ["--data", bridge, "--output", str(tmp_path / "labels")]
    code = scripts.label(["--model", str(chain / "policy"), *arguments])
    assert "'lapa_quantizer' is needed" in error_of(capsys, code)
    arguments = ["--model", str(chain / "quantizer"), "--data", bridge, "--output_dir", str(tmp_path / "robot")]
    assert "'lapa' is needed" in error_of(capsys, scripts.finetune(arguments))
    arguments = ["--data", str(chain / "labels"), "--output_dir", str(tmp_path / "policy"), *CPU]
    sizes = json.dumps({"text_config": TEXT, "latent_vocab_size": 5})
    tokenizer = str(shared_path("fixtures/tokenizer/tiny.tokenizer.model"))
    fresh = ["--vision_tokenizer", str(chain / "vision"), "--tokenizer", tokenizer, "--policy_config", sizes]
    assert "latent_vocab_size" in error_of(capsys, scripts.pretrain([*arguments, *fresh]))
    wrong = ["--model", str(chain / "quantizer")]
    assert "'lapa' is needed" in error_of(capsys, scripts.pretrain([*arguments, *wrong]))
    wrong = ["--vision_tokenizer", str(chain / "quantizer"), "--tokenizer", tokenizer]
    assert "'lapa_vision_tokenizer' is needed" in error_of(capsys, scripts.pretrain([*arguments, *wrong]))
    wrong = ["--model", str(chain / "policy"), "--quantizer", str(chain / "policy")]
    assert "'lapa_quantizer' is needed" in error_of(capsys, scripts.pretrain([*arguments, *wrong]))
    wrong = ["--model", str(chain / "policy"), "--data", bridge, "--output_dir", str(tmp_path / "quantizer")]
    assert "'lapa_quantizer' is needed" in error_of(capsys, scripts.train_quantizer(wrong))
    assert not list(tmp_path.iterdir())


def test_lineage_is_recorded_checked_and_printed(chain, bridge, tmp_path, capsys):
    labels = ["--data", str(chain / "labels"), "--max_steps", "1", "--per_device_train_batch_size", "2", *CPU]
    labels += ["--cache_vision_codes", "false"]
    named = ["--model", str(chain / "policy"), "--quantizer", str(chain / "quantizer")]
    assert scripts.pretrain([*labels, *named, "--output_dir", str(tmp_path / "policy")]) == 0
    latent = LapaForLatentAction.from_pretrained(tmp_path / "policy").config
    assert (latent.quantizer_hash, latent.quantizer_name) == (hash_weights(chain / "quantizer"), "quantizer")
    finetuning = ["--data", bridge, "--num_bins", "16", "--max_steps", "1", "--per_device_train_batch_size", "2", *CPU]
    finetuning += ["--cache_vision_codes", "false"]
    for model, output in (("policy", "robot"), ("robot", "again")):
        folders = ["--model", str(tmp_path / model), "--output_dir", str(tmp_path / output)]
        assert scripts.finetune([*finetuning, *folders]) == 0
        config = LapaForActionPrediction.from_pretrained(tmp_path / output).config
        # The latent-pretrained model stays on record when a finetuned one is finetuned.
        assert config.latent_policy_hash == hash_weights(tmp_path / "policy") and config.latent_policy_name == "policy"
        assert config.quantizer_hash == latent.quantizer_hash
    card = (export(tmp_path / "again", tmp_path / "hub") / "README.md").read_text()
    assert f"from the quantizer `quantizer`, whose weights have SHA-256 `{latent.quantizer_hash}`" in card
    assert f"latent-pretrained model `policy`, whose weights have SHA-256 `{config.latent_policy_hash}`" in card
    # Another quantizer of the same sizes: its codes mean something else.
    other = LapaQuantizer.from_pretrained(chain / "quantizer")
    torch.nn.init.normal_(next(other.parameters()))
    other.save_pretrained(tmp_path / "other")
    wrong = ["--model", str(chain / "policy"), "--quantizer", str(tmp_path / "other")]
    code = scripts.pretrain([*labels, *wrong, "--output_dir", str(tmp_path / "out")])
    assert "is the quantizer" in error_of(capsys, code)
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    (tmp_path / "policy" / "config.json").write_text(json.dumps({**config, "quantizer_hash": "c0ffee"}))
    learned = ["--model", str(tmp_path / "policy"), "--output_dir", str(tmp_path / "out")]
    assert "pass `replace_quantizer`" in error_of(capsys, scripts.pretrain([*labels, *learned]))
    assert scripts.pretrain([*labels, *learned, "--replace_quantizer", "true"]) == 0
    assert LapaForLatentAction.from_pretrained(tmp_path / "out").config.quantizer_hash == latent.quantizer_hash
    assert LapaForLatentAction.from_pretrained(tmp_path / "out").config.quantizer_name is None


def test_labels_go_on_and_never_mix(chain, bridge, tmp_path, capsys):
    output = tmp_path / "labels"
    arguments = ["--model", str(chain / "quantizer"), "--data", bridge, "--output", str(output), "--device", "cpu"]
    assert scripts.label([*arguments, "--episodes_per_unit", "10"]) == 0
    shards = sorted(output.glob("data/labels-*.parquet"))
    contents = [path.read_bytes() for path in shards]
    times = [path.stat().st_mtime_ns for path in shards]
    shards[1].unlink()
    assert scripts.label([*arguments, "--episodes_per_unit", "10"]) == 0
    assert [path.read_bytes() for path in shards] == contents
    assert [path.stat().st_mtime_ns == time for path, time in zip(shards, times)] == [True, False, True]
    capsys.readouterr()
    code = scripts.label([*arguments, "--episodes_per_unit", "10", "--frame_gap", "2"])
    assert "frame_gap" in error_of(capsys, code)


def test_resume_from_the_last_checkpoint(bridge, tmp_path):
    """Training on from a checkpoint ends where an uninterrupted training does."""
    sizes = ["--quantizer_config", json.dumps(TINY_QUANTIZER), "--data", bridge, "--num_sample_reconstructions", "0"]
    batches = ["--per_device_train_batch_size", "4", "--save_steps", "2", *CPU[:-2]]
    outputs = [str(tmp_path / name) for name in ("whole", "parts")]
    last = ["--resume_from_checkpoint", "last"]
    assert scripts.train_quantizer([*sizes, *batches, "--output_dir", outputs[0], "--max_steps", "4"]) == 0
    # `last` without a checkpoint starts from the beginning.
    assert scripts.train_quantizer([*sizes, *batches, "--output_dir", outputs[1], "--max_steps", "2", *last]) == 0
    assert scripts.train_quantizer([*sizes, *batches, "--output_dir", outputs[1], "--max_steps", "4", *last]) == 0
    assert hash_weights(outputs[0]) == hash_weights(outputs[1])
