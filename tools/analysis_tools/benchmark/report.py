"""Writes tables and plots of earlier results beside their benchmark.json."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from candidates import Candidate, parse
from tabulate import tabulate

from hat_mm.engine.environment import describe

ROOT = Path(__file__).resolve().parents[3]
TITLES = {
    'forward': 'Forward pass',
    'train': 'Training step (forward and backward pass)',
    'memory': 'Memory of the forward pass',
    'train-memory': 'Memory of a training step',
}
TIME_NOTE = (
    'Speed-up: median of the other divided by the median of this one. Parameters, and MACs of a '
    "forward pass of one image (1000 proposals in a detector's second stage)."
)
MEMORY_NOTE = 'Peak beyond weights and images, in training with the gradients of the weights.'
MIB = 2**20


# --- figures --------------------------------------------------------------------------------------


def pixels(row: dict[str, Any]) -> int:
    """Pixels of an image, or tokens of a map."""
    return row['size'][0] * row['size'][1]


def cost(row: dict[str, Any]) -> float | None:
    """The result of a row: median seconds, or bytes; None if it failed."""
    values = row.get('seconds') or row.get('peaks')
    return statistics.median(values) if values else None


def against(row: dict[str, Any], peer: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """Cost of the peer divided by that of ``row``; for memory, the inverse."""
    setting = {key: row[key] for key in ('mode', 'size', 'batch')} | {'candidate': peer}
    costs = [cost(other) for other in rows if setting.items() <= other.items()]
    if not costs or not costs[0] or not cost(row):  # a peak can be 0
        return None
    ratio = costs[0] / cost(row)
    return 1 / ratio if row['mode'].endswith('memory') else ratio


def curves(results: dict[str, Any]) -> dict[tuple[str, int, str], list[tuple[int, float]]]:
    """Points (pixels, cost) by mode, batch and candidate."""
    found: dict[tuple, list] = {}
    for row in results['rows']:
        if cost(row) is not None:
            key = (row['mode'], row['batch'], row['candidate'])
            found.setdefault(key, []).append((pixels(row), cost(row)))
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent e in ``y = c * x ** e``, by least squares of the logarithms.

    Returns:
        None if there are fewer than three different x, or a y is not positive.
    """
    xs, ys = zip(*points, strict=True)
    if len({*xs}) < 3 or min(ys) <= 0:
        return None
    return float(np.polyfit(np.log(xs), np.log(ys), 1)[0])


def label(text: str) -> str:
    """A candidate's name, shortened."""
    return text.removeprefix('hat_mm.').replace(':arch=', '-')


# --- accuracy that others have published ----------------------------------------------------------

PEERS_REPORTED = {
    'resnet50': dict(top1=76.1, box_ap=None),
    'swin-t': dict(top1=81.3, box_ap=50.4),
    'convnext-t': dict(top1=82.1, box_ap=50.4),
}


@cache
def _models(family: str) -> list[dict[str, Any]]:
    path = ROOT / 'configs' / family.replace('-', '_') / 'metafile.yml'
    return yaml.safe_load(path.read_text(encoding='utf-8'))['Models'] if path.exists() else []


def _reported(family: str, pattern: str, metric: str) -> float | None:
    for model in _models(family):
        if re.match(pattern, model['Name']):
            for result in model.get('Results') or []:
                if f'{metric} (authors)' in result['Metrics']:
                    return result['Metrics'][f'{metric} (authors)']
    return None


