"""Puts a backbone of hat_mm into a config of mmdet, mmsegmentation or mmpretrain.

Writes a config that inherits from the other one and states the few settings that change, each with
its reason. The new model is built and run on a small picture before anything is written.

  python tools/misc/swap_backbone.py mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py fastervit-0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hat_mm import compat
from hat_mm.engine.cli import UserError, add_cfg_options, read_config, run_tool
from hat_mm.engine.edits import base_of, find, literal, write
from hat_mm.engine.swap import plan_swap


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config', metavar='SRC', help='a file, or a config of a toolbox as mmdet::FOLDER/FILE.py'
    )
    parser.add_argument(
        'backbone',
        metavar='BACKBONE',
        help='name of a file in configs/_base_/backbones, such as fastervit-2, or a file like them',
    )
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='(default: standard output, for a file in this folder)',
    )
    parser.add_argument('--force', action='store_true', help='replace FILE')
    flag = parser.add_argument
    flag('--no-pretrained', action='store_true', help='start from random weights')
    flag(
        '--keep-preprocessing',
        action='store_true',
        help="keep mean, deviation and order of channels, though the weights' are others",
    )
    flag(
        '--transformer-recipe',
        action='store_true',
        help='set AdamW, clipped gradients and no decay of norms and biases',
    )
    flag('--no-check', action='store_true', help='do not build and run the new model')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def bases(path: Path) -> list[Path]:
    """A config and all that it inherits from, but those of a toolbox."""
    found = [path]
    if path.is_file():
        config = compat.require('mmengine').Config
        for name in config._get_base_files(str(path)):
            if '::' not in name:
                found += bases(path.parent / name)
    return found


def main(argv: list[str] | None = None) -> None:
    """Swaps the backbone, writes the config, and says what changed."""
    args = parse_args(argv)
    source = find(args.config)
    if args.out is not None and args.out.suffix != '.py':
        raise UserError(f'--out {args.out} must end with .py', status=2)
    if args.out is not None and args.out.exists():
        inputs = [*bases(source), Path(args.backbone)]
        if any(path.exists() and path.samefile(args.out) for path in inputs):
            raise UserError(f'{args.out} would replace what it inherits from: choose another --out')
        if not args.force or args.out.is_dir():
            raise UserError(f'{args.out} exists: choose another --out, or --force to replace it')
    cfg = read_config(str(source), scope=False)
    if compat.require('mmengine').Config._is_lazy_import(str(source)):
        raise UserError(
            f'{source} is written in the new style, with imports, from which the config that this '
            'tool writes cannot inherit; in Python, hat_mm.swap_backbone takes it'
        )
    swap = plan_swap(
        cfg,
        args.backbone,
        pretrained=not args.no_pretrained,
        keep_preprocessing=args.keep_preprocessing,
        transformer_recipe=args.transformer_recipe,
        options=args.cfg_options,
        check=not args.no_check,
    )
    folder = args.out.parent if args.out else Path()
    text = swap.edits.text(base_of(args.config, folder), swap.notes)
    if args.out is None:
        print(text, end='')
        return
    write(args.out, text, swap.cfg)
    for path, edit in swap.edits.items():
        print(f'{path} = {literal(edit.value)}  # {edit.why}')
    for note in swap.notes:
        print(f'not decided: {note}')
    print(f'{args.out}: written. Next: python tools/train.py {args.out}')


if __name__ == '__main__':
    sys.exit(run_tool(main, 'swap_backbone.py'))
