"""From a picture to what a model file takes, as the toolboxes' test pipelines do it."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

_INTERPOLATIONS = {
    'nearest': cv2.INTER_NEAREST,
    'bilinear': cv2.INTER_LINEAR,
    'bicubic': cv2.INTER_CUBIC,
    'area': cv2.INTER_AREA,
    'lanczos': cv2.INTER_LANCZOS4,
}
# Pixels of an image; a very thin picture would be resized to more, or to none.
_LARGEST = 2**28


class ModelError(Exception):
    """A model file cannot be opened or run; the message says why."""


class PictureError(ValueError):
    """A picture cannot be read or used; the message says why."""


def read(path: str | Path) -> np.ndarray:
    """Reads a picture, (H, W, 3), BGR.

    Raises:
        PictureError: It cannot be read.
    """
    if not Path(path).is_file():
        why = 'is a folder' if Path(path).is_dir() else 'does not exist'
        raise PictureError(f'image {str(path)!r} {why}')
    try:
        content = np.fromfile(path, np.uint8)  # imread fails for names that are not UTF-8
        image = cv2.imdecode(content, cv2.IMREAD_COLOR) if content.size else None
    except (OSError, cv2.error) as error:
        cause = ' '.join(str(error).split())
        raise PictureError(f'image {str(path)!r} cannot be read: {cause}') from error
    if image is None:
        raise PictureError(f'image {str(path)!r} cannot be read: it is no image, or is damaged')
    return image


def check(image: np.ndarray) -> None:
    """Raises PictureError unless an array is a picture (H, W, 3) of uint8."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise PictureError(
            f'an image must be (H, W, 3) of uint8, got {image.shape} of {image.dtype}'
        )


def prepare(image: np.ndarray, meta: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes, normalizes and pads a picture.

    Args:
        image: (H, W, 3), uint8, BGR.
        meta: The model file's metadata.

    Returns:
        The batch of one image, (1, 3, H, W), float32, and its height and width without padding.

    Raises:
        ModelError: The test pipeline resizes in a way that is not known here, or to another size
            than that of a file of one size.
        PictureError: The picture is too thin.
    """
    steps, static = meta['resize'], meta.get('static')
    if static and meta['task'] != 'classification':
        steps = [dict(type='Fit', scale=static)]
    elif static and not steps:
        steps = [dict(type='Resize', scale=[static[1], static[0]])]
    for step in steps:
        image = _apply(step, image)
    height, width = image.shape[:2]
    # Padding would change what a classifier sees.
    if static and meta['task'] == 'classification' and [height, width] != [*static]:
        raise ModelError(
            f'the file takes {static[0]}x{static[1]} (height x width), its test pipeline gives '
            f'{height}x{width}'
        )
    divisor = meta['pad_size_divisor']
    rows, cols = static or (-(-n // divisor) * divisor for n in (height, width))
    if meta['bgr_to_rgb']:
        image = image[..., ::-1]
    pixels = (image - np.float32(meta['mean'])) / np.float32(meta['std'])
    padding = (0, max(rows - height, 0)), (0, max(cols - width, 0)), (0, 0)
    return np.pad(pixels, padding).transpose(2, 0, 1)[None], (height, width)


def _apply(step: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """Does one transform of mmcv, mmdet, mmseg or mmpretrain."""
    kind = step['type'].split('.')[-1]
    height, width = image.shape[:2]
    if kind == 'CenterCrop':
        cols, rows = _pair(step['crop_size'])
        top, left = max(0, round((height - rows) / 2)), max(0, round((width - cols) / 2))
        return image[top : top + rows, left : left + cols]
    if kind not in _SIZES:
        raise ModelError(f'the file asks for {kind}, which this version cannot do')
    size = _SIZES[kind](step, height, width)
    how, backend = step.get('interpolation', 'bilinear'), step.get('backend', 'cv2')
    return _resize(image, size, how=how, backend=backend)


def _pair(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value, value]


def _scaled(height: int, width: int, factor: float) -> tuple[int, int]:
    return int(width * factor + 0.5), int(height * factor + 0.5)


def _fit(step: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    """Within a height and width."""
    return _scaled(height, width, min(step['scale'][0] / height, step['scale'][1] / width))


def _by_scale(step: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    if step.get('scale') is None:
        by_width, by_height = _pair(step['scale_factor'])
        scale = [int(width * by_width + 0.5), int(height * by_height + 0.5)]
    else:
        scale = _pair(step['scale'])
    if not step.get('keep_ratio'):
        return scale[0], scale[1]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return _scaled(height, width, factor)


def _by_edge(step: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    edge, scale = step.get('edge', 'short'), step['scale']
    if (
        edge == 'width'
        or (edge == 'short' and width < height)
        or (edge == 'long' and width > height)
    ):
        return scale, int(scale * height / width)
    return int(scale * width / height), scale


def _by_shortest_edge(step: dict[str, Any], height: int, width: int) -> tuple[int, int]:
    factor = min(_pair(step['scale'])) / min(height, width)
    if step.get('max_size'):
        factor = min(factor, step['max_size'] / max(height, width))
    return _scaled(height, width, factor)


# Width and height after the transforms of mmcv, mmdet, mmseg and mmpretrain.
_SIZES = dict(Fit=_fit, Resize=_by_scale, ResizeEdge=_by_edge, ResizeShortestEdge=_by_shortest_edge)


def _resize(image: np.ndarray, size: tuple[int, int], *, how: str, backend: str) -> np.ndarray:
    """Resizes to a width and height."""
    if not 0 < size[0] * size[1] <= _LARGEST:
        height, width = image.shape[:2]
        raise PictureError(f'a picture of {width}x{height} would have {size[0]}x{size[1]} pixels')
    if backend == 'cv2' and how in _INTERPOLATIONS:
        return cv2.resize(image, size, interpolation=_INTERPOLATIONS[how])
    if backend != 'pillow' or how not in ('bilinear', 'bicubic'):
        raise ModelError(f'the file asks for {how!r} by {backend!r}, which this version cannot do')
    # Pillow rounds after each side. It may begin with the other one, which changes the rounding.
    for axis, n in ((1, size[0]), (0, size[1])):
        if image.shape[axis] != n:
            weights = _filter(how, image.shape[axis], n)
            image = np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)
            image = np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)
    return image


def _filter(how: str, old: int, new: int) -> np.ndarray:
    """The (new, old) matrix of Pillow's filters, which average when an image becomes smaller."""
    ratio = old / new
    reach = max(ratio, 1.0)
    distance = (np.arange(old) + 0.5 - (np.arange(new)[:, None] + 0.5) * ratio) / reach
    x = np.abs(distance)
    if how == 'bilinear':
        weights = np.maximum(1 - x, 0)
    else:  # cubic convolution with a = -0.5
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)