def published(candidate: Candidate) -> dict[str, float | None]:
    """Accuracy that a network's authors report; for our networks, that in the metafiles.

    Returns:
        ``top1``, ImageNet-1K in percent, and ``box_ap``, COCO with Cascade Mask R-CNN and the 3x
        schedule; None if it is not known.
    """
    name, arch = candidate.name, candidate.arguments.get('arch')
    if name in PEERS_REPORTED and not candidate.arguments:
        return PEERS_REPORTED[name]
    released = re.fullmatch(r'authors/faster_vit_(\d)(?:_any_res|_224)', name)
    if released:
        name, arch = 'hat_mm.FasterViT', released[1]
    family = {'hat_mm.FasterViT': 'fastervit', 'hat_mm.HATNet': 'hat-net'}.get(name)
    if family is None:
        return dict(top1=None, box_ap=None)
    stem = re.escape(f'{family}-{arch}')
    return dict(
        top1=_reported(family, f'{stem}_3rdparty_in1k', 'Top 1 Accuracy'),
        box_ap=_reported(family, f'cascade-mask-rcnn_{stem}_.*-3x_coco$', 'box AP'),
    )


# --- Markdown -------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table; cells that a row lacks stay empty."""
    return tabulate(rows, headers='keys', tablefmt='github', disable_numparse=True)


def _cells(row: dict[str, Any], results: dict[str, Any]) -> dict[str, str]:
    height, width = row['size']
    cells = {'size': f'{height}×{width}', 'batch': str(row['batch'])}
    cells['candidate'] = f'`{row["candidate"]}`'
    memory = row['mode'].endswith('memory')
    cost_name = 'peak MiB' if memory else 'median s'
    if 'error' in row:
        return cells | {cost_name: 'failed'}
    if memory:
        cells[cost_name] = f'{cost(row) / MIB:.1f}'
    else:
        cells[cost_name] = f'{cost(row):.4g}'
        cells['min–max s'] = f'{min(row["seconds"]):.3g}–{max(row["seconds"]):.3g}'
        cells['images/s'] = f'{row["batch"] / cost(row):.2f}'
    for peer in results['peers']:
        ratio = against(row, peer, results['rows'])
        if ratio is not None:
            cells[f'{"of" if memory else "speed-up over"} {label(peer)}'] = f'{ratio:.2f}'
    if not memory:
        parameters = row['parameters']
        cells['params M'] = '' if parameters is None else f'{parameters / 1e6:.1f}'
        cells['MACs G'] = '' if row['macs'] is None else f'{row["macs"] / 1e9:.3g}'
    return cells


def markdown(results: dict[str, Any]) -> str:
    """The tables of all modes, the exponents, and the hardware and versions."""
    parts = []
    for mode in dict.fromkeys(row['mode'] for row in results['rows']):
        rows = [row for row in results['rows'] if row['mode'] == mode]
        parts += [f'## {TITLES[mode]}', table([_cells(row, results) for row in rows])]
        parts.append(MEMORY_NOTE if mode.endswith('memory') else TIME_NOTE)
        errors = [f'- `{r["candidate"]}`, {r["size"]}: {r["error"]}' for r in rows if 'error' in r]
        parts += ['\n'.join(errors)] if errors else []
    grown = {key: exponent(points) for key, points in curves(results).items()}
    lines = [
        {'of': TITLES[mode], 'batch': batch, 'candidate': f'`{name}`', 'exponent': f'{power:.2f}'}
        for (mode, batch, name), power in grown.items()
        if power is not None
    ]
    if lines:
        note = 'Time or memory grow with the pixels to the power of the exponent (least squares).'
        parts += ['## Growth', table(lines), note]
    how = f'{results["rounds"]} rounds; memory: {results["processes"]} processes each'
    parts += [f'```bash\n{results["command"]}\n```', f'({how}; {describe(results)}.)']
    return '\n\n'.join(parts) + '\n'


# --- plots ----------------------------------------------------------------------------------------
# matplotlib is imported late, because the GPU check makes tables without it.


