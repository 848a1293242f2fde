"""Puts a backbone of hat_mm in the place of another one, in any config of the toolboxes.

The parts of a model that read the backbone's maps are told the new channels: in a detector its neck
or, without one, its heads; in a segmentor its neck and heads; in a classifier its head. Each reads
the map that stands in for the one it read before: in a detector that of the nearest stride, because
anchors and points are made for strides; elsewhere that of the same depth, counted from the end.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hat_mm import compat
from hat_mm.backbones.base import HierarchicalBackbone

from .build import build_part, without_weights
from .cli import UserError
from .maps import check_model

__all__ = ['Edit', 'Swap', 'plan_swap', 'read_backbone', 'swap_backbone']

MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
"""Of the pictures that the published weights were trained on, as RGB from 0 to 255."""

_TEXT = 'it learns from pictures and text together'
_TEACHES = 'it teaches a backbone that hides a part of the picture from itself'
REFUSED = {
    **dict.fromkeys(('ChineseCLIP', 'CLIPZeroShot', 'GLIP', 'GroundingDINO'), _TEXT),
    'MultimodalEncoderDecoder': _TEXT,
    **dict.fromkeys(('BEiT', 'CAE', 'EVA', 'MAE', 'MaskFeat', 'MFF', 'MILAN', 'MixMIM'), _TEACHES),
    **dict.fromkeys(('SimMIM', 'SparK', 'iTPN'), _TEACHES),
    'CornerNet': 'its corner heads read both maps of an hourglass network',
    'DDRHead': 'its head reads the two branches of DDRNet',
    'DPTHead': 'its head reads the tokens of a plain vision transformer',
    'DepthEstimator': 'its backbone is a diffusion model with a text encoder',
    'Detectron2Wrapper': 'its network is built by Detectron2',
    'LRASPPHead': 'its head averages windows of 49x49 pixels of a map of stride 8',
    'MLANeck': 'its neck adds maps of one size, those of a plain vision transformer',
    'PIDHead': 'its head reads the three branches of PIDNet',
    'RFP': 'its neck feeds its maps back into a DetectoRS_ResNet of its own',
    'SSDNeck': "SSD's extra layers continue the channels of its backbone",
    'TridentFasterRCNN': 'its backbone has three branches, which the heads know',
}
"""Models, necks and heads that work with their own backbone only, and why."""

_VIT_NECKS = ('Feature2Pyramid', 'MultiLevelNeck')  # make a pyramid of maps of one stride
_OWN_OUTPUT_HEADS = ('ClsHead', 'ConformerHead', 'DeiTClsHead', 'InceptionV3Head')
_MAP_HEADS = ('CSRAClsHead',)  # of classifiers; the others read a vector
_DECAY_BY_NAME = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')


_SIDE = 128  # of the picture that the old backbone runs on, in pixels


class Edit(NamedTuple):
    """A changed setting.

    Attributes:
        value: Its new value.
        why: The reason, in a few words.
    """

    value: Any
    why: str


class Swap(NamedTuple):
    """What a swap changes.

    Attributes:
        cfg: The config with the new backbone.
        edits: By the names of the settings, as ``--cfg-options`` takes them.
        notes: What is left to the user.
    """

    cfg: Any
    edits: dict[str, Edit]
    notes: list[str]


class _Map(NamedTuple):
    channels: int
    stride: float


# --- what is put in -------------------------------------------------------------------------------


def read_backbone(name: str) -> dict[str, Any]:
    """Reads the config of a backbone.

    Args:
        name: Of a file in ``configs/_base_/backbones``, such as ``fastervit-2``, or the path of a
            file that sets ``backbone`` likewise.

    Raises:
        UserError: There is no such backbone, or the file sets none of hat_mm's types.
    """
    files = {path.stem: path for path in _backbone_files()}
    path = Path(name) if name.endswith('.py') else files.get(name)
    if path is None or not path.is_file():
        ours = [stem for stem, file in files.items() if _backbone_of(file) is not None]
        raise UserError(f'{name!r} is no backbone: give a file, or one of {", ".join(ours)}')
    found = _backbone_of(path)
    if found is None:
        raise UserError(f"{path} sets no backbone = dict(type='hat_mm.…')")
    return found


def _backbone_of(path: Path) -> dict[str, Any] | None:
    """What a file sets as ``backbone``, if it is of a type of hat_mm."""
    try:
        found = compat.require('mmengine.config').Config.fromfile(path).get('backbone')
    except (OSError, SyntaxError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    ours = isinstance(found, dict) and str(found.get('type')).startswith('hat_mm.')
    return found.to_dict() if ours else None


def _backbone_files() -> list[Path]:
    """The files of configs/_base_/backbones, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    folders = [root / 'configs/_base_/backbones' for root in (package.parent, package / '.mim')]
    return next((found for folder in folders if (found := sorted(folder.glob('*.py')))), [])


