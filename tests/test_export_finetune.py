"""`finetune.py` of an exported folder: reads JSONL and LeRobot data, and leaves a policy that loads like the export."""

import ast
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_folders import NOT_NEEDED, run_without, save_policy
from PIL import Image

from lapa.hub_cards import finetune
from lapa.hub_cards.export import export

FPS = 5
LENGTHS = (3, 4)
TASKS = ("push the block", "stop")
CAMERA = "observation.images.top"


def level_of(step: int) -> int:
    """Brightness of a step's frame, by which it is recognised after the video codec."""
    return 20 + 30 * step


def write_video(path: Path, levels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for index, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), level, np.uint8), format="rgb24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def action_of(step: int) -> list[float]:
    return [float(step), 0.5 if step % 2 else -0.5]


def write_lerobot(root: Path, version: str) -> Path:
    """Two episodes; in v3.0 both share one parquet file and one video, in v2.1 each has its own."""
    episodes = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    frames = np.concatenate([np.arange(length) for length in LENGTHS])
    steps = np.arange(len(frames))
    columns = {
        "action": pa.array([action_of(step) for step in steps], pa.list_(pa.float32())),
        "timestamp": pa.array(frames / FPS, pa.float32()),
        "frame_index": pa.array(frames),
        "episode_index": pa.array(episodes),
        "task_index": pa.array(episodes),
    }
    table = pa.table(columns)
    features = {"action": {"dtype": "float32", "shape": [2]}, CAMERA: {"dtype": "video", "shape": [32, 32, 3]}}
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000}
    (root / "meta").mkdir(parents=True)
    if version == "v2.1":
        info["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        lines = [json.dumps({"task_index": index, "task": task}) for index, task in enumerate(TASKS)]
        (root / "meta" / "tasks.jsonl").write_text("\n".join(lines) + "\n")
        (root / "data" / "chunk-000").mkdir(parents=True)
        for episode in range(len(LENGTHS)):
            chosen = np.flatnonzero(episodes == episode)
            pq.write_table(table.take(chosen), root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
            video = root / "videos" / "chunk-000" / CAMERA / f"episode_{episode:06d}.mp4"
            write_video(video, [level_of(step) for step in chosen])
    else:
        info["video_path"] = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
        tasks = pa.table({"task_index": pa.array([0, 1]), "__index_level_0__": pa.array(TASKS)})
        pq.write_table(tasks, root / "meta" / "tasks.parquet")
        starts = np.concatenate([[0], np.cumsum(LENGTHS)[:-1]]) / FPS
        places = {
            "episode_index": [0, 1],
            f"videos/{CAMERA}/chunk_index": [0, 0],
            f"videos/{CAMERA}/file_index": [0, 0],
        }
        places[f"videos/{CAMERA}/from_timestamp"] = starts.tolist()
        (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.table(places), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        (root / "data" / "chunk-000").mkdir(parents=True)
        pq.write_table(table, root / "data" / "chunk-000" / "file-000.parquet")
        write_video(root / "videos" / CAMERA / "chunk-000" / "file-000.mp4", [level_of(step) for step in steps])
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


def write_jsonl(folder: Path) -> Path:
    """Two instructions on one picture, each with its own action; the last dimension is a gripper of -1 and 1."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), 90, np.uint8)).save(folder / "0.png")
    rows = []
    for step in range(8):
        right = step % 2
        actions = ["0.75" if right else "-0.25", 0.1, 1.0 if right else -1.0]
        rows.append({"image": "0.png", "instruction": "go right" if right else "stop", "raw_actions": actions})
    (folder / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder / "demos.jsonl"


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_reads_lerobot(tmp_path, version):
    data = finetune.read_lerobot(write_lerobot(tmp_path / "set", version), None, "action", None)
    assert data.instructions == [TASKS[0]] * 3 + [TASKS[1]] * 4
    np.testing.assert_array_equal(data.actions, [action_of(step) for step in range(7)])
    found = {step: float(np.mean(frame)) for step, frame in data.images()}
    assert sorted(found) == list(range(7))
    for step, level in found.items():
        assert abs(level - level_of(step)) < 6, step


def test_lerobot_that_does_not_fit(tmp_path):
    root = write_lerobot(tmp_path / "set", "v3.0")
    with pytest.raises(ValueError, match="`--camera` must be one of observation.images.top, got wrist"):
        finetune.read_lerobot(root, "wrist", "action", None)
    with pytest.raises(ValueError, match="`--action-key` 'torque' is no feature"):
        finetune.read_lerobot(root, None, "torque", None)
    video = root / "videos" / CAMERA / "chunk-000" / "file-000.mp4"
    write_video(video, [level_of(step) for step in range(5)])
    with pytest.raises(ValueError, match="no frame at 1.000 s"):
        list(finetune.read_lerobot(root, None, "action", None).images())


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 3 is no JSON"),
        ('{"image": "a.png", "instruction": "x"}', "line 3 must have `instruction`, `raw_actions`"),
        ('{"image": "a.png", "instruction": " ", "raw_actions": [1, 2, 3]}', "line 3: `instruction` must say"),
        ('{"image": "a.png", "instruction": "x", "raw_actions": [1, 2]}', "line 3: the action must be 3 finite"),
        ('{"image": "a.png", "instruction": "x", "raw_actions": [1, 2, NaN]}', "line 3: the action must be 3 finite"),
        ('{"vision": [1], "instruction": "x", "raw_actions": [1, 2, 3]}', "line 1: `vision` is missing"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    good = '{"image": "a.png", "instruction": "x", "raw_actions": [1, 2, 3]}\n'
    path.write_text(good + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        finetune.read_jsonl(path)


def test_is_one_file_that_states_its_dependencies():
    source = Path(finetune.__file__).read_text()
    assert source.startswith("# /// script\n")
    block = source.split("# ///\n")[0]
    names = {"PIL": "pillow", "av": "av", "huggingface_hub": "transformers", "tqdm": "transformers"}
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(node.module.split(".")[0])
    assert "lapa" not in modules
    for module in modules & {
        "PIL",
        "av",
        "huggingface_hub",
        "tqdm",
        "torch",
        "transformers",
        "peft",
        "pyarrow",
        "numpy",
    }:
        assert f'"{names.get(module, module)}' in block, module


RUN = """
import contextlib, io, json, runpy, sys
def script(folder, *arguments):
    sys.argv = ["finetune.py", *arguments]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            runpy.run_path(f"{folder}/finetune.py", run_name="__main__")
    except SystemExit as exit:
        return exit.code, errors.getvalue().splitlines()[-1:]
tiny = ["--max-steps", "60", "--learning-rate", "0.01", "--lora-rank", "4", "--batch-size", "4", "--cpu"]
short = [*tiny, "--max-steps", "2"]
codes = [
    script("latent", "--data", "data/demos.jsonl", "--output", "adapted", *tiny)[0],
    script("action", "--data", "set_v3.0", "--output", "merged", "--merge", "--unnorm-key", "robot", *short)[0],
    script("merged", "--data", "set_v2.1", "--output", "again", *short)[0],
]
failures = [
    script("action", "--data", "data/demos.jsonl", "--output", "merged", *short),
    script("action", "--data", "nothing", "--output", "x", *short),
    script("action", "--model", "adapted", "--data", "data/demos.jsonl", "--output", "x", *short),
    script("action", "--data", "data/broken.jsonl", "--output", "x", *short),
]
from transformers import AutoModelForCausalLM, pipeline
trust = {"trust_remote_code": True}
rows = [{"image": "data/0.png", "instruction": text} for text in ("go right", "stop")]
results = {}
for name in ("adapted", "merged", "again"):
    pipe = pipeline("robot-action", model=name, device="cpu", **trust)
    results[name] = [{**result, "action": result["action"].tolist()} for result in pipe(rows)]
    results[name + " class"] = type(AutoModelForCausalLM.from_pretrained(name, **trust)).__name__
print()
print(json.dumps({"codes": codes, "failures": failures, "results": results, "lapa": "lapa" in sys.modules}))
"""


def test_runs_from_the_exported_folder_without_lapa(tmp_path):
    for kind in ("latent", "action"):
        export(save_policy(tmp_path / "models" / kind, kind), tmp_path / kind)
    write_jsonl(tmp_path / "data")
    (tmp_path / "data" / "broken.jsonl").write_text('{"image": "0.txt", "instruction": "x", "raw_actions": [1, 2, 3]}')
    (tmp_path / "data" / "0.txt").write_text("no image")
    for version in ("v2.1", "v3.0"):
        write_lerobot(tmp_path / f"set_{version}", version)
    before = {path.name for path in tmp_path.iterdir()}
    hidden = tuple(set(NOT_NEEDED) - {"peft", "av", "pyarrow", "pandas"})
    found = json.loads(run_without(hidden, RUN, tmp_path).splitlines()[-1])
    assert found["codes"] == [0, 0, 0] and found["lapa"] is False
    assert {path.name for path in tmp_path.iterdir()} - before == {"adapted", "merged", "again", ".modules"}

    # The adapter of a latent model, learnt: each instruction its own action, the values of the data to the bit.
    right, stop = found["results"]["adapted"]
    np.testing.assert_allclose(right["action"], [0.75, 0.1, 1.0], atol=1e-6)
    np.testing.assert_allclose(stop["action"], [-0.25, 0.1, -1.0], atol=1e-6)
    assert right["unnorm_key"] == "demos" and min(right["scores"] + stop["scores"]) > 0.5
    assert {found["results"][f"{name} class"] for name in ("adapted", "merged", "again")} == {
        "LapaForActionPrediction"
    }
    config = json.loads((tmp_path / "adapted" / "config.json").read_text())
    assert config["has_action_segment"] and config["action_dim"] == 3 and config["action_num_bins"] == [2, 1, 2]
    assert (tmp_path / "adapted" / "adapter_model.safetensors").stat().st_size < 200_000
    assert not (tmp_path / "adapted" / "finetune.py").exists()

    # Merged weights need no adapter, and are finetuned on.
    merged = {path.name for path in (tmp_path / "merged").iterdir()}
    assert merged == {path.name for path in (tmp_path / "action").iterdir()} - {"README.md"} | {"trainer_state.json"}
    assert found["results"]["merged"][0]["unnorm_key"] == "robot" and len(found["results"]["merged"][0]["action"]) == 2
    assert found["results"]["again"][0]["unnorm_key"] == "set_v2.1"
    source, link = tmp_path / "merged" / "model.safetensors", tmp_path / "again" / "model.safetensors"
    assert source.samefile(link) or source.read_bytes() == link.read_bytes()

    messages = [
        "exists; give a folder",
        "must be a JSONL file or a LeRobot folder",
        "holds an adapter",
        "no readable image",
    ]
    assert [code for code, _ in found["failures"]] == [2] * 4
    for (_, lines), message in zip(found["failures"], messages):
        assert message in lines[0]
