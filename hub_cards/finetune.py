# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.6",
#   "transformers>=5.23",
#   "accelerate>=1.10",
#   "peft>=0.21",
#   "av>=14",
#   "pyarrow>=17",
#   "numpy>=1.26",
#   "pillow>=10",
#   "sentencepiece",
#   "protobuf",
#   "safetensors>=0.6",
# ]
# ///
"""Finetunes the LAPA model of this folder on your own robot data with LoRA.

    uv run finetune.py --data path/to/lerobot_dataset --output my-policy
    uv run finetune.py --data demonstrations.jsonl --output my-policy --merge

`--data` is a LeRobot data set (v2.1 or v3.0: a folder with `meta/info.json`) or a JSONL file with one step per line:
`{"image": "frames/0.jpg", "instruction": "pick up the cup", "raw_actions": [0.01, ..., 1.0]}`, where `vision` may hold
the image's codes in place of `image`. Action bins are fitted from the data: equal-frequency per dimension, two bins for
a dimension that takes two values, such as a gripper. The policy predicts one step at a time from image and instruction;
`lapa finetune` also trains chunks and reads the robot's state.

It runs on one device: the first GPU, or the CPU. The result loads like this folder: `pipeline("robot-action", model="my-policy", trust_remote_code=True)`.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# A published row holds the whole prompt as its instruction.
PUBLISHED_PROMPT_START = "<s> You are a helpful assistant."
IGNORED_LABEL = -100
ENCODING_BATCH_SIZE = 16
POLICY_CLASS = "LapaForActionPrediction"
# Columns of a LeRobot table beside action and camera.
STEP_COLUMNS = ("timestamp", "episode_index", "frame_index", "task_index")


@dataclass
class Demonstrations:
    """
    Steps of robot data.

    Args:
        instructions: One per step.
        actions: (num_steps, action_dim) float64, physical units.
        images: Gives (step, image) for every step, in any order; None where `codes` are there.
        codes: (num_steps, num_image_tokens) int64 codes of the vision tokenizer.
    """

    instructions: list[str]
    actions: np.ndarray
    images: Callable[[], Iterator[tuple[int, Any]]] | None = None
    codes: np.ndarray | None = None


def _matrix(rows: list[Any], where: Callable[[int], str]) -> np.ndarray:
    """(num_steps, action_dim) float64; a row that is no vector of finite numbers is named."""
    if not rows:
        raise ValueError(f"{where(0)}: there are no steps.")
    vectors = []
    for number, row in enumerate(rows):
        try:
            vector = np.asarray(row, dtype=np.float64)  # published rows hold numbers as strings, too
        except (TypeError, ValueError):
            raise ValueError(
                f"{where(number)}: the action must be a list of numbers, got {str(row)[:60]!r}."
            ) from None
        if vector.ndim != 1 or vector.shape != np.shape(rows[0]) or not np.isfinite(vector).all():
            raise ValueError(
                f"{where(number)}: the action must be {np.shape(rows[0])[0] if np.ndim(rows[0]) == 1 else 'some'} "
                f"finite numbers as in the first step, got {str(row)[:80]}."
            )
        vectors.append(vector)
    return np.stack(vectors)


def read_jsonl(path: Path) -> Demonstrations:
    """Reads a JSONL file; image paths are relative to its folder."""
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append((number, _json_row(line, path, number)))
    if not rows:
        raise ValueError(f"{path} has no rows.")
    has_codes = ["vision" in row for _, row in rows]
    if any(has_codes) and not all(has_codes):
        raise ValueError(
            f"{path}, line {rows[has_codes.index(False)][0]}: `vision` is missing, and other rows have it."
        )
    actions = _matrix([row["raw_actions"] for _, row in rows], lambda index: f"{path}, line {rows[index][0]}")
    data = Demonstrations([row["instruction"] for _, row in rows], actions)
    if all(has_codes):
        lengths = {len(row["vision"]) for _, row in rows}
        if len(lengths) != 1:
            raise ValueError(f"{path}: `vision` must have equally many codes in every row, got {sorted(lengths)}.")
        data.codes = np.asarray([row["vision"] for _, row in rows], dtype=np.int64)
    else:
        data.images = lambda: ((index, str(path.parent / row["image"])) for index, (_, row) in enumerate(rows))
    return data


def _json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error
    missing = {"instruction", "raw_actions"} - set(row) if isinstance(row, dict) else {"instruction"}
    if missing or not ({"image", "vision"} & set(row)):
        raise ValueError(f"{path}, line {number} must have `instruction`, `raw_actions`, and `image` or `vision`.")
    if not isinstance(row["instruction"], str) or not row["instruction"].strip():
        raise ValueError(f"{path}, line {number}: `instruction` must say what to do, got {row['instruction']!r}.")
    return row


def read_lerobot(root: Path, camera: str | None, action_key: str, instruction: str | None) -> Demonstrations:
    """
    Reads a LeRobot data set of format v2.1 or v3.0 from its parquet and mp4 files.

    Args:
        root: Folder with `meta/info.json`.
        camera: Feature that holds the images; None where there is one.
        action_key: Feature that holds the actions.
        instruction: Instruction for all steps, in place of the data set's tasks.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = json.loads((root / "meta" / "info.json").read_text(encoding="utf-8"))
    version = str(info.get("codebase_version"))
    if not version.startswith(("v2.", "v3.")):
        raise ValueError(f"{root} has `codebase_version` {version!r}; accepted: v2.x and v3.x.")
    features = info["features"]
    camera = _choose_camera(features, camera)
    if action_key not in features:
        raise ValueError(f"`--action-key` {action_key!r} is no feature; accepted: {', '.join(features)}.")
    stored = features[camera]["dtype"] == "image"
    columns = [action_key, *STEP_COLUMNS, *([camera] if stored else [])]
    files = sorted((root / "data").glob("*/*.parquet"))
    if not files:
        raise ValueError(f"{root / 'data'} has no parquet files.")
    table = pa.concat_tables([pq.read_table(file, columns=columns) for file in files])
    table = table.sort_by([("episode_index", "ascending"), ("frame_index", "ascending")])
    actions = _matrix(table[action_key].to_pylist(), lambda index: f"{root}, step {index}")
    if instruction is None:
        tasks = _read_tasks(root, version)
        instructions = [tasks[index] for index in table["task_index"].to_pylist()]
    else:
        instructions = [instruction] * len(actions)
    if empty := [index for index, text in enumerate(instructions) if not text.strip()]:
        raise ValueError(f"{root}, step {empty[0]} has an empty task: name it with `--instruction`.")
    if stored:
        images = lambda: _stored_images(table[camera])  # noqa: E731
    else:
        steps = _steps_per_video(root, info, version, camera, table)
        images = lambda: _video_frames(steps, 0.5 / float(info["fps"]))  # noqa: E731
    return Demonstrations(instructions, actions, images)