# --- the old backbone -----------------------------------------------------------------------------


def _strides(backbone: dict, scope: str) -> list[_Map]:
    """The maps of a detector's backbone, by running it."""
    return [_Map(m.shape[1], _SIDE / m.shape[-1]) for m in _run(without_weights(backbone), scope)]


def _run(cfg: Any, scope: str, given: Any = None) -> Sequence[torch.Tensor]:
    """The maps of a backbone or a neck, with random weights, for a small picture."""
    try:
        part = build_part(copy.deepcopy(cfg), scope)
    except Exception as error:
        raise UserError(f'{_kind(cfg)} of the config cannot be built: {error}') from error
    part.eval()  # some of the toolboxes' return nothing
    with torch.no_grad():
        return part(torch.zeros(1, 3, _SIDE, _SIDE) if given is None else given)


def _count(backbone: dict, scope: str) -> int:
    """The number of maps of a segmentor's backbone."""
    indices = backbone.get('out_indices')
    if indices is None:
        kind = compat.require(f'{scope}.registry').MODELS.get(backbone['type'])
        parameter = inspect.signature(kind).parameters.get('out_indices')
        indices = parameter.default if parameter else None
    if isinstance(indices, Sequence):
        return len(indices)
    return len(_run(without_weights(backbone), scope))


# --- the swap -------------------------------------------------------------------------------------


