"""Reads a user's own data: what is in it, what is wrong with it, how large its objects are.

Detection takes COCO's JSON; YOLO's and Pascal VOC's files become such JSON first, through the
``supervision`` package. Semantic segmentation takes a folder of label maps, classification a folder
for each class.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hat_mm import compat
from hat_mm.weights.names import some

from .cli import UserError

IGNORED = 255
"""Value of unlabelled pixels in label maps."""
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
CLASSIFIED = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')
"""Suffixes of pictures; those that mmpretrain reads from folders of classes."""


@dataclass(frozen=True)
class Finding:
    """Something wrong with the data.

    Attributes:
        text: What is wrong.
        cases: Names of all that it concerns.
        fatal: Whether a training would fail or learn something else.
    """

    text: str
    cases: Sequence[Any]
    fatal: bool = True

    def __str__(self) -> str:
        kind = 'error' if self.fatal else 'warning'
        return f'{kind}: {self.text}: {len(self.cases)} ({some(self.cases, 3)})'


@dataclass
class Split:
    """What one part of the data holds.

    Attributes:
        source: Annotation file, folder of label maps, or folder of classes.
        images: Folder of the pictures.
        classes: Names of the classes, in the order of their numbers.
        pictures: Number of pictures.
        objects: Number of objects, of each class.
        most: Number of objects in the fullest picture.
        sides: Square roots of the areas of all boxes, in pixels.
        sizes: Height and width of each picture in pixels; empty if not known.
        suffix: Suffix of the pictures beside label maps.
        findings: What is wrong.
    """

    source: Path
    images: Path
    classes: tuple[str, ...]
    pictures: int = 0
    objects: Counter = field(default_factory=Counter)
    most: int = 0
    sides: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sizes: list[tuple[int, int]] = field(default_factory=list)
    suffix: str = ''
    findings: list[Finding] = field(default_factory=list)

    def find(self, text: str, cases: Iterable[Any], *, fatal: bool = True) -> None:
        """Notes something that is wrong, unless it has no cases."""
        cases = list(cases)
        if cases:
            self.findings.append(Finding(text, cases, fatal))

    def find_empty_classes(self) -> None:
        """Notes classes without any example."""
        empty = [name for name in self.classes if not self.objects[name]]
        self.find('classes without an example', empty, fatal=False)

    def report(self) -> str:
        """What is in the split, and what is wrong, in lines."""
        counts = ', '.join(f'{name} {self.objects[name]}' for name in self.classes[:10])
        more = f' and {len(self.classes) - 10} more' if len(self.classes) > 10 else ''
        lines = [f'{self.source}: {self.pictures} pictures; {counts}{more}']
        if len(self.sides):
            quantiles = ', '.join(f'{q:.0f}' for q in np.quantile(self.sides, (0.05, 0.5, 0.95)))
            lines.append(f'side of a box, 5, 50 and 95 %: {quantiles} pixels')
        return '\n  '.join([*lines, *map(str, self.findings)])


# --- detection --------------------------------------------------------------------------------


def read_coco(source: Path, images: Path, *, masks: bool) -> Split:
    """Reads and checks a JSON file in COCO's format.

    Args:
        source: JSON file.
        images: Folder that its file names start from.
        masks: Whether every object needs a mask.

    Raises:
        UserError: The file is not of this format.
    """
    try:
        coco = json.loads(source.read_text(encoding='utf-8'))
        files = {image['id']: str(image['file_name']) for image in coco['images']}
        sizes = {image['id']: (image['height'] + 0, image['width'] + 0) for image in coco['images']}
        names = {category['id']: str(category['name']) for category in coco['categories']}
        annotations = coco['annotations']
        owners = [(a['id'], a['image_id'], a['category_id']) for a in annotations]
        numbers = [[value + 0 for value in a['bbox']] for a in annotations]
        boxes = np.array(numbers, dtype=float).reshape(len(owners), 4)
        hash(tuple(owners))
        # The toolbox and COCO's evaluation read both.
        areas = np.array([a['area'] + 0 * a['iscrowd'] for a in annotations], dtype=float)
    except OSError as error:
        raise UserError(f'{source} cannot be read: {error.strerror}') from error
    except KeyError as error:
        raise UserError(f"{source} is not in COCO's format: an entry has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{source} is not in COCO's format: {error}") from error
    split = Split(source, images, tuple(names.values()), len(coco['images']))
    split.sizes = list(sizes.values())
    for what in ('images', 'categories', 'annotations'):
        split.find(f'ids of {what} that occur twice', _twice(one['id'] for one in coco[what]))
    split.find('class names that occur twice', _twice(names.values()))
    # COCO's evaluation does: such an object never counts as found.
    zero = [number for number, *_ in owners if number == 0]
    split.find('objects with the id 0, which COCO takes for none', zero, fatal=False)
    split.find(
        'pictures without height and width',
        [files[i] for i, size in sizes.items() if not 1 <= min(size) <= max(size) < np.inf],
    )
    split.find(
        f'pictures that are not in {images}',
        [name for name in files.values() if not (images / name).is_file()],
    )
    split.find(
        'objects with a box that is no number',
        [
            number
            for (number, *_), box in zip(owners, boxes, strict=True)
            if not np.isfinite(box).all()
        ],
    )
    split.find(
        'objects of an unknown picture or class',
        [n for n, image, name in owners if image not in files or name not in names],
    )
    if not owners:
        split.find('no object at all in', [source])
    split.objects = Counter(names[name] for *_, name in owners if name in names)
    if masks:
        without = [a['id'] for a in annotations if not _is_mask(a.get('segmentation'))]
        split.find('objects without a mask, which the model needs', without)
    if any(finding.fatal for finding in split.findings):
        return split
    split.most = max(Counter(image for _, image, _ in owners).values(), default=0)
    limits = np.array([sizes[image][::-1] for _, image, _ in owners])
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    # mmdet drops what is outside, or below a pixel, and does not clip the rest.
    gone = (boxes[:, 2:] < 1).any(1) | (areas <= 0) | (high <= 0).any(1) | (low >= limits).any(1)
    beyond = ~gone & ((low < -1).any(1) | (high > limits + 1).any(1))
    split.sides = np.sqrt(boxes[~gone, 2:].prod(1))
    ids = np.array([number for number, *_ in owners], dtype=object)
    empty = 'objects that are empty or outside of their picture'
    split.find(empty, ids[gone], fatal=bool(gone.all()))
    split.find('boxes that reach beyond their picture', ids[beyond], fatal=False)
    used = {image for _, image, _ in owners}
    split.find(
        'pictures without an object', [files[i] for i in files if i not in used], fatal=False
    )
    split.find_empty_classes()
    return split


def _is_mask(segmentation: Any) -> bool:
    """Whether it is a run-length code or polygons of three corners and more."""
    if isinstance(segmentation, dict):
        return 'size' in segmentation and isinstance(segmentation.get('counts'), list | str)
    return (
        isinstance(segmentation, list)
        and bool(segmentation)
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
    )


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def to_coco(sources: dict[Path, tuple[Path, Path]], classes: Path | None) -> None:
    """Writes YOLO's or Pascal VOC's annotations as JSON files in COCO's format.

    Args:
        sources: For each file to write, folder of the annotations and folder of the pictures.
        classes: YOLO's ``data.yaml``, or a text file with a name a line; None for Pascal VOC, whose
            files have the names in them.

    Raises:
        DependencyError: ``supervision`` is not installed.
        UserError: A folder is missing or empty, or ``supervision`` cannot read the files.
    """
    datasets = compat.require('supervision').DetectionDataset
    found: dict[Path, Any] = {}
    for target, (labels, images) in sources.items():
        _pictures(images)
        suffix = '.txt' if classes else '.xml'
        if not any(labels.glob(f'*{suffix}')):
            raise UserError(
                f"{labels} has no {suffix} files: YOLO's are .txt and need --classes, Pascal "
                "VOC's are .xml and need none"
            )
        try:
            if classes:
                dataset = _read_yolo(datasets, labels, images, classes)
            else:
                dataset = datasets.from_pascal_voc(str(images), str(labels))
            dataset.as_coco(annotations_path=str(target))
        except UserError:
            raise
        except Exception as error:  # whatever a reader stumbles over in a file
            raise UserError(f'supervision cannot read {labels}: {error}') from error
        found[target] = json.loads(target.read_text(encoding='utf-8'))
    # Pascal VOC's classes are numbered as they occur, which differs between the splits.
    every = {c['name']: None for coco in found.values() for c in coco['categories']}
    numbers = {name: i for i, name in enumerate(every, start=1)}
    for target, coco in found.items():
        old = {c['id']: numbers[c['name']] for c in coco['categories']}
        for annotation in coco['annotations']:
            annotation['category_id'] = old[annotation['category_id']]
        coco['categories'] = [dict(id=number, name=name) for name, number in numbers.items()]
        target.write_text(json.dumps(coco), encoding='utf-8')


def _read_yolo(datasets: Any, labels: Path, images: Path, classes: Path) -> Any:
    if classes.suffix in ('.yaml', '.yml'):
        return datasets.from_yolo(str(images), str(labels), str(classes))
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, 'data.yaml')  # JSON is YAML, too
        names.write_text(json.dumps({'names': read_classes(classes)}), encoding='utf-8')
        return datasets.from_yolo(str(images), str(labels), str(names))


def read_classes(path: Path) -> tuple[str, ...]:
    """Reads names of classes from a text file, one a line.

    Raises:
        UserError: The file cannot be read, is empty, or a name occurs twice.
    """
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names or _twice(names):
        raise UserError(f'{path} must have a name of a class in each line, none of them twice')
    return names


# --- segmentation and classification ----------------------------------------------------------


def read_label_maps(source: Path, images: Path, classes: tuple[str, ...]) -> Split:
    """Reads and checks pictures and label maps, which are PNG files with the same stems.

    The objects of the split are the pictures that a class occurs in.

    Args:
        source: Folder of the label maps: a class number for each pixel, or 255 for none.
        images: Folder of the pictures.
        classes: Names of the classes, from number 0.

    Raises:
        UserError: A folder is missing or empty.
    """
    pictures = _pictures(images)
    maps = {path.stem: path for path in _pictures(source) if path.suffix == '.png'}
    split = Split(source, images, classes, len(pictures), suffix=pictures[0].suffix)
    split.find(
        f'pictures without a .png in {source}', [p.name for p in pictures if p.stem not in maps]
    )
    split.find(
        f'pictures that are not {split.suffix}, like the first one',
        [path.name for path in pictures if path.suffix != split.suffix],
    )
    damaged, channels, other, wrong = [], [], [], []
    for path in pictures:
        if path.stem not in maps:
            continue
        image, labels = _read(path, 'color'), _read(maps[path.stem], 'unchanged')
        if image is None or labels is None:
            damaged.append(path.stem)
        elif labels.ndim > 2:
            channels.append(maps[path.stem].name)
        else:
            split.sizes.append(labels.shape)
            if image.shape[:2] != labels.shape:
                other.append(path.name)
            numbers = np.unique(labels.astype(int))
            strange = [n for n in numbers if n >= len(classes) and n != IGNORED]
            if strange:
                wrong.append(f'{maps[path.stem].name} with {strange[0]}')
            split.objects.update(classes[n] for n in numbers if n < len(classes))
    split.find('pictures that cannot be read, or their label maps', damaged)
    split.find('label maps with several channels, which must have one', channels)
    split.find('label maps of another size than their picture', other)
    split.find(f'label maps with other values than 0 to {len(classes) - 1} and 255', wrong)
    split.find_empty_classes()
    return split


def _read(path: Path, flag: str) -> np.ndarray | None:
    """A picture ('color') or a label map ('unchanged'); None if it cannot be read."""
    # As mmseg reads them: label maps by Pillow, because OpenCV would turn a palette into colours.
    backend = 'pillow' if flag == 'unchanged' else 'cv2'
    try:
        return compat.require('mmcv').imread(str(path), flag=flag, backend=backend)
    except Exception:  # Pillow has many errors for damaged files
        return None


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f'there is no folder {folder}')
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f'{folder} has no pictures ({", ".join(SUFFIXES)})')
    return found


def read_folders(source: Path) -> Split:
    """Reads and checks a folder that has a folder of pictures for each class.

    Raises:
        UserError: The folder is missing or has no folders.
    """
    if not source.is_dir():
        raise UserError(f'there is no folder {source}')
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    if not folders:
        raise UserError(f'{source} has no folders, one for each class')
    split = Split(source, source, tuple(folder.name for folder in folders))
    for folder in folders:
        found = [path for path in folder.rglob('*') if path.suffix.lower() in CLASSIFIED]
        split.objects[folder.name] = len(found)
    split.pictures = split.objects.total()
    split.find_empty_classes()
    if not split.pictures:
        split.find(f'no picture ({", ".join(CLASSIFIED)}) in', [source])
    return split
