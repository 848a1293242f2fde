"""The models that can be measured: their names, and how they are built and run.

A candidate is written NAME[:KEY=VALUE,...][@FLAG+FLAG...]. NAME is a registered type with its
scope, a config (SCOPE::CONFIG is one that a toolbox ships), one of PEERS, timm/MODEL, or
authors/MODEL for the authors' own FasterViT.
"""

from __future__ import annotations

import importlib
import re
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from measuring import PRECISIONS, Work, set_tf32

import hat_mm
from hat_mm import compat
from hat_mm.engine.build import build_model, build_type, read_type
from hat_mm.engine.cli import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class Peer:
    """A well-known backbone under a short name.

    Attributes:
        type: Its type in a toolbox's registry.
        arguments: What makes it this one and lets it give four maps.
        timm: The same model in timm.
        top1: ImageNet-1K accuracy in percent, reported by its authors.
        box_ap: COCO box AP of Cascade Mask R-CNN with the 3x schedule, reported by its authors.
    """

    type: str
    arguments: dict[str, Any]
    timm: str
    top1: float
    box_ap: float | None


def _swin(timm: str, dims: int, depth: int, heads: int, top1: float, box_ap: float) -> Peer:
    arguments = dict(embed_dims=dims, depths=[2, 2, depth, 2])
    arguments['num_heads'] = [heads * 2**i for i in range(4)]
    return Peer('mmdet.SwinTransformer', arguments, timm, top1, box_ap)


def _convnext(arch: str, top1: float, box_ap: float) -> Peer:
    maps = dict(out_indices=[0, 1, 2, 3], gap_before_final_norm=False)
    return Peer('mmpretrain.ConvNeXt', dict(arch=arch, **maps), f'convnext_{arch}', top1, box_ap)


PEERS = {
    'resnet50': Peer('mmdet.ResNet', dict(depth=50, norm_eval=False), 'resnet50', 76.1, None),
    'swin-t': _swin('swin_tiny_patch4_window7_224', 96, 6, 3, 81.3, 50.4),
    'swin-s': _swin('swin_small_patch4_window7_224', 96, 18, 3, 83.0, 51.9),
    'swin-b': _swin('swin_base_patch4_window7_224', 128, 18, 4, 83.5, 51.9),
    'convnext-t': _convnext('tiny', 82.1, 50.4),
    'convnext-s': _convnext('small', 83.1, 51.9),
    'convnext-b': _convnext('base', 83.8, 52.7),
}

FLAGS = {
    'deploy': 'switch_to_deploy, for forward passes',
    'compile': 'torch.compile; of a config the backbone',
    'channels_last': 'memory layout of model and images',
    'tf32': 'float32 whose products on a GPU round their factors',
    'bf16': 'half precision; in training and in configs by autocast',
    'fp16': 'the same',
    'cp': 'with_cp=True, for training',
}
CONFIG_ENDINGS = ('.py', '.json', '.yaml', '.yml')


