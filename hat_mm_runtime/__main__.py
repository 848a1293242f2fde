"""Runs an exported model on pictures."""

import argparse
import json
import sys
import time
from pathlib import Path

import cv2

from . import Model, ModelError, images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser('python -m hat_mm_runtime', description=__doc__)
    parser.add_argument('model', help='file of tools/deployment/export.py, .onnx or .xml')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='picture')
    parser.add_argument(
        '--out', type=Path, metavar='DIR', help='folder for pictures of the results'
    )
    parser.add_argument('--json', action='store_true', help='print a line of JSON for each picture')
    parser.add_argument('--score-thr', type=float, default=0.3, help='least score of detections')
    parser.add_argument('--threads', type=int, help='number of threads')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the model or a picture failed."""
    args = parse_args(argv)
    failed = False
    try:
        targets = _targets(args.images, args.out) if args.out else {}
        model = Model(args.model, args.threads)
        for path in args.images:
            try:
                image = images.read(path)
            except ValueError as error:  # and on to the next
                print(f'error: {error}', file=sys.stderr)
                failed = True
                continue
            start = time.perf_counter()
            found = model(image, args.score_thr)
            seconds = time.perf_counter() - start
            if args.json:
                print(json.dumps(dict(image=path, results=found.to_json())))
            else:
                print(f'{path}: {found} ({seconds:.2f} s)')
            if args.out and not cv2.imwrite(str(targets[path]), found.draw()):
                raise OSError(f'{targets[path]} cannot be written')
    except (ModelError, ImportError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return int(failed)


def _targets(paths: list[str], folder: Path) -> dict[str, Path]:
    """A file for each picture; refuses those that would replace a picture or each other."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = {path: folder / f'{Path(path).stem}.png' for path in paths}
    for path, target in targets.items():
        others = [other for other in targets if other != path and targets[other] == target]
        if others:
            raise OSError(f'--out: {path} and {others[0]} would have the same name, {target.name}')
        if target.exists() and any(
            target.samefile(other) for other in paths if Path(other).exists()
        ):
            raise OSError(f'--out: the result of {path} would replace the picture {target}')
    return targets


if __name__ == '__main__':
    sys.exit(main())
