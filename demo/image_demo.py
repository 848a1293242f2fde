"""Finds objects, segments or classes in pictures and videos, with a model of any task.

Writes the pictures with what was found into OUT/vis, and all results to OUT/results.json in COCO's
style. What cannot be read is reported in a line, and the rest goes on.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import hat_mm
from hat_mm.engine.cli import UserError, make_writable, run_tool

# isort: split
from mmengine.utils import ProgressBar

from hat_mm_runtime import ModelError, PictureError
from hat_mm_runtime.images import read

CHECKPOINTS = ('.pth', '.pt', '.ckpt', '.bin', '.safetensors', '.tar')
PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        usage='%(prog)s INPUT [INPUT ...] MODEL [WEIGHTS] [options]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # argparse cannot tell which of the last two words is the model.
    parser.add_argument(
        'words',
        nargs='+',
        metavar='INPUT … MODEL [WEIGHTS]',
        help='pictures, videos, folders or patterns; a name of hat_mm.list_models(), a config or '
        'an exported file; its checkpoint, for a name by default the published one',
    )
    parser.add_argument('--out-dir', type=Path, default=Path('outputs'), metavar='OUT')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of detections')
    parser.add_argument(
        '--tiles', type=int, metavar='PIXELS', help='detect in tiles of this side, through SAHI'
    )
    parser.add_argument('--overlap', type=float, default=0.2, help='shared part of tiles')
    parser.add_argument('--device', help='such as cuda:0 (default: a GPU if there is one)')
    args = parser.parse_args(argv)
    has_weights = args.words[-1].lower().endswith(CHECKPOINTS)
    args.weights = args.words.pop() if has_weights else None
    if len(args.words) < 2:
        parser.error('give at least one INPUT, then a MODEL')
    *args.inputs, args.model = args.words
    return args


# --- inputs and outputs ---------------------------------------------------------------------------


def find_files(inputs: list[str], results: Path) -> dict[Path, Path]:
    """The files of all inputs, and the path of each result below the folder of results.

    Args:
        inputs: Files, folders and patterns.
        results: Folder of earlier results, which are left out.

    Raises:
        UserError: Nothing matches an input.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        # A name may hold brackets.
        matches = [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))
        files: dict[Path, Path] = {}
        for path in map(Path, matches):
            if path.is_dir():
                below = (file for file in sorted(path.rglob('*')) if file.is_file())
                good = (file for file in below if file.suffix.lower() in (*PICTURES, *VIDEOS))
                files |= {file: file.relative_to(path) for file in good}
            elif str(path) == text or path.suffix.lower() in (*PICTURES, *VIDEOS):
                files.setdefault(path, Path(path.name))
        old = results.resolve()
        files = {a: b for a, b in files.items() if old not in a.resolve().parents}
        if not files:
            raise UserError(f'no picture or video: {text!r}')
        found |= {file: target for file, target in files.items() if file not in found}
    taken: set[Path] = set()
    for file, wanted in found.items():
        target = wanted.with_suffix('.mp4' if file.suffix.lower() in VIDEOS else '.jpg')
        number = 2
        while target in taken:
            target = target.with_stem(f'{wanted.stem}_{number}')
            number += 1
        taken.add(target)
        found[file] = target
    return found


def frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, or the one picture of a file.

    Raises:
        PictureError: It cannot be read.
    """
    if path.suffix.lower() not in VIDEOS:
        yield read(path)
        return
    video = cv2.VideoCapture(plain(path))
    try:
        good, frame = video.read()
        if not good:
            raise PictureError(f'video {str(path)!r} cannot be read: it has no frames')
        while good:
            yield frame
            good, frame = video.read()
    finally:
        video.release()


def plain(path: Path) -> str:
    """A path that OpenCV's videos can take; they end the process at others.

    Raises:
        PictureError: It is not UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise PictureError(f'video {str(path)!r}: its name is not UTF-8, rename it') from error
    return str(path)


