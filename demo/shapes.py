"""Draws the toy set "shapes" in one of three layouts, unless it is there already.

Coloured shapes with exact visible masks, for demos and tests: a module and a program.

A scene is drawn by :func:`draw_scene` from a random generator and a :class:`Style`, without any
file; a writer puts scenes on the disk in one of the :data:`LAYOUTS`. NumPy does the drawing, so the
pixels do not depend on OpenCV's version; Pillow, imported on use, only encodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Goes up when the same parameters draw other pixels, so that no older set is taken for it."""

MARKER = 'dataset.json'
"""File in a set's folder with the parameters that drew it."""

SPLITS = ('train', 'val')
ADE_SPLITS = {'train': 'training', 'val': 'validation'}
IMAGE_SIDES = (192, 384)
SINGLE_SIDES = (112, 160)
"""Sides of an image with one object, which fills more of it then."""
RELATION_SIZE = (64, 384)
"""Height and width of an image with a far marker: long and low, far at few pixels."""
FAR = 224
"""Least distance in pixels from the marker to any object, along the width."""
MARKER_WIDTH = 48
MARKER_COLOURS = ((255, 0, 0), (0, 0, 255))
"""Colour of each kind of marker."""
_STALE_SECONDS = 3600


def _regular(corners: int, inner: float = 1.0) -> tuple[tuple[float, float], ...]:
    """(x, y) corners of a regular polygon in the unit circle; ``inner`` < 1 makes it a star."""
    steps = corners if inner == 1.0 else 2 * corners
    angles = -np.pi / 2 + 2 * np.pi * np.arange(steps) / steps
    radii = np.where(np.arange(steps) % 2 == 0, 1.0, inner)
    return tuple(
        zip((radii * np.cos(angles)).tolist(), (radii * np.sin(angles)).tolist(), strict=True)
    )


_ARM = 0.36
OUTLINES: dict[str, tuple[tuple[float, float], ...] | None] = {
    'circle': None,
    'square': ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    'triangle': ((0, -1), (1, 1), (-1, 1)),
    'pentagon': _regular(5),
    'star': _regular(5, inner=0.42),
    'cross': (
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ),
}
"""Corners of each shape as (x, y) in [-1, 1], y downwards; None is the unit circle."""


@dataclasses.dataclass(frozen=True)
class Style:
    """What scenes look like.

    Attributes:
        classes: Names of the shapes, keys of :data:`OUTLINES` up to any hyphen; a label is an index
            into it.
        rotate: Whether each object is turned by a random angle.
        lines: Least and greatest number of line segments in the background.
        dots: Least and greatest number of dots in the background.
        clutter_size: Greatest width of a line and radius of a dot, in pixels.
        noise: Standard deviation of the noise on each pixel, in grey levels of 0–255.
        vivid: Whether objects are of saturated colours on a greyish background, not of any on any.
        objects: Least and greatest number of objects.
        object_sizes: Least and greatest side of an object, in pixels.
        min_visible: Share of an object that stays in sight; a later object that would hide more
            goes elsewhere.
        marks: Kinds of the far marker, see :func:`draw_relation`; a class is then the name of a
            shape, a hyphen and a kind, those of the first kind first. Empty for no marker.
    """

    classes: tuple[str, ...]
    rotate: bool
    lines: tuple[int, int]
    dots: tuple[int, int]
    clutter_size: float
    noise: float
    vivid: bool
    objects: tuple[int, int] = (1, 4)
    object_sizes: tuple[int, int] = (32, 96)
    min_visible: float = 0.3
    marks: tuple[str, ...] = ()


EASY = Style(('circle', 'square', 'triangle'), False, (4, 10), (8, 20), 3.0, 0.0, True)
HARD = Style(tuple(OUTLINES), True, (30, 60), (40, 90), 8.0, 8.0, False)
RELATION = dataclasses.replace(
    EASY,
    classes=tuple(f'{name}-{mark}' for mark in 'ab' for name in EASY.classes),
    objects=(2, 5),
    object_sizes=(14, 28),
    min_visible=1.0,
    marks=('a', 'b'),
)
"""Small shapes whose class is the outline together with the kind of a far marker."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawn image and what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (N,) int64, indices into the style's classes.
        masks: (N, H, W) bool, the *visible* pixels of each object: later objects hide earlier
            ones, so no pixel belongs to two.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def _inside(
    outline: tuple[tuple[float, float], ...] | None, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Which points (x, y) lie in an outline, by the even-odd rule."""
    if outline is None:
        return x * x + y * y <= 1
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, (*outline[1:], outline[0]), strict=True):
        if y0 != y1:
            crosses = ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
            inside ^= crosses
    return inside


