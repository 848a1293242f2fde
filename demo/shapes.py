"""Draws the toy dataset "shapes" in one of four layouts, unless it exists already.

Coloured shapes with exact masks of their visible pixels, for demos and tests; a module and a
program.

:func:`draw_scene` draws a scene from a random generator and a :class:`Style`, without any file; a
writer saves scenes in one of the :data:`LAYOUTS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.progress import track

FORMAT = 2
"""Increased when the same parameters draw other images, so that older sets are not mistaken."""

MARKER = 'dataset.json'
"""File in a dataset's folder that records the parameters that drew it."""

SPLITS = ('train', 'val')
IMAGE_SIDES = (192, 384)
SINGLE_SIDES = (112, 160)
"""Sides of an image with one object, which then fills more of it."""
RELATION_SIZE = (64, 384)
"""Height and width of an image with a far marker: long and low, so far apart in few pixels."""
FAR = 224
"""Minimum distance in pixels from the marker to any object, along the width."""
MARKER_WIDTH = 48
MARKER_COLOURS = ((255, 0, 0), (0, 0, 255))
"""Colour of each kind of marker."""
_SHIFT = 4
"""Fractional bits of the fixed-point coordinates for OpenCV."""


def _regular(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """(x, y) corners of a regular polygon in the unit circle; ``inner`` < 1 makes it a star."""
    steps = corners if inner == 1.0 else 2 * corners
    angles = -np.pi / 2 + 2 * np.pi * np.arange(steps) / steps
    radii = np.where(np.arange(steps) % 2 == 0, 1.0, inner)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


_ARM = 0.36
OUTLINES = {
    'circle': None,
    'square': [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    'triangle': [(0, -1), (1, 1), (-1, 1)],
    'pentagon': _regular(5),
    'star': _regular(5, inner=0.42),
    'cross': [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
}
"""Corners of each shape as (x, y) in [-1, 1], y downwards; None is the unit circle."""


@dataclasses.dataclass(frozen=True)
class Style:
    """What scenes look like.

    Attributes:
        classes: Names of the classes, up to any hyphen keys of :data:`OUTLINES`; a label is an
            index into them.
        rotate: Whether each object is rotated by a random angle.
        lines: Minimum and maximum number of line segments in the background.
        dots: Minimum and maximum number of dots in the background.
        clutter_size: Maximum width of a line and radius of a dot, in pixels.
        noise: Standard deviation of the noise on each pixel, in grey levels of 0–255.
        vivid: Whether objects have saturated colours on a greyish background; otherwise both have
            any colours.
        objects: Minimum and maximum number of objects.
        object_sizes: Minimum and maximum side of an object, in pixels.
        min_visible: Fraction of an object that stays visible; a later object that would hide more
            is placed elsewhere.
        stuff: Two names, of lines and of dots in the background, see :func:`_textures`; empty for
            a background without classes.
        marks: Kinds of the far marker, see :func:`draw_relation`; a class is then the name of a
            shape, a hyphen and a kind, with the classes of the first kind first. Empty for no
            marker.
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
    stuff: tuple[str, ...] = ()
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
"""Small shapes whose class combines the outline with the kind of a far marker."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One drawn image and what is in it.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        labels: (N,) int64, indices into the style's classes.
        masks: (N, H, W) bool, the *visible* pixels of each object: later objects hide earlier
            ones, so no pixel belongs to two objects.
        stuff: (H, W) int64, indices into the style's stuff, behind the objects as well; None if
            the style has none.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    stuff: np.ndarray | None = None


# --- drawing --------------------------------------------------------------------------------------


def _fixed_point(values: np.ndarray | float) -> np.ndarray:
    """Fixed-point coordinates for OpenCV: integers with ``_SHIFT`` fractional bits."""
    return np.rint(np.multiply(values, 2**_SHIFT)).astype(np.int32)


def _object_mask(
    rng: np.random.Generator, style: Style, label: int, size: tuple[int, int]
) -> np.ndarray:
    """Mask (H, W) of a whole object at a random place in the image."""
    side = int(rng.integers(style.object_sizes[0], style.object_sizes[1] + 1))
    left = int(rng.integers(0, size[1] - side + 1))
    top = int(rng.integers(0, size[0] - side + 1))
    angle = rng.uniform(0, 2 * np.pi) if style.rotate else 0.0
    # The side is measured from the centre of the first pixel to that of the last.
    radius = (side - 1) / 2
    centre = np.array([left + radius, top + radius])
    mask = np.zeros(size, np.uint8)
    outline = OUTLINES[style.classes[label].partition('-')[0]]
    if outline is None:
        cv2.circle(
            mask, _fixed_point(centre).tolist(), int(_fixed_point(radius)), 1, -1, shift=_SHIFT
        )
        return mask.astype(bool)
    corners = np.array(outline)
    if style.rotate:  # and shrunk until the corners fit into the same box
        turn = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        corners = corners / np.linalg.norm(corners, axis=1).max() @ turn
    cv2.fillPoly(mask, [_fixed_point(centre + radius * corners)], 1, shift=_SHIFT)
    return mask.astype(bool)


def _colour(rng: np.random.Generator, style: Style, taken: list[np.ndarray]) -> np.ndarray:
    """An RGB colour for an object that differs from those taken, so that its outline is visible."""
    best, best_distance = None, -1.0
    for _ in range(30):
        colour = rng.uniform(0, 255, 3)
        if style.vivid:  # stretched until one channel is bright and another dark
            bright, dark = rng.uniform(150, 255), rng.uniform(0, 70)
            colour = np.interp(colour, [colour.min(), colour.max()], [dark, bright])
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
        start, end = (rng.uniform(0, 1, (2, 2)) * (width, height)).astype(int).tolist()
        thickness = round(rng.uniform(1, style.clutter_size))
        colour = base + rng.uniform(-70, 70, 3)
        cv2.line(image, start, end, colour.tolist(), thickness)
    for _ in range(rng.integers(style.dots[0], style.dots[1] + 1)):
        centre = (rng.uniform(0, 1, 2) * (width, height)).astype(int).tolist()
        radius = round(rng.uniform(1, style.clutter_size))
        colour = base + rng.uniform(-70, 70, 3)
        cv2.circle(image, centre, radius, colour.tolist(), -1)
    return image, base


def _textures(
    rng: np.random.Generator, style: Style, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A background with lines on one side of a random straight line and dots on the other.

    Returns:
        (H, W, 3) float, its mean colour, and which of the two each pixel has, (H, W) int64.
    """
    lined, base = _background(rng, dataclasses.replace(style, lines=(60, 90), dots=(0, 0)), size)
    dotted, other = _background(
        rng, dataclasses.replace(style, lines=(0, 0), dots=(250, 400)), size
    )
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(side) - rng.uniform(0.3, 0.7) * side for side in size)
    stuff = (np.cos(angle) * y[:, None] + np.sin(angle) * x > 0).astype(np.int64)
    return np.where(stuff[..., None] == 0, lined, dotted), (base + other) / 2, stuff


def draw_scene(rng: np.random.Generator, style: Style = EASY, only: int | None = None) -> Scene:
    """Draws one scene: a cluttered background and objects, later ones in front.

    The image is never square; its sides are 192 to 384 pixels, or 112 to 160 for one object. The
    sides of an object are the style's ``object_sizes`` (a rotated one fits in a circle of that
    width). At least ``min_visible`` of every object stays visible, so every object has a label.

    Args:
        rng: Source of all randomness.
        style: What to draw.
        only: Label of the single object to draw; None draws as many as the style's ``objects``
            says, with random labels.

    Returns:
        The image, labels and visible masks, and with a style that has stuff its map.
    """
    least, greatest = IMAGE_SIDES if only is None else SINGLE_SIDES
    height, width = (int(side) for side in rng.integers(least, greatest + 1, 2))
    if height == width:
        width += 1 if width < greatest else -1
    stuff = None
    if style.stuff:
        image, base, stuff = _textures(rng, style, (height, width))
    else:
        image, base = _background(rng, style, (height, width))
    if only is None:
        labels, masks = _add_objects(rng, style, image, base, range(len(style.classes)))
    else:
        labels, masks = _add_objects(rng, style, image, base, range(only, only + 1), count=1)
    image = image + rng.normal(0, style.noise, image.shape)
    return Scene(_pixels(image), labels, masks, stuff)


def draw_relation(
    rng: np.random.Generator, mark: int, left: bool, style: Style = RELATION
) -> Scene:
    """Draws one scene in which the class of every object depends on a marker far from it.

    The marker, a bar as high as the image near its left or right end, has the colour of its kind
    and is not an object. The objects are near the other end, at least :data:`FAR` pixels away.
    Their number, size, place, outline and colour do not depend on the kind, so only the marker
    shows it.

    Args:
        rng: Source of all randomness; with the same state, the two kinds differ only in the pixels
            of the marker and in the labels.
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
    outlines = len(style.classes) // len(style.marks)
    choices = range(mark * outlines, (mark + 1) * outlines)
    near = end + FAR
    labels, masks = _add_objects(rng, style, image[:, near:], base, choices)
    masks = np.pad(masks, ((0, 0), (0, 0), (near, 0)))
    if left:
        return Scene(_pixels(image), labels, masks)
    return Scene(_pixels(image[:, ::-1]), labels, masks[..., ::-1])


def _pixels(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _add_objects(
    rng: np.random.Generator,
    style: Style,
    image: np.ndarray,
    base: np.ndarray,
    choices: range,
    count: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws objects into a background; returns their labels and visible masks.

    Args:
        rng: Source of all randomness.
        style: What to draw.
        image: The background, (H, W, 3) float.
        base: Its mean colour.
        choices: The labels to choose from, with equal probability.
        count: Number of objects; None for one from the style's range.
    """
    colours, labels = [base], []
    masks: list[np.ndarray] = []
    areas: list[int] = []
    least, greatest = style.objects
    for _ in range(rng.integers(least, greatest + 1) if count is None else count):
        label = int(rng.integers(choices.start, choices.stop)) if len(choices) > 1 else choices[0]
        for _ in range(20):
            mask = _object_mask(rng, style, label, image.shape[:2])
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
    return np.array(labels), np.stack(masks)


def scenes(
    split: str, count: int, seed: int, style: Style, single: bool = False
) -> Iterator[Scene]:
    """Draws the scenes of a split; the i-th does not depend on how many there are.

    Args:
        split: ``'train'`` or ``'val'``; the two share no scene.
        count: Number of scenes.
        seed: Non-negative seed of the whole dataset.
        style: What to draw.
        single: Whether each scene has one object, of each class in turn. In a style with a far
            marker, its kinds and the ends of the image take turns instead.

    Yields:
        The scenes, in order.
    """
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        if style.marks:
            turn, mark = divmod(index, len(style.marks))
            yield draw_relation(rng, mark, turn % 2 == 0, style)
        else:
            yield draw_scene(rng, style, index % len(style.classes) if single else None)


# --- layouts --------------------------------------------------------------------------------------

# A writer saves a split in an existing folder: (folder, split, scenes, name of each label).
Writer = Callable[[Path, str, Iterable[Scene], tuple[str, ...]], None]


def write_instances(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split as COCO instances: ``SPLIT/*.png`` and ``annotations/SPLIT.json``."""
    from pycocotools import mask as coco_mask  # comes with mmdet, which reads these files

    (folder / split).mkdir()
    images, annotations = [], []
    for index, scene in enumerate(drawn, 1):
        name = f'{index - 1:06d}.png'
        Image.fromarray(scene.image).save(folder / split / name)
        height, width = scene.image.shape[:2]
        images.append({'id': index, 'file_name': name, 'height': height, 'width': width})
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': index,
                    'category_id': label + 1,
                    'bbox': coco_mask.toBbox(code).tolist(),
                    'area': int(coco_mask.area(code)),
                    'iscrowd': 0,
                    'segmentation': {**code, 'counts': code['counts'].decode()},
                }
            )
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(classes)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations').mkdir(exist_ok=True)
    (folder / f'annotations/{split}.json').write_text(json.dumps(content), encoding='utf-8')


def write_panoptic(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split as COCO instances, with a label map of each picture beside the JSON file.

    The maps are 8-bit grey images, ``annotations/SPLIT/*.png``: the classes of objects, then those
    of stuff, from 0.
    """
    maps = folder / 'annotations' / split
    maps.mkdir(parents=True)

    def with_maps() -> Iterator[Scene]:
        for index, scene in enumerate(drawn):
            label_map = scene.stuff + len(classes)
            for mask, label in zip(scene.masks, scene.labels, strict=True):
                label_map[mask] = label
            Image.fromarray(label_map.astype(np.uint8)).save(maps / f'{index:06d}.png')
            yield scene

    write_instances(folder, split, with_maps(), classes)


def write_semantic(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split in ADE20K's layout: ``images/SPLIT/*.png``, ``annotations/SPLIT/*.png``.

    The splits are named ``training`` and ``validation``. A label map is an 8-bit grey image: 1 is
    the background, 2 the first class, and 0, which would be unlabelled, does not occur. As with
    ADE20K, the config defines the names of classes.
    """
    name = {'train': 'training', 'val': 'validation'}[split]
    images, maps = folder / 'images' / name, folder / 'annotations' / name
    images.mkdir(parents=True)
    maps.mkdir(parents=True)
    for index, scene in enumerate(drawn):
        Image.fromarray(scene.image).save(images / f'{index:06d}.png')
        label_map = np.ones(scene.image.shape[:2], np.uint8)
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            label_map[mask] = label + 2
        Image.fromarray(label_map).save(maps / f'{index:06d}.png')


def write_classes(
    folder: Path, split: str, drawn: Iterable[Scene], classes: tuple[str, ...]
) -> None:
    """Writes a split of scenes with one object each as an image folder: ``SPLIT/CLASS/*.png``."""
    for name in classes:
        (folder / split / name).mkdir(parents=True)
    for index, scene in enumerate(drawn):
        name = classes[scene.labels[0]]
        Image.fromarray(scene.image).save(folder / split / name / f'{index:06d}.png')


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of a dataset.

    Attributes:
        write: Writes a split.
        folder: Default folder of the dataset.
        num_train: Default number of training images.
        num_val: Default number of validation images.
        single: Whether each scene has one object only.
    """

    write: Writer
    folder: str
    num_train: int = 256
    num_val: int = 48
    single: bool = False


LAYOUTS = {
    'instances': Layout(write_instances, 'data/shapes'),
    'semantic': Layout(write_semantic, 'data/shapes-semantic', num_train=768),
    'classes': Layout(write_classes, 'data/shapes-classes', 2048, 96, single=True),
    'panoptic': Layout(write_panoptic, 'data/shapes-panoptic', num_train=768),
}
STUFF = ('lines', 'dots')
"""Classes of the background in the layout ``'panoptic'``."""
RELATION_SET = Layout(write_instances, 'data/shapes-relation', 4096, 256)
"""Default folder and size of the dataset with a far marker."""


# --- the set --------------------------------------------------------------------------------------


def _check_replaceable(folder: Path, parameters: dict, force: bool) -> None:
    """Raises FileExistsError unless a new dataset may replace the folder."""
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
        raise FileExistsError(
            f'{folder} holds another toy set ({"; ".join(changes)}): choose another --out, or '
            '--force to replace it'
        )


def _read_marker(folder: Path) -> dict | None:
    """The parameters that drew a dataset; None if the folder is not one of ours."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and 'format' in found else None


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
    progress: bool = False,
) -> bool:
    """Makes a dataset of shapes, unless it exists already.

    The dataset is drawn beside ``out`` and moved there when complete, so an interrupted call leaves
    nothing that could be mistaken for a dataset.

    Args:
        out: Folder of the dataset.
        layout: ``'instances'`` (COCO's), ``'semantic'`` (ADE20K's), ``'classes'`` (a folder for
            each class) or ``'panoptic'`` (COCO's, with label maps of the background, too).
        num_train: Number of training images; None for the default of the layout or of
            ``relation``, as for ``num_val``.
        num_val: Number of validation images.
        seed: Non-negative seed.
        hard: Six rotated classes in heavy clutter and noise, instead of three upright ones in
            light clutter.
        relation: Small objects whose class depends on a far marker, see :func:`draw_relation`;
            only with the layout ``'instances'``, and not with ``hard``.
        force: Replaces a toy dataset that was drawn with other arguments. A folder that holds
            anything else is never replaced.
        progress: Shows a progress bar for each split.

    Returns:
        True if the dataset was drawn, False if it existed.

    Raises:
        ValueError: The layout is unknown, a number is out of range, or ``relation`` cannot be
            combined with the other arguments.
        FileExistsError: ``out`` holds something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {", ".join(LAYOUTS)}, got {layout!r}')
    if relation and (hard or layout != 'instances'):
        raise ValueError("relation goes with the layout 'instances' only, and not with hard")
    kind = RELATION_SET if relation else LAYOUTS[layout]
    num_train = kind.num_train if num_train is None else num_train
    num_val = kind.num_val if num_val is None else num_val
    if min(num_train, num_val) < 1 or seed < 0:
        raise ValueError(
            'num_train and num_val must be at least 1 and seed at least 0, got '
            f'{num_train}, {num_val} and {seed}'
        )
    out = Path(out).absolute()
    style = RELATION if relation else HARD if hard else EASY
    if layout == 'panoptic':
        style = dataclasses.replace(style, stuff=STUFF)
    counts = {'train': num_train, 'val': num_val}
    parameters = dict(
        format=FORMAT, counts=counts, seed=seed, hard=hard, layout=layout, relation=relation
    )
    if _read_marker(out) == parameters:
        return False
    _check_replaceable(out, parameters, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.partial-', dir=out.parent) as folder:
        partial = Path(folder, out.name)
        partial.mkdir()
        for split, count in counts.items():
            drawn = scenes(split, count, seed, style, kind.single)
            bar = track(drawn, f'drawing {split}', total=count, disable=not progress)
            kind.write(partial, split, bar, style.classes)
        (partial / MARKER).write_text(json.dumps(parameters), encoding='utf-8')
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    return True


# --- the program ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--layout',
        choices=LAYOUTS,
        default='instances',
        help="instances in COCO's files (the default), semantic label maps in ADE20K's, one "
        'object an image in a folder for each of the classes, or panoptic: instances on two '
        'kinds of background, with label maps beside them',
    )
    parser.add_argument(
        '--out',
        help='folder of the set (default: data/shapes, with -semantic, -classes, -panoptic, '
        '-hard or -relation)',
    )
    parser.add_argument('--num-train', type=int, help='training images (default: by layout)')
    parser.add_argument('--num-val', type=int, help='validation images (default: by layout)')
    parser.add_argument('--seed', type=int, default=0)
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


def main(argv: list[str] | None = None) -> int:
    """Draws the dataset; returns the exit status."""
    options = vars(parse_args(argv))
    kind = RELATION_SET if options['relation'] else LAYOUTS[options['layout']]
    out = options.pop('out') or kind.folder + ('-hard' if options['hard'] else '')
    try:
        drawn = make_dataset(out, **options, progress=True)
    except (ValueError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted: nothing was left behind', file=sys.stderr)
        return 130
    print(f'{out}: {"drawn" if drawn else "already there"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