class _Swapper:
    """Collects the edits of one config."""

    def __init__(self, cfg: Any, backbone: dict[str, Any]) -> None:
        self.cfg, self.backbone = cfg, dict(backbone)
        self.edits: dict[str, Edit] = {}
        self.notes: list[str] = []
        self.scope = _scope(cfg)
        for name in ('out_indices', 'init_cfg'):
            self.backbone.pop(name, None)
        with torch.device('meta'):
            built = build_part(dict(self.backbone), self.scope)
        if not isinstance(built, HierarchicalBackbone):
            raise UserError(f'{backbone["type"]} is no backbone of hat_mm')
        self.maps = [_Map(*m) for m in zip(built.out_channels, built.out_strides, strict=True)]
        self.out_indices: list[int] = []
        if not isinstance(cfg.get('model'), dict):
            raise UserError('the config has no model')
        detector = cfg.model.get('detector')  # of trackers and semi-supervised training
        nested = isinstance(detector, dict)
        self.path = 'model.detector' if nested else 'model'
        self.model: Any = detector if nested else cfg.model
        self.refuse(cfg.model)

    def set(self, path: str, value: Any, why: str) -> None:
        """Notes an edit of the model, unless the value is there already."""
        old = self.get(path)
        if _plain(old) == _plain(value):
            return
        value = _like(old, value)
        name = path.rpartition('.')[2]
        if isinstance(value, dict) and not isinstance(old, dict) and name in self.get_part(path):
            value = dict(_delete_=True, **value)  # None cannot be updated
        self.edits[f'{self.path}.{path}'] = Edit(value, why)

    def get(self, path: str) -> Any:
        found: Any = self.model
        for key in path.split('.'):
            try:
                found = found[int(key)] if isinstance(found, list) else found.get(key)
            except (AttributeError, IndexError):
                return None
        return found

    def get_part(self, path: str) -> Any:
        """The part of the model that has the setting."""
        parent = path.rpartition('.')[0]
        return self.get(parent) if parent else self.model

    def refuse(self, model: Any) -> None:
        """Raises UserError if a part of the model works with its own backbone only."""
        for kind in _types(model):
            if kind in REFUSED:
                raise UserError(f'{kind} cannot take another backbone: {REFUSED[kind]}')
        if 'backbone' not in self.model:
            raise UserError(f'{_kind(model)} has no backbone in its config')

    # --- detectors ---

    def fit_detector(self) -> None:
        """Gives neck and heads the maps of the nearest strides."""
        neck = self.model.get('neck')
        old = _strides(self.model.backbone, self.scope)
        if neck is None:
            stages = self.nearest(old)
            readers = [k for k, v in self.model.items() if _reads_maps(v, old)]
            if not readers:
                self.adapt(old, stages)
            for key in readers:
                self.set(f'{key}.in_channels', self.channels(stages), 'of the maps')
                if 'strides' in self.model[key]:
                    strides = [int(self.maps[s].stride) for s in stages]
                    self.set(f'{key}.strides', strides, 'of the maps')
            return
        path, first = ('neck.0', neck[0]) if isinstance(neck, list) else ('neck', neck)
        given = first.get('in_channels')
        if isinstance(given, int):  # the neck reads the last map
            [stage] = self.nearest(old[-1:])
            self.set(f'{path}.in_channels', self.maps[stage].channels, 'of the map it reads')
            return
        if not given or len(given) != len(old):
            raise UserError(
                f'{_kind(first)} reads {given} channels, but {_kind(self.model.backbone)} has maps '
                f'with {[m.channels for m in old]}'
            )
        skipped = first.get('start_level', 0)
        if skipped and _kind(first) == 'NASFCOS_FPN':  # it counts from the first map
            skipped, why = 0, 'the first map is made, but not read'
            self.edits['find_unused_parameters'] = Edit(True, why)
        stages = self.nearest(old)[skipped:]
        wanted = self.channels(stages)
        # YOLOv3's neck lists the last map first.
        backwards = list(given) == [m.channels for m in old][::-1] and given[0] > given[-1]
        self.set(f'{path}.in_channels', wanted[::-1] if backwards else wanted, 'of the maps')
        if skipped:
            self.set(f'{path}.start_level', 0, 'maps that are not read are not made')
            if first.get('end_level', -1) > 0:
                self.set(f'{path}.end_level', first.end_level - skipped, 'counted from the first')

    def nearest(self, old: Sequence[_Map]) -> list[int]:
        """A stage for each old map, of the nearest stride; all are different and in order."""
        strides = [m.stride for m in self.maps]
        stages: list[int] = []
        for m in reversed(old):
            limit = stages[0] if stages else len(strides)
            near = [abs(math.log2(s / m.stride)) for s in strides[:limit]]
            if min(near, default=1) >= 1:
                raise UserError(
                    f'{_kind(self.model)} reads maps of strides {_strides_text(old)}; those of '
                    f'{self.backbone["type"]} are {_strides_text(self.maps)}'
                )
            stages.insert(0, near.index(min(near)))
        self.out_indices = stages
        return stages

    def adapt(self, old: Sequence[_Map], stages: Sequence[int]) -> None:
        """Puts a convolution between the backbone and heads that are made for its channels."""
        if len(old) != 1:
            raise UserError(
                f'{_kind(self.model)} has neither a neck nor a head that states the channels of '
                f'the {len(old)} maps that it reads'
            )
        neck = dict(
            type='ChannelMapper',
            in_channels=self.channels(stages),
            out_channels=old[0].channels,
            kernel_size=1,
            num_outs=1,
        )
        self.set('neck', neck, 'the heads are made for the channels of the old backbone')

    def channels(self, stages: Sequence[int]) -> list[int]:
        self.out_indices = list(stages)
        return [self.maps[s].channels for s in stages]

    # --- segmentors ---

    def fit_segmentor(self) -> None:
        """Gives neck and heads the maps of the same depth, counted from the end."""
        count = _count(self.model.backbone, self.scope)
        last = len(self.maps) - 1
        stages = [max(last - count + 1 + i, 0) for i in range(count)]
        neck = self.model.get('neck')
        if neck is not None and _kind(neck) not in _VIT_NECKS:
            self.fit_neck(neck, stages)
            return
        if neck is not None:
            self.set('neck', None, 'the new backbone makes a pyramid itself')
        reads = []
        for path, head in self.heads():
            found = [stages[i] for i in self.read(head, count)]
            if _kind(head) == 'EncHead' and not head.get('add_lateral'):
                found = found[-1:]  # it takes the others, but does not use them
            reads.append((path, head, found))
        weighed = [stages for _, head, stages in reads if _kind(head) == 'OCRHead']
        if weighed:  # by what the head before makes of a map, which must have the same size
            reads = [(path, head, weighed[0]) for path, head, _ in reads]
        first = [stages[0] for _, head, _ in reads if head.get('c1_in_channels')]
        # Maps that no head reads would be parameters without a gradient.
        self.out_indices = sorted({*first, *(s for _, _, stages in reads for s in stages)})
        for path, head, stages in reads:
            self.set_channels(path, head, [self.maps[s].channels for s in stages])
            self.set_indices(path, head, [self.out_indices.index(s) for s in stages])
            if head.get('c1_in_channels'):
                self.set(f'{path}.c1_in_channels', self.maps[first[0]].channels, 'of the first map')
            if 'strides' in head:
                strides = [int(self.maps[s].stride) for s in stages]
                self.set(f'{path}.strides', strides, 'of the maps')

    def fit_neck(self, neck: Any, stages: Sequence[int]) -> None:
        """Gives a neck the maps, and heads the channels of what leaves it."""
        wanted = self.channels(stages)
        if len(set(stages)) != len(neck.in_channels):
            raise UserError(
                f'{_kind(neck)} reads {len(neck.in_channels)} maps; {self.backbone["type"]} has '
                f'{len(self.maps)}'
            )
        self.set('neck.in_channels', wanted, 'of the maps')
        sizes = [int(_SIDE / self.maps[s].stride) for s in stages]
        maps = [torch.zeros(1, c, n, n) for c, n in zip(wanted, sizes, strict=True)]
        new = dict(neck, in_channels=_like(neck.in_channels, wanted))
        arriving = [m.shape[1] for m in _run(new, self.scope, maps)]
        for path, head in self.heads():
            self.set_channels(path, head, [arriving[i] for i in self.read(head, len(arriving))])

    @staticmethod
    def read(head: Any, count: int) -> list[int]:
        """The places of the maps that a head reads, counted from the first."""
        several = isinstance(head.in_channels, Sequence)
        default: Any = list(range(count)) if several else -1
        found = head.get('in_index', default)
        found = found if isinstance(found, Sequence) else [found]
        return [range(count)[i] for i in found]

    def set_indices(self, path: str, head: Any, places: list[int]) -> None:
        old = head.get('in_index')
        if isinstance(old, Sequence):
            self.set(f'{path}.in_index', places, 'of these maps')
        elif not isinstance(head.in_channels, Sequence):  # otherwise it reads all maps
            last = len(self.out_indices) - 1
            if places[0] != (last if old in (None, -1) else old):
                self.set(f'{path}.in_index', places[0], 'of these maps')

    def set_channels(self, path: str, head: Any, channels: list[int]) -> None:
        several = isinstance(head.in_channels, Sequence)
        self.set(f'{path}.in_channels', channels if several else channels[0], 'of the maps')
        if head.get('num_convs') == 0:
            self.set(f'{path}.channels', sum(channels), 'without convolutions, those of the maps')

    def heads(self) -> Iterator[tuple[str, Any]]:
        """Path and config of each head that reads maps."""
        for name in ('decode_head', 'auxiliary_head'):
            found = self.model.get(name) or []
            several = isinstance(found, list)
            for i, head in enumerate(found if several else [found]):
                path = f'{name}.{i}' if several else name
                while 'kernel_generate_head' in head:  # K-Net refines what another head makes
                    path, head = f'{path}.kernel_generate_head', head.kernel_generate_head
                if 'in_channels' in head:
                    yield path, head

    # --- classifiers ---

    def fit_classifier(self) -> None:
        """Gives the head the last map, averaged over the picture."""
        neck, head = self.model.get('neck'), self.model.get('head')
        necks = _listed(neck)
        kind = _kind(necks[0]) if necks else ''
        self.out_indices = [len(self.maps) - 1]
        channels = self.maps[-1].channels
        pool = dict(type='GlobalAveragePooling')
        if kind == 'HRFuseScales':  # the head reads what it makes
            self.set('neck.0.in_channels', self.channels(range(len(self.maps))), 'of the maps')
        elif head is not None and _kind(head) in _OWN_OUTPUT_HEADS:
            self.set('head', self.linear(head, channels), f'{_kind(head)} reads other outputs')
        elif head is not None and 'in_channels' in head and 'with_avg_pool' not in (neck or {}):
            self.set('head.in_channels', channels, 'of the last map')
        if kind == 'ClsBatchNormNeck':
            self.set('neck', [pool, dict(necks[0], input_features=channels)], 'averages the map')
        elif kind == 'LinearNeck':
            self.set('neck', [pool, dict(necks[0], in_channels=channels)], 'averages the map')
        elif kind == 'GlobalAveragePooling':
            if necks[0].get('dim', 2) != 2:
                self.set('neck', dict(_delete_=True, **pool), 'averages a map, not tokens')
        elif isinstance(neck, dict) and 'in_channels' in neck:  # training without labels
            self.set('neck.in_channels', channels, 'of the last map')
            if neck.get('with_avg_pool') is False:
                self.set('neck.with_avg_pool', True, 'averages the map')
        elif not necks and head is not None and _kind(head) not in _MAP_HEADS:
            self.set('neck', pool, 'averages the map, which the old backbone did itself')

    def linear(self, head: Any, channels: int) -> dict[str, Any]:
        """A linear head in place of one that reads what only the old backbone returns."""
        classes = head.get('num_classes') or self.model.backbone.get('num_classes')
        if not classes or classes < 1:
            raise UserError(f'{_kind(head)} does not tell its number of classes')
        new = dict(_delete_=True, type='LinearClsHead', num_classes=classes, in_channels=channels)
        return new | {key: head[key] for key in ('loss', 'topk') if key in head}

    # --- the rest ---

    def preprocessors(self) -> dict[str, Any]:
        """The parts that normalize pictures, by their paths."""
        parts = {f'{self.path}.data_preprocessor': self.model.get('data_preprocessor')}
        parts['model.data_preprocessor'] = self.cfg.model.get('data_preprocessor')
        if not any(parts.values()):
            parts['data_preprocessor'] = self.cfg.get('data_preprocessor')
        inner = {  # one for labelled and unlabelled pictures
            f'{path}.data_preprocessor': part['data_preprocessor']
            for path, part in parts.items()
            if part and 'data_preprocessor' in part
        }
        return {path: part for path, part in (parts | inner).items() if part and 'mean' in part}

    def set_pictures(self, init: Any, pretrained: bool, keep: bool) -> None:
        """Sets weights, and mean, deviation and order of channels of their pictures."""
        parts = self.preprocessors()
        weights = isinstance(init, dict) and init.get('type') == 'Pretrained'
        [channels] = {len(part['mean']) for part in parts.values()} or {3}
        if channels != 3:
            self.backbone['in_channels'] = channels
            if weights and pretrained:
                self.notes.append(
                    f'no weights: they are for 3 channels, these pictures have {channels}'
                )
        elif init is not None and (pretrained or not weights):
            self.backbone['init_cfg'] = init
            if weights and not keep:
                for path, part in parts.items():
                    self.set_statistics(path, part)

    def set_statistics(self, path: str, found: Any) -> None:
        order = 'bgr_to_rgb'
        if self.scope == 'mmpretrain' or _kind(found) == 'ReIDDataPreprocessor':
            order = 'to_rgb'
        why = "of the weights' pictures"
        for name, value in (('mean', MEAN), ('std', STD), (order, True)):
            if _plain(found.get(name)) != value:
                self.edits[f'{path}.{name}'] = Edit(value, why)
        if found.get('rgb_to_bgr'):
            self.edits[f'{path}.rgb_to_bgr'] = Edit(False, why)

    def override(self, path: str, value: Any) -> None:
        """Takes a setting of the user's, if need be into an edit of a whole part."""
        for name, edit in self.edits.items():
            if path.startswith(f'{name}.') and isinstance(edit.value, dict):
                *parents, key = path.removeprefix(f'{name}.').split('.')
                part = edit.value
                for parent in parents:
                    part = part.setdefault(parent, {})
                part[key] = value
                return
        self.edits = {k: v for k, v in self.edits.items() if not k.startswith(f'{path}.')}
        self.edits[path] = Edit(value, 'by --cfg-options')

    def finish(self, recipe: bool) -> None:
        """Puts the backbone in, removes what belonged to the old one, and writes the notes."""
        old = self.model.backbone
        new = dict(_delete_=True, **self.backbone, out_indices=tuple(self.out_indices))
        edits = {f'{self.path}.backbone': Edit(new, f'in place of {_kind(old)}')}
        if self.model.get('pretrained') is not None:
            edits[f'{self.path}.pretrained'] = Edit(None, 'weights of the old backbone')
        for path, part in ((self.path, self.model), ('model', self.cfg.model)):
            if 'Pretrained' in map(_kind, _listed(part.get('init_cfg'))):
                edits[f'{path}.init_cfg'] = Edit(None, 'weights of the old model')
        self.edits = edits | self.edits
        self.optimize(recipe)
        if old.get('frozen_stages', -1) >= 0:
            self.notes.append(
                f'the stem and {old.frozen_stages} stage(s) of the old backbone were frozen; '
                f'{self.path}.backbone.frozen_stages freezes those of the new one'
            )
        if (old.get('norm_cfg') or {}).get('type') == 'SyncBN':
            self.notes.append(
                'the old backbone had SyncBN; where the new one has BN, '
                f"{self.path}.backbone.norm_cfg=dict(type='SyncBN') synchronizes it"
            )
        if self.cfg.get('load_from'):
            self.notes.append(
                f'load_from still names {self.cfg.load_from}: of its weights only those of equal '
                'names and shapes are loaded'
            )
        if 'teacher_config' in self.cfg.model or 'teacher_backbone' in self.cfg.model:
            self.notes.append('the teacher keeps its backbone')

    def optimize(self, recipe: bool) -> None:
        """Sets the optimizer, or says what it would do."""
        wrapper = self.cfg.get('optim_wrapper') or {}
        optimizer, rules = wrapper.get('optimizer') or {}, wrapper.get('paramwise_cfg') or {}
        if wrapper.get('constructor') in _DECAY_BY_NAME:
            rate = rules.get('decay_rate', rules.get('layer_decay_rate', 0.9))
            why = 'the old one knows its own backbones only'
            name = 'optim_wrapper.constructor'
            self.edits[name] = Edit('hat_mm.LayerDecayOptimWrapperConstructor', why)
            layers = dict(_delete_=True, layer_decay_rate=rate, flat_decay_mult=0.0)
            self.edits['optim_wrapper.paramwise_cfg'] = Edit(layers, 'decays with the depth')
        kind = optimizer.get('type')
        if recipe:
            if kind != 'AdamW':
                adamw = dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999))
                adamw['weight_decay'] = 0.05
                why = 'of vision transformers; for 16 pictures a step'
                self.edits['optim_wrapper.optimizer'] = Edit(adamw, why)
            if wrapper.get('clip_grad') is None:
                clip = dict(max_norm=1.0, norm_type=2)
                self.edits['optim_wrapper.clip_grad'] = Edit(clip, 'of vision transformers')
            name = 'optim_wrapper.paramwise_cfg'
            if name not in self.edits and rules.get('flat_decay_mult') != 0.0:
                self.edits[f'{name}.flat_decay_mult'] = Edit(0.0, 'no decay of norms and biases')
        elif kind not in ('AdamW', None):
            self.notes.append(
                f'the optimizer is still {kind} with lr={optimizer.get("lr")}; vision transformers '
                'are trained with AdamW (--transformer-recipe)'
            )
        named = [k for k in rules.get('custom_keys') or {} if k.startswith('backbone.')]
        if named:
            self.notes.append(
                'paramwise_cfg.custom_keys names parameters of the old backbone: '
                + ', '.join(named)
            )


