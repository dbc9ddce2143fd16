"""Undoes what a hand-held camera did between the frames of a pair, so that codes need not say it."""

import torch
import torch.nn.functional as F

from lapa.configuration.configuration_lapa_quantizer import MIN_ALIGNED_SIDE

# The shift is looked for from coarse to fine, the finest picture having at most so many pixels along its longer side, the
# coarsest no less than `MIN_ALIGNED_SIDE` along its shorter one.
FINEST_SIDE = 128
# Largest shift that is found, as a share of the coarsest picture.
MAX_SHIFT_SHARE = 0.25
ITERATIONS_PER_LEVEL = 5
# Share of the pixels, those with the steepest edges, that the shift is read from: the others say nothing of it.
EDGE_SHARE = 0.25
# A pixel whose own shift is this many times the median one away counts a quarter: it belongs to something that moves.
OUTLIER_DISTANCE = 2.0
# Grey levels in [0, 1] that two pixels may be apart and still be half alike.
UNLIKE = 0.1
# Of that measure, what a shift must gain for each pixel that it is long.
PREFER_NEAR = 1e-4
# Pixels; below this the median is no measure of what is usual.
MIN_SCALE = 0.02
# Added to the squared gradients: a picture without edges is not shifted.
DAMPING = 1e-5


@torch.no_grad()
def camera_shift(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    By how far most of the picture moved from the first frame to the second.

    On the grey, blurred pictures, from coarse to fine: the best shift of whole pixels at first, then Gauss-Newton steps (Lucas
    and Kanade 1981), with weights (Geman and McClure 1987) that leave out what moves otherwise than the rest: a hand, and what
    it holds.

    Args:
        first, second: (batch, channels, height, width) float in [0, 1], at least 16 pixels a side.

    Returns:
        (batch, 2) float32, x to the right and y downwards, in pixels; at most a quarter of the picture.
    """
    device = first.device.type
    with torch.autocast(device, enabled=False):
        pictures = [_blurred(frames.float().mean(1, keepdim=True)) for frames in (first, second)]
        step = -(-max(first.shape[-2:]) // FINEST_SIDE)
        levels = [tuple(F.avg_pool2d(picture, step) if step > 1 else picture for picture in pictures)]
        while min(levels[-1][0].shape[-2:]) >= 2 * MIN_ALIGNED_SIDE:
            levels.append(tuple(F.avg_pool2d(picture, 2) for picture in levels[-1]))
        shift = _best_of_whole_pixels(*levels[-1]) / 2
        for before, after in reversed(levels):
            shift = _refined(before, after, 2 * shift)
        return shift * step


@torch.no_grad()
def align_frames(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Frame pairs whose second frame is moved back onto the first, so that what stood still stands still in them.

    Args:
        pixel_values: (batch, 2, channels, height, width) float in [0, 1].

    Returns:
        The same shape and dtype. Where the second frame did not see what the first one shows, the first one's pixels stand.
    """
    first, second = pixel_values.unbind(1)
    shift = camera_shift(first, second)
    with torch.autocast(first.device.type, enabled=False):
        moved = _moved(second.float(), shift, "bicubic").clamp(0, 1).to(second.dtype)
        height, width = second.shape[-2:]
        x, y = _places(shift, height, width)
        seen = ((y >= -0.5) & (y <= height - 0.5))[:, :, None] & ((x >= -0.5) & (x <= width - 0.5))[:, None, :]
    return torch.stack((first, torch.where(seen[:, None], moved, first)), 1)


def _blurred(pictures: torch.Tensor) -> torch.Tensor:
    """(batch, 1, height, width), with a binomial kernel: gradients of sharp edges hold over a fraction of a pixel only."""
    line = pictures.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line)[None, None]
    return F.conv2d(F.pad(pictures, (1, 1, 1, 1), "replicate"), kernel)


def _places(shift: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (batch, width) and rows (batch, height) of a shifted picture's pixels."""
    columns, rows = (torch.arange(side, dtype=torch.float32, device=shift.device) for side in (width, height))
    return columns + shift[:, :1], rows + shift[:, 1:]


def _moved(pictures: torch.Tensor, shift: torch.Tensor, mode: str) -> torch.Tensor:
    """What `pictures` (batch, channels, height, width) show `shift` pixels further on, their edges repeated."""
    height, width = pictures.shape[-2:]
    x, y = _places(shift, height, width)
    grid = torch.stack(
        (
            ((2 * x + 1) / width - 1)[:, None, :].expand(-1, height, -1),
            ((2 * y + 1) / height - 1)[:, :, None].expand(-1, -1, width),
        ),
        -1,
    )
    return F.grid_sample(pictures, grid, mode=mode, padding_mode="border", align_corners=False)


def _best_of_whole_pixels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The shift (batch, 2) of whole pixels between pictures (batch, 1, height, width) that explains most of them."""
    reach = int(MAX_SHIFT_SHARE * min(first.shape[-2:]))
    window = 2 * reach + 1

    def shifted(pictures: torch.Tensor) -> torch.Tensor:
        """(batch, window * window, height * width): every pixel after every shift, 0 beyond the edge."""
        return F.unfold(F.pad(pictures, (reach, reach, reach, reach)), window)

    squared = (shifted(second) - first.flatten(2)).square()
    seen = shifted(torch.ones_like(first[:1]))
    # A pixel that is far off says no more than one that is off: it belongs to something that moves.
    error = (seen * squared / (squared + UNLIKE**2)).sum(2) / seen.sum(2)
    offsets = torch.arange(-reach, reach + 1, device=first.device)
    offsets = torch.stack((offsets.repeat(window), offsets.repeat_interleave(window)), 1).to(first.dtype)
    # The nearest of equals.
    chosen = (error + PREFER_NEAR * offsets.norm(dim=1)).argmin(1)
    return offsets[chosen]


def _refined(first: torch.Tensor, second: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A better shift (batch, 2) between pictures (batch, 1, height, width)."""
    dy, dx = torch.gradient(first, dim=(2, 3))
    # The outermost gradients are one-sided.
    dx, dy = (gradient[..., 1:-1, 1:-1].flatten(1) for gradient in (dx, dy))
    edges = (dx.square() + dy.square()).topk(max(1, int(EDGE_SHARE * dx.shape[1])), 1)
    dx, dy = dx.gather(1, edges.indices), dy.gather(1, edges.indices)
    steepness = edges.values.sqrt().clamp(min=1e-4)
    limit = MAX_SHIFT_SHARE * min(first.shape[-2:])
    for _ in range(ITERATIONS_PER_LEVEL):
        error = (_moved(second, shift, "bicubic") - first)[..., 1:-1, 1:-1].flatten(1).gather(1, edges.indices)
        distance = error.abs() / steepness
        scale = OUTLIER_DISTANCE * distance.median(1, keepdim=True).values.clamp(min=MIN_SCALE)
        weight = (1 + (distance / scale).square()).square().reciprocal()
        xx, xy, yy = ((weight * product).sum(1) for product in (dx * dx, dx * dy, dy * dy))
        ex, ey = ((weight * gradient * error).sum(1) for gradient in (dx, dy))
        xx, yy = xx + DAMPING, yy + DAMPING
        determinant = xx * yy - xy * xy
        change = torch.stack((xy * ey - yy * ex, xy * ex - xx * ey), 1) / determinant[:, None]
        # A step that is too long comes of gradients that do not reach so far.
        shift = (shift + change.clamp(-2, 2)).clamp(-limit, limit)
    return shift


__all__ = ["align_frames", "camera_shift"]
