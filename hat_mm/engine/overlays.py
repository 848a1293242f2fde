"""Maps of a network as colours on the picture."""

import cv2
import numpy as np


def stride_of(image_width: int, map_width: int) -> int:
    """Pixels of the network's image for a cell of a map, a power of two."""
    return 2 ** round(np.log2(image_width / map_width))


def to_cells(points: np.ndarray, *, matrix: np.ndarray, stride: float) -> np.ndarray:
    """Takes points of the picture to cells of a map.

    Args:
        points: x, y in pixels of the picture, (N, 2).
        matrix: From the picture's pixels (x, y, 1) to the network's image, (2, 3).
        stride: Pixels of the network's image for a cell.

    Returns:
        x, y in cells, (N, 2); the first cell reaches from 0 to 1.
    """
    return (np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]) / stride


def to_picture(
    values: np.ndarray,
    *,
    matrix: np.ndarray,
    stride: float,
    size: tuple[int, int],
    smooth: bool = False,
) -> np.ndarray:
    """Spreads a map over the picture.

    Args:
        values: The map, (h, w).
        matrix: From the picture's pixels (x, y, 1) to the network's image, (2, 3).
        stride: Pixels of the network's image for a cell of the map.
        size: Height and width of the picture.
        smooth: Whether to interpolate between cells.

    Returns:
        (H, W), float32; 0 where the network does not see the picture.
    """
    # Both count from the centre of the first pixel or cell.
    scale = matrix[:, :2] / stride
    shift = (scale @ (0.5, 0.5)) + matrix[:, 2] / stride - 0.5
    how = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
    return cv2.warpAffine(
        np.ascontiguousarray(values, np.float32),
        np.column_stack([scale, shift]),
        size[::-1],
        flags=how | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE if smooth else cv2.BORDER_CONSTANT,
    )


def overlay(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Colours a picture, more where values are high.

    Args:
        image: The picture, (H, W, 3), uint8, BGR.
        values: (H, W), not negative. Brightness goes by their square root, so that weak ones show.

    Returns:
        The same size and type.
    """
    share = np.sqrt(values / max(float(values.max()), 1e-12))
    colors = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    opacity = 0.35 + 0.5 * share[..., None]
    return (grey * (1 - opacity) + colors * opacity).astype(np.uint8)
