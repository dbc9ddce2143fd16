"""Undoing a camera's motion between the frames of a pair."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import quantizer_config

from lapa import LapaQuantizer
from lapa.evaluation import quantizer_report_figures
from lapa.evaluation.quantizer_report_measures import Runner, mean_frames, reconstruction_errors
from lapa.evaluation.quantizer_report_sample import PairSample
from lapa.modeling_lapa.frame_alignment_lapa import align_frames, camera_shift
from lapa.modeling_lapa.modeling_lapa_quantizer import LapaQuantizerEncoder
from lapa.training import quantizer_trainer
from lapa.training.arguments import LapaQuantizerTrainingArguments
from lapa.training.label_latent_actions import hash_weights
from lapa.training.quantizer_trainer import reconstruction_grid

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "frame_alignment.py"


@cache
def simulated_pairs(embodiment: str, image_size: int, num_episodes: int = 8) -> tuple[torch.Tensor, np.ndarray]:
    """Pairs (num_pairs, 2, 3, height, width) of the tabletop, and by how many pixels the picture moved: (num_pairs, 2)."""
    sys.path.insert(0, str(BENCHMARK.parent))
    try:
        spec = importlib.util.spec_from_file_location("frame_alignment", BENCHMARK)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARK.parent))
    return module.tabletop_pairs(embodiment, image_size, num_episodes)


def textured(*size: int) -> torch.Tensor:
    """A random picture (3, height, width) in [0, 1] with things of all sizes, as photographs have."""
    generator, picture = torch.Generator().manual_seed(0), torch.zeros(3, *size)
    for octave in range(3, 7):
        noise = torch.rand(1, 3, *(-(-side // 2**octave) + 1 for side in size), generator=generator)
        smooth = torch.nn.functional.interpolate(noise, size=size, mode="bicubic", align_corners=False)[0]
        picture += smooth * 2**octave
    return (picture - picture.min()) / (picture.max() - picture.min())


@pytest.mark.parametrize("image_size", [32, 64])
def test_finds_the_shake_of_a_camera_while_a_hand_moves(image_size):
    pairs, moved = simulated_pairs("human_video", image_size)
    assert np.abs(moved).max() > 0.5
    errors = np.abs(camera_shift(*pairs.unbind(1)).numpy() - moved)
    assert np.median(errors) < 0.02 and errors.max() < 0.15


def test_a_still_camera_is_left_alone_whatever_moves_before_it():
    pairs, moved = simulated_pairs("arm", 32)
    assert not moved.any()
    assert camera_shift(*pairs.unbind(1)).abs().max() < 0.01
    assert (align_frames(pairs) - pairs).abs().max() < 0.01


@pytest.mark.parametrize(
    ("size", "shift"), [((64, 96), (5, -7)), ((256, 256), (24, 17)), ((40, 16), (-2, 3)), ((16, 1024), (-3, 2))]
)
def test_undoes_shifts_of_many_pixels_in_any_format(size, shift):
    (x, y), reach = shift, 32
    picture = textured(size[0] + 2 * reach, size[1] + 2 * reach)

    def view(x: int, y: int) -> torch.Tensor:
        return picture[:, reach - y : reach - y + size[0], reach - x : reach - x + size[1]]

    pair = torch.stack((view(0, 0), view(x, y)))[None]
    found = camera_shift(*pair.unbind(1))[0]
    assert (found - torch.tensor([x, y])).abs().max() < 0.5
    aligned = align_frames(pair)
    assert torch.equal(aligned[:, 0], pair[:, 0])
    left, before = ((frames[0, 1] - frames[0, 0]).abs().mean() for frames in (aligned, pair))
    assert left < 0.1 * before
    # What the second frame did not see is the first one's.
    columns = aligned[0, ..., : -x - 1] if x < 0 else aligned[0, ..., 1 - x :]
    rows = aligned[0, ..., : -y - 1, :] if y < 0 else aligned[0, ..., 1 - y :, :]
    for unseen in (columns, rows):
        assert unseen.numel() and torch.equal(unseen[1], unseen[0])


def test_pictures_without_edges_stay_as_they_are():
    blank = torch.stack((torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)), 1)
    assert torch.equal(camera_shift(*blank.unbind(1)), torch.zeros(2, 2))
    assert torch.equal(align_frames(blank), blank)


@pytest.mark.parametrize(("gain", "offset"), [(0.8, 0.0), (0.9, 0.1), (1.1, -0.05)])
def test_light_that_changes_is_no_motion(gain, offset):
    still = textured(128, 128)
    assert camera_shift(still[None], (still * gain + offset)[None]).abs().max() < 0.02
    far = textured(192, 192)
    first, second = far[:, 32:160, 32:160], far[:, 12:140, 58:186]
    found = camera_shift(first[None], (second * gain + offset)[None])[0]
    assert (found - torch.tensor([-26, 20])).abs().max() < 0.1
    pairs, moved = simulated_pairs("human_video", 32, num_episodes=3)
    errors = np.abs(camera_shift(pairs[:, 0], pairs[:, 1] * gain + offset).numpy() - moved)
    assert np.median(errors) < 0.02 and errors.max() < 0.15


def stripes(size: int, angle: float, period: float) -> torch.Tensor:
    """Sharp stripes (3, size, size): along them no shift can be seen."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    across = columns * np.cos(np.radians(angle)) + rows * np.sin(np.radians(angle))
    return ((across / period) % 1 < 0.5).float().expand(3, -1, -1)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("angle", [0, 30, 45, 135])
