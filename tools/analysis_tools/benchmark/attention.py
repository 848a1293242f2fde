"""One block of hierarchical attention beside one of full attention, on growing maps.

The block is that of stage 2 of FasterViT-0 (256 channels, 8 heads, windows of 7x7 tokens, 2x2
carriers each), in eval mode on one map. Beside it: the same without carriers, so that windows know
nothing of each other, and the same layer with attention of all tokens to all, with FasterViT's
position bias and without. The bias is a number for each head and pair of tokens; of many tokens it
is made for a chunk of the queries at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from models import make_folder, one_line, read_positive, read_size
from report import MIB, cell, plot_growth, significant, table
from torch import Tensor, nn

from hat_mm.backbones.fastervit import HATStage
from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import circumstances, describe
from hat_mm.layers import SelfAttention, TransformerLayer

SIZES = [(14, 14), (28, 28), (56, 56), (80, 112), (112, 160), (160, 224)]
FORMS = {
    'carriers': 'windows with carriers',
    'windows': 'windows alone',
    'full': 'full attention, with bias',
    'full-no-bias': 'full attention, no bias',
}
MODES = {'forward': 'time, s', 'memory': 'memory, MiB'}
WINDOW, CARRIERS = 7, 2


# --- what is measured -----------------------------------------------------------------------------


class FusedAttention(SelfAttention):
    """Self-attention without a position bias, which leaves the kernel nothing to read but tokens.

    Args:
        dim: Channels C, a multiple of ``num_heads``.
        num_heads: Heads G.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads, nn.Identity())

    def forward(self, x: Tensor, grid_size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Maps (B, N, C) to (B, N, C)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class FullBlock(nn.Module):
    """The layer that a hierarchical block has for its windows, on all tokens of a map at once.

    Args:
        dim: Channels C.
        num_heads: Heads G.
        bias: Whether attention has a position bias.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool) -> None:
        super().__init__()
        self.layer = TransformerLayer(dim, num_heads)
        if not bias:
            self.layer.attn = FusedAttention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape."""
        grid_size = (x.shape[2], x.shape[3])
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.layer(tokens + self.layer.pos_embed(grid_size), grid_size)
        return tokens.unflatten(1, grid_size).permute(0, 3, 1, 2)


def build(form: str, dim: int, heads: int) -> nn.Module:
    """Makes the block of one of :data:`FORMS`, with random weights, in eval mode."""
    torch.manual_seed(0)
    if form.startswith('full'):
        return FullBlock(dim, heads, bias=form == 'full').eval()
    carrier_size = CARRIERS if form == 'carriers' else 0
    stage = HATStage(nn.Identity(), dim, heads, window_size=WINDOW, carrier_size=carrier_size)
    return stage.eval()


def prepare(
    form: str, size: tuple[int, int], dim: int, heads: int, device: str, dtype: str
) -> measuring.Work:
    """Makes the block and a map of ``size`` tokens for it."""
    precision = measuring.PRECISIONS[dtype]
    block = build(form, dim, heads).to(device, precision)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, dim, *size, generator=generator).to(device, precision)

    def forward() -> Tensor:
        with torch.inference_mode():
            return block(x)

    return measuring.Work(forward, reset=lambda: measuring.set_tf32(dtype == 'tf32'))


def work_of(job: dict[str, Any]) -> measuring.Work:
    """What a job measures."""
    return prepare(**{key: value for key, value in job.items() if key != 'mode'})


