"""Merges trained LoRA adapters into the weights that they were trained on.

CONFIG is that of the training, with mmpretrain's LoRAModel around the backbone; it also names the
weights that the training started from, which the checkpoint does not hold. The result is a
checkpoint of the same model without LoRAModel, as large and as fast as before the training.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

import hat_mm
from hat_mm.engine.build import build_model
from hat_mm.engine.cli import UserError, add_cfg_options, read_config, run_tool
from hat_mm.engine.export import load_weights
from hat_mm.weights import fileio


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the training')
    parser.add_argument('checkpoint', help='its checkpoint, or what was published from it')
    parser.add_argument(
        'out_file', help=f'file to write; its end is the format: {", ".join(fileio.SUFFIXES)}'
    )
    add_cfg_options(parser)
    parser.add_argument('--force', action='store_true', help='overwrite OUT_FILE')
    return parser.parse_args(argv)


def find_lora(cfg: Any) -> Iterator[Any]:
    """Yields the configs of the modules that LoRAModel wraps."""
    if isinstance(cfg, dict):
        kind = cfg.get('type')
        if getattr(kind, '__name__', str(kind)).endswith('LoRAModel'):
            yield cfg['module']
        cfg = list(cfg.values())
    if isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from find_lora(value)


def starts_from_a_file(cfg: Any) -> bool:
    """Whether a module's config says which weights fill it."""
    given = cfg.get('init_cfg') or []
    several = given if isinstance(given, (list, tuple)) else [given]
    return bool(cfg.get('pretrained')) or any(init.get('checkpoint') for init in several)


def merge(model: nn.Module) -> int:
    """Adds all adapters of a model to their layers and removes them, in place.

    Returns:
        The number of adapters.
    """
    merged = 0
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child).__name__ == 'LoRALinear':
                update = child.lora_up.weight @ child.lora_down.weight
                child.original_layer.weight.data += child.scaling * update.detach()
                setattr(parent, name, child.original_layer)
                merged += 1
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if type(child).__name__ == 'LoRAModel':
                setattr(parent, name, child.module)
    return merged


def main(argv: list[str] | None = None) -> None:
    """Merges and reports."""
    args = parse_args(argv)
    try:
        fileio.check_target(args.out_file, args.force)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    cfg = read_config(args.config, args.cfg_options)
    wrapped = [*find_lora(cfg.model)]
    if not wrapped:
        raise UserError(f'config {args.config!r} has no LoRAModel')
    if not all(map(starts_from_a_file, wrapped)):
        raise UserError(
            f'config {args.config!r} does not say which weights LoRAModel started from '
            '(init_cfg of its module), and the checkpoint does not hold them'
        )
    model = build_model(cfg)
    model.eval()  # of some models it returns None
    meta: dict[str, Any] = load_weights(model, args.checkpoint)
    merged = merge(model)
    # meta['cfg'] has LoRAModel, which inferencers would build.
    meta = {key: value for key, value in meta.items() if key != 'cfg'}
    meta = {**meta, 'merged_lora': {'adapters': merged, 'hat_mm_version': hat_mm.__version__}}
    checkpoint = {'meta': meta, 'state_dict': dict(model.state_dict())}
    fileio.write(args.out_file, checkpoint, args.force)
    print(f'{args.out_file}: {merged} adapters merged')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'merge_lora.py'))