def swap_backbone(cfg: Any, backbone: str | dict[str, Any], **settings: Any) -> Any:
    """Puts a backbone of hat_mm into a config of mmdet, mmseg or mmpretrain.

    What is left to the user is logged as warnings.

    Args:
        cfg: A config of a detector, segmentor, classifier or tracker; it is not changed.
        backbone: Name of a file in ``configs/_base_/backbones``, path of such a file, or the
            backbone's config.
        settings: Further arguments of :func:`plan_swap`.

    Returns:
        The config with the new backbone.

    Raises:
        UserError: The model cannot take another backbone, or the new one fails the check.

    Example:
        >>> cfg = Config.fromfile('mask-rcnn_r50_fpn_1x_coco.py')
        >>> cfg = hat_mm.swap_backbone(cfg, 'fastervit-2')
    """
    swap = plan_swap(cfg, backbone, **settings)
    logger = compat.require('mmengine.logging').MMLogger.get_current_instance()
    for note in swap.notes:
        logger.warning(f'swap_backbone: {note}')
    return swap.cfg


def plan_swap(
    cfg: Any,
    backbone: str | dict[str, Any],
    *,
    pretrained: bool = True,
    keep_preprocessing: bool = False,
    transformer_recipe: bool = False,
    options: dict[str, Any] | None = None,
    check: bool = True,
) -> Swap:
    """Finds the settings that a config needs for another backbone.

    Args:
        cfg: As of :func:`swap_backbone`.
        backbone: As of :func:`swap_backbone`.
        pretrained: Whether the backbone starts from its published weights, if it has some.
        keep_preprocessing: Whether mean, deviation and order of the channels stay as they are, even
            if the weights are made for others.
        transformer_recipe: Whether to set AdamW, clipped gradients and no decay of vectors.
        options: Further settings by dotted name, as ``--cfg-options`` gives them.
        check: Whether to build the new model and run it on a small picture.

    Returns:
        The new config, its edits, and notes on what was not decided.

    Raises:
        UserError: The model cannot take another backbone, or the new one fails the check.
    """
    given = read_backbone(backbone) if isinstance(backbone, str) else dict(backbone)
    swapper = _Swapper(cfg, given)
    if swapper.scope == 'mmseg':
        swapper.fit_segmentor()
    elif swapper.scope == 'mmpretrain' or _kind(swapper.model) == 'BaseReID':
        swapper.fit_classifier()
    else:
        swapper.fit_detector()
    swapper.set_pictures(given.get('init_cfg'), pretrained, keep_preprocessing)
    swapper.finish(transformer_recipe)
    for path, value in (options or {}).items():
        swapper.override(path, value)
    new = copy.deepcopy(cfg)
    changes = {path: copy.deepcopy(edit.value) for path, edit in swapper.edits.items()}
    try:
        new.merge_from_dict(changes)
    except (TypeError, LookupError) as error:
        raise UserError(f'--cfg-options do not fit the config: {error}', status=2) from error
    if check:
        new.default_scope = swapper.scope
        swapper.notes += check_model(new)
    return Swap(new, swapper.edits, swapper.notes)