def _choose_camera(features: dict[str, Any], camera: str | None) -> str:
    cameras = [name for name, feature in features.items() if feature.get("dtype") in ("video", "image")]
    if camera is None and len(cameras) == 1:
        return cameras[0]
    if camera not in cameras:
        raise ValueError(f"`--camera` must be one of {', '.join(cameras) or '(there are none)'}, got {camera}.")
    return camera


def _read_tasks(root: Path, version: str) -> dict[int, str]:
    """Task texts by index: `tasks.jsonl` in v2, `tasks.parquet` in v3."""
    import pyarrow.parquet as pq

    if version.startswith("v2."):
        lines = (root / "meta" / "tasks.jsonl").read_text(encoding="utf-8").splitlines()
        return {row["task_index"]: row["task"] for row in map(json.loads, filter(str.strip, lines))}
    table = pq.read_table(root / "meta" / "tasks.parquet")
    # pandas wrote the texts as an index, whose column has no fixed name.
    (texts,) = [name for name in table.column_names if name != "task_index"]
    return dict(zip(table["task_index"].to_pylist(), table[texts].to_pylist()))


def _steps_per_video(root: Path, info: dict[str, Any], version: str, camera: str, table: Any) -> dict[Path, list]:
    """For each video file, (seconds into it, step) of the steps it shows, in order of time."""
    import pyarrow.parquet as pq

    places: dict[int, tuple[Path, float]] = {}
    episodes = table["episode_index"].to_pylist()
    if version.startswith("v2."):
        for episode in sorted(set(episodes)):
            chunk = episode // info["chunks_size"]
            name = info["video_path"].format(episode_chunk=chunk, video_key=camera, episode_index=episode)
            places[episode] = (root / name, 0.0)
    else:
        prefix = f"videos/{camera}"
        columns = ["episode_index", *(f"{prefix}/{key}" for key in ("chunk_index", "file_index", "from_timestamp"))]
        for file in sorted((root / "meta" / "episodes").glob("*/*.parquet")):
            for row in pq.read_table(file, columns=columns).to_pylist():
                chunk, number = row[f"{prefix}/chunk_index"], row[f"{prefix}/file_index"]
                name = info["video_path"].format(video_key=camera, chunk_index=chunk, file_index=number)
                places[row["episode_index"]] = (root / name, row[f"{prefix}/from_timestamp"])
    steps: dict[Path, list[tuple[float, int]]] = {}
    for step, (episode, seconds) in enumerate(zip(episodes, table["timestamp"].to_pylist())):
        if episode not in places:
            raise ValueError(f"{root}: episode {episode} has steps, but meta/episodes does not list it.")
        path, start = places[episode]
        steps.setdefault(path, []).append((start + seconds, step))
    return {path: sorted(pairs) for path, pairs in steps.items()}