def test_a_thing_that_moves_before_edges_of_one_direction_is_not_hidden(size, angle):
    for picture in (stripes(size, angle, size / 6.3), stripes(size, angle, 1.9 * size)):
        pair = torch.stack((picture, picture))[None].clone()
        side, way = size // 8, size // 21
        pair[0, 0, :, 2 : 2 + side, 2 : 2 + side] = 0.5
        pair[0, 1, :, 2 : 2 + side, 2 + way : 2 + way + side] = 0.5
        shift = camera_shift(*pair.unbind(1))[0]
        # Along the stripes only what moves says anything; it is not followed further than it moves, and not out of sight.
        assert shift.isfinite().all() and shift.norm() < 1.5 * way
        left, before = ((frames[0, 1] - frames[0, 0]).abs().mean() for frames in (align_frames(pair), pair))
        assert left > 0.3 * before


def test_frames_that_are_no_numbers_stay_so():
    pair = textured(32, 32).expand(1, 2, -1, -1, -1).clone()
    pair[0, 1, 0, 5, 5] = torch.nan
    assert torch.equal(camera_shift(*pair.unbind(1)), torch.zeros(1, 2))
    assert align_frames(pair)[0, 1].isnan().any()
    swapped = pair.flip(1)
    assert torch.equal(camera_shift(*swapped.unbind(1)), torch.zeros(1, 2))
    assert torch.equal(align_frames(swapped)[0, 1], swapped[0, 1])


def test_stays_in_range_in_any_precision_and_lets_gradients_through():
    # Sharp edges, where a bicubic kernel overshoots.
    pairs = (simulated_pairs("human_video", 32, num_episodes=1)[0] > 0.5).float()
    aligned = align_frames(pairs)
    assert aligned.min() >= 0 and aligned.max() <= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(align_frames(pairs), aligned)
    pairs = pairs.clone().requires_grad_()
    align_frames(pairs).square().sum().backward()
    assert (pairs.grad.flatten(2).abs().sum(2) > 0).all()


def test_compiles_once_for_all_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(align_frames, backend=counter, fullgraph=True)
    for size in range(2, 8):
        compiled(torch.rand(size, 2, 3, 32, 32))
    assert counter.frame_count <= 2


def test_a_pair_alone_is_what_it_is_in_a_batch():
    pairs, _ = simulated_pairs("human_video", 32, num_episodes=1)
    together = align_frames(pairs)
    alone = torch.cat([align_frames(pair[None]) for pair in pairs])
    assert torch.allclose(together, alone, atol=1e-5)
    half = align_frames(pairs.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half[:, 0], pairs[:, 0].bfloat16())
    assert (half.float() - together).abs().mean() < 0.01


