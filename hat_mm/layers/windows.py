"""From maps to windows and back: padding, splitting, merging, masks.

Letters: B batch, C channels, H W map size, w window size, nh nw windows along each axis.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tracing


def count_windows(map_size: Sequence[int], window_size: int) -> tuple[int, int]:
    """Counts the windows (nh, nw) that cover a map of size (H, W), incomplete ones included."""
    height, width = map_size
    return (height + window_size - 1) // window_size, (width + window_size - 1) // window_size


def pad_to_windows(x: Tensor, num_windows: tuple[int, int], window_size: int) -> Tensor:
    """Pads a map with zeros at the bottom and right to whole windows.

    Args:
        x: Map, (B, C, H, W).
        num_windows: Windows along the axes, (nh, nw).
        window_size: Window size w.

    Returns:
        Map, (B, C, nh * w, nw * w).
    """
    bottom = num_windows[0] * window_size - x.shape[-2]
    right = num_windows[1] * window_size - x.shape[-1]
    return F.pad(x, (0, right, 0, bottom))


def split_windows(x: Tensor, num_windows: tuple[int, int], window_size: int) -> Tensor:
    """Splits a channels-last map into windows.

    Args:
        x: Map, (B, nh * w, nw * w, C).
        num_windows: Windows along the axes, (nh, nw).
        window_size: Window size w.

    Returns:
        Windows, (B * nh * nw, w * w, C): by image, then by window in row-major order; the tokens of
        a window are in row-major order, too.
    """
    nh, nw = num_windows
    batch, _, _, channels = x.shape
    x = x.reshape(tracing.any_batch(batch), nh, window_size, nw, window_size, channels)
    number = tracing.any_batch(batch * nh * nw)
    return x.transpose(2, 3).reshape(number, window_size * window_size, channels)


def merge_windows(windows: Tensor, num_windows: tuple[int, int], window_size: int) -> Tensor:
    """Puts windows back into a map; the inverse of :func:`split_windows`.

    It also takes carriers from window order to raster order, with the carrier size as the window
    size.

    Args:
        windows: (B * nh * nw, w * w, C).
        num_windows: Windows along the axes, (nh, nw).
        window_size: Window size w.

    Returns:
        Map, (B, nh * w, nw * w, C).
    """
    nh, nw = num_windows
    channels = windows.shape[-1]
    batch = tracing.any_batch(windows.shape[0] // (nh * nw))
    x = windows.reshape(batch, nh, nw, window_size, window_size, channels)
    return x.transpose(2, 3).reshape(batch, nh * window_size, nw * window_size, channels)


def average_windows(x: Tensor, window_size: int) -> Tensor:
    """Averages each window of a map; windows at the border average only the tokens that exist.

    Args:
        x: Map, (B, C, H, W).
        window_size: Window size w.

    Returns:
        Averages, (B, C, nh, nw).
    """
    map_size = x.shape[-2:]
    num_windows = count_windows(map_size, window_size)
    # The averages include padding, which is then corrected. Average pooling with ceil_mode needs no
    # correction, but torch.compile would make a graph for each way in which a size can divide.
    x = F.avg_pool2d(pad_to_windows(x, num_windows, window_size), window_size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, cols = (
        window_size
        / (size - window_size * torch.arange(n, device=x.device, dtype=dtype)).clamp(
            max=window_size
        )
        for size, n in zip(map_size, num_windows, strict=True)
    )
    return x * (rows[:, None] * cols).to(x.dtype)


def border_mask(height: int, width: int, window_size: int, device: torch.device) -> Tensor | None:
    """Distinguishes real tokens from padding if a map ends inside its last windows.

    Args:
        height: Height H of the map in tokens.
        width: Width W of the map in tokens.
        window_size: Window size w.
        device: Device of the mask.

    Returns:
        Mask of keys, (nh * nw, 1, 1, w * w), True for real tokens, in the order of
        :func:`split_windows` for one image; None if all windows are full.
    """
    if not tracing.needs_border_mask(height, width, window_size):
        return None
    rows, cols = (
        (torch.arange(n * window_size, device=device) < size).view(n, window_size)
        for n, size in zip(
            count_windows((height, width), window_size), (height, width), strict=True
        )
    )
    mask = rows[:, None, :, None] & cols[None, :, None, :]
    return mask.reshape(-1, 1, 1, window_size * window_size)


def shift_mask(
    num_windows: tuple[int, int], window_size: int, shift: int, device: torch.device
) -> Tensor:
    """Masks pairs of tokens that are in one window only because the map was rolled.

    Source: Swin Transformer, https://arxiv.org/abs/2103.14030.

    Args:
        num_windows: Windows along the axes, (nh, nw).
        window_size: Window size w.
        shift: Tokens by which the map was rolled to the top and to the left, 0 < shift < w.
        device: Device of the mask.

    Returns:
        Mask by window, head, query and key, (nh * nw, 1, w * w, w * w), True where a query may see
        a key, in the order of :func:`split_windows` for one image.
    """

    def together(n: int) -> Tensor:
        """(n, w, w): whether two tokens of a window are on the same side of the roll's seam."""
        index = torch.arange(n * window_size, device=device).view(n, window_size)
        rolled = index >= n * window_size - shift
        return rolled[:, :, None] == rolled[:, None, :]

    rows, cols = map(together, num_windows)
    mask = rows[:, None, :, None, :, None] & cols[None, :, None, :, None, :]
    return mask.reshape(-1, 1, window_size**2, window_size**2)


def averaging_matrix(start: Tensor, end: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """The (n, size) matrix that averages an axis from ``start`` to before ``end``, both (n,)."""
    index = torch.arange(size, device=start.device)
    inside = ((index >= start[:, None]) & (index < end[:, None])).to(dtype)
    return inside / inside.sum(1, keepdim=True)