def _stored_images(column: Any) -> Iterator[tuple[int, Any]]:
    import io

    from PIL import Image

    for step in range(len(column)):
        yield step, Image.open(io.BytesIO(column[step].as_py()["bytes"]))


def _video_frames(steps: dict[Path, list], tolerance: float) -> Iterator[tuple[int, np.ndarray]]:
    """(step, (height, width, 3) uint8 RGB frame), each video decoded once from the start."""
    import av

    for path, wanted in steps.items():
        position = 0
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in container.decode(stream):
                if position == len(wanted):
                    break
                seconds = float(frame.pts * stream.time_base)
                while position < len(wanted) and abs(wanted[position][0] - seconds) <= tolerance:
                    yield wanted[position][1], frame.to_ndarray(format="rgb24")
                    position += 1
        if position < len(wanted):
            raise ValueError(f"{path} has no frame at {wanted[position][0]:.3f} s, where a step of the data set is.")


def read_data(args: argparse.Namespace) -> Demonstrations:
    """Reads `--data`, whichever of the formats it is."""
    path = Path(args.data)
    if (path / "meta" / "info.json").is_file():
        return read_lerobot(path, args.camera, args.action_key, args.instruction)
    if path.is_file():
        return read_jsonl(path)
    raise ValueError(f"`--data` must be a JSONL file or a LeRobot folder with meta/info.json, got {path}.")


def find_model(name: str) -> Path:
    """Folder of an exported model; a Hub repository is downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name))
    needed = ("config.json", "processor_config.json", "modeling_lapa.py")
    if absent := [file for file in needed if not (folder / file).is_file()]:
        raise ValueError(
            f"`--model` {folder} is no exported policy, it lacks {', '.join(absent)} (see `lapa export`)."
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"`--model` {folder} holds an adapter; finetune a folder that was written with --merge.")
    return folder


def fit_bins(processor: Any, actions: np.ndarray, unnorm_key: str, num_bins: int | None) -> Any:
    """Makes the fitted bins the processor's only ones, and returns them."""
    processor.action_dim, processor.target, processor.action_statistics = actions.shape[1], "action", {}
    processor.action_horizon, processor.use_proprio = 1, False
    bins = processor.fit_actions(actions, unnorm_key, num_bins=num_bins, gripper_dimension=None)
    rows = list(bins.edges)
    for dimension in range(actions.shape[1]):
        values = np.unique(actions[:, dimension])
        if len(values) == 2:
            # Quantiles put both values into one bin; these two bins have them as midpoints.
            half = (values[1] - values[0]) / 2
            rows[dimension] = (values[0] - half, values[0] + half, values[1] + half)
    bins = type(bins)(tuple(rows))
    processor.set_action_statistics(unnorm_key, bins)
    return bins


