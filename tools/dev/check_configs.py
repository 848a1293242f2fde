"""Prints the grid of configs with a mark for each cell: parses, builds, steps.

A cell parses if its config resolves; builds if its model does, with the real backbone and without
memory for its weights; steps if the model, with the real widths but one block of each kind in each
stage, takes a training step on two small images to which every parameter contributes, and predicts.
A ResNet keeps all its blocks.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import make_configs
import torch

import hat_mm  # repairs the toolboxes before they are imported
from hat_mm.engine.build import build_model

SIZES = ((64, 96), (80, 64))
"""Height and width of the two images; a classifier gets both at the first size."""


# --- one config -----------------------------------------------------------------------------------


def parse(path: Path) -> Any:
    """Resolves a config."""
    return importlib.import_module('mmengine.config').Config.fromfile(str(path))


def shorten(cfg: Any) -> None:
    """Leaves few blocks in each stage of our backbones, few boxes, and no weights to load."""
    model = cfg.model
    model.backbone.init_cfg = None
    if model.backbone.type.startswith('hat_mm.'):
        kind = getattr(hat_mm, model.backbone.type.removeprefix('hat_mm.'))
        fields = dataclasses.asdict(kind.archs[str(model.backbone.arch)])
        # In SwinHAT every second block is of another kind.
        blocks = 2 if kind is hat_mm.SwinHAT else 1
        model.backbone.arch = {**fields, 'depths': (blocks,) * len(fields['depths'])}
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = (96, 128)  # instead of whole crops
    if 'roi_head' in model:
        model.test_cfg.rpn.max_per_img = 20
        model.test_cfg.rcnn.max_per_img = 5
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    if 'num_queries' in model:
        model.num_queries = 20


def step(cfg: Any) -> tuple[dict[str, float], list]:
    """Takes one training step and one prediction with a shortened model.

    Returns:
        The losses and the predictions.

    Raises:
        ValueError: A loss is not finite, or parameters got no gradient.
    """
    torch.manual_seed(0)
    shorten(cfg)
    optim = importlib.import_module('mmengine.optim')
    model = importlib.import_module('mmengine.model').revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    with _scope(cfg):
        optim_wrapper = optim.build_optim_wrapper(model, cfg.optim_wrapper)
        reached = set()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: reached.add(name))
        losses = model.train().train_step(batch(cfg), optim_wrapper)
        bad = [name for name, value in losses.items() if not torch.isfinite(value).all()]
        unused = [name for name in trained if name not in reached]
        if bad or unused:
            raise ValueError(f'losses not finite: {bad}; parameters without a gradient: {unused}')
        with torch.no_grad():
            predictions = model.eval().test_step(batch(cfg, images=1))
    return {name: float(value.detach().mean()) for name, value in losses.items()}, list(predictions)


def batch(cfg: Any, images: int = 2) -> dict:
    """Random images with ground truth, as the toolbox's dataloader would give them."""
    if cfg.default_scope == 'mmdet':
        masks = 'mask_head' in cfg.model.get('roi_head', {})
        testing = importlib.import_module('mmdet.testing')
        sizes = [[3, *size] for size in SIZES[:images]]
        return testing.demo_mm_inputs(images, sizes, num_classes=80, with_mask=masks)
    structures = importlib.import_module(f'{cfg.default_scope}.structures')
    samples, inputs = [], []
    for size in SIZES[:images]:
        if cfg.default_scope == 'mmseg':
            sample = structures.SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
            data = importlib.import_module('mmengine.structures').PixelData(
                data=torch.randint(0, cfg.model.decode_head.num_classes, (1, *size))
            )
            sample.gt_sem_seg = data
        else:
            size = SIZES[0]
            sample = structures.DataSample().set_gt_label(len(samples))
        samples.append(sample)
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    if cfg.default_scope == 'mmpretrain':
        inputs = torch.stack(inputs)
    return dict(inputs=inputs, data_samples=samples)


def _scope(cfg: Any) -> Any:
    registry = importlib.import_module('mmengine.registry')
    return registry.DefaultScope.overwrite_default_scope(cfg.default_scope)


# --- the grid -------------------------------------------------------------------------------------


def check(path: Path, steps: bool) -> tuple[str, str]:
    """How far a config gets: the marks of what it passes, and the first error."""
    marks = ''
    try:
        cfg = parse(path)
        marks += 'p'
        with torch.device('meta'):
            build_model(cfg.copy())
        marks += 'b'
        if steps:
            step(parse(path))
            marks += 's'
    except Exception as error:
        return marks, f'{type(error).__name__}: {error}'
    return marks, ''


def main(argv: list[str] | None = None) -> int:
    """Checks the configs and prints the grid; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only', default='*', metavar='GLOB', help="names of configs, such as 'dino*'"
    )
    parser.add_argument('--no-steps', action='store_true', help='parse and build only')
    args = parser.parse_args(argv)
    leaves = [
        leaf for leaf in make_configs.LEAVES if fnmatch.fnmatch(Path(leaf.path).stem, args.only)
    ]
    if not leaves:
        parser.error(f'no config has a name like {args.only!r}')
    # How parameters are initialized is not what the grid is about.
    importlib.import_module('mmengine.logging').MMLogger.get_current_instance().setLevel('WARNING')
    cells, errors = {}, {}
    for number, leaf in enumerate(leaves, 1):
        start = time.perf_counter()
        marks, error = check(make_configs.CONFIGS / leaf.path, not args.no_steps)
        cells[leaf.backbone, leaf.pairing.task] = marks or '-'
        if error:
            errors[leaf.path] = error
        spent = time.perf_counter() - start
        print(f'{number}/{len(leaves)} {leaf.path} {marks} {spent:.1f} s', file=sys.stderr)
    tasks = [task for task in make_configs.TASKS if any(t is task for _, t in cells)]
    print(f'| backbone | {" | ".join(task.title for task in tasks)} |')
    print(f'|{" --- |" * (len(tasks) + 1)}')
    for name in dict.fromkeys(leaf.backbone for leaf in leaves):
        print(f'| {name} | {" | ".join(cells.get((name, task), "") for task in tasks)} |')
    print('\np: parses, b: builds, s: takes a training step and predicts')
    for path, error in errors.items():
        print(f'{path}: {error}', file=sys.stderr)
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main())
