"""`lapa demo`: all three stages and closed loop, in the simulator that ships with the package or on real data.

    lapa demo --output outputs/demo                     # about eight minutes on two cores
    lapa demo --output outputs/cross --cross-embodiment # video of another embodiment
    lapa demo --output outputs/bridge --data RLDS_DIR   # the three stages on a real RLDS folder

Writes `report.html` and `report.json`. An interrupted run goes on where it stopped when it is started again.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lapa.data.atomic_files import atomic_file, write_atomically

PROGRESS_FILE = "progress.json"


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa demo`."""
    parser = parser_class(prog="lapa demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder to write")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="of data, initialisation and training; 0 to 99 (0 is the seed of the search for settings)",
    )
    parser.add_argument(
        "--cross-embodiment", action="store_true", help="take the action-free video from another embodiment"
    )
    parser.add_argument("--data", type=Path, metavar="RLDS_DIR", help="run on a real RLDS folder instead")
    parser.add_argument("--frequency", type=float, default=5.0, help="with --data: control frequency in Hz")
    parser.add_argument("--camera", help="with --data: camera key; the first one by default")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted or finished run in --output")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; the results mean nothing")
    return parser


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run the demo with command-line arguments."""
    args = make_parser(parser_class).parse_args(arguments)
    if not 0 <= args.seed < 100:
        raise ValueError(f"--seed must lie in [0, 99], got {args.seed}.")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading and writing weights; the stages show their own
    if args.data is not None:
        from lapa.evaluation.demo_rlds import run_rlds_demo

        return run_rlds_demo(args)
    return run_tabletop_demo(args)


class Progress:
    """What an output folder has finished, so that a restarted run skips it.

    Args:
        output: The folder.
        identity: What the run is; a folder with another identity is refused.
        restart: Forget what is there.
    """

    def __init__(self, output: Path, identity: dict[str, Any], restart: bool) -> None:
        self.output, self.path = output, output / PROGRESS_FILE
        identity = json.loads(json.dumps(identity))
        if self.path.exists() and not restart:
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
            if self.state["identity"] != identity:
                raise ValueError(
                    f"--output {output} holds a run with other settings: choose another folder, or say --restart."
                )
            return
        if output.exists() and any(output.iterdir()):
            if not self.path.exists():
                raise ValueError(f"--output {output} is not empty and holds no demo: choose another folder.")
            shutil.rmtree(output)
        output.mkdir(parents=True, exist_ok=True)
        self.state = {"identity": identity, "stages": {}}
        self._save()

    def _save(self) -> None:
        write_atomically(self.path, json.dumps(self.state, indent=1).encode())

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        """Result of a stage: computed and kept, or what was kept. Results are JSON."""
        stages = self.state["stages"]
        if name not in stages:
            print(f"--- {name}", flush=True)
            start = time.perf_counter()
            result = run()
            stages[name] = {"seconds": time.perf_counter() - start, "result": result}
            self._save()
        return stages[name]["result"]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage; an interrupted stage counts from its last start."""
        return {name: stage["seconds"] for name, stage in self.state["stages"].items()}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("lapa", "torch", "transformers", "numpy", "gymnasium", "pymunk")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def run_tabletop_demo(args: argparse.Namespace) -> int:
    """The demo in the simulator."""
    from lapa.evaluation.demo_report import write_tabletop_report
    from lapa.evaluation.demo_settings import DemoSettings

    settings = DemoSettings().quick() if args.quick else DemoSettings()
    embodiment = "gripper" if args.cross_embodiment else "arm"
    identity = {"seed": args.seed, "embodiment": embodiment, "settings": settings.to_dict()}
    progress = Progress(args.output, identity, args.restart)
    results = run_stages(settings, args.seed, embodiment, args.output, progress)
    report = write_tabletop_report(settings, args.seed, embodiment, args.output, progress, results)
    print_summary(report, args.output)
    return 0


