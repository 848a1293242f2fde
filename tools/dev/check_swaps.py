"""Swaps the backbone of every config that the toolboxes ship, and lists what happens.

Each leaf of mmdet, mmsegmentation and mmpretrain is parsed, swapped, built and run on a small
picture. What is found goes to a file as soon as it is there, so the check can be interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from hat_mm.engine.build import build_model, without_weights
from hat_mm.engine.cli import UserError
from hat_mm.engine.config_text import TOOLBOXES, config_text, configs_of
from hat_mm.engine.maps import check_model
from hat_mm.engine.swap import plan_swap

BACKBONES = ('fastervit-0', 'hat-net-tiny')
SECONDS = 300
"""Most seconds for one config."""

checked: dict[str, str] = {}  # models that this process has run, and their errors


def leaves(toolbox: str) -> Iterator[str]:
    """The configs of a toolbox, by their paths in its folder."""
    root = configs_of(toolbox)
    for path in sorted(root.rglob('*.py')):
        if '_base_' not in path.parts:
            yield str(path.relative_to(root))


def check(toolbox: str, leaf: str, backbone: str) -> dict[str, Any]:
    """Swaps one backbone.

    Returns:
        ``outcome``: ``swapped``, ``refused``, ``failed``, ``broken`` (mmengine cannot read it) or
        ``fragment`` (it has no model); ``why`` for the others than ``swapped``.
    """
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    start = time.perf_counter()
    found = dict(toolbox=toolbox, leaf=leaf, backbone=backbone)
    try:
        outcome, why = _check(configs_of(toolbox) / leaf, backbone)
    except Exception as error:
        outcome, why = 'failed', f'{type(error).__name__}: {" ".join(str(error).split())}'
    finally:
        signal.alarm(0)
    return found | dict(outcome=outcome, why=why[:500], seconds=time.perf_counter() - start)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f'more than {SECONDS} s')


def _check(path: Path, backbone: str) -> tuple[str, str]:
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        return 'broken', f'{type(error).__name__}: {error}'
    if not isinstance(cfg.get('model'), dict):
        return 'fragment', 'no model'
    try:
        swap = plan_swap(cfg, backbone, check=False)
    except UserError as error:
        return 'refused', str(error)
    written = config_text(swap, str(path))
    with NamedTemporaryFile('w', suffix='.py') as file:
        file.write(written)
        file.flush()
        read = Config.fromfile(file.name)
    if read.to_dict() != swap.cfg.to_dict():
        return 'failed', f'the config that is written is another: {written}'
    text = json.dumps(without_weights(swap.cfg.model.to_dict()), default=str, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in checked:
        try:
            check_model(swap.cfg)
            checked[key] = ''
        except UserError as error:
            checked[key] = str(error)
    if not checked[key]:
        return 'swapped', ''
    try:
        cfg.default_scope = swap.cfg.default_scope
        build_model(without_weights(cfg))
    except Exception as error:
        return 'broken', f'with its own backbone, too: {type(error).__name__}: {error}'
    return 'failed', checked[key]


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    MMLogger.get_current_instance().setLevel('ERROR')
    logging.disable(logging.ERROR)


def main(argv: list[str] | None = None) -> int:
    """Checks what has not been checked, and prints the counts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--toolboxes', nargs='+', choices=TOOLBOXES, default=list(TOOLBOXES))
    parser.add_argument('--backbones', nargs='+', default=list(BACKBONES))
    parser.add_argument('--only', default='*', metavar='GLOB', help="leaves, such as 'yolox/*'")
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/check_swaps.jsonl'))
    args = parser.parse_args(argv)
    known = []
    if args.out.exists():
        known = [json.loads(line) for line in args.out.read_text(encoding='utf-8').splitlines()]
    done = {(found['toolbox'], found['leaf'], found['backbone']) for found in known}
    todo = [
        job
        for backbone in args.backbones
        for toolbox in args.toolboxes
        for leaf in leaves(toolbox)
        if (job := (toolbox, leaf, backbone)) not in done and Path(leaf).match(args.only)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        args.out.open('a', encoding='utf-8') as file,
        ProcessPoolExecutor(args.jobs, initializer=_quiet) as pool,
    ):
        for run in as_completed([pool.submit(check, *job) for job in todo]):
            file.write(json.dumps(run.result()) + '\n')
            file.flush()
    return 0


if __name__ == '__main__':
    sys.exit(main())
