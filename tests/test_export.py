"""`lapa export`: a folder that loads and predicts without `lapa`, and nothing half-written on bad input."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_folders import (
    NOT_NEEDED,
    cached_repository,
    picture,
    policy_config,
    run_without,
    save_policy,
    save_quantizer,
    save_vision_tokenizer,
)
from PIL import Image
from transformers import pipeline

import lapa.cli
from lapa import LapaForActionPrediction, LapaQuantizer, LapaVisionTokenizer
from lapa.evaluation.baselines.configuration_latent_decoder import LatentActionDecoderConfig
from lapa.evaluation.baselines.latent_decoder import LatentActionDecoder
from lapa.evaluation.baselines.latent_decoder_policy import LatentDecoderPolicy
from lapa.evaluation.policies import open_policy
from lapa.hub_cards.card import CardOptions
from lapa.hub_cards.export import export, push_to_hub
from lapa.hub_cards.remote_code import flatten_source

POLICY_FILES = {
    "README.md", "config.json", "finetune.py", "generation_config.json", "model.safetensors", "processor_config.json",
    "tokenizer.model", "tokenizer_config.json",
}  # fmt: skip
BARE_FILES = {"README.md", "config.json", "model.safetensors"}
# The files that transformers is told to open, and what they cannot do without.
CODE = {
    "action": {"configuration_lapa", "modeling_lapa", "processing_lapa", "pipeline_robot_action", "tokenization_lapa",
               "image_processing_lapa"},
    "quantizer": {"configuration_lapa_quantizer", "modeling_lapa_quantizer"},
    "vision_tokenizer": {"configuration_lapa_vision_tokenizer", "modeling_lapa_vision_tokenizer"},
}  # fmt: skip
CODE["latent"] = CODE["action"]
ALLOWED_IMPORTS = {"torch", "transformers", "accelerate", "PIL", "numpy", "sentencepiece", "google", "huggingface_hub"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders under `models/`, their exports under `hub/`, an image beside the exports."""
    root = tmp_path_factory.mktemp("export")
    models = {
        "action": save_policy(root / "models" / "action", "action"),
        "latent": save_policy(root / "models" / "latent", "latent"),
        "quantizer": save_quantizer(root / "models" / "quantizer"),
        "vision_tokenizer": save_vision_tokenizer(root / "models" / "vision_tokenizer"),
    }
    (root / "models" / "action" / "optimizer.pt").write_bytes(b"left over by training")
    for name, folder in models.items():
        export(folder, root / "hub" / name)
    Image.fromarray(picture()).save(root / "hub" / "camera.jpg", quality=100)
    return root


