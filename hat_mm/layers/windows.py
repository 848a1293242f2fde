"""Between maps and windows: padding, cutting, putting back.

Letters: B batch, C channels, H W map size, w window side, nh nw windows along each axis.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import EvalCache


def window_grid(height: int, width: int, window: int) -> tuple[int, int]:
    """Counts the windows of side ``window`` that cover a map: (nh, nw), the last ones in part."""
    return (height + window - 1) // window, (width + window - 1) // window


def pad_to_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Pads a map with zeros at the bottom and right to whole windows.

    Args:
        x: Map, (B, C, H, W).
        grid: Number of windows along the axes, (nh, nw).
        window: Side w of a window.

    Returns:
        Map, (B, C, nh * w, nw * w).
    """
    bottom, right = grid[0] * window - x.shape[-2], grid[1] * window - x.shape[-1]
    # A branch on the size would cost torch.compile one graph for each outcome; padding by nothing
    # costs eager mode a copy.
    if not torch.compiler.is_compiling() and bottom == 0 and right == 0:
        return x
    return F.pad(x, (0, right, 0, bottom))


def split_windows(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """Cuts a channels-last map into windows.

    Args:
        x: Map, (B, nh * w, nw * w, C).
        grid: Number of windows along the axes, (nh, nw).
        window: Side w of a window.

    Returns:
        Windows, (B * nh * nw, w * w, C): images first, then windows row-major over the map; tokens
        row-major in a window.
    """
    nh, nw = grid
    batch, _, _, channels = x.shape
    x = x.reshape(batch, nh, window, nw, window, channels)
    return x.transpose(2, 3).reshape(batch * nh * nw, window * window, channels)


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
    batch = windows.shape[0] // (nh * nw)
    x = windows.reshape(batch, nh, nw, window, window, channels)
    return x.transpose(2, 3).reshape(batch, nh * window, nw * window, channels)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Cuts a channels-last map (B, H', W', C) to its top left (B, height, width, C)."""
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    # The strides of a slice tell whether anything was cut, and torch.compile would make a graph for
    # each outcome.
    for axis, size in ((1, height), (2, width)):
        x = x.index_select(axis, torch.arange(size, device=x.device))
    return x


def average_windows(x: Tensor, window: int) -> Tensor:
    """Averages each window of a map; windows at the border average the tokens that exist.

    Args:
        x: Map, (B, C, H, W).
        window: Side w of a window.

    Returns:
        Map of windows, (B, C, nh, nw).
    """
    height, width = x.shape[-2:]
    grid = window_grid(height, width, window)
    # Zeros are averaged in and out again: average pooling with ceil_mode would do without, but
    # torch.compile makes a graph for each way in which a size can divide.
    x = F.avg_pool2d(pad_to_windows(x, grid, window), window)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, cols = (
        window / (side - window * torch.arange(n, device=x.device, dtype=dtype)).clamp(max=window)
        for side, n in zip((height, width), grid, strict=True)
    )
    return x * (rows[:, None] * cols).to(x.dtype)


class BorderMask(nn.Module):
    """Tells real tokens from padding where a map ends inside its last windows.

    Args:
        window: Side w of a window.
        cache: Where the last mask is kept in eval mode. Defaults to one of its own.

    Shape:
        Called with ``(height, width, device)``, returns (nh * nw, 1, 1, w * w), True for real
        tokens, in the order of :func:`split_windows` for one image; None if all windows are full.
    """

    def __init__(self, window: int, cache: EvalCache | None = None) -> None:
        super().__init__()
        self.window = window
        self._cache = EvalCache() if cache is None else cache

    def forward(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """Makes the mask of a map of ``height`` times ``width`` tokens."""
        # One graph of torch.compile for both outcomes, as in pad_to_windows.
        if not torch.compiler.is_compiling() and not (height % self.window or width % self.window):
            return None
        sides = (height, width)
        key = (self.window, *sides, device)
        return self._cache.get(self, key, lambda: self._compute(sides, device))

    def _compute(self, sides: tuple[int, int], device: torch.device) -> Tensor:
        w = self.window
        rows, cols = (
            (torch.arange(windows * w, device=device) < side).view(windows, w)
            for windows, side in zip(window_grid(*sides, w), sides, strict=True)
        )
        mask = rows[:, None, :, None] & cols[None, :, None, :]
        return mask.reshape(-1, 1, 1, w * w)


class ShiftMask(nn.Module):
    """Keeps tokens apart that only the rolling of a map has brought into one window.

    Source: Swin Transformer, https://arxiv.org/abs/2103.14030.

    Args:
        window: Window side w.
        shift: Tokens by which the map was rolled to the top and to the left, 0 < shift < w.
        cache: Where the last mask is kept in eval mode. Defaults to one of its own.

    Shape:
        Called with ``(grid, device)``, the windows along the axes and where the mask is to be,
        returns (nh * nw, 1, w * w, w * w), window, head, query, key, True where a query may see a
        key, in the order of :func:`split_windows` for one image.
    """

    def __init__(self, window: int, shift: int, cache: EvalCache | None = None) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self._cache = EvalCache() if cache is None else cache

    def forward(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Makes the mask of ``grid`` windows."""
        key = (self.window, self.shift, *grid, device)
        return self._cache.get(self, key, lambda: self._compute(grid, device))

    def _compute(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        w = self.window

        def together(windows: int) -> Tensor:
            """(n, w, w): whether two tokens of a window were as near on this axis before."""
            index = torch.arange(windows * w, device=device).view(windows, w)
            rolled = index >= windows * w - self.shift
            return rolled[:, :, None] == rolled[:, None, :]

        rows, cols = map(together, grid)
        mask = rows[:, None, :, None, :, None] & cols[None, :, None, :, None, :]
        return mask.reshape(-1, 1, w * w, w * w)