def encode_images(model: Any, processor: Any, data: Demonstrations) -> np.ndarray:
    """(num_steps, num_image_tokens) int64 codes of the frozen vision tokenizer, computed once."""
    import torch
    from tqdm import tqdm

    if data.codes is not None:
        if data.codes.shape[1] != processor.num_image_tokens:
            raise ValueError(f"`vision` must hold {processor.num_image_tokens} codes, got {data.codes.shape[1]}.")
        return data.codes
    assert data.images is not None
    codes = np.full((len(data.actions), processor.num_image_tokens), -1, dtype=np.int64)
    batch: list[tuple[int, Any]] = []

    def flush() -> None:
        pixels = processor.image_processor([image for _, image in batch], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = model.model.encode_images(pixels.to(model.device)).cpu().numpy()
        codes[[step for step, _ in batch]] = found
        batch.clear()

    for pair in tqdm(data.images(), total=len(codes), desc="encoding images"):
        batch.append(pair)
        if len(batch) == ENCODING_BATCH_SIZE:
            flush()
    if batch:
        flush()
    assert (codes >= 0).all()
    return codes


class Examples:
    """Training examples of a processor, made when asked for."""

    def __init__(self, processor: Any, data: Demonstrations, codes: np.ndarray, tokens: np.ndarray):
        self.processor, self.data, self.codes, self.tokens = processor, data, codes, tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        text = self.data.instructions[index]
        return self.processor.encode_example(
            text,
            vision_codes=self.codes[index],
            action_tokens=self.tokens[index],
            raw_instruction=text.startswith(PUBLISHED_PROMPT_START),
        )


def make_collator(pad_token_id: int) -> Callable[[list[dict[str, list[int]]]], dict[str, Any]]:
    """Pads on the right, as in the published training."""
    import torch

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": torch.full((len(examples), width), pad_token_id),
            "attention_mask": torch.zeros(len(examples), width, dtype=torch.int64),
            "labels": torch.full((len(examples), width), IGNORED_LABEL),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.tensor(example["input_ids"])
            batch["labels"][row, :length] = torch.tensor(example["labels"])
            batch["attention_mask"][row, :length] = 1
        return batch

    return collate


def add_lora(model: Any, args: argparse.Namespace) -> Any:
    """LoRA on all linear layers; the action rows of embedding and head are trained whole."""
    from peft import LoraConfig, get_peft_model

    rows = list(range(*model.config.segment("action")))
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        target_modules="all-linear",
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows},
    )
    return get_peft_model(model, config)