def sibling_imports(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


def expected_files(folder):
    """The fixed files, and the code that can be reached from what transformers is told to open."""
    reached, pending = set(), set(CODE[folder.name])
    while pending:
        name = pending.pop()
        reached.add(name)
        pending |= sibling_imports(folder / f"{name}.py") - reached
    return {f"{name}.py" for name in reached} | (POLICY_FILES if folder.name in ("action", "latent") else BARE_FILES)


def test_holds_what_the_hub_needs_and_no_more(folders):
    assert {path.name for path in (folders / "hub").iterdir()} == {*CODE, "camera.jpg"}
    for name in CODE:
        folder = folders / "hub" / name
        assert {path.name for path in folder.iterdir()} == expected_files(folder)
        source = folders / "models" / name / "model.safetensors"
        assert source.samefile(folder / source.name) or source.read_bytes() == (folder / source.name).read_bytes()
        assert str(folders) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_remote_code_imports_only_what_the_hub_has(folders):
    for path in (folders / "hub").glob("*/*.py"):
        if path.name == "finetune.py":
            continue
        siblings = {other.stem for other in path.parent.glob("*.py")}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module in siblings, (path, node.module)
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                if (path.stem, top) == ("adapter_loading_lapa", "peft"):
                    continue  # in a `try`, for folders that hold an adapter
                assert top in ALLOWED_IMPORTS or top in sys.stdlib_module_names, (path, name)


WITHOUT_LAPA = """
import json, re
from pathlib import Path
import numpy as np, torch
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer,
                          pipeline)
trust = {"trust_remote_code": True}
found = {}
row = {"image": np.load("picture.npy"), "instruction": "push"}
for name in ("action", "latent"):
    result = pipeline("robot-action", model=name, device="cpu", **trust)(row)
    found[name] = {key: np.asarray(value).tolist() for key, value in result.items()}
    for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, AutoImageProcessor):
        found[f"{name} {auto_class.__name__}"] = type(auto_class.from_pretrained(name, **trust)).__name__
frames = torch.from_numpy(np.load("frames.npy"))
quantizer = AutoModel.from_pretrained("quantizer", **trust).eval()
found["quantizer"] = quantizer.encode(frames).latent_action_codes.tolist()
tokenizer = AutoModel.from_pretrained("vision_tokenizer", **trust).eval()
found["vision_tokenizer"] = tokenizer.encode(frames[:, 0, :, :16, :16]).codes.tolist()
snippets = 0
for name in ("action", "latent", "quantizer", "vision_tokenizer"):
    scope = {}
    for block in re.findall(r"```python\\n(.*?)```", Path(name, "README.md").read_text(), re.DOTALL):
        exec(block, scope)
        snippets += 1
    found[f"{name} scope"] = sorted(key for key in scope if key in ("actions", "codes", "next_frame", "again", "result"))
found["snippets"] = snippets
import sys
found["lapa"] = "lapa" in sys.modules
print(json.dumps(found))
"""


def test_loads_and_predicts_the_same_without_lapa(folders):
    frames = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    np.save(folders / "hub" / "frames.npy", frames.numpy())
    np.save(folders / "hub" / "picture.npy", picture())
    found = json.loads(run_without(NOT_NEEDED, WITHOUT_LAPA, folders / "hub").splitlines()[-1])
    assert found["lapa"] is False
    for name, model in (("action", "LapaForActionPrediction"), ("latent", "LapaForLatentAction")):
        expected = pipeline("robot-action", model=str(folders / "models" / name), device="cpu")(
            {"image": picture(), "instruction": "push"}
        )
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            if key in ("action", "scores"):
                np.testing.assert_allclose(found[name][key], value, atol=1e-6)
            else:
                assert found[name][key] == value
        classes = ["LapaConfig", model, model, "LapaProcessor", "LapaTokenizer", "LapaImageProcessor"]
        autos = ["Config", "Model", "ModelForCausalLM", "Processor", "Tokenizer", "ImageProcessor"]
        assert [found[f"{name} Auto{auto}"] for auto in autos] == classes
    quantizer = LapaQuantizer.from_pretrained(folders / "models" / "quantizer").eval()
    assert found["quantizer"] == quantizer.encode(frames).latent_action_codes.tolist()
    tokenizer = LapaVisionTokenizer.from_pretrained(folders / "models" / "vision_tokenizer").eval()
    assert found["vision_tokenizer"] == tokenizer.encode(frames[:, 0, :, :16, :16]).codes.tolist()
    # The snippets of the cards ran to their ends.
    assert found["snippets"] == 6
    assert found["action scope"] == ["actions", "result"] and found["latent scope"] == ["codes", "result"]
    assert found["quantizer scope"] == ["codes", "next_frame"] and found["vision_tokenizer scope"] == [
        "again",
        "codes",
    ]


def test_exported_folder_works_beside_lapa_too(folders):
    row = {"image": picture(), "instruction": "push"}
    pipe = pipeline("robot-action", model=str(folders / "hub" / "action"), device="cpu", trust_remote_code=True)
    expected = pipeline("robot-action", model=str(folders / "models" / "action"), device="cpu")(row)
    assert pipe(row)["action_tokens"] == expected["action_tokens"]


def test_export_of_an_export_is_the_same(folders, tmp_path):
    export(folders / "hub" / "action", tmp_path / "action")
    for path in (tmp_path / "action").iterdir():
        assert path.read_bytes() == (folders / "hub" / "action" / path.name).read_bytes(), path.name


def test_sharded_weights_and_no_processor(tmp_path):
    torch.manual_seed(0)
    model = LapaForActionPrediction(policy_config(has_action_segment=True))
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "model" / "generation_config.json").unlink()
    export(tmp_path / "model", tmp_path / "hub")
    shards = {path.name for path in (tmp_path / "model").glob("model*")}
    assert (
        len(shards) > 2
        and {path.name for path in (tmp_path / "hub").glob("model*.*") if path.suffix != ".py"} >= shards
    )
    assert not (tmp_path / "hub" / "finetune.py").exists() and not (tmp_path / "hub" / "processing_lapa.py").exists()
    assert "custom_pipelines" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    assert json.loads((tmp_path / "hub" / "generation_config.json").read_text())["eos_token_id"] == 2
    again = LapaForActionPrediction.from_pretrained(tmp_path / "hub")
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), again.parameters()))


