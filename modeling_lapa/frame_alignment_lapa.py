"""Undoes what a hand-held camera did between the frames of a pair, so that codes need not say it."""

import torch
import torch.nn.functional as F

from lapa.configuration.configuration_lapa_quantizer import MIN_ALIGNED_SIDE

# The shift is looked for from coarse to fine. Along its shorter side the finest picture has at most so many pixels, the coarsest
# no less than `MIN_ALIGNED_SIDE`.
FINEST_SIDE = 128
# Largest shift that is found, as a share of the shorter side of the coarsest picture.
MAX_SHIFT_SHARE = 0.25
ITERATIONS_PER_LEVEL = 5
# Share of the pixels, those with the steepest edges, that the shift is read from: the others say nothing of it.
EDGE_SHARE = 0.25
# A pixel whose own shift is this many times the median one away counts a quarter: it belongs to something that moves.
OUTLIER_DISTANCE = 2.0
# Grey levels in [0, 1] that two pixels may be apart and still be half alike.
UNLIKE = 0.1
# Of that measure, what a shift of whole pixels must gain for each pixel that it is long.
PREFER_NEAR = 1e-4
# Pixels; below this the median is no measure of what is usual.
MIN_SCALE = 0.02
# Of the squared gradients, added to them: along edges that all run one way the shift is not determined.
DAMPING = 1e-3
# Standard deviation of grey below which a picture is blank.
BLANK = 1e-3