# --- names ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model as written on the command line.

    Attributes:
        text: As written, which is its name in tables.
        name: Registered type, config, peer, ``timm/MODEL`` or ``authors/MODEL``.
        arguments: Its arguments.
        flags: Of :data:`FLAGS`.
    """

    text: str
    name: str
    arguments: dict[str, Any]
    flags: tuple[str, ...]

    @property
    def precision(self) -> str:
        """Key of :data:`PRECISIONS`."""
        return next((flag for flag in self.flags if flag in PRECISIONS), 'float32')

    @property
    def is_config(self) -> bool:
        """Whether it is a whole model."""
        return self.name.endswith(CONFIG_ENDINGS)

    @property
    def base(self) -> str:
        """The text without flags."""
        return self.text.removesuffix('@' + '+'.join(self.flags)) if self.flags else self.text

    @property
    def label(self) -> str:
        """A shorter name, for plots and heads of tables."""
        arguments = dict(self.arguments)
        short = re.sub(r'^(hat_mm|mmdet|mmpretrain)\.', '', self.name)
        if self.is_config:
            short = Path(self.name).stem
        elif isinstance(arguments.get('arch'), str | int):
            short += f'-{arguments.pop("arch")}'
        words = [f'{key}={value}' for key, value in arguments.items()]
        words = [word if len(word) < 25 else f'{word[:22]}...' for word in words]
        return ' '.join([short, *words, *self.flags])


def parse(text: str) -> Candidate:
    """Reads a candidate as written on the command line.

    Raises:
        UserError: An argument is not KEY=VALUE, a flag is unknown, or flags exclude each other.
    """
    base, _, tail = text.rpartition('@') if '@' in text else (text, '', '')
    flags = tuple(tail.split('+')) if tail else ()
    for flag in flags:
        if flag not in FLAGS:
            raise UserError(f'unknown flag {flag!r} in {text!r}; choices: {", ".join(FLAGS)}')
    precisions = [flag for flag in flags if flag in PRECISIONS]
    if len(precisions) > 1 or len(set(flags)) < len(flags):
        raise UserError(f'{text!r} has flags that exclude each other, or one twice')
    if {'deploy', 'cp'} <= set(flags):
        raise UserError(f'{text!r}: the deploy form cannot be trained, and cp is for training')
    name, arguments = read_type(base)
    return Candidate(text, name, arguments, flags)


# --- building -------------------------------------------------------------------------------------


def build(candidate: Candidate, size: Size) -> torch.nn.Module:
    """Builds a backbone with random weights, in eval mode, for images of a size."""
    if '/' in candidate.name:
        return _created(candidate, size)
    kind, arguments = candidate.name, candidate.arguments
    if kind in PEERS:
        kind, arguments = PEERS[kind].type, PEERS[kind].arguments | arguments
    if '.' not in kind:
        raise UserError(
            f'{kind!r} has no scope; write for example hat_mm.{kind} or mmdet.{kind}, a config, '
            f'timm/{kind}, authors/faster_vit_0_any_res, or one of {", ".join(PEERS)}'
        )
    if 'cp' in candidate.flags:
        arguments = arguments | {'with_cp': True}
    return build_type(kind, arguments)


def _optional(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{module} cannot be imported ({error}): {command}') from error


def _created(candidate: Candidate, size: Size) -> torch.nn.Module:
    """Builds a model of timm or of the authors, which may be made for images of one size."""
    library, _, name = candidate.name.partition('/')
    options: dict[str, Any]
    if library == 'timm':
        create = _optional('timm', 'pip install --no-deps timm').create_model
        options = dict(features_only=True)
        if 'swin' in name:
            options.update(img_size=size, strict_img_size=False)
    elif library == 'authors':
        cure = 'pip install timm && pip install --no-deps fastervit==1.0.0'
        create = _optional('fastervit', cure).create_model
        options = {}
        if name.endswith('_any_res'):
            options = dict(resolution=list(size), window_size=[7, 7, 7, 7])
    else:
        raise UserError(f'{candidate.name!r} is neither timm/MODEL nor authors/MODEL nor a config')
    if 'cp' in candidate.flags:
        raise UserError(f'{candidate.text!r}: cp is for registered types and configs')
    try:
        model = create(name, **options | candidate.arguments)
    except Exception as error:  # each of the libraries has its own for a name it does not know
        raise UserError(f'{candidate.base} at {size[0]}x{size[1]}: {error!r}') from error
    model.eval()
    return model


def _samples(scope: str, size: Size, batch: int, masks: bool) -> dict:
    """Random images and ground truth of class 0, as the toolbox's dataloader would give them."""
    if scope == 'mmdet':
        data = compat.require('mmdet.testing').demo_mm_inputs(
            batch, [[3, *size]] * batch, num_items=[8] * batch, with_mask=masks
        )
        for sample in data['data_samples']:
            sample.gt_instances.labels.zero_()
            sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        return data
    structures = compat.require(f'{scope}.structures')
    inputs = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    samples = []
    for _ in range(batch):
        if scope == 'mmseg':
            sample = structures.SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
            pixels = torch.zeros(1, *size, dtype=torch.int64)
            sample.gt_sem_seg = compat.require('mmengine.structures').PixelData(data=pixels)
        else:
            sample = structures.DataSample().set_gt_label(0)
        samples.append(sample)
    return dict(inputs=inputs if scope == 'mmpretrain' else list(inputs), data_samples=samples)