def train(model: Any, examples: Examples, args: argparse.Namespace, scratch: Path) -> Any:
    """Runs transformers' Trainer and returns it."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        remove_unused_columns=False,
        activation_checkpointing=args.activation_checkpointing,
        use_cpu=args.cpu,
        seed=args.seed,
        report_to="none",
    )
    collator = make_collator(examples.processor.tokenizer.bos_token_id)
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
    trainer.train()
    return trainer


def write_metadata(source: Path, folder: Path, model: Any, processor: Any, merged: bool) -> None:
    """Configs, tokenizer and remote code of the result: those of the source, with what has changed."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    names = (
        "action_dim",
        "action_vocab_size",
        "action_num_bins",
        "has_action_segment",
        "action_horizon",
        "use_proprio",
    )
    config |= {name: getattr(model.config, name) for name in names}
    config["architectures"] = [POLICY_CLASS]
    for auto_class in set(config["auto_map"]) - {"AutoConfig"}:
        config["auto_map"][auto_class] = f"modeling_lapa.{POLICY_CLASS}"
    settings = json.loads((source / "processor_config.json").read_text(encoding="utf-8"))
    for name in ("action_dim", "target", "action_statistics", "action_horizon", "use_proprio"):
        settings[name] = getattr(processor, name)
    for name, content in (("config.json", config), ("processor_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    copied = [*source.glob("*.py"), *source.glob("tokenizer*"), *source.glob("generation_config.json")]
    for file in copied:
        # An adapter cannot be finetuned again, so the script goes with merged weights only.
        if merged or file.name != "finetune.py":
            shutil.copyfile(file, folder / file.name)


def save_base(source: Path, folder: Path, model: Any, grew: bool) -> None:
    """The weights under the adapter: links to the source's, or new ones where action rows were added."""
    if grew:
        model.save_pretrained(folder)
        return
    for file in [*source.glob("*.safetensors"), *source.glob("*.safetensors.index.json")]:
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


def run(args: argparse.Namespace) -> Path:
    """Reads the data, finetunes, and writes the result; nothing is left behind on failure."""
    output = Path(args.output).resolve()
    if output.exists():
        raise ValueError(f"`--output` {output} exists; give a folder that does not.")
    source = find_model(args.model)
    data = read_data(args)
    staging = output.with_name(f".{output.name}.partial-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        _finetune(args, source, data, staging)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _finetune(args: argparse.Namespace, source: Path, data: Demonstrations, staging: Path) -> None:
    import torch
    from transformers import set_seed
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    set_seed(args.seed)
    processor_class: Any = get_class_from_dynamic_module("processing_lapa.LapaProcessor", str(source))
    processor = processor_class.from_pretrained(source)
    model_class: Any = get_class_from_dynamic_module(f"modeling_lapa.{POLICY_CLASS}", str(source))
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = model_class.from_pretrained(
        source,
        action_dim=data.actions.shape[1],
        action_num_bins=None,
        action_horizon=1,
        use_proprio=False,
        dtype=args.dtype,
    )
    if torch.cuda.is_available() and not args.cpu:
        model.to("cuda")
    path = Path(args.data).resolve()
    key = args.unnorm_key or (path.name if path.is_dir() else path.stem)
    bins = fit_bins(processor, data.actions, key, args.num_bins)
    model.config.action_num_bins = list(bins.num_bins)
    print(f"{len(data.actions)} steps, {len(set(data.instructions))} instructions, bins per dimension {bins.num_bins}")
    codes = encode_images(model, processor, data)
    examples = Examples(processor, data, codes, bins.encode(data.actions))
    examples[0]  # codes outside the vocabulary and the like show here, before anything is written
    if not args.merge:
        save_base(source, staging, model, grew=not stored.get("has_action_segment", False))
    adapted = add_lora(model, args)
    adapted.print_trainable_parameters()
    scratch = staging / "trainer"
    trainer = train(adapted, examples, args, scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    if args.merge:
        adapted.merge_and_unload().save_pretrained(staging)
    else:
        # The whole embedding and head are with the base weights; the adapter holds the trained rows.
        adapted.save_pretrained(staging, save_embedding_layers=False)
        (staging / "README.md").unlink(missing_ok=True)
    trainer.state.save_to_json(str(staging / "trainer_state.json"))
    write_metadata(source, staging, model, processor, args.merge)


def make_parser() -> argparse.ArgumentParser:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = str(Path(__file__).resolve().parent)
    parser.add_argument("--data", required=True, help="JSONL file or LeRobot folder")
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument("--model", default=here, help="exported folder or Hub repository; this folder by default")
    parser.add_argument("--merge", action="store_true", help="write plain weights instead of an adapter")
    parser.add_argument("--unnorm-key", help="name of the action statistics; the data's name by default")
    parser.add_argument("--num-bins", type=int, help="most bins per action dimension; all by default")
    parser.add_argument("--camera", help="LeRobot feature with the images, where there are several")
    parser.add_argument("--action-key", default="action", help="LeRobot feature with the actions")
    parser.add_argument("--instruction", help="instruction for every step, in place of a LeRobot data set's tasks")
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8, help="per device")
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-rank", type=int, default=32)
    parser.add_argument("--lora-alpha", type=int, default=32)
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU although there is an accelerator")
    return parser


def main(argv: Iterable[str] | None = None) -> int:
    """Finetunes, and turns what the user can mend into one line and exit code 2."""
    args = make_parser().parse_args(None if argv is None else list(argv))
    # Before torch is loaded: with several GPUs in sight the Trainer would spread the batch over them.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        output = run(args)
    except (ValueError, OSError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 2
    print(f'{output}: load it with pipeline("robot-action", model={str(output)!r}, trust_remote_code=True)')
    return 0


if __name__ == "__main__":
    sys.exit(main())