@torch.no_grad()
def camera_shift(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    By how far most of the picture moved from the first frame to the second.

    On the grey, blurred pictures, from coarse to fine: the best shift of whole pixels at first, then Gauss-Newton steps (Lucas
    and Kanade 1981) for the shift and for a gain and an offset of the light, with weights (Geman and McClure 1987) that leave
    out what moves otherwise than the rest: a hand, and what it holds.

    Args:
        first, second: (batch, channels, height, width) float in [0, 1], at least 16 pixels a side.

    Returns:
        (batch, 2) float32, x to the right and y downwards, in pixels; either at most a quarter of the shorter side. 0 where
        there is nothing to go by.
    """
    with torch.autocast(first.device.type, enabled=False):
        before, after = (_blurred(frames.float().mean(1, keepdim=True)) for frames in (first, second))
        step = -(-min(first.shape[-2:]) // FINEST_SIDE)
        if step > 1:
            before, after = F.avg_pool2d(before, step), F.avg_pool2d(after, step)
        levels = [(before, _in_the_light_of(before, after))]
        while min(levels[-1][0].shape[-2:]) >= 2 * MIN_ALIGNED_SIDE:
            levels.append((F.avg_pool2d(levels[-1][0], 2), F.avg_pool2d(levels[-1][1], 2)))
        shift = _best_of_whole_pixels(*levels[-1]) / 2
        for before, after in reversed(levels):
            shift = _refined(before, after, 2 * shift)
        shift = shift * step
        return torch.where(shift.isfinite().all(1, keepdim=True), shift, 0.0)


def align_frames(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Frame pairs whose second frame is moved back onto the first, so that what stood still stands still in them.

    Args:
        pixel_values: (batch, 2, channels, height, width) float in [0, 1].

    Returns:
        The same shape and dtype. Where the second frame did not see what the first one shows, the first one's pixels stand.
        Gradients reach the frames, not through the shift.
    """
    first, second = pixel_values.unbind(1)
    shift = camera_shift(first, second)
    with torch.autocast(first.device.type, enabled=False):
        moved = _moved(second.float(), shift).clamp(0, 1).to(second.dtype)
        height, width = second.shape[-2:]
        x, y = _places(shift, height, width)
        seen = ((y >= -0.5) & (y <= height - 0.5))[:, :, None] & ((x >= -0.5) & (x <= width - 0.5))[:, None, :]
    return torch.stack((first, torch.where(seen[:, None], moved, first)), 1)


def _blurred(pictures: torch.Tensor) -> torch.Tensor:
    """(batch, 1, height, width), with a binomial kernel: gradients of sharp edges hold over a fraction of a pixel only."""
    line = pictures.new_tensor([0.25, 0.5, 0.25])
    kernel = (line[:, None] * line)[None, None]
    return F.conv2d(F.pad(pictures, (1, 1, 1, 1), "replicate"), kernel)


def _in_the_light_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The second pictures with the mean and the contrast of the first."""
    mean = [pictures.mean((1, 2, 3), keepdim=True) for pictures in (first, second)]
    spread = [pictures.std((1, 2, 3), keepdim=True) for pictures in (first, second)]
    is_seen = torch.minimum(*spread) > BLANK
    return torch.where(is_seen, (second - mean[1]) * (spread[0] / spread[1].clamp(min=BLANK)) + mean[0], first)


def _places(shift: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns (batch, width) and rows (batch, height) of a shifted picture's pixels."""
    columns, rows = (torch.arange(side, dtype=torch.float32, device=shift.device) for side in (width, height))
    return columns + shift[:, :1], rows + shift[:, 1:]


def _moved(pictures: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """What `pictures` (batch, channels, height, width) show `shift` pixels further on, bicubic, their edges repeated."""
    height, width = pictures.shape[-2:]
    x, y = _places(shift, height, width)
    grid = torch.stack(
        (
            ((2 * x + 1) / width - 1)[:, None, :].expand(-1, height, -1),
            ((2 * y + 1) / height - 1)[:, :, None].expand(-1, -1, width),
        ),
        -1,
    )
    return F.grid_sample(pictures, grid, mode="bicubic", padding_mode="border", align_corners=False)


def _best_of_whole_pixels(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The shift (batch, 2) of whole pixels between pictures (batch, 1, height, width) that explains most of them."""
    reach = int(MAX_SHIFT_SHARE * min(first.shape[-2:]))
    window = 2 * reach + 1

    def shifted(pictures: torch.Tensor) -> torch.Tensor:
        """(batch, window * window, height * width): every pixel after every shift, 0 beyond the edge."""
        return F.unfold(F.pad(pictures, (reach, reach, reach, reach)), window)

    def error(pictures: torch.Tensor) -> torch.Tensor:
        squared = (pictures - first.flatten(2)).square()
        # A pixel that is far off says no more than one that is off: it belongs to something that moves.
        return squared / (squared + UNLIKE**2)

    seen = shifted(torch.ones_like(first[:1]))
    # What differs without a shift counts only where the shift, too, compares that pixel of either picture: or the best shift
    # would be one that moves it out of sight. The opposite shift stands at the mirrored place.
    gain = (seen * seen.flip(1) * error(second.flatten(2)) - seen * error(shifted(second))).mean(2)
    offsets = torch.arange(-reach, reach + 1, device=first.device)
    offsets = torch.stack((offsets.repeat(window), offsets.repeat_interleave(window)), 1).to(first.dtype)
    return offsets[(gain - PREFER_NEAR * offsets.norm(dim=1)).argmax(1)]


def _refined(first: torch.Tensor, second: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """A better shift (batch, 2) between pictures (batch, 1, height, width)."""
    dx = (first[..., 1:-1, 2:] - first[..., 1:-1, :-2]).flatten(1) / 2
    dy = (first[..., 2:, 1:-1] - first[..., :-2, 1:-1]).flatten(1) / 2
    steepness, edges = (dx.square() + dy.square()).topk(int(EDGE_SHARE * dx.shape[1]), 1)
    steepness = steepness.sqrt().clamp(min=1e-4)

    def on_edges(pictures: torch.Tensor) -> torch.Tensor:
        return pictures[..., 1:-1, 1:-1].flatten(1).gather(1, edges)

    target = on_edges(first)
    light = target - target.mean(1, keepdim=True)
    columns = torch.stack((dx.gather(1, edges), dy.gather(1, edges), -light, -torch.ones_like(light)), 1)
    gain, offset = torch.zeros_like(shift[:, :1]), torch.zeros_like(shift[:, :1])
    limit = MAX_SHIFT_SHARE * min(first.shape[-2:])
    for _ in range(ITERATIONS_PER_LEVEL):
        error = on_edges(_moved(second, shift)) - target - gain * light - offset
        distance = error.abs() / steepness
        # Not `median`, which CUDA has no deterministic way for.
        usual = distance.sort(1).values[:, distance.shape[1] // 2, None]
        weight = (1 + (distance / (OUTLIER_DISTANCE * usual.clamp(min=MIN_SCALE))).square()).square().reciprocal()
        weighted = weight[:, None] * columns
        matrix = weighted @ columns.mT
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        # Of both gradients the same, so that it does not depend on how the picture is turned.
        steep = diagonal[:, :2].sum(1, keepdim=True).expand(-1, 2)
        damping = DAMPING * torch.cat((steep, diagonal[:, 2:]), 1) + 1e-6
        right = weighted @ error[:, :, None]
        change = -torch.linalg.solve_ex(matrix + torch.diag_embed(damping), right).result[:, :, 0]
        gain, offset = gain + change[:, 2:3], offset + change[:, 3:]
        # A step that is too long comes of gradients that do not reach so far.
        shift = (shift + change[:, :2].clamp(-2, 2)).clamp(-limit, limit)
    return shift


__all__ = ["align_frames", "camera_shift"]