class TestQuantizer:
    """`align_frames` of its config."""

    @pytest.fixture
    def pairs(self) -> torch.Tensor:
        return simulated_pairs("human_video", 32, num_episodes=2)[0]

    def build(self, **changes) -> LapaQuantizer:
        torch.manual_seed(0)
        return LapaQuantizer(quantizer_config(**changes)).eval()

    @torch.no_grad()
    def test_sees_aligned_pairs_everywhere(self, pairs, tmp_path):
        model, plain = self.build(align_frames=True), self.build()
        aligned = align_frames(pairs)
        assert torch.equal(model.align(pairs), aligned) and plain.align(pairs) is pairs
        expected, output = plain(aligned), model(pairs)
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.latent_action_embeddings, expected.latent_action_embeddings)
        assert not torch.equal(output.latent_action_embeddings, plain(pairs).latent_action_embeddings)
        model.save_pretrained(tmp_path)
        for loaded in (LapaQuantizer.from_pretrained(tmp_path), LapaQuantizerEncoder.from_pretrained(tmp_path)):
            encode = loaded.encode if isinstance(loaded, LapaQuantizer) else loaded
            assert torch.equal(encode(pairs).latent_action_embeddings, expected.latent_action_embeddings)

    def test_reports_measure_on_aligned_pairs(self, pairs):
        frames = (pairs * 255).round().byte().permute(0, 1, 3, 4, 2).numpy()
        seen = Runner(self.build(align_frames=True)).aligned(frames)
        assert seen.dtype == np.uint8 and np.array_equal(seen[:, 0], frames[:, 0])
        still = np.abs(seen[:, 1].astype(int) - frames[:, 0]).mean()
        assert still < 0.97 * np.abs(frames[:, 1].astype(int) - frames[:, 0]).mean()
        assert np.array_equal(Runner(self.build()).aligned(frames), frames)

    def sample(self, pairs: torch.Tensor) -> PairSample:
        count = len(pairs)
        return PairSample(
            frames=(pairs * 255).round().byte().permute(0, 1, 3, 4, 2).numpy(),
            source=np.zeros(count, int),
            group=np.arange(count),
            episode=np.arange(count),
            steps=np.zeros((count, 2), int),
            target=np.zeros((count, 0)),
            gripper_change=np.full(count, np.nan),
            target_names=(),
            sources=[SimpleNamespace(embodiment="hand")],
            grouping="episodes",
        )

    def test_errors_are_those_of_aligned_pairs(self, pairs):
        sample, codes = self.sample(pairs), np.zeros((len(pairs), 4), int)
        runners = [Runner(self.build(align_frames=align)) for align in (False, True)]
        plain, aligned = (reconstruction_errors(runner, sample, codes) for runner in runners)
        assert aligned["copy_first_frame"].mean() < 0.97 * plain["copy_first_frame"].mean()
        expected = runners[1].aligned(sample.frames)[:, 1].mean(0) / 255
        assert np.allclose(mean_frames(runners[1], sample)[0], expected)

    def test_a_report_shows_aligned_pairs(self, pairs, monkeypatch):
        sample, codes = self.sample(pairs), np.zeros((len(pairs), 4), int)
        runner, shown = Runner(self.build(align_frames=True)), []
        monkeypatch.setattr(quantizer_report_figures, "_labelled_grid", lambda rows, names: shown.extend(rows))
        measured = SimpleNamespace(sample=sample, encoded=SimpleNamespace(codes=codes), runner=runner)
        quantizer_report_figures.reconstructions(measured)
        rows = quantizer_report_figures.spread_rows(measured, len(shown[0]))
        seen = runner.aligned(sample.frames[rows])
        assert np.array_equal(shown[0], seen[:, 0]) and np.array_equal(shown[1], seen[:, 1])
        assert not np.array_equal(shown[1], sample.frames[rows, 1])

    def test_a_training_draws_aligned_pairs(self, pairs, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(
            quantizer_trainer,
            "reconstruction_grid",
            lambda frames, decoded: drawn.append(frames) or reconstruction_grid(frames, decoded),
        )
        dataset = [{"frames": (pair * 255).round().byte(), "example_id": ""} for pair in pairs]
        arguments = LapaQuantizerTrainingArguments(
            str(tmp_path),
            max_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            num_sample_reconstructions=4,
        )
        trainer = quantizer_trainer.LapaQuantizerTrainer(self.build(align_frames=True), arguments, dataset)
        trainer.train()
        (frames,) = drawn
        assert camera_shift(*frames.unbind(1)).abs().max() < 0.1 < camera_shift(*pairs[:4].unbind(1)).abs().max()

    def test_codes_of_aligned_pairs_are_another_quantizers(self, tmp_path):
        hashes = []
        for align in (False, True):
            self.build(align_frames=align).save_pretrained(tmp_path / str(align))
            hashes.append(hash_weights(tmp_path / str(align)))
        weights = [(tmp_path / str(align) / "model.safetensors").read_bytes() for align in (False, True)]
        assert weights[0] == weights[1] and hashes[0] != hashes[1]

    def test_refuses_frames_too_small_to_find_a_shift_in(self):
        with pytest.raises(StrictDataclassError, match=r"`align_frames` needs frames of at least 16 pixels a side.*8"):
            quantizer_config(align_frames=True, image_size=8, patch_size=2, bottleneck="query")
