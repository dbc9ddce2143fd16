"""`lapa imagine`: what a latent-pretrained policy would do, drawn by the quantizer's decoder.

    lapa imagine --model outputs/demo/pretrained --quantizer outputs/demo/quantizer --image table.png \\
        --instruction "reach the red cube" --output rollout.gif
    lapa imagine --model outputs/demo/pretrained --quantizer outputs/demo/quantizer --image frames/ \\
        --instruction "reach the red cube" --do-sample --seed 1 --output rollouts
    lapa imagine --model outputs/demo/pretrained --quantizer outputs/demo/quantizer --suite tabletop-demo \\
        --policy outputs/demo/lapa --policy-do-sample --do-sample --rollouts 50 --output outputs/imagined

From images: an animation and, beside it, the codes of every step as JSON. With `--suite`: neural rollouts beside the simulator's,
their error over the horizon, and whether they tell which episodes a finetuned policy will solve.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
DEFAULT_STEPS = 16
# Pictures are enlarged to about this height, and a step lasts this long where the quantizer does not tell its gap.
SHOWN_HEIGHT, DEFAULT_SECONDS = 256, 0.4
OF_IMAGES: tuple[str, ...] = ("image", "instruction", "scale")
OF_SUITES: tuple[str, ...] = (
    "policy", "rollouts", "frame_gap", "policy_do_sample", "policy_temperature", "unnorm_key", "num_environments",
    "num_shown", "judge_rollouts",
)  # fmt: skip


def make_parser(parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Arguments of `lapa imagine`."""
    parser = parser_class(
        prog="lapa imagine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a latent-pretrained policy")
    parser.add_argument("--quantizer", required=True, help="folder of the quantizer whose codes it learned")
    parser.add_argument(
        "--output", type=Path, required=True, help="FILE.gif, or a folder for several images or a suite"
    )
    parser.add_argument("--steps", type=int, help=f"frames to draw; {DEFAULT_STEPS}, with --suite a whole episode")
    parser.add_argument("--do-sample", action="store_true", help="sample codes instead of choosing greedily")
    parser.add_argument("--temperature", type=float, help="with --do-sample; 1 by default")
    parser.add_argument("--top-k", type=int, help="with --do-sample: only the k likeliest codes; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--device", help="where the models run; a GPU if there is one")
    parser.add_argument(
        "--allow-mismatch", action="store_true", help="draw with a quantizer that the policy was not trained with"
    )
    images = parser.add_argument_group("from images")
    images.add_argument("--image", nargs="+", metavar="FILE", help="start pictures, or a folder of them")
    images.add_argument("--instruction", nargs="+", metavar="TEXT", help="one for all, or one per image")
    images.add_argument("--scale", type=int, help=f"enlargement; by default to about {SHOWN_HEIGHT} pixels")
    suites = parser.add_argument_group("against a simulator")
    suites.add_argument("--suite", help="name of a suite of `lapa evaluate`, or a YAML file")
    suites.add_argument("--policy", help="folder of the policy finetuned from --model, which plays in the simulator")
    suites.add_argument("--rollouts", type=int, help="episodes per cell; the suite's own number by default")
    suites.add_argument("--frame-gap", type=int, help="simulator steps per drawn frame; as the quantizer was trained")
    suites.add_argument("--policy-do-sample", action="store_true", help="sample the actions in the simulator")
    suites.add_argument("--policy-temperature", type=float, help="with --policy-do-sample")
    suites.add_argument("--unnorm-key", help="which action statistics of --policy")
    suites.add_argument("--num-environments", type=int, help="played and imagined side by side; 50 by default")
    suites.add_argument("--num-shown", type=int, help="episodes per cell kept as GIF; 2 by default")
    suites.add_argument("--judge-rollouts", type=int, help="episodes per cell and kind that test the judge; 30")
    return parser


def main(
    arguments: Sequence[str] | None = None,
    parser_class: type[argparse.ArgumentParser] = argparse.ArgumentParser,
) -> int:
    """Run with command-line arguments."""
    args = make_parser(parser_class).parse_args(arguments)
    for name in OF_IMAGES if args.suite else OF_SUITES:
        if getattr(args, name) not in (None, False):
            raise ValueError(f"`{name}` does not apply {'with' if args.suite else 'without'} `suite`.")
    required: tuple[str, ...] = ("policy",) if args.suite else ("image", "instruction")
    for name in required:
        if getattr(args, name) is None:
            raise ValueError(f"`{name}` must be given{' with `suite`' if args.suite else ' (or `suite`)'}.")
    for name, least in (("steps", 1), ("scale", 1), ("seed", 0)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading weights
    return _against_suite(args) if args.suite else _from_images(args)


def image_files(given: Sequence[str]) -> list[Path]:
    """
    The start pictures: files as they are given, folders by their pictures in the order of their names.

    Raises:
        ValueError: What does not exist, or a folder without pictures.
    """
    files: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"`image` ({path}) holds no picture: {', '.join(IMAGE_SUFFIXES)} are read.")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"`image` ({path}) does not exist.")
    return files


def output_files(output: Path, images: Sequence[Path]) -> list[Path]:
    """
    Where the animation of each image is written.

    Raises:
        ValueError: One file for several images, images of one name, or a folder that is a file.
    """
    if output.suffix.lower() == ".gif":
        if len(images) > 1:
            raise ValueError(f"`output` ({output}) is one file for {len(images)} images: name a folder.")
        if output.is_dir():
            raise ValueError(f"`output` is a folder: {output}.")
        return [output]
    if output.is_file():
        raise ValueError(f"`output` ({output}) must be a folder or end in .gif.")
    names = [image.stem for image in images]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"`image` names {twice[0]} twice; animations are named after their images.")
    return [output / f"{name}.gif" for name in names]