def memory_of_job(job: dict[str, Any]) -> dict[str, int | None]:
    """The memory of a block, in a fresh process."""
    # What libraries allocate once; a GPU's depends on the size.
    work_of(job if job['device'] == 'cuda' else job | {'size': (WINDOW, WINDOW)}).run()
    return measuring.peak_memory(work_of(job), job['device'])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures all forms at all sizes; returns what attention_scaling.json holds."""
    rows = []
    for size in args.size:
        print(f'{size[0]}x{size[1]} tokens', file=sys.stderr, flush=True)
        found = {form: {'form': form, 'size': list(size)} for form in FORMS}
        timers = {}
        with ExitStack() as stack:
            for form, row in found.items():
                job = dict(form=form, size=size, dim=args.dim, heads=args.heads)
                job |= dict(device=args.device, dtype=args.dtype)
                try:
                    memory = measuring.memory_of(job | {'mode': 'memory'}, args.processes)
                    row['memory'], row['memories'] = memory['peak'], memory['peaks']
                    job['mode'] = 'forward'
                    timers[form], _ = measuring.timer_of(job, work_of, stack)
                except Exception as error:  # the others can still be measured
                    row['error'] = one_line(error)
            warm_up = 3 if args.device == 'cuda' else 1
            seconds, failed = measuring.time_in_turns(timers, args.rounds, warm_up)
        for form, values in seconds.items():
            found[form]['seconds'] = values
        for form, error in failed.items():
            found[form]['error'] = one_line(error)
        rows += found.values()
    kept = ('dim', 'heads', 'dtype', 'rounds', 'processes')
    options = {name: getattr(args, name) for name in kept}
    return {**circumstances(args.device), **options, 'rows': rows}


# --- output ---------------------------------------------------------------------------------------


def value(row: dict[str, Any], mode: str) -> float | None:
    """Median seconds, or MiB."""
    if mode == 'forward':
        return measuring.median(row.get('seconds'))
    return row['memory'] / MIB if 'memory' in row else None


def curves(results: dict[str, Any], mode: str) -> dict[str, list[tuple[float, float]]]:
    """Points (tokens, value) of each form."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in results['rows']:
        y = value(row, mode)
        if y is not None:
            tokens = row['size'][0] * row['size'][1]
            found.setdefault(row['form'], []).append((tokens, y))
    return found


def markdown(results: dict[str, Any]) -> str:
    """Both tables, with a column for each form, and what they were measured on."""
    parts = []
    sizes = list(dict.fromkeys(tuple(row['size']) for row in results['rows']))
    cells = {(row['form'], tuple(row['size'])): row for row in results['rows']}
    for mode, title in MODES.items():
        lines = []
        for size in sizes:
            rows = [cells.get((form, size), {}) for form in FORMS]
            figures = [significant(value(row, mode), 3) for row in rows]
            tokens = f'{size[0] * size[1]:,}'
            lines.append([f'{size[0]}×{size[1]}', tokens, *figures])
        of_form = curves(results, mode)
        points = [of_form.get(form, []) for form in FORMS]
        fits = [measuring.fit_exponent(*zip(*p, strict=True)) if p else None for p in points]
        lines.append(['exponent', '', *(cell(fit, '.2f') for fit in fits)])
        parts.append(table(['map', 'tokens', *(f'{f}: {title}' for f in FORMS.values())], lines))
    errors = [f'- {r["form"]}, {r["size"]}: {r["error"]}' for r in results['rows'] if 'error' in r]
    parts += ['\n'.join(errors)] * bool(errors)
    parts.append(
        f'{results["dim"]} channels, {results["heads"]} heads, {results["dtype"]}, one map. Memory '
        'is the peak beyond weights and map. The exponent is that of the tokens, by least squares.'
    )
    parts.append(f'```bash\n{results["command"]}\n```')
    how = f'{results["rounds"]} rounds; memory: {results["processes"]} processes each'
    parts.append(f'({how}; medians; {describe(results)}.)')
    return '\n\n'.join(parts) + '\n'


def save(results: dict[str, Any], folder: Path) -> None:
    """Writes attention_scaling.json, .md and .png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + '\n'
    (folder / 'attention_scaling.json').write_text(text, encoding='utf-8')
    (folder / 'attention_scaling.md').write_text(markdown(results), encoding='utf-8')
    panels = {
        title: {FORMS[form]: points for form, points in curves(results, mode).items()}
        for mode, title in MODES.items()
    }
    plot_growth(panels, 'tokens of the map', folder / 'attention_scaling.png')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog='benchmark attention',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('--size', nargs='+', type=read_size, default=SIZES, metavar='HxW',
        help=f'tokens of the map (default: {" ".join(f"{h}x{w}" for h, w in SIZES)})')  # fmt: skip
    add('--dim', type=read_positive, default=256, help='channels (default: 256)')
    add('--heads', type=read_positive, default=8)
    add('--dtype', choices=list(measuring.PRECISIONS), default='float32')
    add('--rounds', type=read_positive, default=5)
    add(
        '--processes',
        type=read_positive,
        default=3,
        help='fresh processes whose median is the memory',
    )
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--out', type=Path, default=Path('work_dirs/attention_scaling'), metavar='DIR')
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        parser.error(f'--heads {args.heads} does not divide --dim {args.dim}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, writes and prints."""
    args = parse_args(argv)
    make_folder(args.out)
    results = measure(args)
    save(results, args.out)
    print(markdown(results))
    failed = [row for row in results['rows'] if 'error' in row]
    if failed:
        raise UserError(f'{len(failed)} of {len(results["rows"])} measurements failed; see above')
