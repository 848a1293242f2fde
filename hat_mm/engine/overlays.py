"""Maps of a network as colours on the picture, and the maps of its attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from .attention import StageAttention, trace_attention
from .build import evaluation
from .cli import UserError


def stride_of(image_size: Sequence[int], map_size: Sequence[int]) -> int:
    """Pixels of the network's image for a cell of a map, a power of two.

    Args:
        image_size: Height and width of the image.
        map_size: Height and width of the map.
    """
    longer = int(np.argmax(map_size))  # the other side may be a single cell
    return 2 ** round(np.log2(image_size[longer] / map_size[longer]))


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


# --- attention ------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """What a place looks at: in a block, or through a stage.

    Attributes:
        name: ``'rollout'`` or the block.
        tokens: Weights, (H, W) of the picture.
        carriers: The same of carriers (HAT-Net: averages); None where there are none.
    """

    name: str
    tokens: np.ndarray
    carriers: np.ndarray | None


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of a model in one picture; made by one run, asked for any place.

    Attributes:
        size: Height and width of the picture.
        stages: Attention of each stage, by name.
        matrix: From the picture's pixels (x, y, 1) to the network's image, (2, 3).
        image_size: Height and width of the network's image.
        device: Where the network is.
    """

    size: tuple[int, int]
    stages: dict[str, StageAttention]
    matrix: np.ndarray
    image_size: tuple[int, ...]
    device: torch.device

    @classmethod
    def of(cls, infer: Any, image: np.ndarray) -> 'AttentionMaps':
        """Runs a model.

        Args:
            infer: A :class:`hat_mm.Inferencer`.
            image: The picture, (H, W, 3), uint8, BGR.

        Raises:
            ValueError: The model has no attention of hat_mm.
            UserError: It is an exported file.
        """
        inputs, _, matrix = infer.prepare(image)
        with evaluation(infer.model):
            stages = trace_attention(infer.model, lambda: infer.model.extract_feat(inputs))
        by_name = {stage.name: stage for stage in stages}
        return cls(image.shape[:2], by_name, matrix, tuple(inputs.shape[-2:]), inputs.device)

    def choose(self, name: str, box: Sequence[float]) -> torch.Tensor:
        """The tokens (H, W) of a stage whose centres lie in a box of the picture, at least one.

        Args:
            name: The stage.
            box: x1, y1, x2, y2 in pixels of the picture; a point is a box without extent.

        Raises:
            UserError: The box is outside of what the network sees.
        """
        height, width = self.stages[name].map_size
        corners = np.reshape(box, (2, 2))
        (x1, y1), (x2, y2) = to_cells(corners, matrix=self.matrix, stride=self._stride(name))
        if not np.isfinite(corners).all() or (corners[1] < corners[0]).any():
            raise UserError(f'a box is X1 Y1 X2 Y2 with X1 <= X2 and Y1 <= Y2, got {[*box]}')
        outside = (corners[1] < 0).any() or (corners[0] >= self.size[::-1]).any()
        if outside or x2 < 0 or y2 < 0 or x1 >= width or y1 >= height:
            raise UserError(f'{[*box]} is no place in the picture that the network sees')
        cols, rows = np.arange(width) + 0.5, np.arange(height) + 0.5
        tokens = ((rows >= y1) & (rows <= y2))[:, None] & ((cols >= x1) & (cols <= x2))
        middle = [
            int(np.clip((a + b) / 2, 0, n - 1)) for a, b, n in ((y1, y2, height), (x1, x2, width))
        ]
        tokens[middle[0], middle[1]] = True
        return torch.from_numpy(tokens).to(self.device)

    def panels(self, name: str, box: Sequence[float]) -> list[Panel]:
        """What a box looks at: the rollout through a stage, then each of its blocks.

        Args:
            name: The stage.
            box: As in :meth:`choose`.
        """
        stage, tokens = self.stages[name], self.choose(name, box)
        stride: float = self._stride(name)

        def spread(values: torch.Tensor, stride: float = stride) -> np.ndarray:
            cells = values.cpu().numpy()
            return to_picture(cells, matrix=self.matrix, stride=stride, size=self.size)

        found = [Panel('rollout', spread(stage.rollout(tokens)), None)]
        for i, block in enumerate(stage.blocks):
            near, far = stage.look(block, tokens)
            carriers = None if far is None else spread(far, stride * stage.cell_size)
            found.append(Panel(f'block {i}', spread(near), carriers))
        return found

    def _stride(self, name: str) -> int:
        return stride_of(self.image_size, self.stages[name].map_size)