def _pixels(size: tuple[int, int], box: tuple[float, float, float, float]) -> tuple:
    """Slices of the pixels in a box (x0, y0, x1, y1); their centres as a row x and a column y."""
    height, width = size
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(width, int(np.ceil(box[2]))), min(height, int(np.ceil(box[3])))
    where = (slice(y0, max(y0, y1)), slice(x0, max(x0, x1)))
    return where, np.arange(x0, max(x0, x1))[None] + 0.5, np.arange(y0, max(y0, y1))[:, None] + 0.5


def _object_mask(
    rng: np.random.Generator,
    style: Style,
    label: int,
    size: tuple[int, int],
    columns: tuple[int, int] | None = None,
) -> np.ndarray:
    """Mask (H, W) of a whole object at a random place in the image, or in its given columns."""
    height, width = size
    first, end = columns or (0, width)
    side = float(rng.integers(style.object_sizes[0], style.object_sizes[1] + 1))
    # Whole pixels: an upright object's box is then exactly `side` wide and high.
    left = float(rng.integers(first, end - side + 1))
    top = float(rng.integers(0, height - side + 1))
    angle = rng.uniform(0, 2 * np.pi) if style.rotate else 0.0
    cos, sin = np.cos(angle), np.sin(angle)
    outline = OUTLINES[style.classes[label].partition('-')[0]]
    # A turned shape is shrunk until its corners stay in the same box.
    reach = max(np.hypot(x, y) for x, y in outline) if outline and style.rotate else 1.0
    where, x, y = _pixels(size, (left, top, left + side, top + side))
    u, v = ((x - left) * 2 / side - 1) * reach, ((y - top) * 2 / side - 1) * reach
    mask = np.zeros(size, dtype=bool)
    mask[where] = _inside(outline, cos * u + sin * v, cos * v - sin * u)
    return mask


def _colour(rng: np.random.Generator, style: Style, taken: list[np.ndarray]) -> np.ndarray:
    """An RGB colour for an object that differs from those taken, so that its outline is seen."""
    best, best_distance = None, -1.0
    for _ in range(30):
        colour = rng.uniform(0, 255, 3)
        if style.vivid:  # stretched until one channel is bright and another dark
            low, high = colour.min(), colour.max()
            bright, dark = rng.uniform(150, 255), rng.uniform(0, 70)
            colour = dark + (colour - low) / max(high - low, 1e-6) * (bright - dark)
        distance = min(float(np.linalg.norm(colour - other)) for other in taken)
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance >= 90:
            break
    return best