def plot_growth(results: dict[str, Any], path: Path) -> bool:
    """Draws cost against pixels if three sizes were measured; returns whether it drew anything."""
    panels: dict[str, dict[str, list]] = {}
    for (mode, batch, name), points in curves(results).items():
        power = exponent(points)
        if power is not None:
            unit, scale = ('MiB', MIB) if mode.endswith('memory') else ('s', 1)
            panel = panels.setdefault(f'{TITLES[mode]}, {unit}', {})
            key = f'exponent {power:.2f}: {label(name)}, batch {batch}'
            panel[key] = [(x, y / scale) for x, y in sorted(points)]
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 4.5), layout='constrained')
    all_axes = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, lines) in zip(all_axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.loglog(*zip(*points, strict=True), 'o-', label=name[:60], markersize=4)
        axes.set(xlabel='pixels of the image, or of the map', ylabel=title)
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True


def plot_accuracy(results: dict[str, Any], path: Path) -> bool:
    """Draws published accuracy against measured throughput at the first size and batch.

    Returns:
        Whether there is anything to draw.
    """
    done = [row for row in results['rows'] if row['mode'] == 'forward' and 'seconds' in row]
    done = [r for r in done if (r['size'], r['batch']) == (done[0]['size'], done[0]['batch'])]
    known = [(row, published(parse(row['candidate']))) for row in done]
    titles = {'top1': 'ImageNet-1K top-1, %', 'box_ap': 'COCO box AP, Cascade Mask R-CNN 3x'}
    panels = [key for key in titles if any(accuracy[key] is not None for _, accuracy in known)]
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 5 * len(panels), 4.5), layout='constrained')
    all_axes = figure.subplots(1, len(panels), squeeze=False)
    height, width = done[0]['size']
    for axes, key in zip(all_axes[0], panels, strict=True):
        for index, (row, accuracy) in enumerate(known):
            x = row['batch'] / cost(row)
            y = float('nan') if accuracy[key] is None else accuracy[key]
            axes.plot(x, y, 'os^DvPX<>'[index % 9], label=label(row['candidate'])[:60], alpha=0.8)
        axes.set_xlabel(f'images/s at {height}×{width}, batch {done[0]["batch"]}, measured')
        axes.set_ylabel(f'{titles[key]}, reported by the authors', fontsize=8)
        axes.set_xlim(left=0)
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
    figure.legend(
        *all_axes[0][0].get_legend_handles_labels(), loc='outside right center', fontsize=7
    )
    figure.savefig(path, dpi=110)
    return True


def plot_engines(results: dict[str, Any], path: Path) -> bool:
    """Draws the seconds of networks in PyTorch and as files, at the first size.

    Returns:
        Whether there are files among the candidates.
    """
    done = [row for row in results['rows'] if row['mode'] == 'forward' and 'seconds' in row]
    done = [row for row in done if row['size'] == done[0]['size']]
    if not any(parse(row['candidate']).is_file for row in done):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.8 + 0.4 * len(done)), layout='constrained')
    axes = figure.subplots()
    shown = [parse(row['candidate']) for row in done]
    names = ['@'.join([Path(one.name).name, *one.flags]) for one in shown]
    colors = ['C0' if one.is_file else 'C7' for one in shown]
    bars = axes.barh(range(len(done)), [cost(row) for row in done], color=colors)
    axes.bar_label(bars, [f'{cost(row):.2f} s' for row in done], padding=3)
    axes.set_yticks(range(len(done)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    height, width = done[0]['size']
    axes.set_xlabel(f'seconds for an image of {height}×{width}')
    figure.savefig(path, dpi=110)
    return True


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws growth with the pixels, accuracy against throughput, and files beside PyTorch.

    Returns:
        The PNGs that were written.
    """
    plots = {
        'growth.png': plot_growth,
        'accuracy.png': plot_accuracy,
        'engines.png': plot_engines,
    }
    return [folder / name for name, draw in plots.items() if draw(results, folder / name)]


# --- the command ----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Writes tables and plots of earlier results."""
    results = json.loads(args.results.read_text(encoding='utf-8'))
    args.results.with_suffix('.md').write_text(markdown(results), encoding='utf-8')
    for path in plot(results, args.results.parent):
        print(path)