class Writer:
    """Writes pictures of results, or a video of them.

    Args:
        source: The file that the results are of.
        target: Where they go.
    """

    def __init__(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self.target = target
        self.video: cv2.VideoWriter | None = None
        self.rate = 0.0
        if target.suffix == '.mp4':
            video = cv2.VideoCapture(plain(source))
            self.rate = video.get(cv2.CAP_PROP_FPS) or 25.0
            video.release()

    def write(self, picture: np.ndarray) -> None:
        """Writes a picture (H, W, 3), BGR.

        Raises:
            PictureError: JPEG or OpenCV cannot take it.
        """
        if not self.rate:
            good, content = cv2.imencode('.jpg', picture)
            if not good:
                raise PictureError(f'{self.target} cannot be written: too large for JPEG?')
            self.target.write_bytes(content.tobytes())
            return
        if self.video is None:
            kind = cv2.VideoWriter.fourcc(*'mp4v')
            size = picture.shape[1::-1]
            self.video = cv2.VideoWriter(plain(self.target), kind, self.rate, size)
            if not self.video.isOpened():
                raise PictureError(f'{self.target} cannot be written: OpenCV has no encoder for it')
        self.video.write(picture)

    def close(self) -> None:
        """Ends a video."""
        if self.video is not None:
            self.video.release()


class Results:
    """Results of all pictures in COCO's style: images, annotations, categories."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.categories: dict[int, str] = {}

    def add(self, file: Path, frame: int, found: Any) -> None:
        """Adds what was found in a picture, or in a frame of a video."""
        height, width = found.image.shape[:2]
        image: dict[str, Any] = dict(id=len(self.images), file_name=str(file))
        image |= dict(width=width, height=height)
        if file.suffix.lower() in VIDEOS:
            image['frame'] = frame
        self.images.append(image)
        for one in found.to_json():
            self.categories[one['category_id']] = one.pop('name')
            number = len(self.annotations)
            self.annotations.append(dict(id=number, image_id=image['id'], **one))

    def write(self, path: Path, classes: Any) -> None:
        """Writes the file; classes that were not found are among the categories, too."""
        names = dict(enumerate(classes or ())) | self.categories
        categories = [dict(id=i, name=names[i]) for i in sorted(names)]
        content = dict(images=self.images, annotations=self.annotations, categories=categories)
        path.write_text(json.dumps(content), encoding='utf-8')


# --- the demo -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Runs the model on all inputs.

    Raises:
        UserError: An input could not be read.
    """
    args = parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no Unicode
            stream.reconfigure(errors='backslashreplace')
    files = find_files(args.inputs, args.out_dir / 'vis')
    make_writable(str(args.out_dir), '--out-dir')
    infer = hat_mm.Inferencer(
        args.model, args.weights, device=args.device, tile=args.tiles, overlap=args.overlap
    )
    results, failed = Results(), 0
    progress = ProgressBar(len(files), file=sys.stderr)
    try:
        for file, target in files.items():
            writer = None
            try:
                writer = Writer(file, args.out_dir / 'vis' / target)
                for i, frame in enumerate(frames(file)):
                    found = infer(frame, args.score_thr)
                    results.add(file, i, found)
                    writer.write(found.draw())
            except (PictureError, ModelError) as error:  # and on to the next
                known = str(file) in str(error)
                print(f'\nerror: {error if known else f"{file}: {error}"}', file=sys.stderr)
                failed += 1
            finally:
                if writer is not None:
                    writer.close()
            progress.update()
    finally:  # an interrupted run keeps what it has found
        results.write(args.out_dir / 'results.json', infer.classes)
    print(
        f'\n{len(files) - failed} files: pictures in {args.out_dir / "vis"}, '
        f'{len(results.annotations)} results in {args.out_dir / "results.json"}'
    )
    if failed:
        raise UserError(f'{failed} of {len(files)} files could not be read')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'image_demo.py'))
