"""What `lapa label` writes: columns, provenance, card, refusals."""

import io
import json
import shutil
from dataclasses import fields, replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_errors import error_of
from label_processes import make_clips
from PIL import Image
from shared_files import shared_path
from tiny_models import TINY_VISION_TOKENIZER, build

from lapa import LapaForLatentAction, LapaVisionTokenizer, LapaVisionTokenizerConfig
from lapa.data.label_manifest import LabelManifest, LabelSettings
from lapa.data.label_table import LabelFolder, label_schema
from lapa.data.rlds import RldsSource
from lapa.training import label_script, scripts
from lapa.training.label_vision import hash_vision_tokenizer, load_vision_tokenizer

label_error = partial(error_of, start="lapa label: error: ")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_clips(folder / "clips", 5, 6)
    build("nsvq").save_pretrained(folder / "quantizer")
    LapaVisionTokenizer(LapaVisionTokenizerConfig(**TINY_VISION_TOKENIZER)).save_pretrained(folder / "vision")
    policy = build("latent")
    policy.model.vision_tokenizer.load_state_dict(LapaVisionTokenizer.from_pretrained(folder / "vision").state_dict())
    policy.save_pretrained(folder / "policy")
    return folder


def label(place, output, *more, data=None):
    base = ["--model", str(place / "quantizer"), "--data", str(data or place / "clips"), "--output", str(output)]
    return scripts.label([*base, "--device", "cpu", "--num_workers", "0", *more])


CLIPS = ("--frame_gap", "2", "--frequency", "10", "--episodes_per_unit", "3")


@pytest.fixture(scope="module")
def bridge(place, tmp_path_factory):
    """Real data, with codes of a vision tokenizer."""
    output = tmp_path_factory.mktemp("bridge") / "labels"
    data = shared_path("data/bridge_rlds/1.0.0")
    assert label(place, output, "--vision_tokenizer", str(place / "policy"), data=data) == 0
    return output


def test_columns_of_real_data(bridge, place):
    from datasets import load_dataset

    table = load_dataset(str(bridge), split="train")
    names = [
        "episode_id",
        "step_index",
        "timestamp",
        "image",
        "next_frame_offset",
        "instruction",
        "latent_action_codes",
    ]
    assert table.column_names == [*names, "vision_codes", "action", "embodiment", "unnorm_key", "source"]
    source = RldsSource(shared_path("data/bridge_rlds/1.0.0"))
    episode = next(iter(source))
    row = table[2]
    assert (row["episode_id"], row["step_index"], row["next_frame_offset"]) == (episode.episode_id, 2, 3)
    assert row["timestamp"] == pytest.approx(0.4) and row["instruction"] == episode.instruction
    assert (row["embodiment"], row["unnorm_key"], row["source"]) == ("widowx", "bridge_dataset", episode.source)
    assert np.array_equal(np.float32(row["action"]), episode.action[2])
    # The recorded JPEG file is stored as it is.
    assert np.array_equal(np.asarray(row["image"]), episode.frame("image_0", 2))
    raw = pq.read_table(bridge / "data" / "labels-00000-of-00001.parquet")["image"][2].as_py()["bytes"]
    assert raw == bytes(episode.frames["image_0"].encoded[2])