# --- helpers --------------------------------------------------------------------------------------


def _kind(cfg: Any) -> str:
    """The name of a type without its scope."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _scope(cfg: Any) -> str:
    """The toolbox of a config, by its scope or, without one, by who knows the type of its model."""
    if cfg.get('default_scope'):
        return cfg.default_scope
    for scope in ('mmdet', 'mmseg', 'mmpretrain'):
        try:
            compat.require(f'{scope}.utils').register_all_modules(init_default_scope=False)
            registry = compat.require(f'{scope}.registry').MODELS
        except ImportError:
            continue
        if _kind(cfg.get('model')) in registry.module_dict:
            return scope
    raise UserError('the config has neither a default_scope nor a model that a toolbox knows')


def _types(cfg: Any) -> Iterator[str]:
    """The types of a config and of all that is in it but the backbones."""
    if isinstance(cfg, dict):
        if 'type' in cfg:
            yield _kind(cfg)
        for key, value in cfg.items():
            if key != 'backbone':
                yield from _types(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _types(value)


def _like(old: Any, new: Any) -> Any:
    """``new`` as a tuple if ``old`` is one: some parts take nothing else."""
    return tuple(new) if isinstance(old, tuple) else new


def _strides_text(maps: Sequence[_Map]) -> str:
    return ', '.join(f'{m.stride:g}' for m in maps)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _reads_maps(part: Any, old: Sequence[_Map]) -> bool:
    channels = part.get('in_channels') if isinstance(part, dict) else None
    return isinstance(channels, Sequence) and list(channels) == [m.channels for m in old]
