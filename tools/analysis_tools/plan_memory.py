"""Plans the memory that training a detector takes on each GPU: by DDP, with_cp, FSDP2.

Parameters, gradients and AdamW's states are counted. Activations are what autograd keeps of a
training step in float32: of the backbone by torch's fake tensors, which have sizes and no memory;
of neck and heads in a real step on the CPU, with so many objects in each image that the second
stage gets all the positive boxes it may. Left out are the workspace of operators, fragments, and
what CUDA and NCCL take, for which --spare is reserved.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from hat_mm.backbones.base import HierarchicalBackbone
from hat_mm.engine.cli import UserError, read_config, run_tool
from hat_mm.engine.environment import circumstances, describe, tune
from hat_mm.engine.fsdp2 import find_units
from hat_mm.weights.initialization import initialize

OBJECTS = 128
"""In an image: as many as a second stage may take for its masks."""
GPUS = (24, 40, 80)
"""Gigabytes of usual GPUs."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('configs', nargs='+', help='configs of mmdet with FasterViT, HATNet or SwinHAT')
    add('--size', nargs=2, type=int, default=(800, 1333), metavar=('HEIGHT', 'WIDTH'))
    add('--batch', type=int, default=2, help='images on each GPU')
    add('--processes', type=int, default=8, help='GPUs that share the states under FSDP2')
    add('--spare', type=float, default=2, help='GB of a GPU that are not planned for')
    add('--out', type=Path, help='JSON of what was measured; what it has is not measured again')
    args = parser.parse_args(argv)
    if min(*args.size, args.batch, args.processes) < 1:
        parser.error('--size, --batch and --processes must be at least 1')
    return args


# --- what is measured -----------------------------------------------------------------------------


class Kept:
    """Counts the bytes that autograd keeps, without those of a model's parameters and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._storages = {x.untyped_storage()._cdata: x for x in model.state_dict().values()}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Counts the storage of a tensor once."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def watching(self) -> Any:
        """A context in which what autograd keeps is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)


def count_backbone(
    cfg: Any, shape: tuple[int, ...], with_cp: bool, fake: bool = True
) -> tuple[int, int, list[tuple[int, ...]]]:
    """Activations of a training step of a backbone.

    Args:
        cfg: Its config.
        shape: Shape of the images.
        with_cp: Whether its blocks are computed again in the backward pass.
        fake: Whether to compute nothing; the counts are the same.

    Returns:
        Bytes; of them, the most of one block; shapes of the maps.
    """
    with FakeTensorMode() if fake else contextlib.nullcontext():
        backbone = MODELS.build(cfg | dict(with_cp=with_cp, init_cfg=None)).train()
        kept, blocks = Kept(backbone), [0]

        def before(_: nn.Module, inputs: tuple) -> None:
            for tensor in inputs:  # checkpointing keeps them
                if isinstance(tensor, Tensor):
                    kept.pack(tensor)
            blocks.append(-kept.bytes)

        def after(*_: Any) -> None:
            blocks[-1] += kept.bytes

        for stage in backbone.stages:
            for block in stage.blocks:
                block.register_forward_pre_hook(before)
                block.register_forward_hook(after)
        with kept.watching():
            maps = backbone(torch.zeros(shape))
        for tensor in maps:  # the neck keeps them
            kept.pack(tensor)
    return kept.bytes, max(blocks), [tuple(tensor.shape) for tensor in maps]


@MODELS.register_module(name='PlannedMaps')
class Maps(nn.Module):
    """Maps of noise, with gradients, in place of those of a backbone."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.maps = [torch.randn(shape).requires_grad_() for shape in shapes]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns them for any images."""
        return tuple(self.maps)


def count_rest(cfg: Any, shapes: list[tuple[int, ...]], size: tuple[int, int]) -> int:
    """Bytes that neck and heads keep of a training step with one image, without its maps.

    Args:
        cfg: Config of the detector.
        shapes: Shapes of the backbone's maps.
        size: Height and width of the image.
    """
    from mmdet.testing import demo_mm_inputs

    model = build(cfg, dict(type='mmengine.PlannedMaps', shapes=shapes))
    initialize(model)  # the constructor of DINO leaves some parameters as they come
    truth = dict(num_items=[OBJECTS], with_mask=True, num_classes=2)
    data = model.data_preprocessor(demo_mm_inputs(1, [(3, *size)], **truth), training=True)
    kept = Kept(model)
    for tensor in model.backbone.maps:
        kept.pack(tensor)
    before = kept.bytes
    with kept.watching():
        losses = model(**data, mode='loss')  # holds what is kept
    del losses
    return kept.bytes - before