def test_codes_are_the_models_own(bridge, place):
    """Latent codes are the quantizer's; vision codes are what the policy computes from the stored image."""
    from datasets import load_dataset

    from lapa import LapaImageProcessor, LapaQuantizer
    from lapa.data.frame_pairs import resize_frame

    table = load_dataset(str(bridge), split="train").select(range(10))
    policy = LapaForLatentAction.from_pretrained(place / "policy").eval()
    pixels = LapaImageProcessor(size=8)(list(table["image"]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        codes = policy.model.encode_images(pixels).flatten(1)
    assert np.asarray(table["vision_codes"]).tolist() == codes.tolist()
    episode = next(iter(RldsSource(shared_path("data/bridge_rlds/1.0.0"))))
    frames = np.stack([resize_frame(episode.frame("image_0", step), (32, 32)) for step in range(10)])
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    pairs = torch.stack([video[:7], video[3:]], 1)
    with torch.no_grad():
        latent = LapaQuantizer.from_pretrained(place / "quantizer").eval().encode(pairs).latent_action_codes
    assert np.asarray(table["latent_action_codes"])[:7].tolist() == latent.tolist()


def test_the_vision_tokenizer_may_come_from_either_folder(place):
    own, inside = (load_vision_tokenizer(str(place / name)) for name in ("vision", "policy"))
    assert hash_vision_tokenizer(*own) == hash_vision_tokenizer(*inside)
    next(own[0].parameters()).data[0] += 1
    assert hash_vision_tokenizer(*own) != hash_vision_tokenizer(*inside)
    with pytest.raises(ValueError, match="must hold a vision tokenizer or a policy"):
        load_vision_tokenizer(str(place / "quantizer"))


def test_provenance_is_in_every_file(bridge, place):
    metadata = pq.read_schema(bridge / "data" / "labels-00000-of-00001.parquet").metadata
    values = json.loads(metadata[b"lapa"])
    settings = LabelSettings.from_dict({item.name: values[item.name] for item in fields(LabelSettings)})
    manifest = LabelManifest.load(bridge)
    assert settings == manifest.settings and manifest.complete
    from lapa.training.label_latent_actions import hash_weights

    assert settings.quantizer_hash == hash_weights(place / "quantizer")
    (source,) = settings.sources
    assert (source.name, source.camera, source.frame_gap_seconds) == ("bridge_dataset/train", "image_0", 0.6)
    assert source.licence == "CC BY 4.0" and source.num_episodes == 25
    assert settings.versions["torch"] == torch.__version__ and settings.num_threads == 1
    assert (settings.batch_size, settings.dtype, settings.device, settings.frame_size) == (
        64,
        "float32",
        "cpu",
        [32, 32],
    )
    assert manifest.totals.pairs.gaps.frames == {3: 175}
    assert np.sum(manifest.totals.code_counts, axis=1).tolist() == [175] * 4
    (unit,) = manifest.units
    assert (unit["rows"], unit["episodes"]) == (175, [0, 25])


def test_schema_is_that_of_datasets(bridge):
    """The description of the columns, which is written by hand, is what `datasets` would write."""
    from datasets import Features

    schema = label_schema(LabelManifest.load(bridge).settings)
    features = Features.from_arrow_schema(schema)
    assert features.arrow_schema.equals(schema.remove_metadata())
    assert json.loads(features.arrow_schema.metadata[b"huggingface"]) == json.loads(schema.metadata[b"huggingface"])


def test_images_that_are_no_jpeg_are_encoded(place, tmp_path):
    assert label(place, tmp_path / "labels", *CLIPS, "--image_quality", "60") == 0
    assert label(place, tmp_path / "small", *CLIPS, "--image_size", "16", "--action", "false") == 0
    folder = LabelFolder(tmp_path / "labels")
    assert folder.rows == (12, 8)
    (table,) = folder.read_groups(0, [0], ["image", "action", "embodiment", "timestamp"])
    row = table.to_pylist()[1]
    assert row["action"] is None and row["embodiment"] == "human" and row["timestamp"] == pytest.approx(0.1)
    buffer = io.BytesIO()
    first = Image.open(place / "clips" / "clip0000" / "img_00001.png")
    first.save(buffer, format="JPEG", quality=60)
    assert row["image"]["bytes"] == buffer.getvalue()
    (small,) = LabelFolder(tmp_path / "small").read_groups(0, [0], ["image"])
    assert Image.open(io.BytesIO(small.to_pylist()[0]["image"]["bytes"])).size == (16, 16)
    assert "action" not in pq.read_schema(tmp_path / "small" / "data" / "labels-00000-of-00002.parquet").names


def test_a_run_with_other_settings_is_refused(place, tmp_path, capsys):
    output = tmp_path / "labels"
    assert label(place, output, *CLIPS) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for more, named in (
        (["--frame_gap", "3"], "sources[0].frame_gap (3, not 2)"),
        (["--frequency", "20"], "sources[0].options.frequency (20.0, not 10.0)"),
        (["--batch_size", "8"], "batch_size (8, not 64)"),
        (["--num_threads", "2"], "num_threads (2, not 1)"),
        (["--filters", "static"], "sources[0].filters (['StaticPairs(min_change=0.00392"),
        (["--episodes_per_unit", "1"], "num_units (5, not 2), episodes_per_unit (1, not 3)"),
        (["--dtype", "bfloat16"], "dtype ('bfloat16', not 'float32')"),
        (["--vision_tokenizer", str(place / "vision")], "vision_tokenizer_hash"),
    ):
        assert f"holds labels made with other settings: {named}" in label_error(
            capsys, label(place, output, *CLIPS, *more)
        )
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    torch.set_num_threads(1)


def test_folders_that_hold_something_else_are_refused(place, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "holds no labels, but notes.txt" in label_error(capsys, label(place, tmp_path / "other", *CLIPS))
    (tmp_path / "file").write_text("mine")
    assert "`output` is a file" in label_error(capsys, label(place, tmp_path / "file", *CLIPS))
    with pytest.raises(ValueError, match=r"holds no labels: it has no labels.json"):
        LabelFolder(tmp_path / "other")
    with pytest.raises(ValueError, match="holds no labels: `path` .*nowhere' is no folder"):
        LabelFolder(tmp_path / "nowhere")
    (tmp_path / "other" / "labels.json").write_text("{")
    with pytest.raises(ValueError, match=r"labels.json is damaged"):
        LabelFolder(tmp_path / "other")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--batch_size", "0"], "`batch_size` must be at least 1"),
        (["--image_quality", "101"], "`image_quality`"),
        (["--shard_index", "2", "--num_shards", "2"], r"`shard_index` must lie in [0, 1]"),
        (["--format", "jsonl"], "needs `vision_tokenizer`"),
        (["--format", "csv"], "csv"),
        (["--camera", "left"], "left"),
        (["--frame_gap", "9"], "gave no pair of frames to label"),
        (["--frame_gap_seconds", "0.2", "--frame_gap", "2"], "exclude"),
        (["--vision_tokenizer", "/nowhere"], "/nowhere"),
        (["--push_to_hub", "a/b/c"], "a/b/c"),
    ],
)
def test_bad_arguments(place, tmp_path, capsys, more, named):
    base = () if "--frame_gap" in more or "--frame_gap_seconds" in more else ("--frame_gap", "2")
    assert named in label_error(capsys, label(place, tmp_path / "labels", "--frequency", "10", *base, *more))


def test_what_is_not_said_is_as_the_quantizer_was_trained(place, tmp_path):
    quantizer = shutil.copytree(place / "quantizer", tmp_path / "quantizer")
    settings = {"frame_gap": 3, "frame_gap_seconds": None, "frequency": 5.0, "camera": "image_0"}
    (quantizer / "training_settings.json").write_text(json.dumps(settings))
    assert label(tmp_path, tmp_path / "labels", data=place / "clips") == 0
    (source,) = LabelManifest.load(tmp_path / "labels").settings.sources
    # Clips have no camera of that name; the gap and the frequency hold.
    assert (source.frame_gap, source.camera) == (3, "video")
    (table,) = LabelFolder(tmp_path / "labels").read_groups(0, [0], ["timestamp"])
    assert table["timestamp"].to_pylist()[:3] == pytest.approx([0, 0.2, 0.4])
    # A gap that is said replaces the recorded one, in whichever unit.
    assert label(tmp_path, tmp_path / "other", "--frame_gap_seconds", "0.4", data=place / "clips") == 0
    assert LabelManifest.load(tmp_path / "other").settings.sources[0].frame_gap is None


def test_mixtures_keep_their_sources_apart(place, tmp_path, capsys):
    make_clips(tmp_path / "more", 2, 7)
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(f"- path: {place / 'clips'}\n  frame_gap: 1\n- path: more\n  filters: [static]\n")
    assert label(place, tmp_path / "labels", "--frame_gap", "2", "--frequency", "10", data=mixture) == 0
    manifest = LabelManifest.load(tmp_path / "labels")
    assert {name: entry["rows"] for name, entry in manifest.source_totals.items()} == {"clips": 25, "more": 10}
    assert [source.frame_gap for source in manifest.settings.sources] == [1, 2]
    mixture.write_text(f"- path: {place / 'clips'}\n- path: {place / 'clips'}\n  frame_gap: 3\n")
    code = label(place, tmp_path / "twice", "--frame_gap", "2", "--frequency", "10", data=mixture)
    assert "names clips twice" in label_error(capsys, code)


def test_what_cannot_be_read_is_counted_or_stops(place, tmp_path, capsys):
    clips = make_clips(tmp_path / "clips", 6, 8)
    (clips / "clip0002" / "img_00004.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        code = label(place, tmp_path / "labels", *CLIPS, "--num_workers", workers, data=clips)
        assert "clip0002" in label_error(capsys, code)
    left = [path.name for path in (tmp_path / "labels").rglob("*") if path.is_file()]
    assert "labels.json" in left and not any(name.startswith(".") for name in left)
    skip = (*CLIPS, "--on_error", "skip")
    assert "1 of 6 episodes could not be read" in label_error(
        capsys, label(place, tmp_path / "few", *skip, data=clips)
    )
    assert not LabelManifest.load(tmp_path / "few").complete
    assert label(place, tmp_path / "few", *skip, "--max_skipped", "0.2", data=clips) == 0
    assert "skipped_episodes: unreadable 1" in capsys.readouterr().out
    manifest = LabelManifest.load(tmp_path / "few")
    assert manifest.totals.pairs.skipped_groups == {"unreadable": 1} and manifest.totals.pairs.groups == 6
    assert manifest.units[0]["skipped"] == {"unreadable": 1} and "skipped" not in manifest.units[1]
    (message,) = manifest.totals.skipped
    assert "img_00004.png" in message or "clip0002" in message


def test_published_rows(place, tmp_path):
    """As the published loader reads them: `delta` a list of strings beside `fields`, steps without instruction left out."""
    from lapa.data.jsonl import read_rows

    more = ("--format", "jsonl", "--vision_tokenizer", str(place / "vision"))
    assert label(place, tmp_path / "labels", *CLIPS, *more) == 0
    files = sorted((tmp_path / "labels" / "data").glob("*.jsonl"))
    assert [file.name for file in files] == ["labels-00000-of-00002.jsonl", "labels-00001-of-00002.jsonl"]
    row = json.loads(files[0].read_text().splitlines()[0])
    assert list(row) == ["vision", "instruction", "delta", "fields"] and len(row["vision"]) == 16
    assert all(isinstance(code, str) for code in row["delta"]) and row["fields"] == "[instruction],[vision],delta"
    rows = [row for file in files for row in read_rows(file, "latent")]
    assert len(rows) == 16 and {row.sentence for row in rows} == {"do 0", "do 1", "do 2"}
    manifest = LabelManifest.load(tmp_path / "labels")
    assert manifest.totals.pairs.dropped_items == {"no_instruction": 4}
    with pytest.raises(ValueError, match="holds published JSONL files: join them"):
        LabelFolder(tmp_path / "labels")
    assert "cat labels/data/*.jsonl" in (tmp_path / "labels" / "README.md").read_text()


def test_card(bridge):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(bridge / "README.md")
    assert card.data.tags[1] == "lapa" and card.data.size_categories == ["n<1K"]
    assert card.data.configs == [{"config_name": "default", "data_files": "data/*.parquet"}]
    text = card.text
    assert "175 steps of 25 episodes" in text and "| bridge_dataset/train | image_0 | 0.6 s |" in text
    assert "CC BY 4.0" in text and LabelManifest.load(bridge).quantizer_hash in text
    assert "| `vision_codes` | list of int64 |" in text and 'load_dataset("labels"' in text


def test_perplexity_of_known_counts():
    from lapa.hub_cards.labels import code_usage

    first, second, everything = code_usage([[1, 1, 1, 1], [4, 0, 0, 0]])
    assert (first["used"], second["used"], everything["used"]) == (4, 1, 4)
    assert first["perplexity"] == pytest.approx(4) and second["perplexity"] == pytest.approx(1)
    assert everything["largest"] == pytest.approx(5 / 8)


def test_push(place, tmp_path, monkeypatch, capsys):
    """The whole folder goes up, as a data set, with a card that names the repository."""
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, **options):
            calls.append(("upload", options.pop("folder_path"), options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    more = ("--push_to_hub", "me/labels", "--private")
    assert label(place, tmp_path / "out", *CLIPS, "--shard_index", "0", "--num_shards", "2", *more) == 0
    assert not calls, "a folder with missing units is not uploaded"
    assert label(place, tmp_path / "out", *CLIPS, *more) == 0
    (create, upload) = calls
    assert create == ("create", "me/labels", {"repo_type": "dataset", "private": True, "exist_ok": True})
    assert upload[1] == str(tmp_path / "out") and upload[2]["repo_type"] == "dataset"
    assert upload[2]["ignore_patterns"] == [".*", "**/.*"]
    assert 'load_dataset("me/labels"' in (tmp_path / "out" / "README.md").read_text()
    assert "https://huggingface.co/datasets/me/labels" in capsys.readouterr().out
    assert label_script.upload_labels(tmp_path / "out", "me/labels") == "https://huggingface.co/datasets/me/labels"


@pytest.mark.parametrize("spelling", ["--shard_index 1 --num_shards 3", "--shard-index 1 --num-shards=3"])
def test_the_command_that_finishes_the_folder(spelling, monkeypatch):
    """All that was said, wherever and however it was, but which part of the work one process does."""
    import shlex

    from lapa.training.script_arguments import LabelArguments

    line = f"--model q --data 'a b' --output=label --frame-gap 2 --action false {spelling} --on-error skip"
    monkeypatch.setattr("sys.argv", ["lapa", "label", *shlex.split(line)])
    (arguments,) = scripts.make_parser((LabelArguments,), "lapa label").parse_args_and_config(shlex.split(line))
    command = label_script._command(arguments)
    assert command == "lapa label --data 'a b' --frame_gap 2 --on_error skip --model q --output label --action False"
    (again,) = scripts.make_parser((LabelArguments,), "lapa label").parse_args_and_config(shlex.split(command)[2:])
    assert again == replace(arguments, shard_index=0, num_shards=1)
