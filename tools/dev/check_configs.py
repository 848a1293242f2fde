"""Checks every config of the grid: parses it, builds its model, takes a training step.

"Parses" means that all bases are found. "Builds" means that the model can be built with the real
backbone, without memory for its weights. "Steps" means that the model, with the real widths but one
block of each kind per stage, takes a training step on two small images in which every parameter
gets a gradient, and predicts. A ResNet keeps all its blocks.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import fnmatch
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import torch

import hat_mm  # repairs the toolboxes before they are imported

# isort: split
from make_configs import CONFIGS, LEAVES
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from torch import nn

from hat_mm.engine.build import build_model

SIZES = ((64, 96), (80, 64))
"""Height and width of the two images; a classifier gets both in the first size."""


def shorten(cfg: Config) -> None:
    """Reduces our backbones to few blocks per stage, DETR's kin to few layers; drops weights."""
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
        if model.test_cfg.get('rpn'):
            model.test_cfg.rpn.max_per_img = 20
            model.test_cfg.rcnn.max_per_img = 5
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    if 'num_queries' in model:
        model.num_queries = 20
        model.encoder.num_layers, model.decoder.num_layers = 1, 2
        if 'max_per_img' in model.test_cfg:
            model.test_cfg.max_per_img = 20
    head = model.get('panoptic_head', model.get('decode_head', {}))
    if isinstance(head, dict) and head.get('type') == 'Mask2FormerHead':
        head.num_queries = 20
        head.pixel_decoder.encoder.num_layers = head.transformer_decoder.num_layers = 1
        for part in (model, head):
            if 'num_points' in part.get('train_cfg', {}):
                part.train_cfg.num_points = 256
    for augment in model.get('data_preprocessor', {}).get('batch_augments') or []:
        augment.update({key: (96, 96) for key in ('size', 'scale') if key in augment})


def step(cfg: Config) -> tuple[dict[str, float], list]:
    """Takes one training step and one prediction with a shortened model.

    Returns:
        The losses and the predictions.

    Raises:
        ValueError: A loss is not finite, or parameters got no gradient.
    """
    torch.manual_seed(0)
    shorten(cfg)
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        losses = train_step(model, cfg.optim_wrapper, batch(cfg), reached=model)
        with torch.no_grad():
            predictions = model.eval().test_step(batch(cfg, images=1))
    return {name: float(value.detach().mean()) for name, value in losses.items()}, list(predictions)


def train_step(
    model: Any, optim_wrapper: dict[str, Any], pictures: dict[str, Any], reached: nn.Module
) -> dict[str, torch.Tensor]:
    """Takes a training step.

    Args:
        model: The model.
        optim_wrapper: Config of the optimizer wrapper.
        pictures: A batch as a dataloader of the toolbox returns it.
        reached: The part of the model whose parameters must all get a gradient.

    Returns:
        The losses.

    Raises:
        ValueError: A loss is not finite, or parameters got no gradient.
    """
    wrapper = build_optim_wrapper(model, optim_wrapper)
    waiting = {name: p for name, p in reached.named_parameters() if p.requires_grad}
    for name, parameter in list(waiting.items()):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: waiting.pop(name, None))
    model.train()  # of some models it returns None
    losses = model.train_step(pictures, wrapper)
    bad = [name for name, value in losses.items() if not torch.isfinite(value).all()]
    if bad or waiting:
        raise ValueError(f'losses not finite: {bad}; parameters without a gradient: {[*waiting]}')
    return losses


def batch(cfg: Config, images: int = 2) -> dict:
    """Random images with ground truth, in the form that the toolbox's dataloader returns."""
    sizes = SIZES[:images]
    if cfg.default_scope == 'mmdet':
        panoptic = 'panoptic_head' in cfg.model
        masks = panoptic or 'mask_head' in cfg.model.get('roi_head', {})
        shapes = [[3, *size] for size in sizes]
        demo_mm_inputs = importlib.import_module('mmdet.testing').demo_mm_inputs
        truth = dict(num_classes=80, with_mask=masks, with_semantic=panoptic)
        return demo_mm_inputs(images, shapes, **truth)
    structures = importlib.import_module(f'{cfg.default_scope}.structures')
    if cfg.default_scope == 'mmpretrain':
        inputs = torch.randint(0, 256, (images, 3, *SIZES[0]), dtype=torch.uint8)
        samples = [structures.DataSample().set_gt_label(label) for label in range(images)]
        return dict(inputs=inputs, data_samples=samples)
    inputs, samples = [], []
    for size in sizes:
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
        sample = structures.SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        classes = torch.randint(0, cfg.model.decode_head.num_classes, (1, *size))
        sample.gt_sem_seg = PixelData(data=classes)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


def check(path: Path, steps: bool) -> tuple[list[str], str]:
    """The checks that a config passes, and its first error."""
    passed = []
    try:
        cfg = Config.fromfile(path)
        passed.append('parses')
        with torch.device('meta'):
            build_model(copy.deepcopy(cfg))
        passed.append('builds')
        if steps:
            step(cfg)
            passed.append('steps')
    except Exception as error:
        return passed, f'{type(error).__name__}: {error}'
    return passed, ''


def main(argv: list[str] | None = None) -> int:
    """Checks the configs and prints a line for each; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--only', default='*', metavar='GLOB', help="names of configs, such as 'dino*'"
    )
    parser.add_argument('--no-steps', action='store_true', help='parse and build only')
    args = parser.parse_args(argv)
    leaves = [leaf for leaf in LEAVES if fnmatch.fnmatch(leaf.name, args.only)]
    if not leaves:
        parser.error(f'no config has a name like {args.only!r}')
    # Initialization is not checked, so its log is not needed.
    MMLogger.get_current_instance().setLevel('WARNING')
    failed = 0
    for number, leaf in enumerate(leaves, 1):
        start = time.perf_counter()
        passed, error = check(CONFIGS / leaf.path, not args.no_steps)
        spent = time.perf_counter() - start
        print(f'{number}/{len(leaves)} {leaf.path}: {", ".join(passed)} ({spent:.1f} s) {error}')
        failed += bool(error)
    print(f'{len(leaves) - failed} of {len(leaves)} configs pass')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