def _background(
    rng: np.random.Generator, style: Style, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A gradient with lines and dots on it, (H, W, 3) float, and the gradient's mean colour."""
    height, width = size
    base = (
        rng.uniform(70, 190) + rng.uniform(-15, 15, 3) if style.vivid else rng.uniform(40, 215, 3)
    )
    slope = rng.uniform(-25, 25, (2, 3))
    across = np.linspace(-1, 1, width)[None, :, None] * slope[0]
    down = np.linspace(-1, 1, height)[:, None, None] * slope[1]
    image = base + across + down
    for _ in range(rng.integers(style.lines[0], style.lines[1] + 1)):
        (x0, y0), (x1, y1) = rng.uniform(0, 1, (2, 2)) * (width, height)
        half = rng.uniform(1, style.clutter_size) / 2
        colour = base + rng.uniform(-70, 70, 3)
        box = (min(x0, x1) - half, min(y0, y1) - half, max(x0, x1) + half, max(y0, y1) + half)
        where, x, y = _pixels(size, box)
        length = max(float(np.hypot(x1 - x0, y1 - y0)), 1e-6)
        away = np.abs((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length
        image[where][away <= half] = colour
    for _ in range(rng.integers(style.dots[0], style.dots[1] + 1)):
        cx, cy = rng.uniform(0, 1, 2) * (width, height)
        radius = rng.uniform(1, style.clutter_size)
        colour = base + rng.uniform(-70, 70, 3)
        where, x, y = _pixels(size, (cx - radius, cy - radius, cx + radius + 1, cy + radius + 1))
        image[where][(x - cx) ** 2 + (y - cy) ** 2 <= radius**2] = colour
    return image, base


def draw_scene(rng: np.random.Generator, style: Style = EASY, only: int | None = None) -> Scene:
    """Draws one scene: a cluttered background and one to four objects, later ones in front.

    The image is never square; its sides are 192 to 384 pixels, or 112 to 160 for one object. An
    object's are 32 to 96 (a turned one fits in a circle of that width). At least 30 % of every
    object stays visible, so nothing in the image goes without a label.

    Args:
        rng: Source of all randomness.
        style: What to draw.
        only: Label of the one object to draw; None draws one to four of random labels.

    Returns:
        The image, labels and visible masks.
    """
    least, greatest = IMAGE_SIDES if only is None else SINGLE_SIDES
    height, width = (int(side) for side in rng.integers(least, greatest + 1, 2))
    if height == width:
        width += 1 if width < greatest else -1
    size = (height, width)
    image, base = _background(rng, style, size)
    if only is None:
        return _with_objects(rng, style, image, base, range(len(style.classes)))
    return _with_objects(rng, style, image, base, range(only, only + 1), count=1)


def draw_relation(
    rng: np.random.Generator, mark: int, left: bool, style: Style = RELATION
) -> Scene:
    """Draws one scene in which the class of every object depends on a marker far from it.

    The marker, a bar as high as the image near one of its ends, has the colour of its kind and is
    no object. The objects lie towards the other end, at least :data:`FAR` pixels away. Neither
    number, size, place, outline nor colour of the objects depends on the kind, so without a look at
    the marker it can only be guessed.

    Args:
        rng: Source of all randomness; with the same state, the two kinds differ in the pixels of
            the marker and in the labels alone.
        mark: Index into ``style.marks``.
        left: Whether the marker is at the left end.
        style: What to draw.

    Returns:
        The image, labels and visible masks. The marker has no label.
    """
    image, base = _background(rng, style, RELATION_SIZE)
    start = int(rng.integers(0, 9))
    end = start + MARKER_WIDTH
    image[:, start:end] = MARKER_COLOURS[mark]
    near = end + FAR
    outlines = len(style.classes) // len(style.marks)
    scene = _with_objects(
        rng,
        style,
        image,
        base,
        range(mark * outlines, (mark + 1) * outlines),
        columns=(near, RELATION_SIZE[1]),
    )
    if left:
        return scene
    return Scene(scene.image[:, ::-1], scene.labels, scene.masks[..., ::-1])


def _with_objects(
    rng: np.random.Generator,
    style: Style,
    image: np.ndarray,
    base: np.ndarray,
    choices: range,
    count: int | None = None,
    columns: tuple[int, int] | None = None,
) -> Scene:
    """The scene of a background, (H, W, 3) float, with objects drawn into it.

    Args:
        rng: Source of all randomness.
        style: What to draw.
        image: The background.
        base: Its mean colour.
        choices: The labels to choose from, equally likely.
        count: Number of objects; None for one from the style's range.
        columns: The columns that objects may cover; None for all.
    """
    colours, labels = [base], []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    size = image.shape[:2]
    least, greatest = style.objects
    for _ in range(rng.integers(least, greatest + 1) if count is None else count):
        label = int(rng.integers(choices.start, choices.stop)) if len(choices) > 1 else choices[0]
        for _ in range(20):
            mask = _object_mask(rng, style, label, size, columns)
            left = [int((other & ~mask).sum()) for other in masks]
            if all(now >= style.min_visible * area for now, area in zip(left, areas, strict=True)):
                break
        else:
            continue
        for other in masks:
            other &= ~mask
        colour = _colour(rng, style, colours)
        image[mask] = colour
        colours.append(colour)
        labels.append(label)
        masks.append(mask)
        areas.append(int(mask.sum()))
    if style.noise:
        image = image + rng.normal(0, style.noise, image.shape)
    return Scene(
        np.clip(np.rint(image), 0, 255).astype(np.uint8), np.array(labels), np.stack(masks)
    )


def scenes(
    split: str, count: int, seed: int, style: Style, single: bool = False
) -> Iterator[Scene]:
    """Draws the scenes of a split; the i-th does not depend on how many there are.

    Args:
        split: ``'train'`` or ``'val'``; the splits share no scene.
        count: Number of scenes.
        seed: Non-negative seed of the whole set.
        style: What to draw.
        single: Whether each has one object, of each class in turn. In a style with a far marker,
            its kinds and ends of the image take turns instead.

    Yields:
        The scenes, in order.
    """
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        if style.marks:
            turn, mark = divmod(index, len(style.marks))
            yield draw_relation(rng, mark, turn % 2 == 0, style)
            continue
        yield draw_scene(rng, style, index % len(style.classes) if single else None)


def encode_mask(mask: np.ndarray) -> dict:
    """Encodes a mask (H, W) as COCO's uncompressed run lengths: down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order='F'), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    ends = edges if edges.size and edges[-1] == mask.size else np.append(edges, mask.size)
    return {'size': list(mask.shape), 'counts': np.diff(ends, prepend=0).tolist()}


def _annotation(mask: np.ndarray, label: int, image_id: int, annotation_id: int) -> dict:
    """COCO's record of one object, box and area from its visible mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': label + 1,
        'bbox': [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        'area': int(mask.sum()),
        'iscrowd': 0,
        'segmentation': encode_mask(mask),
    }


def write_instances(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split as COCO instances: ``SPLIT/*.png`` and ``annotations/SPLIT.json``.

    Args:
        folder: An existing folder.
        split: ``'train'`` or ``'val'``.
        drawn: The scenes.
        classes: Name of each label.
    """
    (folder / split).mkdir()
    images, annotations = [], []
    for index, scene in enumerate(drawn):
        name = _file_name(index)
        _save(scene.image, folder / split / name)
        height, width = scene.image.shape[:2]
        images.append({'id': index + 1, 'file_name': name, 'height': height, 'width': width})
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            annotations.append(_annotation(mask, label, index + 1, len(annotations) + 1))
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(classes)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations').mkdir(exist_ok=True)
    _dump(content, folder / 'annotations' / f'{split}.json')


def write_semantic(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split in ADE20K's layout: ``images/SPLIT/*.png``, ``annotations/SPLIT/*.png``.

    The splits are named ``training`` and ``validation``. A label map is an 8-bit grey image in
    which 0 would be unlabelled and does not occur, 1 is the background, 2 the first class.

    Args:
        folder: An existing folder.
        split: ``'train'`` or ``'val'``.
        drawn: The scenes.
        classes: Name of each label.
    """
    del classes  # names are the config's business, as with ADE20K
    images, maps = (folder / kind / ADE_SPLITS[split] for kind in ('images', 'annotations'))
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    for index, scene in enumerate(drawn):
        _save(scene.image, images / _file_name(index))
        label_map = np.ones(scene.image.shape[:2], np.uint8)
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            label_map[mask] = label + 2
        _save(label_map, maps / _file_name(index))


def write_classes(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split of scenes with one object each as an image folder: ``SPLIT/CLASS/*.png``.

    Args:
        folder: An existing folder.
        split: ``'train'`` or ``'val'``.
        drawn: The scenes.
        classes: Name of each label.
    """
    for name in classes:
        (folder / split / name).mkdir(parents=True)
    for index, scene in enumerate(drawn):
        _save(scene.image, folder / split / classes[scene.labels[0]] / _file_name(index))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a set lies on the disk.

    Attributes:
        write: Called for each split with (folder, split, scenes, classes).
        folder: Where the set goes by default.
        num_train: Default number of training images.
        num_val: Default number of validation images.
        single: Whether each scene has one object only.
        pngs: Number of PNG files of a scene.
        others: Other files, relative to the set's folder.
    """

    write: Callable[[Path, str, Iterable[Scene], tuple[str, ...]], None]
    folder: str
    num_train: int = 256
    num_val: int = 48
    single: bool = False
    pngs: int = 1
    others: tuple[str, ...] = ()


LAYOUTS = {
    'instances': Layout(
        write_instances,
        'data/shapes',
        others=tuple(f'annotations/{split}.json' for split in SPLITS),
    ),
    'semantic': Layout(write_semantic, 'data/shapes-semantic', num_train=768, pngs=2),
    'classes': Layout(
        write_classes, 'data/shapes-classes', num_train=2048, num_val=96, single=True
    ),
}


RELATION_SET = dataclasses.replace(
    LAYOUTS['instances'], folder='data/shapes-relation', num_train=4096, num_val=256
)
"""Where the set with a far marker goes, and how large it is, by default."""


def _file_name(index: int) -> str:
    return f'{index:06d}.png'


def _save(pixels: np.ndarray, path: Path) -> None:
    """Writes (H, W, 3) RGB or (H, W) grey values as PNG."""
    from PIL import Image

    Image.fromarray(pixels).save(path)


def _dump(content: dict, path: Path) -> None:
    """Writes JSON whose bytes depend on the content alone."""
    path.write_text(json.dumps(content, separators=(',', ':')) + '\n', encoding='utf-8')


_UNSAID = {'layout': 'instances', 'relation': False}
"""Parameters that came later than the first sets, whose marker lacks them, and what they were."""


def _is_complete(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether a folder holds the whole set that the parameters draw."""
    layout = LAYOUTS[parameters['layout']]
    return (
        _read_marker(folder) == parameters
        and all((folder / name).is_file() for name in layout.others)
        and len(list(folder.rglob('*.png'))) == layout.pngs * sum(parameters['counts'].values())
    )


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The parameters that drew a set, or None where the folder is no set of ours."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or 'format' not in found:
        return None
    return {**_UNSAID, **found}


def _write_marker(folder: Path, parameters: dict[str, Any]) -> None:
    """Leaves the parameters in a set, but for those that are as in the first sets."""
    said = {k: v for k, v in parameters.items() if k not in _UNSAID or v != _UNSAID[k]}
    _dump(said, folder / MARKER)


def _check_replaceable(folder: Path, parameters: dict, force: bool) -> None:
    """Raises FileExistsError unless a new set may take the folder's place."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = _read_marker(folder)
    if found is None:
        raise FileExistsError(
            f'{folder} exists and is not a toy set (no readable {MARKER}): nothing in it was '
            'touched; choose another --out'
        )
    if not force:
        changes = [f'{k} {found.get(k)} -> {v}' for k, v in parameters.items() if found.get(k) != v]
        what = '; '.join(changes) or 'files are missing'
        raise FileExistsError(
            f'{folder} holds another toy set ({what}): choose another --out, or --force to '
            'replace it'
        )


def make_dataset(
    out: str | Path,
    *,
    layout: str = 'instances',
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
    hard: bool = False,
    relation: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> bool:
    """Makes a set of shapes, unless it is already there.

    The set is drawn beside ``out`` and moved there when complete, so an interrupted call leaves
    nothing that could be taken for a set. The same arguments give the same bytes.

    Args:
        out: Folder of the set.
        layout: ``'instances'`` (COCO's), ``'semantic'`` (ADE20K's) or ``'classes'`` (a folder for
            each class).
        num_train: Number of training images; None is the layout's or the relation's default, as
            for ``num_val``.
        num_val: Number of validation images.
        seed: Non-negative seed.
        hard: Six rotated classes in heavy clutter and noise, instead of three upright ones in
            light clutter.
        relation: Small objects whose class depends on a far marker, see :func:`draw_relation`;
            with the layout of instances only, and not with ``hard``.
        force: Replace a toy set that other arguments drew. A folder that holds anything else is
            never replaced.
        progress: Called with (split, images done, images in all) after each image.

    Returns:
        True if the set was drawn, False if it was there.

    Raises:
        ValueError: If the layout is unknown, a number out of range, or ``relation`` does not go
            with the rest.
        FileExistsError: If ``out`` holds something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    if relation and (hard or layout != 'instances'):
        other = 'hard' if hard else f'the layout {layout!r}'
        raise ValueError(
            f"relation does not go with {other}: it is drawn in the layout 'instances', with its "
            'own light clutter'
        )
    defaults = RELATION_SET if relation else LAYOUTS[layout]
    num_train = defaults.num_train if num_train is None else num_train
    num_val = defaults.num_val if num_val is None else num_val
    for name, value, least in (
        ('num_train', num_train, 1),
        ('num_val', num_val, 1),
        ('seed', seed, 0),
    ):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    out = Path(out).absolute()
    style = RELATION if relation else HARD if hard else EASY
    counts = {'train': num_train, 'val': num_val}
    parameters = {
        'format': FORMAT,
        'counts': counts,
        'seed': seed,
        'hard': hard,
        'layout': layout,
        'relation': relation,
    }
    if _is_complete(out, parameters):
        return False
    _check_replaceable(out, parameters, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f'.{out.name}.partial-'
    for left in out.parent.glob(f'{prefix}*'):  # of a process that was killed
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        for split, count in counts.items():
            drawn = scenes(split, count, seed, style, LAYOUTS[layout].single)
            reported = _reporting(drawn, progress, split, count)
            LAYOUTS[layout].write(partial, split, reported, style.classes)
        _write_marker(partial, parameters)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _reporting(
    drawn: Iterable[Scene], progress: Callable[[str, int, int], None], split: str, count: int
) -> Iterator[Scene]:
    """Hands scenes on, and reports each when the next is asked for: then it has been written."""
    for done, scene in enumerate(drawn, start=1):
        yield scene
        progress(split, done, count)


def _umask() -> int:
    """The process's file mode mask: mkdtemp makes private folders, a data set is not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- the program ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--layout',
        choices=LAYOUTS,
        default='instances',
        help="instances in COCO's files (the default), semantic label maps in ADE20K's, or one "
        'object an image in a folder for each of the classes',
    )
    folders = ', '.join(layout.folder for layout in LAYOUTS.values())
    parser.add_argument(
        '--out',
        help=f'folder of the set (default, by layout: {folders}; -hard is added with --hard; '
        f'{RELATION_SET.folder} with --relation)',
    )
    for option, name, what in (
        ('--num-train', 'num_train', 'training'),
        ('--num-val', 'num_val', 'validation'),
    ):
        counts = ', '.join(str(getattr(layout, name)) for layout in LAYOUTS.values())
        parser.add_argument(
            option,
            type=int,
            help=f'{what} images (default, by layout: {counts}; '
            f'{getattr(RELATION_SET, name)} with --relation)',
        )
    parser.add_argument(
        '--seed', type=int, default=0, help='seed; the same one gives the same bytes'
    )
    parser.add_argument(
        '--hard',
        action='store_true',
        help='six rotated classes in heavy clutter instead of three in light',
    )
    parser.add_argument(
        '--relation',
        action='store_true',
        help='small shapes whose class depends on a marker far away in the image, too; instances '
        'only, and not with --hard',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace a toy set drawn with other options'
    )
    return parser.parse_args(argv)


def show_progress(split: str, done: int, total: int) -> None:
    """Prints how far a split is: in place on a terminal, else a line every 64 images."""
    if sys.stdout.isatty():
        print(f'\rdrawing {split}: {done}/{total}', end='\n' if done == total else '', flush=True)
    elif done % 64 == 0 or done == total:
        print(f'drawing {split}: {done}/{total}', flush=True)


def main(argv: list[str] | None = None) -> int:
    """Draws the set; returns the exit status."""
    args = parse_args(argv)
    layout = RELATION_SET if args.relation else LAYOUTS[args.layout]
    out = args.out or layout.folder + ('-hard' if args.hard else '')
    num_train = layout.num_train if args.num_train is None else args.num_train
    num_val = layout.num_val if args.num_val is None else args.num_val
    start = time.perf_counter()
    try:
        drawn = make_dataset(
            out,
            layout=args.layout,
            num_train=num_train,
            num_val=num_val,
            seed=args.seed,
            hard=args.hard,
            relation=args.relation,
            force=args.force,
            progress=show_progress,
        )
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: nothing was left behind', file=sys.stderr)
        return 130
    took = f'drawn in {time.perf_counter() - start:.1f} s' if drawn else 'already there'
    print(f'{out}: {num_train} train and {num_val} val images, {took}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
