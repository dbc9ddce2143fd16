"""
How well `align_frames` finds what a camera did, and what that costs.

    python benchmarks/frame_alignment.py [--video VIDEO] [--rlds RLDS_DIR]

Errors are in pixels, per axis. The tabletop's camera is known. A video is shown through a window that is moved at random, so its
own camera must stand still. Of an RLDS data set the shifts themselves are printed: its cameras are fixed.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import alternate

from lapa.evaluation.demo_settings import DemoSettings
from lapa.evaluation.demo_stages import make_environment
from lapa.evaluation.environments.tabletop import CONTROL_FREQUENCY
from lapa.evaluation.environments.tabletop_recording import record_episode
from lapa.evaluation.quantizer_report_motion import global_shift, grey
from lapa.modeling_lapa.frame_alignment_lapa import align_frames, camera_shift

GAP = 4


def tabletop_pairs(embodiment: str, image_size: int, num_episodes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Pairs (num_pairs, 2, 3, height, width) in [0, 1], and by how many pixels the picture moved: (num_pairs, 2)."""
    environment = make_environment(DemoSettings(image_size=image_size), embodiment)
    pairs, moved = [], []
    for seed in range(num_episodes):
        episode = record_episode(environment, None, seed, noise=0.3, family="reach")
        renderer = environment._renderers[image_size]
        # The renderer draws the camera's place to whole pixels of its finer canvas.
        scale, fine = renderer._pixels_per_metre, renderer._supersampling
        places = [environment._shake.offset(step / CONTROL_FREQUENCY) for step in range(len(episode.frames))]
        pixels = np.array([(-round(place.real * scale), round(place.imag * scale)) for place in places]) / fine
        for step in range(len(episode.frames) - GAP):
            pairs.append(episode.frames[[step, step + GAP]])
            moved.append(pixels[step + GAP] - pixels[step])
    return _floats(np.stack(pairs)), np.stack(moved)


def _floats(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).movedim(-1, -3).float() / 255


def video_pairs(path: Path, reach: int = 20, gap: int = 8, num_pairs: int = 60) -> tuple[torch.Tensor, np.ndarray]:
    """Pairs of a video whose second frame is seen through a window that is up to `reach` pixels off, and by how much."""
    import av

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    generator, (height, width) = np.random.default_rng(0), frames.shape[1:3]
    pairs, moved = [], []
    for start in generator.integers(len(frames) - gap, size=num_pairs):
        x, y = generator.integers(-reach, reach + 1, 2)
        second = frames[start + gap, reach - y : height - reach - y, reach - x : width - reach - x]
        pairs.append(np.stack([frames[start, reach : height - reach, reach : width - reach], second]))
        moved.append((x, y))
    return _floats(np.stack(pairs)), np.array(moved)


def rlds_pairs(path: Path, size: int = 128, gap: int = 5) -> torch.Tensor:
    """Every third pair of the data set's first camera."""
    from lapa.data.frame_pairs import resize_frame
    from lapa.data.open_source import open_source

    pairs = []
    for episode in open_source({"path": path}):
        camera = next(iter(episode.frames))
        frames = [resize_frame(f, (size, size)) for f in episode.read_frames(camera, list(range(episode.num_steps)))]
        pairs += [np.stack([frames[step], frames[step + gap]]) for step in range(0, len(frames) - gap, 3)]
    return _floats(np.stack(pairs))


def _line(name: str, errors: np.ndarray) -> None:
    worst = errors.max(1)
    low, high, most = np.quantile(errors, [0.5, 0.95, 1])
    within = ", ".join(f"{np.mean(worst < limit):.0%} within {limit}" for limit in (0.25, 1))
    print(f"{name}: median {low:.3f}, 95% {high:.3f}, largest {most:.2f}; of {len(errors)} pairs {within}")


def main() -> None:
    """Prints a line per kind of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, help="of a camera that stands still")
    parser.add_argument("--rlds", type=Path, help="data set of fixed cameras")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for size in (32, 64):
        pairs, moved = tabletop_pairs("human_video", size, 40)
        _line(f"tabletop, {size} px", np.abs(camera_shift(*pairs.unbind(1)).numpy() - moved))
        darker = camera_shift(pairs[:, 0], 0.8 * pairs[:, 1] + 0.1).numpy()
        _line(f"tabletop, {size} px, other light", np.abs(darker - moved))
        frames = (pairs * 255).byte().movedim(-3, -1).numpy()
        report = np.array([global_shift(*pair) for pair in grey(frames)])
        _line(f"tabletop, {size} px, the quantizer report's estimate", np.abs(report - moved))
        still, _ = tabletop_pairs("arm", size, 10)
        _line(f"tabletop, {size} px, still camera", camera_shift(*still.unbind(1)).abs().numpy())
    if args.video:
        pairs, moved = video_pairs(args.video)
        _line("video", np.abs(camera_shift(*pairs.unbind(1)).numpy() - moved))
    if args.rlds:
        _line("RLDS", camera_shift(*rlds_pairs(args.rlds).unbind(1)).abs().numpy())
    batches = {size: torch.rand(32, 2, 3, size, size) for size in (32, 64, 128, 256)}
    timings = alternate({str(size): partial(align_frames, batch) for size, batch in batches.items()}, rounds=5)
    for size, timing in timings.items():
        print(f"{size} px: {timing.cpu / 32 * 1e3:.2f} ms of CPU time per pair, one thread")


if __name__ == "__main__":
    main()
