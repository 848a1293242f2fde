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
from hat_mm.weights.official import IMAGENET_MEAN, IMAGENET_STD

from .build import build_part, without_weights
from .cli import TOOLBOXES, UserError
from .edits import Edit, Edits
from .maps import SIDE, check_model
from .optim import OPTIONS

__all__ = ['Refused', 'Swap', 'plan_swap', 'read_backbone', 'swap_backbone']

MEAN, STD = [*IMAGENET_MEAN], [*IMAGENET_STD]
"""Of the pictures that the published weights were trained on, as RGB from 0 to 255."""

_TEXT = 'it works with published weights only, of a whole that includes a text model'
_HIDES = 'it trains a backbone that hides a part of the picture from itself'
REFUSED = {
    **dict.fromkeys(('ChineseCLIP', 'CLIPZeroShot', 'GLIP', 'GroundingDINO'), _TEXT),
    'MultimodalEncoderDecoder': _TEXT,
    **dict.fromkeys(('BEiT', 'CAE', 'EVA', 'MAE', 'MaskFeat', 'MFF', 'MILAN', 'MixMIM'), _HIDES),
    **dict.fromkeys(('SimMIM', 'SparK', 'iTPN'), _HIDES),
    'CornerNet': 'its corner heads read both maps of an hourglass network',
    'DDRHead': 'its head reads the two branches of DDRNet',
    'DPTHead': 'its head reads the tokens of a plain vision transformer',
    'DepthEstimator': 'its backbone is a diffusion model with a text encoder',
    'Detectron2Wrapper': 'its network is built by Detectron2',
    'LRASPPHead': 'its head averages windows of 49x49 points, more than a map of stride 32 has',
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


class Refused(UserError):
    """The model of a config cannot take another backbone."""


class Swap(NamedTuple):
    """What a swap changes.

    Attributes:
        cfg: The config with the new backbone.
        edits: The settings that change.
        notes: What is left to the user.
    """

    cfg: Any
    edits: Edits
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
    except (OSError, SyntaxError, NameError) as error:
        raise UserError(f'{path} cannot be read: {error}') from error
    ours = isinstance(found, dict) and str(found.get('type')).startswith('hat_mm.')
    return found.to_dict() if ours else None


def _backbone_files() -> list[Path]:
    """The files of configs/_base_/backbones, in a checkout or in an installed package."""
    package = Path(__file__).resolve().parents[1]
    folders = [root / 'configs/_base_/backbones' for root in (package.parent, package / '.mim')]
    return next((found for folder in folders if (found := sorted(folder.glob('*.py')))), [])


def _new_maps(backbone: dict[str, Any], scope: str) -> list[_Map]:
    """All maps of a backbone of hat_mm.

    Raises:
        UserError: It cannot be built, or is of another package.
    """
    try:
        with torch.device('meta'):
            built = build_part(dict(backbone), scope)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f'the backbone {backbone} cannot be built: {error}') from error
    if not isinstance(built, HierarchicalBackbone):
        raise UserError(f'{backbone["type"]} is no backbone of hat_mm')
    return [_Map(*m) for m in zip(built.out_channels, built.out_strides, strict=True)]


# --- the old backbone -----------------------------------------------------------------------------


def _old_maps(backbone: dict, scope: str) -> list[_Map]:
    """The maps of a detector's backbone, by running it."""
    maps = _run(backbone, scope, torch.zeros(1, backbone.get('in_channels', 3), SIDE, SIDE))
    return [_Map(m.shape[1], SIDE / m.shape[-1]) for m in maps]


def _count(backbone: dict, scope: str) -> int:
    """The number of maps of a segmentor's backbone."""
    indices, kind = backbone.get('out_indices'), backbone['type']
    if indices is None:
        found = kind if inspect.isclass(kind) else _registry(scope).get(kind)
        parameter = inspect.signature(found).parameters.get('out_indices') if found else None
        indices = parameter.default if parameter else None
    return len(indices) if isinstance(indices, Sequence) else len(_old_maps(backbone, scope))


def _registry(scope: str) -> Any:
    compat.require(f'{scope}.utils').register_all_modules(init_default_scope=False)
    return compat.require(f'{scope}.registry').MODELS


