"""Checks that the maps of a backbone reach the heads at the strides that the heads are made for."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.structures import InstanceData
from torch import nn

from hat_mm import compat
from hat_mm.backbones.base import HierarchicalBackbone

from .build import build_model, without_weights
from .cli import UserError

__all__ = ['check_maps', 'check_model', 'without_groups']

SIDE = 128
"""Side of the picture that is run, in pixels; the strides of all levels divide it."""


class _Part(NamedTuple):
    name: str
    reads_all: bool  # of the levels; the others read the first ones
    strides: list[float]


def check_maps(model: nn.Module) -> list[str]:
    """Runs backbone and neck of each part of a model that has a backbone of hat_mm.

    Args:
        model: A detector, segmentor, classifier or tracker; it is not changed.

    Returns:
        Warnings: maps that no part reads, levels that miss the stride of their anchors or points.

    Raises:
        UserError: All levels miss their strides by the same factor, or a head with anchors or
            points gets more levels than it has strides for, and would drop the last ones.
    """
    warnings = []
    for owner in _owners(model):
        backbone, made_for = owner.backbone, list(_made_for(owner))
        if not made_for:
            continue
        with _evaluation(owner), torch.no_grad():
            image = next(backbone.parameters()).new_zeros(1, backbone.in_channels, SIDE, SIDE)
            levels = backbone(image)
            if getattr(owner, 'neck', None) is not None:
                levels = owner.neck(levels)
        name = type(owner).__name__
        warnings += _compare(name, made_for, [SIDE / level.shape[-1] for level in levels])
    return warnings


def _owners(model: nn.Module) -> list[Any]:
    """The parts of a model, or the model itself, that have a backbone of hat_mm."""
    backbones = (HierarchicalBackbone,)
    return [m for m in model.modules() if isinstance(getattr(m, 'backbone', None), backbones)]


def _compare(owner: str, made_for: Sequence[_Part], found: Sequence[float]) -> list[str]:
    warnings = []
    for name, reads_all, strides in made_for:
        where = f'{owner}.{name}'
        if len(strides) < len(found) and reads_all:
            raise UserError(
                f'{where} has anchors or points for strides {_text(strides)}, but gets maps of '
                f'strides {_text(found)}: the last would be dropped. Set out_indices of the '
                'backbone, and in_channels and num_outs of the neck, to the levels it is made for'
            )
        shifts = {round(math.log2(a / b)) for a, b in zip(found, strides, strict=False)}
        if shifts != {0}:
            text = f'{where} is made for strides {_text(strides)}, but gets maps of {_text(found)}'
            if len(shifts) == 1:
                raise UserError(
                    f'{text}: all are shifted. Set out_indices of the backbone and in_channels of '
                    'the neck, or the strides of anchors or points'
                )
            warnings.append(text)
    return warnings


def _made_for(owner: nn.Module) -> Iterator[_Part]:
    """The parts of a model that are made for certain strides."""
    for name, part in owner.named_modules():
        if re.search('^(backbone|neck|teacher)|semantic|mask', name):
            continue  # the last two read maps that another part makes
        generator = getattr(part, 'prior_generator', None)
        if generator is not None and hasattr(generator, 'strides'):
            yield _Part(name, True, [_side(stride) for stride in generator.strides])
        elif hasattr(part, 'featmap_strides'):  # an extractor of regions reads the first levels
            yield _Part(name, False, [_side(stride) for stride in part.featmap_strides])
        elif isinstance(getattr(part, 'feature_strides', None), Sequence):
            yield _Part(name, False, [_side(stride) for stride in part.feature_strides])
        elif name.endswith('pixel_decoder') and hasattr(part, 'strides'):
            yield _Part(name, False, [_side(stride) for stride in part.strides])


def _side(stride: Any) -> float:
    return float(stride[0] if isinstance(stride, Sequence) else stride)


def _text(strides: Sequence[float]) -> str:
    return ', '.join(f'{stride:g}' for stride in strides)


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode for a while; each part returns to its own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- a config -------------------------------------------------------------------------------------


def check_model(cfg: Any) -> list[str]:
    """Builds the model of a config with random weights and runs it on a small picture.

    Returns:
        The warnings of :func:`check_maps`.

    Raises:
        UserError: The model cannot be built or run.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = without_groups(without_weights(cfg.model))
    parts: tuple[Any, ...] = (cfg.model, cfg.model.get('detector') or {})
    for part in parts:
        if (part.get('test_cfg') or {}).get('rpn'):
            part.test_cfg.rpn.max_per_img = 5  # thousands of regions would take their time
    _find_teacher(cfg)
    try:
        model = build_model(cfg)
        model.eval()  # some of the toolboxes' return nothing
        warnings = check_maps(model)
        with torch.no_grad():
            for owner in _owners(model):
                forward(owner, cfg.default_scope)
    except UserError:
        raise
    except NotImplementedError as error:
        return [f'the heads were not run: {error}']
    except Exception as error:
        if 'implementation for device cpu not found' in str(error):
            return [f'this model runs on GPUs only, so it was not run as a whole: {error}']
        text = ' '.join(str(error).split()) or 'no message'
        raise UserError(f'the new model fails: {type(error).__name__}: {text}') from error
    return warnings


def without_groups(cfg: Any) -> Any:
    """A copy of a config whose norms need no group of processes."""
    if isinstance(cfg, dict):
        kind = 'BN' if cfg.get('type') in ('SyncBN', 'MMSyncBN') else cfg.get('type')
        given = {k: kind if k == 'type' else without_groups(v) for k, v in cfg.items()}
        return type(cfg)(given)
    return [without_groups(v) for v in cfg] if isinstance(cfg, list) else cfg


def _find_teacher(cfg: Any) -> None:
    """Reads a teacher whose file is named relative to the toolbox's folder."""
    name = cfg.model.get('teacher_config')
    if isinstance(name, str):
        for folder in Path(cfg.filename or '.').absolute().parents:
            if (folder / name).is_file():
                read = compat.require('mmengine.config').Config.fromfile
                cfg.model.teacher_config = read(folder / name)
                return


def forward(model: Any, scope: str) -> None:
    """Runs a model on a random picture, before its post-processing if it can."""
    height = width = 3 * SIDE  # enough for 900 queries, and for kernels of 3 at stride 128
    if type(model).__name__ == 'BaseReID':
        height, width = 256, 128  # its pooling is made for
    structures = importlib.import_module(f'{scope}.structures')
    kinds = {'mmdet': 'DetDataSample', 'mmseg': 'SegDataSample', 'mmpretrain': 'DataSample'}
    size = (height, width)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
    sample = getattr(structures, kinds[scope])(metainfo=meta | dict(scale_factor=(1.0, 1.0)))
    if getattr(model, 'rpn_head', None) is not None:
        model.rpn_head.init_weights()  # the first regions of Sparse R-CNN are weights
    elif scope == 'mmdet':  # Fast R-CNN gets its regions with the picture
        boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
        sample.proposals = InstanceData(bboxes=boxes)
    if scope == 'mmdet':  # some read the truth, whatever the mode
        boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0]))
    image = torch.rand(1, model.backbone.in_channels, height, width)
    if scope == 'mmseg':  # in mode 'tensor' segmentors in steps fail
        model(image, [sample], mode='predict')
        return
    try:
        model(image, [sample], mode='tensor')
    except (AttributeError, TypeError):  # some read the truth in this mode
        model(image, [sample], mode='predict')
