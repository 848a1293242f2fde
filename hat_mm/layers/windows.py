"""Between maps and windows: padding, cutting, putting back.

Letters: B batch, C channels, H W map size, w window side, nh nw windows along each axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads a map with zeros at the bottom and right until both sides divide by ``multiple``.

    Args:
        x: Map, (B, C, H, W).
        multiple: Side in pixels that the padded sides are multiples of.

    Returns:
        Map, (B, C, H', W') with the smallest such H' >= H and W' >= W.
    """
    bottom, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    # A branch on the size would cost torch.compile one graph for each outcome; padding by nothing
    # costs eager mode a copy.
    if not torch.compiler.is_compiling() and bottom == 0 and right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom))


def split_windows(x: Tensor, window: int) -> Tensor:
    """Cuts a channels-last map into windows.

    Args:
        x: Map, (B, nh * w, nw * w, C).
        window: Side w of a window.

    Returns:
        Windows, (B * nh * nw, w * w, C): images first, then windows row-major over the map; tokens
        row-major in a window.
    """
    _, h, w, channels = x.shape
    x = x.reshape(-1, h // window, window, w // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def merge_windows(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Puts windows back into a map; the inverse of :func:`split_windows`.

    The same function takes carrier tokens from window order to raster order, with the carriers of
    one window as its "window".

    Args:
        windows: (B * nh * nw, w * w, C).
        grid: Number of windows along the axes, (nh, nw).
        window: Side w of a window.

    Returns:
        Map, (B, nh * w, nw * w, C).
    """
    nh, nw = grid
    channels = windows.shape[-1]
    x = windows.reshape(-1, nh, nw, window, window, channels)
    return x.transpose(2, 3).reshape(-1, nh * window, nw * window, channels)