def _run(cfg: Any, scope: str, given: Any) -> Sequence[torch.Tensor]:
    """The maps of a backbone or a neck with random weights.

    Raises:
        UserError: It cannot be built or run.
    """
    try:
        part = build_part(copy.deepcopy(without_weights(cfg)), scope)
        part.eval()  # of some models it returns None
        with torch.no_grad():
            return part(given)
    except Exception as error:
        text = f'{type(error).__name__}: {error}'
        raise UserError(f'{_kind(cfg)} of the config cannot be run: {text}') from error


# --- the swap -------------------------------------------------------------------------------------


class _Swapper:
    """Collects the edits of one config."""

    def __init__(self, cfg: Any, backbone: dict[str, Any]) -> None:
        if not isinstance(cfg.get('model'), dict):
            raise UserError('the config has no model')
        self.cfg, self.notes = cfg, list[str]()
        self.edits, self.scope = Edits(cfg), _scope(cfg)
        self.init = backbone.get('init_cfg')
        self.backbone = {k: v for k, v in backbone.items() if k not in ('init_cfg', 'out_indices')}
        self.maps = _new_maps(self.backbone, self.scope)
        self.out_indices: list[int] = []
        detector = cfg.model.get('detector')  # of trackers and semi-supervised training
        nested = isinstance(detector, dict)
        self.path = 'model.detector' if nested else 'model'
        self.model: Any = detector if nested else cfg.model
        for kind in _types(cfg.model):
            if kind in REFUSED:
                raise Refused(f'{kind} cannot take another backbone: {REFUSED[kind]}')
        if not isinstance(self.model.get('backbone'), dict):
            raise Refused(f'{_kind(cfg.model)} has no backbone in its config')

    def set(self, path: str, value: Any, why: str, replace: bool = False) -> None:
        """Adds an edit of the model that has the backbone."""
        self.edits.put(f'{self.path}.{path}', value, why, replace)

    def channels(self, stages: Sequence[int]) -> list[int]:
        return [self.maps[s].channels for s in stages]

    def strides(self, stages: Sequence[int]) -> list[int]:
        return [int(self.maps[s].stride) for s in stages]

    # --- detectors ---

    def fit_detector(self) -> None:
        """Gives neck and heads the maps of the nearest strides."""
        old, neck = _old_maps(self.model.backbone, self.scope), self.model.get('neck')
        if neck is None:
            self.fit_heads(old)
            return
        path, first = ('neck.0', neck[0]) if isinstance(neck, list) else ('neck', neck)
        given = first.get('in_channels')
        if isinstance(given, int):  # the neck reads the last map
            self.out_indices = self.nearest(old[-1:])
            [channels] = self.channels(self.out_indices)
            self.set(f'{path}.in_channels', channels, 'channels of the map that it reads')
            return
        if not given or len(given) != len(old):
            raise UserError(
                f'{_kind(first)} reads {given} channels, but {_kind(self.model.backbone)} has maps '
                f'with {[m.channels for m in old]}'
            )
        skipped = first.get('start_level', 0)
        if skipped and _kind(first) == 'NASFCOS_FPN':  # it counts from the first map
            skipped, why = 0, 'the first map is made, but not read'
            self.edits.put('find_unused_parameters', True, why)
        self.out_indices = self.nearest(old)[skipped:]
        wanted = self.channels(self.out_indices)
        # YOLOv3's neck lists the last map first.
        backwards = list(given) == [m.channels for m in old][::-1] and given[0] > given[-1]
        self.set(
            f'{path}.in_channels', wanted[::-1] if backwards else wanted, 'channels of the maps'
        )
        if skipped:
            self.set(f'{path}.start_level', 0, 'maps that are not read are not made')
            if first.get('end_level', -1) > 0:
                self.set(f'{path}.end_level', first.end_level - skipped, 'counted from the first')

    def nearest(self, old: Sequence[_Map]) -> list[int]:
        """A stage for each old map, of the nearest stride; all are different and in order."""
        stages: list[int] = []
        for m in reversed(old):
            left = self.maps[: stages[0]] if stages else self.maps
            near = [abs(math.log2(new.stride / m.stride)) for new in left]
            if min(near, default=1) >= 1:
                raise Refused(
                    f'{_kind(self.model)} reads maps of strides {_strides_text(old)}; those of '
                    f'{self.backbone["type"]} are {_strides_text(self.maps)}'
                )
            stages.insert(0, near.index(min(near)))
        return stages

    def fit_heads(self, old: Sequence[_Map]) -> None:
        """Fits heads that read the maps themselves, or puts a convolution before them."""
        self.out_indices = self.nearest(old)
        wanted = self.channels(self.out_indices)
        readers = [name for name, part in self.model.items() if _reads_maps(part, old)]
        for name in readers:
            self.set(f'{name}.in_channels', wanted, 'channels of the maps')
            if 'strides' in self.model[name]:
                self.set(f'{name}.strides', self.strides(self.out_indices), 'strides of the maps')
        if readers:
            return
        if len(old) != 1:
            raise UserError(
                f'{_kind(self.model)} has neither a neck nor a head that states the channels of '
                f'the {len(old)} maps that it reads'
            )
        adapter = dict(type='ChannelMapper', in_channels=wanted, out_channels=old[0].channels)
        adapter |= dict(kernel_size=1, num_outs=1)
        self.set('neck', adapter, 'the heads are made for the channels of the old backbone')

    # --- segmentors ---

    def fit_segmentor(self) -> None:
        """Gives neck and heads the maps of the same depth, counted from the end."""
        count = _count(self.model.backbone, self.scope)
        stages = [max(len(self.maps) - count + i, 0) for i in range(count)]
        neck = self.model.get('neck')
        if neck is not None and _kind(neck) not in _VIT_NECKS:
            self.fit_neck(neck, stages)
            return
        if neck is not None:
            self.set('neck', None, 'the new backbone makes a pyramid itself')
        reads = []
        for path, head in self.heads():
            found = [stages[i] for i in _indices(head, count)]
            if _kind(head) == 'EncHead' and not head.get('add_lateral'):
                found = found[-1:]  # it takes the others, but does not use them
            reads.append((path, head, found))
        reads = self.in_order(reads)
        first = [stages[0] for _, head, _ in reads if head.get('c1_in_channels')]
        # Maps that no head reads would be parameters without a gradient.
        self.out_indices = sorted({*first, *(s for *_, found in reads for s in found)})
        for path, head, found in reads:
            self.set_channels(path, head, self.channels(found))
            self.set_indices(path, head, [self.out_indices.index(s) for s in found])
            if head.get('c1_in_channels'):
                [channels] = self.channels(first[:1])
                self.set(f'{path}.c1_in_channels', channels, 'channels of the first map')
            if 'strides' in head:
                self.set(f'{path}.strides', self.strides(found), 'strides of the maps')

    def in_order(self, reads: list[tuple[str, Any, list[int]]]) -> list[tuple[str, Any, list[int]]]:
        """Mends what heads read of backbones whose maps are not those of stages, one by one."""
        weighed = [found for _, head, found in reads if _kind(head) == 'OCRHead']
        if weighed:  # by what the head before makes of a map, which must have the same size
            return [
                (path, head, weighed[0] if path.startswith('decode_head') else found)
                for path, head, found in reads
            ]
        main = [found for path, _, found in reads if path.startswith('decode_head')]
        others = [found for path, _, found in reads if not path.startswith('decode_head')]
        if not main or max(map(max, main)) >= max(map(max, others), default=0):
            return reads
        last = len(self.maps) - 1
        self.notes.append(
            f'{_kind(self.model.backbone)} gave its last map first; now the decode head reads the '
            'last map, and the auxiliary heads those before it'
        )
        return [
            (path, head, [last] if path.startswith('decode_head') else [max(found[-1] - 1, 0)])
            for path, head, found in reads
        ]

    def fit_neck(self, neck: Any, stages: Sequence[int]) -> None:
        """Gives a neck the maps, and heads the channels of what leaves it."""
        self.out_indices, wanted = list(stages), self.channels(stages)
        given = neck.get('in_channels') if isinstance(neck, dict) else None
        if not isinstance(given, Sequence) or not len(given) == len(stages) == len(set(stages)):
            raise UserError(
                f'the neck {_kind(neck)} reads {given} channels; the backbone was to give it '
                f'{len(set(stages))} maps'
            )
        self.set('neck.in_channels', wanted, 'channels of the maps')
        sizes = [SIDE // stride for stride in self.strides(stages)]
        maps = [torch.zeros(1, c, n, n) for c, n in zip(wanted, sizes, strict=True)]
        kind = type(neck.in_channels)  # JPU takes tuples only
        left = [m.shape[1] for m in _run(dict(neck, in_channels=kind(wanted)), self.scope, maps)]
        for path, head in self.heads():
            self.set_channels(path, head, [left[i] for i in _indices(head, len(left))])

    def set_channels(self, path: str, head: Any, channels: list[int]) -> None:
        several = isinstance(head.in_channels, Sequence)
        self.set(
            f'{path}.in_channels', channels if several else channels[0], 'channels of the maps'
        )
        if head.get('num_convs') == 0:
            self.set(f'{path}.channels', sum(channels), 'those of the maps, without convolutions')

    def set_indices(self, path: str, head: Any, places: list[int]) -> None:
        old = head.get('in_index')
        if isinstance(old, Sequence):
            self.set(f'{path}.in_index', places, 'places among the maps')
        elif not isinstance(head.in_channels, Sequence):  # otherwise it reads all maps
            last = len(self.out_indices) - 1
            if places[0] != (last if old in (None, -1) else old):
                self.set(f'{path}.in_index', places[0], 'places among the maps')

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
        """Gives neck and head the last map, averaged over the picture."""
        neck, head = self.model.get('neck'), self.model.get('head')
        parts, channels = [dict(part) for part in _listed(neck)], self.maps[-1].channels
        self.out_indices = [len(self.maps) - 1]
        pool, why = dict(type='GlobalAveragePooling'), 'channels of the last map'
        states_own = False  # whether a neck has channels of its own, which the head reads
        for part in parts:
            if _kind(part) == 'HRFuseScales':
                self.out_indices = list(range(len(self.maps)))
                part['in_channels'] = self.channels(self.out_indices)
            elif 'in_channels' in part:
                part['in_channels'] = channels
            states_own = 'in_channels' in part
            if states_own:
                break
            if 'input_features' in part:
                part['input_features'] = channels
        for part in parts:
            if part.get('with_avg_pool') is False:  # of training without labels
                part['with_avg_pool'] = True
        first = _kind(parts[0]) if parts else ''
        if first in ('ClsBatchNormNeck', 'LinearNeck') or (
            not parts and head is not None and _kind(head) not in _MAP_HEADS
        ):
            parts, why = [pool, *parts], 'averages the map, which the old backbone did itself'
        elif first == 'GlobalAveragePooling' and parts[0].get('dim', 2) != 2:
            parts[0], why = pool, 'averages a map, not tokens'
        self.set_necks(neck, parts, why)
        if head is not None and _kind(head) in _OWN_OUTPUT_HEADS:
            why = f'{_kind(head)} reads what only the old backbone returns'
            self.set('head', self.linear(head), why, replace=True)
        elif head is not None and 'in_channels' in head and not states_own:
            self.set('head.in_channels', channels, 'channels of the last map')

    def set_necks(self, old: Any, parts: list[dict[str, Any]], why: str) -> None:
        """Adds the edits that make ``parts`` of the necks of a classifier."""
        if [set(part) for part in parts] == [set(part) for part in _listed(old)]:
            for i, part in enumerate(parts):
                path = f'neck.{i}' if isinstance(old, list) else 'neck'
                for key, value in part.items():
                    self.set(f'{path}.{key}', value, why)
        else:
            alone = len(parts) == 1 and not isinstance(old, list)
            self.set('neck', parts[0] if alone else parts, why, replace=True)

    def linear(self, head: Any) -> dict[str, Any]:
        """A linear head with the classes and the loss of another."""
        classes = head.get('num_classes') or self.model.backbone.get('num_classes')
        if not classes or classes < 1:
            raise UserError(f'{_kind(head)} does not tell its number of classes')
        new = dict(type='LinearClsHead', num_classes=classes, in_channels=self.maps[-1].channels)
        return new | {key: head[key] for key in ('loss', 'topk') if key in head}

    # --- pictures, weights, optimizer ---

    def set_pictures(self, pretrained: bool, keep: bool) -> None:
        """Sets channels, weights, and mean, deviation and order of the channels."""
        parts = self.preprocessors()
        lengths = {len(part['mean']) for part in parts.values() if part.get('mean')}
        channels = self.model.backbone.get('in_channels', min(lengths, default=3))
        channels = self.backbone.get('in_channels', channels)
        weights = 'Pretrained' in map(_kind, _listed(self.init))
        if channels != 3:
            self.backbone['in_channels'] = channels
        if weights and pretrained and channels != 3:
            self.notes.append(f'no weights: they are for 3 channels, the pictures have {channels}')
        elif self.init is not None and (pretrained or not weights):
            self.backbone['init_cfg'] = self.init
            if weights and not keep:
                self.set_statistics(parts)

    def preprocessors(self) -> dict[str, Any]:
        """The parts that normalize pictures, by their paths."""
        paths = {'model.data_preprocessor', f'{self.path}.data_preprocessor'}
        if not any(map(self.edits.old, paths)):
            paths = {'data_preprocessor'}
        parts = {path: self.edits.old(path) for path in sorted(paths)}
        for path, part in list(parts.items()):
            if part and 'data_preprocessor' in part:  # one for labelled and unlabelled pictures
                del parts[path]
                parts[f'{path}.data_preprocessor'] = part['data_preprocessor']
        return {path: part for path, part in parts.items() if part}

    def set_statistics(self, parts: dict[str, Any]) -> None:
        why, pipeline = 'as the weights were trained', _types(self.cfg.get('train_dataloader'))
        elsewhere = not parts or any(kind.endswith('Normalize') for kind in pipeline)
        for path, part in parts.items():
            if elsewhere and not part.get('mean'):
                continue
            order = 'bgr_to_rgb'
            if self.scope == 'mmpretrain' or _kind(part) == 'ReIDDataPreprocessor':
                order = 'to_rgb'
            for name, value in (('mean', MEAN), ('std', STD), (order, True)):
                self.edits.put(f'{path}.{name}', value, why)
            if part.get('rgb_to_bgr'):
                self.edits.put(f'{path}.rgb_to_bgr', False, why)
        if elsewhere:
            self.notes.append(
                "mean, deviation and order of the pictures' channels are set outside of "
                f'data_preprocessor; the weights are for mean={MEAN}, std={STD}, RGB'
            )

    def finish(self, recipe: bool) -> None:
        """Puts the backbone in, removes what belonged to the old one, and writes the notes."""
        old, rest = self.model.backbone, self.edits
        self.edits = Edits(self.cfg)
        if self.cfg.get('default_scope') != self.scope:
            self.edits['default_scope'] = Edit(self.scope, 'toolbox of the model')
        new = dict(self.backbone, out_indices=tuple(self.out_indices))
        self.set('backbone', new, f'in place of {_kind(old)}', replace=True)
        self.set('pretrained', None, 'weights of the old backbone')
        for path in sorted({f'{self.path}.init_cfg', 'model.init_cfg'}):
            if 'Pretrained' in map(_kind, _listed(self.edits.old(path))):
                self.edits.put(path, None, 'weights of the old model')
        self.edits.update(rest)
        self.optimize(recipe)
        if old.get('frozen_stages') not in (None, -1):
            self.notes.append(
                f'the stem and {old.frozen_stages} stage(s) of the old backbone were frozen; '
                f'{self.path}.backbone.frozen_stages freezes those of the new one'
            )
        if _kind(old.get('norm_cfg')) == 'SyncBN':
            self.notes.append(
                'the old backbone had SyncBN; where the new one has BN, '
                f"{self.path}.backbone.norm_cfg=dict(type='SyncBN') synchronizes it"
            )
        if self.cfg.get('load_from'):
            self.notes.append(
                f'load_from still names {self.cfg.load_from}: of its weights only those of equal '
                'names and shapes are loaded'
            )
        for name in ('teacher_config', 'teacher_backbone', 'reid'):
            if self.cfg.model.get(name):
                kept = 'model for re-identification' if name == 'reid' else 'teacher'
                self.notes.append(f'the {kept} keeps its backbone')

    def optimize(self, recipe: bool) -> None:
        """Sets the optimizer, or says what it would do."""
        wrapper = self.cfg.get('optim_wrapper') or {}
        optimizer, rules = wrapper.get('optimizer') or {}, wrapper.get('paramwise_cfg') or {}
        if _name(wrapper.get('constructor')) in _DECAY_BY_NAME:
            rate = rules.get('decay_rate', rules.get('layer_decay_rate', 0.9))
            kept = {k: v for k, v in rules.items() if k in OPTIONS}
            ours = 'hat_mm.LayerDecayOptimWrapperConstructor'
            self.edits.put('optim_wrapper.constructor', ours, 'the old one knows its own only')
            rules = dict(layer_decay_rate=rate, flat_decay_mult=0.0) | kept
            why = 'decays with the depth'
            self.edits.put('optim_wrapper.paramwise_cfg', rules, why, replace=True)
        kind = _kind(optimizer)
        if recipe:
            of = 'as for vision transformers'
            if kind != 'AdamW':
                adamw = dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
                why = f'{of}; for 16 pictures a step'
                self.edits.put('optim_wrapper.optimizer', adamw, why, replace=True)
            if wrapper.get('clip_grad') is None:
                self.edits.put('optim_wrapper.clip_grad', dict(max_norm=1.0, norm_type=2), of)
            if rules.get('flat_decay_mult') is None:
                path, why = 'optim_wrapper.paramwise_cfg', 'no decay of norms and biases'
                if rules:
                    self.edits.put(f'{path}.flat_decay_mult', 0.0, why)
                else:
                    self.edits.put(path, dict(flat_decay_mult=0.0), why)
        elif optimizer and kind != 'AdamW':
            self.notes.append(
                f'the optimizer is still {kind} with lr={optimizer.get("lr")}; vision transformers '
                'are trained with AdamW (--transformer-recipe)'
            )
        named = [k for k in rules.get('custom_keys') or {} if k.startswith('backbone.')]
        if named:
            self.notes.append(
                f'paramwise_cfg.custom_keys names parts of the old backbone: {", ".join(named)}'
            )


def swap_backbone(cfg: Any, backbone: str | dict[str, Any], **settings: Any) -> Any:
    """Puts a backbone of hat_mm into a config of mmdet, mmseg or mmpretrain.

    What is left to the user is logged as warnings.

    Args:
        cfg: A config of a detector, segmentor, classifier or tracker; it is not changed.
        backbone: Name of a file in ``configs/_base_/backbones``, path of such a file, or the
            backbone's config.
        settings: Further arguments of :func:`plan_swap`, such as ``pretrained=False``.

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
        cfg: See :func:`swap_backbone`.
        backbone: See :func:`swap_backbone`.
        pretrained: Whether the backbone starts from its published weights, if it has some.
        keep_preprocessing: Whether mean, deviation and order of the channels stay as they are, even
            if the weights are made for others.
        transformer_recipe: Whether to set AdamW, clipped gradients and no decay of vectors.
        options: Further settings by dotted name, as ``--cfg-options`` gives them.
        check: Whether to build the new model and run it on a small picture.

    Returns:
        The new config, its edits, and notes on what was not decided.

    Raises:
        Refused: The model cannot take another backbone.
        UserError: The new model fails the check, or an argument does not fit.
    """
    given = read_backbone(backbone) if isinstance(backbone, str) else copy.deepcopy(backbone)
    swapper = _Swapper(cfg, given)
    if swapper.scope == 'mmseg':
        swapper.fit_segmentor()
    elif swapper.scope == 'mmpretrain' or _kind(swapper.model) == 'BaseReID':
        swapper.fit_classifier()
    else:
        swapper.fit_detector()
    swapper.set_pictures(pretrained, keep_preprocessing)
    swapper.finish(transformer_recipe)
    for path, value in (options or {}).items():
        swapper.edits.override(path, value)
    new = swapper.edits.apply()
    if check:
        swapper.notes += check_model(new)
    return Swap(new, swapper.edits, swapper.notes)


# --- helpers --------------------------------------------------------------------------------------


def _kind(cfg: Any) -> str:
    """The name of a type without its scope."""
    return _name(cfg.get('type') if isinstance(cfg, dict) else None)


def _name(kind: Any) -> str:
    """The name of a class, or of one in a registry, without its scope."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _scope(cfg: Any) -> str:
    """The toolbox of a config, by its scope or, without one, by who knows the type of its model."""
    if cfg.get('default_scope') in TOOLBOXES:
        return cfg.default_scope
    for scope in TOOLBOXES:
        try:
            known = _registry(scope).module_dict
        except compat.DependencyError:
            continue
        if _kind(cfg.model) in known:
            return scope
    raise UserError(
        f'neither default_scope, {cfg.get("default_scope")!r}, nor the type of the model, '
        f'{_kind(cfg.model)}, is of one of {", ".join(TOOLBOXES)}'
    )


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


def _indices(head: Any, count: int) -> list[int]:
    """The places of the maps that a head of mmseg reads, counted from the first."""
    several = isinstance(head.in_channels, Sequence)
    default: Any = list(range(count)) if several else -1
    found = head.get('in_index', default)
    return [range(count)[i] for i in (found if isinstance(found, Sequence) else [found])]


def _reads_maps(part: Any, old: Sequence[_Map]) -> bool:
    channels = part.get('in_channels') if isinstance(part, dict) else None
    return isinstance(channels, Sequence) and list(channels) == [m.channels for m in old]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _strides_text(maps: Sequence[_Map]) -> str:
    return ', '.join(f'{m.stride:g}' for m in maps)
