"""Motion seen in pairs of frames, without labels: the shift of the whole picture, and what moves inside it."""

from dataclasses import dataclass

import numpy as np

from lapa.evaluation.quantizer_report_sample import PairSample

# Motion is measured on grey pictures of about so many pixels a side.
MEASURED_SIZE = 64
# Blur, as a share of the picture's side, before gradients are taken: motions of about this length are seen.
BLUR_SHARE = 1 / 16
# Largest shift of the whole picture that is looked for, as a share of its side.
MAX_SHIFT_SHARE = 0.25
# How the shift of the whole picture is told from that of things: peaks tried, blocks a side, standard deviation of grey
# and share of the blocks that make a ground to go by, and the error that a shift may leave of the unshifted one's.
NUM_CANDIDATES, NUM_BLOCKS, MIN_TEXTURE, MIN_TEXTURED_SHARE, MAX_REMAINING_ERROR = 6, 8, 1.5 / 255, 0.25, 0.9


@dataclass
class PairMotion:
    """
    What moved in each pair, in shares of the picture's side, x to the right and y downwards.

    Args:
        shift (`NDArray`): (num_pairs, 2) shift of the whole picture.
        inner (`NDArray`): (num_pairs, 2) motion of what moves inside it, once the shift is undone.
        energy (`NDArray`): (num_pairs,) mean squared difference that is left once the shift is undone.
        raw_energy (`NDArray`): (num_pairs,) mean squared difference of the two frames over the same pixels.
    """

    shift: np.ndarray
    inner: np.ndarray
    energy: np.ndarray
    raw_energy: np.ndarray