def build(cfg: Any, backbone: Any) -> nn.Module:
    """A detector with another backbone, without SyncBN, in training mode."""
    cfg = copy.deepcopy(cfg)  # some heads change theirs
    cfg.backbone = backbone
    with DefaultScope.overwrite_default_scope('mmdet'):
        return revert_sync_batchnorm(MODELS.build(cfg)).train()


def measure(path: str, size: tuple[int, int]) -> dict[str, Any]:
    """Bytes of a detector in float32 with one image: parameters, units of FSDP2, activations."""
    torch.manual_seed(0)
    config = read_config(path)
    if config.default_scope != 'mmdet':
        raise UserError(f'{path} is no config of mmdet')
    cfg = config.model
    with FakeTensorMode():
        model = build(cfg, cfg.backbone | dict(init_cfg=None))
    if not isinstance(model.backbone, HierarchicalBackbone):
        raise UserError(f'{path}: its backbone is none of FasterViT, HATNet, SwinHAT')
    units, seen = [], set()
    for unit in find_units(model, min_params=1_000_000):
        own = set(unit.parameters()) - seen
        seen |= own
        units.append(sum(parameter.nbytes for parameter in own))
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    # mmdet pads the images of a batch to multiples of 32.
    height, width = (-(-side // 32) * 32 for side in size)
    plain, with_cp = (
        count_backbone(cfg.backbone, (1, 3, height, width), with_cp) for with_cp in (False, True)
    )
    return dict(
        size=[height, width],
        parameters=parameters,
        largest_unit=max(units),
        outside_units=parameters - sum(units),
        activations=plain[0],
        largest_block=plain[1],
        activations_with_cp=with_cp[0],
        rest=count_rest(cfg, plain[2], (height, width)),
        measured=describe(circumstances('cpu', tune())),
    )


# --- the plan -------------------------------------------------------------------------------------


def plan(found: dict[str, Any], args: argparse.Namespace) -> dict[str, str]:
    """A row of the table."""
    weights, rest = found['parameters'], args.batch * found['rest']
    plain = args.batch * found['activations'] + rest
    # The backward pass computes one block after the other again.
    with_cp = args.batch * (found['activations_with_cp'] + found['largest_block']) + rest
    # Parameters, gradients and their buckets, two states of AdamW.
    ddp = 5 * weights
    # Shares of all but the buckets. What belongs to no unit is there for the whole step, with its
    # gradients, and a unit four times: itself, the next one, its gradients, and a buffer to sum
    # these up. At the end of the backward pass no unit is left, and the former needs that buffer.
    outside, unit = found['outside_units'], found['largest_unit']
    fsdp2 = 4 * weights / args.processes + max(2 * outside + 4 * unit, 3 * outside)
    row = {
        'parameters, M': f'{weights / 4e6:.0f}',
        'states, DDP': f'{ddp / 1e9:.1f}',
        'states, FSDP2': f'{fsdp2 / 1e9:.1f}',
        'activations': f'{plain / 1e9:.1f}',
        'with_cp': f'{with_cp / 1e9:.1f}',
    }
    for states, name in ((ddp, 'DDP'), (fsdp2, 'FSDP2')):
        for kept, suffix in ((plain, ''), (with_cp, ', with_cp')):
            total = (states + kept) / 1e9
            fitting = [gpu for gpu in GPUS if total + args.spare <= gpu]
            row[name + suffix] = f'{total:.1f}, {f"fits {fitting[0]}" if fitting else "too large"}'
    return row


def main(argv: list[str] | None = None) -> None:
    """Measures what is not in ``--out``; prints a Markdown table in GB."""
    args = parse_args(argv)
    measured = args.out is not None and args.out.exists()
    done = json.loads(args.out.read_text(encoding='utf-8')) if measured else {}
    rows = []
    for path in args.configs:
        name = f'{Path(path).stem} {args.size[0]}x{args.size[1]}'
        if name not in done:
            # In a process of its own, which gives all its memory back.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
                done[name] = pool.submit(measure, path, args.size).result()
            if args.out:
                args.out.write_text(json.dumps(done, indent=1) + '\n', encoding='utf-8')
        rows.append({'config': name, **plan(done[name], args)})
    print(tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True))


if __name__ == '__main__':
    sys.exit(run_tool(main, 'plan_memory.py'))
