"""Runs an exported model on pictures."""

import argparse
import io
import json
import sys
import time
from pathlib import Path

import cv2

from . import Model, ModelError, PictureError


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
    parser.add_argument('--threads', type=_positive, help='number of threads')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 1 if the model or a picture failed."""
    args = parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no Unicode
            stream.reconfigure(errors='backslashreplace')
    failed = False
    try:
        targets = _targets(args.images, args.out) if args.out else {}
        model = Model(args.model, args.threads)
        if model.meta['task'] == 'features':
            raise ModelError(f'{args.model} is a backbone, which finds nothing in a picture')
        for path in args.images:
            start = time.perf_counter()
            try:
                found = model(path, args.score_thr)
            except (PictureError, ModelError) as error:  # and on to the next
                known = str(path) in str(error)
                print(f'error: {error}' if known else f'error: {path}: {error}', file=sys.stderr)
                failed = True
                continue
            seconds = time.perf_counter() - start
            if args.json:
                print(json.dumps(dict(image=path, results=found.to_json())))
            else:
                print(f'{path}: {found} ({seconds:.2f} s)')
            if args.out:
                targets[path].write_bytes(cv2.imencode('.png', found.draw())[1].tobytes())
    except (ModelError, ImportError, OSError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return int(failed)


def _targets(paths: list[str], folder: Path) -> dict[str, Path]:
    """A file for each picture; refuses those that would replace a picture or each other."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = {path: folder / f'{Path(path).stem}_result.png' for path in paths}
    for path, target in targets.items():
        others = [other for other in targets if other != path and targets[other] == target]
        if others:
            raise OSError(f'--out: {path} and {others[0]} would have the same name, {target.name}')
        if any(target.exists() and target.samefile(p) for p in paths if Path(p).exists()):
            raise OSError(f'--out: the result of {path} would replace the picture {target}')
    return targets


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f'{text!r} is not a positive integer')
    return int(text)


if __name__ == '__main__':
    sys.exit(main())
