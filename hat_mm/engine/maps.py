"""Checks that the maps of a backbone reach the heads at the strides that the heads are made for."""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.structures import InstanceData
from torch import nn

from hat_mm import compat
from hat_mm.backbones.base import HierarchicalBackbone

from .build import build_model, evaluation, without_weights
from .cli import UserError

__all__ = ['check_maps', 'check_model', 'without_groups']

SIDE = 128
"""Side of the picture that is run, in pixels; the strides of all levels divide it."""


class _Part(NamedTuple):
    """A part that is made for certain strides.

    Attributes:
        name: Its name in the model.
        strides: The strides.
        reads_all: Whether it reads all levels; others read the first ones.
        levels: The levels that it reads, if it picks some.
    """

    name: str
    strides: list[float]
    reads_all: bool = False
    levels: Sequence[int] | None = None


def check_maps(model: nn.Module) -> list[str]:
    """Runs backbone and neck of each part of a model that has a backbone of hat_mm.

    Args:
        model: A detector, segmentor, classifier or tracker; it is not changed.

    Returns:
        Warnings: levels that miss the strides of their anchors or points.

    Raises:
        UserError: All levels miss their strides by the same factor, or a head with anchors or
            points gets more levels than it has strides for.
    """
    warnings = []
    for owner in _owners(model):
        backbone, parts = owner.backbone, list(_made_for(owner))
        if not parts:
            continue
        with evaluation(owner), torch.no_grad():
            image = next(backbone.parameters()).new_zeros(1, backbone.in_channels, SIDE, SIDE)
            levels = backbone(image)
            if getattr(owner, 'neck', None) is not None:
                levels = owner.neck(levels)
        found = [SIDE / level.shape[-1] for level in levels]
        for part in parts:
            warnings += _compare(type(owner).__name__, part, found)
    return warnings


def _owners(model: nn.Module) -> list[Any]:
    """The parts of a model, or the model itself, that have a backbone of hat_mm."""
    backbones = (HierarchicalBackbone,)
    return [m for m in model.modules() if isinstance(getattr(m, 'backbone', None), backbones)]


def _compare(owner: str, part: _Part, found: Sequence[float]) -> list[str]:
    where = f'{owner}.{part.name} is made for strides {_text(part.strides)}'
    off = 'check_maps=False turns this check off'
    if part.levels is not None:
        found = [found[i] for i in part.levels]
    if part.reads_all and len(part.strides) < len(found):
        raise UserError(
            f'{where}, but gets maps of strides {_text(found)}, of which the last would be dropped '
            'or fail. Set out_indices of the backbone, and in_channels and num_outs of the neck, '
            f'to the levels it is made for; {off}'
        )
    pairs = zip(found, part.strides, strict=False)
    shifts = {round(math.log2(found / wanted)) for found, wanted in pairs}
    if shifts == {0}:
        return []
    text = f'{where}, but gets maps of {_text(found)}'
    if len(shifts) > 1:
        return [text]
    raise UserError(
        f'{text}: all are shifted. Set out_indices of the backbone and in_channels of the neck, or '
        f'the strides of this part; {off}'
    )


def _made_for(owner: nn.Module) -> Iterator[_Part]:
    """The parts of a model that are made for certain strides."""
    for name, part in owner.named_modules():
        if re.search('^(backbone|neck|teacher|mask_head)|semantic', name):
            continue  # the last two read maps that another part makes
        generator = getattr(part, 'prior_generator', None)
        if generator is not None and hasattr(generator, 'strides'):
            yield _Part(name, [_side(stride) for stride in generator.strides], reads_all=True)
        for attribute in ('featmap_strides', 'feature_strides'):  # of regions, of Semantic FPN
            strides = getattr(part, attribute, None)
            if isinstance(strides, Sequence):
                levels = getattr(part, 'in_index', None)
                levels = levels if isinstance(levels, Sequence) else None
                yield _Part(name, [_side(stride) for stride in strides], levels=levels)
        if name.endswith('pixel_decoder') and hasattr(part, 'strides'):
            yield _Part(name, [_side(stride) for stride in part.strides])


def _side(stride: Any) -> float:
    return float(stride[0] if isinstance(stride, Sequence) else stride)


def _text(strides: Sequence[float]) -> str:
    return ', '.join(f'{stride:g}' for stride in strides)


# --- a config -------------------------------------------------------------------------------------


@torch.random.fork_rng(devices=())
def check_model(cfg: Any) -> list[str]:
    """Builds the model of a config with random weights and runs it on a small picture.

    The weights are the same every time, and so is the result: some heads find nothing with others,
    and fail.

    Returns:
        The warnings of :func:`check_maps`, and why a model was not run.

    Raises:
        UserError: The model cannot be built or run, or its levels miss their strides.
    """
    torch.default_generator.manual_seed(0)
    cfg = copy.deepcopy(cfg)
    cfg.model = without_groups(without_weights(cfg.model))
    parts: tuple[Any, ...] = (cfg.model, cfg.model.get('detector') or {})
    for part in parts:
        if (part.get('test_cfg') or {}).get('rpn'):
            part.test_cfg.rpn.max_per_img = 5  # thousands of regions would take their time
    _find_teacher(cfg)
    warnings = []
    try:
        model = build_model(cfg)
        model.eval()  # of some models it returns None
        try:
            warnings += check_maps(model) if cfg.get('check_maps', True) else []
            with torch.no_grad():
                for owner in _owners(model):
                    run_once(owner, cfg.default_scope)
        except NotImplementedError as error:
            warnings.append(f'the heads were not run: {error}')
    except UserError:
        raise
    except Exception as error:
        text = ' '.join(str(error).split()) or 'no message'
        if 'implementation for device cpu not found' not in text:
            raise UserError(f'the new model fails: {type(error).__name__}: {text}') from error
        warnings.append(f'this model runs on GPUs only, so it was not run as a whole: {text}')
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


def run_once(model: Any, scope: str) -> None:
    """Runs a model on a random picture, before its post-processing if it can."""
    height = width = 3 * SIDE  # enough for 900 queries, and for kernels of 3 at stride 128
    if type(model).__name__ == 'BaseReID':
        height, width = 256, 128  # the size that its pooling is made for
    structures = importlib.import_module(f'{scope}.structures')
    kinds = {'mmdet': 'DetDataSample', 'mmseg': 'SegDataSample', 'mmpretrain': 'DataSample'}
    size = (height, width)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size)
    sample = getattr(structures, kinds[scope])(metainfo=meta | dict(scale_factor=(1.0, 1.0)))
    boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
    if scope == 'mmdet':  # some heads compute a loss in every mode
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0]))
    if getattr(model, 'rpn_head', None) is not None:
        model.rpn_head.init_weights()  # the first regions of Sparse R-CNN are weights
    elif scope == 'mmdet':  # Fast R-CNN gets its regions with the picture
        sample.proposals = InstanceData(bboxes=boxes)
    image = torch.rand(1, model.backbone.in_channels, height, width)
    if scope == 'mmseg':  # cascaded heads fail in mode 'tensor'
        model(image, [sample], mode='predict')
        return
    try:
        model(image, [sample], mode='tensor')
    except (AttributeError, TypeError):  # YOLACT's needs masks in this mode
        model(image, [sample], mode='predict')
    if scope == 'mmpretrain' and not hasattr(model, 'predict') and model.with_neck:
        # Models that train without labels stop at the backbone in this mode.
        maps = model.extract_feat(image)
        model.neck([maps] if type(model).__name__ == 'SwAV' else maps)  # SwAV's takes a list