def grey(frames: np.ndarray, size: int = MEASURED_SIZE) -> np.ndarray:
    """(..., height, width, 3) uint8 -> (..., h, w) float64 in [0, 1], averaged down to about `size` pixels a side."""
    step = [max(1, round(length / size)) for length in frames.shape[-3:-1]]
    height, width = (length // s * s for length, s in zip(frames.shape[-3:-1], step))
    mean = frames[..., :height, :width, :].mean(axis=-1) / 255
    blocks = mean.reshape(*mean.shape[:-2], height // step[0], step[0], width // step[1], step[1])
    return np.asarray(blocks.mean(axis=(-3, -1)))


def _peak(surface: np.ndarray, row: int, column: int) -> tuple[float, float]:
    """Sub-pixel place of a peak, by a parabola through its neighbours along each axis."""
    place = []
    for axis, index in ((0, row), (1, column)):
        line = surface[:, column] if axis == 0 else surface[row]
        before, here, after = line[index - 1], line[index], line[(index + 1) % len(line)]
        curve = before - 2 * here + after
        place.append(index + (0.0 if curve >= 0 else float(np.clip(0.5 * (before - after) / curve, -0.5, 0.5))))
    return place[0], place[1]


def _window(shape: tuple[int, int]) -> np.ndarray:
    return np.outer(np.hanning(shape[0] + 2)[1:-1], np.hanning(shape[1] + 2)[1:-1])


def _candidate_shifts(first: np.ndarray, second: np.ndarray) -> list[tuple[float, float]]:
    """The highest peaks of the phase correlation, as (x, y) pixels."""
    window = _window(first.shape)
    spectra = [np.fft.rfft2((frame - frame.mean()) * window) for frame in (first, second)]
    cross = spectra[1] * spectra[0].conj()
    magnitude = np.abs(cross)
    if magnitude.max() <= 1e-12:
        return []
    # Frequencies of mere noise count little.
    surface = np.fft.irfft2(cross / (magnitude + 1e-4 * magnitude.max()), s=first.shape)
    height, width = first.shape
    reach_y, reach_x = max(1, int(height * MAX_SHIFT_SHARE)), max(1, int(width * MAX_SHIFT_SHARE))
    surface = np.roll(surface, (reach_y + 1, reach_x + 1), axis=(0, 1))
    near = surface[: 2 * reach_y + 3, : 2 * reach_x + 3].copy()
    peaks = []
    for _ in range(NUM_CANDIDATES):
        row, column = np.unravel_index(int(near[1:-1, 1:-1].argmax()), (2 * reach_y + 1, 2 * reach_x + 1))
        y, x = _peak(surface, int(row) + 1, int(column) + 1)
        peaks.append((x - reach_x - 1, y - reach_y - 1))
        near[row : row + 3, column : column + 3] = -np.inf
    return peaks


def _block_means(picture: np.ndarray) -> np.ndarray:
    """Means (NUM_BLOCKS * NUM_BLOCKS,) over a grid of blocks; what does not fill a block is left out at the end."""
    height, width = (max(1, length // NUM_BLOCKS) for length in picture.shape)
    rows, columns = (min(NUM_BLOCKS, length) for length in picture.shape)
    blocks = picture[: rows * height, : columns * width].reshape(rows, height, columns, width)
    return np.asarray(blocks.mean(axis=(1, 3)).ravel())


def global_shift(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """
    Shift of the whole picture: of the peaks of the phase correlation the one that explains the most of the ground.

    A thing that moves makes a peak of its own, however still the camera. So a shift counts only where it lowers the error
    of the median block among those with texture, which no thing smaller than half the picture does.

    Args:
        first, second: (height, width) float in [0, 1].

    Returns:
        (x, y) in pixels: `second` is `first` moved by so much.
    """
    variance = np.maximum(_block_means(first**2) - _block_means(first) ** 2, 0)
    textured = variance > MIN_TEXTURE**2
    best = (0.0, 0.0)
    if textured.sum() < MIN_TEXTURED_SHARE * len(textured):
        return best
    unshifted = float(np.median(_block_means(np.abs(second - first))[textured]))
    least = unshifted * MAX_REMAINING_ERROR
    for x, y in _candidate_shifts(first, second):
        error = float(np.median(_block_means(np.abs(second - shift_picture(first, x, y)))[textured]))
        if error < least:
            best, least = (x, y), error
    return best


def shift_picture(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """`picture` (height, width) moved by (x, y) pixels, bilinear; what comes in repeats the edge."""
    height, width = picture.shape
    rows, columns = np.clip(np.arange(height) - y, 0, height - 1), np.clip(np.arange(width) - x, 0, width - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, over = (rows - top)[:, None], columns - left
    upper = picture[top][:, left] * (1 - over) + picture[top][:, right] * over
    lower = picture[bottom][:, left] * (1 - over) + picture[bottom][:, right] * over
    return np.asarray(upper * (1 - down) + lower * down)


def _blur(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, the edge repeated."""
    reach = max(1, int(3 * sigma))
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(picture, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        windows = np.lib.stride_tricks.sliding_window_view(padded, len(kernel), axis=axis)
        picture = windows @ kernel
    return picture


def inner_motion(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """
    Motion of what moves, by least squares on the blurred gradients where the two pictures differ.

    It tells the direction well and the length roughly, and falls short of motions much longer than the blur.

    Args:
        first, second: (height, width) float, the shift of the whole picture undone.

    Returns:
        (x, y) in pixels; 0 where nothing changed.
    """
    sigma = max(1.0, BLUR_SHARE * min(first.shape))
    blurred_first, blurred_second = _blur(first, sigma), _blur(second, sigma)
    difference = blurred_second - blurred_first
    weight = difference**2
    if weight.max() <= 1e-12:
        return 0.0, 0.0
    dy, dx = np.gradient((blurred_first + blurred_second) / 2)
    cross = (weight * dx * dy).sum()
    matrix = np.array([[(weight * dx * dx).sum(), cross], [cross, (weight * dy * dy).sum()]])
    right = -np.array([(weight * dx * difference).sum(), (weight * dy * difference).sum()])
    total = np.linalg.solve(matrix + np.eye(2) * (0.02 * np.trace(matrix) + 1e-20), right)
    limit = MAX_SHIFT_SHARE * min(first.shape)
    length = float(np.hypot(*total))
    total = total * min(1.0, limit / length) if length else total
    return float(total[0]), float(total[1])


def measure_motion(sample: PairSample, chunk: int = 64) -> PairMotion:
    """Motion in every pair of a sample."""
    rows = []
    for start in range(0, len(sample), chunk):
        for first, second in grey(np.asarray(sample.frames[start : start + chunk])):
            rows.append(_pair_motion(first, second))
    table = np.array(rows)
    return PairMotion(table[:, :2], table[:, 2:4], table[:, 4], table[:, 5])


def _pair_motion(first: np.ndarray, second: np.ndarray) -> list[float]:
    height, width = first.shape
    x, y = global_shift(first, second)
    still, moved = first, shift_picture(first, x, y)
    # Pixels that either version has seen.
    inside = np.s_[
        int(abs(y)) + 1 : height - int(abs(y)) - 1 or None, int(abs(x)) + 1 : width - int(abs(x)) - 1 or None
    ]
    raw, left = ((second - still)[inside] ** 2).mean(), ((second - moved)[inside] ** 2).mean()
    inner = inner_motion(moved[inside], second[inside])
    return [x / width, y / height, inner[0] / width, inner[1] / height, float(left), float(raw)]


def synthetic_shift(frames: np.ndarray, x: int, y: int) -> np.ndarray:
    """Frames (batch, height, width, 3) moved by whole pixels; what comes in repeats the edge."""
    height, width = frames.shape[1:3]
    rows = np.clip(np.arange(height) - y, 0, height - 1)
    columns = np.clip(np.arange(width) - x, 0, width - 1)
    return frames[:, rows][:, :, columns]
