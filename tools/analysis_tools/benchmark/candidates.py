"""The models that can be measured: naming, building and running them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import attention
import numpy as np
import torch
from measuring import Work

import hat_mm
from hat_mm import compat
from hat_mm.engine.build import build_model, build_type, read_type
from hat_mm.engine.cli import UserError
from hat_mm_runtime import ENDS, Model, images

Size = tuple[int, int]


# Well-known backbones, with settings that make them return four maps.
PEERS = {
    'resnet50': ('mmdet.ResNet', dict(depth=50, norm_eval=False)),
    'swin-t': ('mmdet.SwinTransformer', dict(embed_dims=96, depths=[2, 2, 6, 2])),
    'convnext-t': (
        'mmpretrain.ConvNeXt',
        dict(arch='tiny', out_indices=[0, 1, 2, 3], gap_before_final_norm=False),
    ),
}
FLAGS = {
    'deploy': 'switch_to_deploy, for forward passes',
    'compile': 'torch.compile; of a config the backbone',
    'channels_last': 'memory layout of model and images',
    'bf16': 'half precision by autocast',
    'fp16': 'the same',
    'cp': 'with_cp=True, for training',
}
HALVES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


# --- names ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A model as written on the command line.

    Attributes:
        text: The candidate as written, which is its name in tables.
        base: The text without flags.
        name: Registered type, config, peer, or ``LIBRARY/MODEL``.
        arguments: Its arguments.
        flags: Flags from :data:`FLAGS`.
    """

    text: str
    base: str
    name: str
    arguments: dict[str, Any]
    flags: tuple[str, ...]

    @property
    def is_config(self) -> bool:
        """Whether it is a config, that is a whole model."""
        return self.name.endswith('.py')

    @property
    def is_file(self) -> bool:
        """Whether it is a file that hat_mm.export wrote."""
        return self.name.endswith(ENDS)

    @property
    def channels(self) -> int:
        """Channels of its input."""
        return self.arguments.get('dim', 256) if self.name.startswith('attention/') else 3


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
    if {*HALVES} <= {*flags} or {'deploy', 'cp'} <= {*flags}:
        raise UserError(f'{text!r} has flags that exclude each other')
    name, arguments = read_type(base)
    return Candidate(text, base, name, arguments, flags)


# --- building -------------------------------------------------------------------------------------


def build(candidate: Candidate, size: Size) -> tuple[torch.nn.Module, str | None]:
    """Builds a model with random weights, in eval mode, for images of a size.

    Returns:
        The model, and the toolbox of a whole model; None for a backbone.

    Raises:
        UserError: It cannot be built.
    """
    if candidate.is_config:
        return _whole(candidate, size)
    if '/' in candidate.name:
        return _created(candidate, size).eval(), None
    kind, arguments = candidate.name, candidate.arguments
    if kind in PEERS:
        kind, arguments = PEERS[kind][0], PEERS[kind][1] | arguments
    if '.' not in kind:
        raise UserError(
            f'{kind!r} has no scope; write for example hat_mm.{kind} or mmdet.{kind}, a config, '
            f'timm/{kind}, authors/faster_vit_0_any_res, or one of {", ".join(PEERS)}'
        )
    if 'cp' in candidate.flags:
        arguments = arguments | {'with_cp': True}
    return build_type(kind, arguments), None