def break_config(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKS = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "no_json": (lambda folder: (folder / "config.json").write_text("{"), "is no JSON file"),
    "other_model": (lambda folder: break_config(folder, model_type="bert"), "`model_type` 'bert'; accepted: lapa"),
    "other_class": (lambda folder: break_config(folder, architectures=["X"]), r"`architectures` \['X'\]; accepted"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
    "cut_off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "damaged or cut off",
    ),
    "lost_shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "b.safetensors does not exist",
    ),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds an adapter"),
    "no_tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "a processor without tokenizer.model"),
    "results": (lambda folder: (folder / "lapa_results.json").write_text("[]"), "must hold a JSON object"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_bad_folder_is_one_error_and_leaves_nothing(name, tmp_path):
    damage, message = BREAKS[name]
    folder = save_policy(tmp_path / "model", "action")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "hub")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command_line(folders, tmp_path, capsys, monkeypatch):
    model = str(folders / "models" / "quantizer")
    assert lapa.cli.main(["export", "--model", model, "--output", str(tmp_path / "hub"), "--license", "mit"]) == 0
    assert f"{len(list((tmp_path / 'hub').iterdir()))} files" in capsys.readouterr().out
    assert "license: mit" in (tmp_path / "hub" / "README.md").read_text()
    assert lapa.cli.main(["export", "--model", model, "--output", str(tmp_path / "hub")]) == 2
    assert "exists; give a folder that does not" in capsys.readouterr().err
    assert lapa.cli.main(["export", "--model", str(tmp_path / "nothing"), "--output", str(tmp_path / "x")]) == 2
    assert "must be a folder with a saved model" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    assert lapa.cli.main(["export", "--model", model, "--output", str(tmp_path / "x"), "--push-to", "a/b"]) == 2
    assert "offline" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


class RecordedApi:
    calls: list = []  # noqa: RUF012

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        self.calls.append(("create", repo_id, private, self.token))
        return type("Url", (), {"repo_id": repo_id})()

    def upload_folder(self, folder_path, repo_id, commit_message):
        self.calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))
        self.card = (Path(folder_path) / "README.md").read_text()
        assert f'from_pretrained("{repo_id}"' in self.card


def test_push_to_hub(folders, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", RecordedApi)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(RecordedApi, "calls", [])
    options = CardOptions(license="mit")
    before = sorted((folders / "models").iterdir())
    names = push_to_hub(folders / "models" / "quantizer", "me/quantizer", options, private=True, token="secret")
    assert RecordedApi.calls == [
        ("create", "me/quantizer", True, "secret"),
        ("upload", "me/quantizer", expected_files(folders / "hub" / "quantizer")),
    ]
    assert set(names) == expected_files(folders / "hub" / "quantizer")
    assert sorted((folders / "models").iterdir()) == before  # the scratch folder is gone
    RecordedApi.calls.clear()
    assert set(push_to_hub(folders / "models" / "action", "me/policy", dry_run=True)) == expected_files(
        folders / "hub" / "action"
    )
    with pytest.raises(ValueError, match="`repo_id` 'a/b/c' is no repository id"):
        push_to_hub(folders / "models" / "action", "a/b/c")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match="offline"):
        push_to_hub(folders / "models" / "action", "me/policy")
    assert RecordedApi.calls == []


def test_flatten_source():
    source = (
        '"""ünï from lapa.a.b import c"""\n'
        "from lapa.processing.thing import (\n    one,\n    two as three,\n)\nimport os; from lapa.data.other import x\n"
        'text = "from lapa.processing.thing import one"\n'
    )
    flat, modules = flatten_source(source, "m")
    assert modules == ["lapa.processing.thing", "lapa.data.other"]
    assert flat == source.replace("from lapa.processing.thing import (", "from .thing import (").replace(
        "from lapa.data.other import x", "from .other import x"
    )
    for line in ("import lapa", "import lapa.data.x as y", "from lapa import a", "from lapa.data import x",
                 "def f():\n    from lapa.data.x import y", "from . import x", "from ..a import b"):  # fmt: skip
        with pytest.raises(ValueError, match="cannot become part of a flat folder"):
            flatten_source(line + "\n", "m")


def test_an_action_decoder_comes_along_and_acts_from_the_hub(tmp_path, monkeypatch):
    model = save_policy(tmp_path / "policy", "latent")
    decoder = LatentActionDecoder(LatentActionDecoderConfig(action_dim=2, embedding_size=8, mlp_hidden_size=8))
    decoder.save_pretrained(model / "action_decoder")
    (model / "action_decoder" / "README.md").write_text("of two arms", encoding="utf-8")
    (model / "action_decoder" / "optimizer.pt").write_bytes(b"left over by training")
    out = export(model, tmp_path / "out")
    assert {path.name for path in (out / "action_decoder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert "LatentDecoderPolicy.from_pretrained" in (out / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    cached_repository(tmp_path / "cache", "someone/decoded", files)
    images, sentences = [picture()], ["push the red block"]
    expected = LatentDecoderPolicy.from_pretrained(model).act(images, sentences)
    opened = open_policy("someone/decoded", 2, device="cpu")
    assert np.array_equal(opened.controller.policy.act(images, sentences), expected)


@pytest.mark.parametrize(
    ("kind", "model_type", "message"),
    [("latent", "bert", "got 'bert' beside a LapaForLatentAction"),
     ("action", "lapa_latent_action_decoder", "got 'lapa_latent_action_decoder' beside a LapaForActionPrediction")],
)  # fmt: skip
def test_what_is_no_decoder_of_codes_is_refused(tmp_path, kind, model_type, message):
    model = save_policy(tmp_path / "policy", kind)
    (model / "action_decoder").mkdir()
    (model / "action_decoder" / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