def _whole(candidate: Candidate, size: Size, batch: int) -> tuple[Any, dict, str]:
    """Builds the model of a config, and the data that makes its batches."""
    if '::' in candidate.name:
        try:
            cfg = compat.require('mmengine.hub').get_config(candidate.name)
        except Exception as error:  # one for each part of the name that can be wrong
            raise UserError(f'no config {candidate.name!r} can be had: {error}') from error
    elif Path(candidate.name).is_file():
        cfg = compat.require('mmengine').Config.fromfile(candidate.name)
    else:
        raise UserError(f'config {candidate.name!r} does not exist')
    if cfg.get('default_scope') not in ('mmdet', 'mmseg', 'mmpretrain') or 'model' not in cfg:
        raise UserError(f'{candidate.name} is no config of a model of mmdet, mmseg or mmpretrain')
    cfg.merge_from_dict({f'model.{key}': value for key, value in candidate.arguments.items()})
    if 'cp' in candidate.flags:
        cfg.model.backbone.with_cp = True
    model = build_model(cfg)
    model = compat.require('mmengine.model').revert_sync_batchnorm(model)
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = size  # instead of whole crops
    masks = 'mask_head' in (cfg.model.get('roi_head') or {})
    return model, _samples(cfg.default_scope, size, batch, masks), cfg.default_scope


# --- running --------------------------------------------------------------------------------------


def image(size: Size, batch: int) -> torch.Tensor:
    """A random batch of images."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def prepare(candidate: Candidate, size: Size, batch: int, training: bool, device: str) -> Work:
    """Builds a candidate and makes a forward pass, or a training step, of it.

    Args:
        candidate: What to build.
        size: Height and width of the images in pixels; sides of a config with a
            ``pad_size_divisor`` are rounded up to it.
        batch: Number of images.
        training: Whether the work is forward and backward pass. Of a backbone the mean of each
            map is what is minimized, of a config its losses for made-up ground truth. Without, a
            config predicts, with its post-processing.
        device: ``'cpu'`` or ``'cuda'``.

    Returns:
        The work; preprocessing is not part of it.

    Raises:
        UserError: The candidate cannot be built, or its flags do not fit it or the device.
    """
    scope, data = None, {}
    torch.manual_seed(0)  # what a detector's second stage gets depends on the weights
    if candidate.is_config:
        model, data, scope = _whole(candidate, size, batch)
    else:
        model = build(candidate, size)
    model.train(training)  # mmpretrain's return nothing
    if 'deploy' in candidate.flags:
        _deploy(candidate, model)
    model.to(device)
    if scope is None:
        inputs = image(size, batch).to(device)
    else:
        data = model.data_preprocessor(data, training)
        inputs = data['inputs']
    dtype, casts = _precision(candidate, training, device)
    if not casts and dtype != torch.float32:
        model.to(dtype)
        inputs = inputs.to(dtype)
    if 'channels_last' in candidate.flags:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if 'compile' in candidate.flags:
        (model if scope is None else model.backbone).compile()

    def outputs() -> Any:
        if scope is None:
            return model(inputs)
        mode = 'loss' if training else 'predict'
        return model(inputs, data['data_samples'], mode=mode)

    def forward() -> Any:
        with torch.autocast(device, dtype) if casts else nullcontext():
            if not training:
                with torch.inference_mode():
                    return outputs()
            found = outputs()
            return _scalar(found) if scope is None else model.parse_losses(found)[0]

    def reset() -> None:
        set_tf32(candidate.precision == 'tf32')
        model.zero_grad(set_to_none=True)

    return Work(forward, training, reset)


def _scalar(outputs: Any) -> torch.Tensor:
    maps = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum(x.float().mean() for x in maps)


def _deploy(candidate: Candidate, model: torch.nn.Module) -> None:
    try:
        hat_mm.switch_to_deploy(model)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'{candidate.text}: {error}') from error


def _precision(candidate: Candidate, training: bool, device: str) -> tuple[torch.dtype, bool]:
    """Type of the products, and whether autocast chooses where it is used."""
    if candidate.precision == 'tf32' and device != 'cuda':
        raise UserError(f'{candidate.text}: tf32 needs a GPU, the device is {device}')
    dtype = PRECISIONS[candidate.precision]
    return dtype, dtype != torch.float32 and (training or candidate.is_config)


@cache
def complexity(base: str, size: Size) -> tuple[int, int | None]:
    """Counts parameters, and MACs of the forward pass of one image.

    The MLPs of positions are left out: a network that predicts keeps what they compute.

    Args:
        base: A candidate without flags.
        size: Height and width of the image in pixels.

    Returns:
        Both numbers; the second is None if the pass cannot be traced.
    """
    from hat_mm.engine.analysis import count

    candidate = parse(base)
    model = _whole(candidate, size, 1)[0] if candidate.is_config else build(candidate, size)
    parameters = sum(p.numel() for p in model.parameters())
    try:
        whole = count(model, size).whole
    except Exception:  # a black box may do what cannot be traced, in ways nobody can list
        return parameters, None
    return parameters, whole.flops - whole.position