def _optional(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{module} cannot be imported ({error}): {command}') from error


def _created(candidate: Candidate, size: Size) -> torch.nn.Module:
    """Builds a model without a registered type; some are made for images of one size."""
    library, _, name = candidate.name.partition('/')
    options: dict[str, Any] = {}
    create: Callable[..., torch.nn.Module]
    if library == 'attention':
        create = attention.build
    elif library == 'timm':
        create = _optional('timm', 'pip install --no-deps timm').create_model
        options = dict(features_only=True)
        if 'swin' in name:
            options.update(img_size=size, strict_img_size=False)
    elif library == 'authors':
        cure = 'pip install timm && pip install --no-deps fastervit==1.0.0'
        create = _optional('fastervit', cure).create_model
        if name.endswith('_any_res'):
            options = dict(resolution=list(size), window_size=[7, 7, 7, 7])
    else:
        raise UserError(f'{candidate.name!r} is neither timm/MODEL nor authors/MODEL nor a config')
    if 'cp' in candidate.flags:
        raise UserError(f'{candidate.text!r}: cp is for registered types and configs')
    try:
        return create(name, **options | candidate.arguments)
    except Exception as error:  # each library has its own exception for an unknown name
        raise UserError(f'{candidate.base} at {size[0]}x{size[1]}: {error!r}') from error


def _whole(candidate: Candidate, size: Size) -> tuple[torch.nn.Module, str]:
    config = compat.require('mmengine').Config
    try:
        if '::' in candidate.name:
            cfg = config.fromstring(f'_base_ = [{candidate.name!r}]', '.py')
        else:
            cfg = config.fromfile(candidate.name)
    except Exception as error:  # different exceptions for each wrong part of a name
        raise UserError(f'no config {candidate.name!r} can be had: {error}') from error
    if cfg.get('default_scope') not in ('mmdet', 'mmseg', 'mmpretrain') or 'model' not in cfg:
        raise UserError(f'{candidate.name} is no config of a model of mmdet, mmseg or mmpretrain')
    cfg.merge_from_dict({f'model.{key}': value for key, value in candidate.arguments.items()})
    if 'cp' in candidate.flags:
        cfg.model.backbone.with_cp = True
    model = compat.require('mmengine.model').revert_sync_batchnorm(build_model(cfg))
    if cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = size  # instead of whole crops
    model.eval()  # of some models it returns None
    return model, cfg.default_scope


def random_batch(scope: str, size: Size, batch: int, masks: bool) -> dict[str, Any]:
    """Random images and ground truth of class 0, in the form that a dataloader returns."""
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
    if scope == 'mmseg':
        sample = structures.SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        pixels = torch.zeros(1, *size, dtype=torch.int64)
        sample.gt_sem_seg = compat.require('mmengine.structures').PixelData(data=pixels)
        inputs = list(inputs)
    else:
        sample = structures.DataSample().set_gt_label(0)
    return dict(inputs=inputs, data_samples=[copy.deepcopy(sample) for _ in range(batch)])


# --- running --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What is measured for a candidate.

    Attributes:
        text: The candidate.
        size: Height and width of the images in pixels; sides of a config with a
            ``pad_size_divisor`` are rounded up to it.
        batch: Number of images.
        training: Whether the work is forward and backward pass. The loss of a backbone is the mean
            of each map; a config has its own losses, for random ground truth. Otherwise the work is
            a forward pass, for a config a prediction with its post-processing.
        device: ``'cpu'`` or ``'cuda'``.
    """

    text: str
    size: Size
    batch: int
    training: bool
    device: str


def _prepare_file(candidate: Candidate, setting: Setting) -> Work:
    """The work of an exported file: the network and, as for a config, its post-processing."""
    if candidate.flags or setting.training or setting.batch > 1 or setting.device != 'cpu':
        raise UserError(
            f'{candidate.text}: a file runs forward on one image at a time, on the CPU, and takes '
            'no flags'
        )
    model = Model(candidate.name, threads=torch.get_num_threads())
    fixed = model.meta.get('static')
    if fixed and tuple(fixed) != setting.size:
        raise UserError(f'{candidate.text} is for {fixed[0]}x{fixed[1]} (height x width) only')
    image = np.random.default_rng(0).integers(0, 256, (*setting.size, 3), np.uint8)
    inputs, size = images.prepare(image, dict(model.meta, resize=[]))
    if model.meta['task'] == 'features':
        return Work(lambda: model.run(inputs))
    return Work(lambda: model.finish(image, model.run(inputs), size=size))


def prepare(setting: Setting) -> Work:
    """Builds a candidate and prepares its forward pass or training step.

    Returns:
        The work; preprocessing is not part of it.

    Raises:
        UserError: The candidate cannot be built, or its flags do not fit it.
    """
    candidate, training = parse(setting.text), setting.training
    if candidate.is_file:
        return _prepare_file(candidate, setting)
    flags, size = candidate.flags, setting.size
    misplaced = 'deploy' if training else 'cp'
    if misplaced in flags:
        raise UserError(f'{candidate.text}: {misplaced} is {FLAGS[misplaced].split(", ")[-1]}')
    torch.manual_seed(0)  # the weights decide what a detector's second stage gets
    model, scope = build(candidate, size)
    model.train(training)
    if 'deploy' in flags:
        try:
            hat_mm.switch_to_deploy(model)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f'{candidate.text}: {error}') from error
    model.to(setting.device)
    data: dict[str, Any] = {}
    if scope is None:
        generator = torch.Generator().manual_seed(0)  # building has used the global generator
        shape = (setting.batch, candidate.channels, *size)
        inputs = torch.randn(shape, generator=generator, device='cpu').to(setting.device)
    else:
        masks = getattr(model, 'with_mask', False)
        data = random_batch(scope, size, setting.batch, masks)
        data = model.data_preprocessor(data, training)
        inputs = data['inputs']
    if 'channels_last' in flags:
        model.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    if 'compile' in flags:
        (model if scope is None else model.backbone).compile()

    def outputs() -> Any:
        if scope is None:
            maps = model(inputs)
            if not training:
                return maps
            maps = [maps] if isinstance(maps, torch.Tensor) else maps
            return sum(x.float().mean() for x in maps)
        if training:
            return model.parse_losses(model(inputs, data['data_samples'], mode='loss'))[0]
        return model(inputs, data['data_samples'], mode='predict')

    def forward() -> Any:
        half = next((HALVES[flag] for flag in flags if flag in HALVES), None)
        with (
            torch.autocast(setting.device, half) if half else nullcontext(),
            nullcontext() if training else torch.inference_mode(),
        ):
            return outputs()

    return Work(forward, training, reset=model.zero_grad, compiled='compile' in flags)


@cache
def complexity(base: str, size: Size) -> tuple[int | None, int | None]:
    """Counts the parameters, and the MACs of the forward pass of one image.

    The position MLPs are left out; in deploy form, those of windows do not run.

    Args:
        base: A candidate without flags.
        size: Height and width of the image in pixels.

    Returns:
        Both numbers; the second is None if the pass cannot be traced, both are for a file.
    """
    from hat_mm.engine.analysis import count

    candidate = parse(base)
    if candidate.is_file:
        return None, None
    model, _ = build(candidate, size)
    parameters = sum(p.numel() for p in model.parameters())
    try:
        whole = count(model, size, channels=candidate.channels).whole
    except Exception:  # models of other libraries may fail to be traced in any way
        return parameters, None
    return parameters, whole.flops - whole.position