def _from_images(args: argparse.Namespace) -> int:
    import numpy as np

    from lapa.data.atomic_files import write_atomically
    from lapa.evaluation.imagine import imagine, open_imagination, sampling_options
    from lapa.evaluation.report import gif_bytes
    from lapa.processing.image_processing_lapa import decode_image
    from lapa.training.label_latent_actions import hash_weights
    from lapa.training.trained_settings import read_training_settings

    files = image_files(args.image)
    instructions = args.instruction * len(files) if len(args.instruction) == 1 else args.instruction
    if len(instructions) != len(files):
        raise ValueError(
            f"`instruction` must be one for all or one per image, got {len(instructions)} for {len(files)}."
        )
    outputs = output_files(args.output, files)
    images = [decode_image(file) for file in files]
    options = sampling_options(args.do_sample, args.temperature, args.top_k)
    policy, world, pairing = open_imagination(args.model, args.quantizer, args.allow_mismatch, args.device, **options)
    say_pairing(pairing, args)
    seconds = gap_seconds(read_training_settings(args.quantizer))
    rollouts = imagine(policy, world, images, instructions, args.steps or DEFAULT_STEPS, args.seed)
    about = {
        "model": args.model,
        "quantizer": args.quantizer,
        "quantizer_hash": hash_weights(args.quantizer),
        "quantizer_is_the_policys": pairing,
        "image_size": list(world.size),
        "seconds_per_step": seconds,
        "generation": options or {"do_sample": False},
        "seed": args.seed if options else None,
        "imagined_together": len(files),
    }
    scale = args.scale or max(1, round(SHOWN_HEIGHT / world.size[0]))
    for number, (file, path) in enumerate(zip(files, outputs)):
        codes, probabilities = rollouts.codes[number], np.round(rollouts.probabilities[number].astype(float), 4)
        told = {"codes": codes.tolist(), "probabilities": probabilities.tolist()}
        content = {"image": str(file), "instruction": instructions[number], **about, **told}
        milliseconds = round(1000 * (seconds or DEFAULT_SECONDS))
        write_atomically(path, gif_bytes(list(rollouts.frames[number]), scale, milliseconds))
        write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1).encode())
        print(f"{path}  codes {' '.join('-'.join(map(str, row)) for row in codes.tolist())}")
    return 0


def say_pairing(pairing: str, args: argparse.Namespace) -> None:
    """Tells the user what is not certain about the two models."""
    from lapa.evaluation.imagine import OTHER, UNRECORDED

    if pairing == UNRECORDED:
        print(f"note: {args.model} does not record whose codes it learned; only number and range of the codes fit")
    if pairing == OTHER:
        print(f"note: {args.model} learned the codes of another quantizer; what is drawn need not be what it means")


def gap_seconds(settings: dict[str, Any]) -> float | None:
    """Seconds between the frames of a pair in a quantizer's training, where that is recorded."""
    if settings.get("frame_gap_seconds"):
        return float(settings["frame_gap_seconds"])
    if settings.get("frame_gap") and settings.get("frequency"):
        return float(settings["frame_gap"]) / float(settings["frequency"])
    return None


def suite_frame_gap(settings: dict[str, Any], frequency: float, asked: int | None) -> int:
    """
    Simulator steps per drawn frame.

    Args:
        settings: Of the quantizer's training.
        frequency: Of the simulator, in Hz.
        asked: What the user says.

    Raises:
        ValueError: Below one, or neither said nor recorded.
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"`frame_gap` must be at least 1, got {asked}.")
        return asked
    seconds = gap_seconds(settings)
    if seconds is not None:
        return max(1, round(seconds * frequency))
    if settings.get("frame_gap"):
        return int(settings["frame_gap"])
    raise ValueError("`frame_gap` must be given: no training_settings.json beside the quantizer says what it was.")


def _against_suite(args: argparse.Namespace) -> int:
    from lapa.evaluation.imagine import open_imagination, sampling_options
    from lapa.evaluation.imagine_report import print_summary, write_report
    from lapa.evaluation.imagine_suite import ImagineSuite, ImagineSuiteSettings
    from lapa.evaluation.policies import open_policy
    from lapa.evaluation.suites import load_suite
    from lapa.training.trained_settings import read_training_settings

    if args.output.is_file():
        raise ValueError(f"`output` is a file: {args.output}.")
    suite = load_suite(args.suite)
    given = {
        name: value
        for name in ("rollouts", "steps", "num_environments", "num_shown", "judge_rollouts")
        if (value := getattr(args, name)) is not None
    }
    options = sampling_options(args.do_sample, args.temperature, args.top_k)
    policy, world, pairing = open_imagination(
        args.model, args.quantizer, args.allow_mismatch, args.device, whole_quantizer=True, **options
    )
    say_pairing(pairing, args)
    gap = suite_frame_gap(read_training_settings(args.quantizer), suite.frequency, args.frame_gap)
    settings = ImagineSuiteSettings(frame_gap=gap, seed=args.seed, **given)
    player = open_policy(
        args.policy,
        suite.action_dim(),
        args.unnorm_key,
        args.device,
        do_sample=args.policy_do_sample or None,
        temperature=args.policy_temperature,
    )
    run = ImagineSuite(suite, policy, world, player, settings)
    report = run.report() | {
        "model": args.model,
        "quantizer": args.quantizer,
        "quantizer_is_the_policys": pairing,
        "generation": options or {"do_sample": False},
        "policy_identity": dict(player.identity),
    }
    path = write_report(run, report, args.output)
    print_summary(report)
    print(path)
    return 0


__all__ = ["gap_seconds", "image_files", "main", "make_parser", "output_files", "suite_frame_gap"]
