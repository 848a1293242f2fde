"""What a model finds in a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np


@dataclass(frozen=True)
class Result:
    """What the results have in common.

    Attributes:
        image: The picture, (H, W, 3), uint8, BGR.
        classes: Names of all classes; None if the file has none.
        palette: Their colours, RGB; None if the file has none.
    """

    image: np.ndarray
    classes: Sequence[str] | None
    palette: Sequence[Sequence[int]] | None

    def name(self, label: int) -> str:
        """Name of a class."""
        known = self.classes or ()
        return known[label] if label < len(known) else f'class {label}'

    def counted(self, labels: Any) -> str:
        """How many there are of each class, as text."""
        found, numbers = np.unique(labels, return_counts=True)
        counts = [f'{n} {self.name(i)}' for i, n in zip(found, numbers, strict=True)]
        return ', '.join(counts) or 'nothing'

    def color(self, label: int) -> tuple[int, ...]:
        """Colour of a class, BGR."""
        if self.palette and label < len(self.palette):
            return tuple(int(n) for n in reversed(self.palette[label]))
        hue = np.array([[[label * 67 % 180, 200, 255]]], np.uint8)  # neighbours differ
        return tuple(int(n) for n in cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0])


@dataclass(frozen=True)
class Detections(Result):
    """Objects in a picture, N of them, the best first.

    Attributes:
        boxes: (N, 4), x1, y1, x2, y2 in pixels of the picture.
        scores: (N,), from 0 to 1.
        labels: Numbers of the classes, (N,).
        masks: Which pixels belong to each object, (N, H, W) of booleans; None if the model finds
            boxes only.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __str__(self) -> str:
        return self.counted(self.labels)

    @property
    def names(self) -> list[str]:
        """Names of the classes of the objects."""
        return [self.name(label) for label in self.labels]

    def draw(self) -> np.ndarray:
        """The picture with boxes, masks, names and scores, (H, W, 3), uint8, BGR."""
        picture = self.image.copy()
        size = max(picture.shape[:2]) / 1000
        for i in reversed(range(len(self))):
            color = self.color(self.labels[i])
            if self.masks is not None:
                mask = self.masks[i]
                picture[mask] = (picture[mask] * 0.5 + np.array(color) * 0.5).astype(np.uint8)
            x1, y1, x2, y2 = (round(float(x)) for x in self.boxes[i])
            cv2.rectangle(picture, (x1, y1), (x2, y2), color, max(1, round(2 * size)))
            text = f'{self.name(self.labels[i])} {self.scores[i]:.2f}'
            _write(picture, text, corner=(x1, y1), color=color)
        return picture

    def to_json(self) -> list[dict[str, Any]]:
        """The objects as in COCO's results: boxes are x, y, width, height, masks are RLE."""
        found = []
        for i, (x1, y1, x2, y2) in enumerate(self.boxes.tolist()):
            label = int(self.labels[i])
            item = dict(bbox=[x1, y1, x2 - x1, y2 - y1], score=float(self.scores[i]))
            item |= dict(category_id=label, name=self.name(label))
            if self.masks is not None:
                item['segmentation'] = encode(self.masks[i])
            found.append(item)
        return found


@dataclass(frozen=True)
class Segmentation(Result):
    """The class of each pixel.

    Attributes:
        map: Numbers of the classes, (H, W).
    """

    map: np.ndarray

    def __str__(self) -> str:
        shares = np.bincount(self.map.ravel()) / self.map.size
        largest = [i for i in np.argsort(-shares) if shares[i] > 0]
        return ', '.join(f'{shares[i]:.0%} {self.name(i)}' for i in largest)

    def draw(self) -> np.ndarray:
        """The picture in the colours of the classes, (H, W, 3), uint8, BGR."""
        colors = np.array([self.color(i) for i in range(int(self.map.max()) + 1)])
        return (self.image * 0.5 + colors[self.map] * 0.5).astype(np.uint8)

    def to_json(self) -> list[dict[str, Any]]:
        """The mask of each class that occurs, as RLE."""
        return [
            dict(category_id=int(i), name=self.name(i), segmentation=encode(self.map == i))
            for i in np.unique(self.map)
        ]


@dataclass(frozen=True)
class Classification(Result):
    """The class of a picture.

    Attributes:
        scores: Probabilities of all classes, (K,).
    """

    scores: np.ndarray

    @property
    def label(self) -> int:
        """Number of the best class."""
        return int(self.scores.argmax())

    def __str__(self) -> str:
        return f'{self.name(self.label)} {self.scores[self.label]:.2f}'

    def draw(self) -> np.ndarray:
        """The picture with the best class and its probability, (H, W, 3), uint8, BGR."""
        picture = self.image.copy()
        _write(picture, str(self), corner=(0, 0), color=self.color(self.label))
        return picture

    def to_json(self) -> list[dict[str, Any]]:
        """The five best classes."""
        best = np.argsort(-self.scores, kind='stable')[:5]
        return [
            dict(category_id=int(i), name=self.name(i), score=float(self.scores[i])) for i in best
        ]


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) in COCO's uncompressed RLE: runs along columns, zeros first."""
    pixels = mask.ravel(order='F')
    starts = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate([[0], starts, [pixels.size]]))
    counts = [0, *runs.tolist()] if pixels[0] else runs.tolist()
    return dict(size=list(mask.shape), counts=counts)


def _write(
    picture: np.ndarray, text: str, *, corner: tuple[int, int], color: Sequence[int]
) -> None:
    """Writes text on a bar above the corner, or below it at the border of the picture."""
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, max(0.35, max(picture.shape[:2]) / 2000)
    (width, height), below = cv2.getTextSize(text, font, scale, 1)
    x = min(max(corner[0], 0), max(picture.shape[1] - width, 0))
    y = max(corner[1], height + below)
    cv2.rectangle(picture, (x, y - height - below), (x + width, y), color, -1)
    blue, green, red = color
    dark = 0.114 * blue + 0.587 * green + 0.299 * red < 110  # the bar, as eyes see it
    ink = (255, 255, 255) if dark else (0, 0, 0)
    cv2.putText(picture, text, (x, y - below // 2), font, scale, ink, 1, cv2.LINE_AA)