def run_stages(settings: Any, seed: int, embodiment: str, output: Path, progress: Progress) -> dict[str, Any]:
    """Every stage in order; returns what the report needs: logs and rollouts."""
    import numpy as np

    from lapa.evaluation import demo_stages as stages
    from lapa.evaluation.baselines.latent_decoder_policy import write_latent_decoder_policy
    from lapa.evaluation.decode_stage import train_decoder
    from lapa.evaluation.demo_tokenizer import build_tokenizer, simulator_phrases
    from lapa.evaluation.rollout import ExpertController, StillController
    from lapa.processing.image_processing_lapa import LapaImageProcessor
    from lapa.processing.processing_lapa import LapaProcessor
    from lapa.training.lineage import model_name

    paths = {name: output / name for name in ("quantizer", "pretrained", "lapa", "scratch")}
    video_file, labelled_file, codes_file = output / "video.npz", output / "labelled.npz", output / "codes.npy"

    def record() -> dict[str, int]:
        video = stages.record_video(settings, seed, embodiment)
        labelled = stages.record_labelled(settings, seed)
        video.save(video_file)
        labelled.save(labelled_file)
        return {
            "video_frames": len(video.frames),
            "labelled_steps": int(len(labelled.actions) - len(labelled.lengths)),
        }

    results: dict[str, Any] = {"recorded": progress.stage("record", record)}
    video, labelled = stages.Recording.load(video_file), stages.Recording.load(labelled_file)
    results["quantizer"] = progress.stage(
        "train the quantizer", lambda: stages.train_quantizer(settings, seed, video, paths["quantizer"])
    )

    def label() -> dict[str, int]:
        codes = stages.recording_codes(video, paths["quantizer"], settings.frame_gap)
        with atomic_file(codes_file) as partial, partial.open("wb") as file:
            np.save(file, codes)
        return {"pairs": len(codes)}

    results["labelled"] = progress.stage("label", label)

    def processor() -> LapaProcessor:
        tokenizer = build_tokenizer(output / "tokenizer.model", simulator_phrases())
        config = stages.policy_config(settings, len(tokenizer))
        return LapaProcessor.from_config(config, LapaImageProcessor(size=settings.image_size), tokenizer)

    results["pretraining"] = progress.stage(
        "pretrain",
        lambda: stages.pretrain(
            settings, seed, video, np.load(codes_file), processor(), paths["pretrained"], paths["quantizer"]
        ),
    )
    recorded = stages.shown_episodes(settings)
    results["rollouts"] = {}
    for name, playing, pretrained in (
        ("lapa", settings.lapa, paths["pretrained"]),
        ("scratch", settings.scratch, None),
    ):
        results[f"finetuning_{name}"] = progress.stage(
            f"finetune {name}",
            lambda name=name, playing=playing, pretrained=pretrained: stages.finetune(
                settings, playing, seed, labelled, processor(), paths[name], pretrained
            ),
        )
        results["rollouts"][name] = progress.stage(
            f"play {name}",
            lambda name=name, playing=playing: keep(
                stages.play_policy(settings, playing, seed, paths[name], recorded), output, name
            ),
        )
    paths["decoder"], paths["lapa_decoder"] = output / "decoder", output / "lapa_decoder"

    def decode() -> list[dict[str, float]]:
        log = train_decoder(
            labelled,
            paths["quantizer"],
            settings.frame_gap,
            settings.latent_decoder_steps,
            seed,
            paths["decoder"],
            model_name(paths["quantizer"]),
        )
        write_latent_decoder_policy(paths["pretrained"], paths["decoder"], paths["lapa_decoder"])
        return log

    results["decoding"] = progress.stage("train the action decoder", decode)
    results["rollouts"]["lapa_decoder"] = progress.stage(
        "play lapa_decoder",
        lambda: keep(stages.play_decoder(settings, seed, paths["lapa_decoder"], recorded), output, "lapa_decoder"),
    )
    for name, controller in (("expert", ExpertController()), ("do_nothing", StillController())):
        results["rollouts"][name] = progress.stage(
            f"play {name}",
            lambda name=name, controller=controller: keep(
                stages.play(settings, controller, name, recorded), output, name
            ),
        )
    return results


def keep(rollouts: Sequence[Any], output: Path, name: str) -> list[dict[str, Any]]:
    """Rollouts as JSON, the frames of recorded ones beside it."""
    import numpy as np

    frames = {str(i): np.stack(rollout.frames) for i, rollout in enumerate(rollouts) if rollout.frames}
    np.savez_compressed(output / f"frames_{name}.npz", **frames)
    fields = ("family", "seed", "instruction", "success", "num_steps")
    return [{field: getattr(rollout, field) for field in fields} for rollout in rollouts]


def print_summary(report: dict[str, Any], output: Path) -> None:
    """The table on the terminal."""
    families = list(next(iter(report["methods"].values()))["families"])
    print("\n" + f"{'':14}" + "".join(f"{family:>22}" for family in [*families, "all"]))
    for name, table in report["methods"].items():
        cells = [*table["families"].values(), table["pooled"]]
        row = [
            f"{100 * cell['success']:5.1f} [{100 * cell['ci95'][0]:4.1f},{100 * cell['ci95'][1]:5.1f}]"
            for cell in cells
        ]
        print(f"{name:14}" + "".join(f"{text:>22}" for text in row))
    print(f"\nsuccess in %, Wilson 95% intervals; {report['minutes']:.1f} minutes\n{output / 'report.html'}")
