"""Writes tables and plots of measured models, beside their benchmark.json."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from candidates import PEERS, Candidate, parse
from measuring import fit_exponent

from hat_mm.engine.environment import describe

ROOT = Path(__file__).resolve().parents[3]
TITLES = {
    'forward': 'Forward pass',
    'train': 'Training step (forward and backward pass)',
    'memory': 'Memory of the forward pass',
    'train-memory': 'Memory of a training step',
}
NOTES = {
    'forward': 'Speed-up: median of the other divided by the median of this one. Parameters, and '
    "MACs for one image (1000 proposals in a detector's second stage). Of products: 2 "
    "FLOP for each multiply-add in the median time, as a share of what this machine's products of "
    'large square matrices reached in the same turns.',
    'train': 'Speed-up and shares as above, with three times the MACs of a forward pass.',
    'memory': 'Peak beyond weights and images.',
    'train-memory': 'Peak beyond weights and images, with the gradients of the weights; held is '
    'what is there between the forward and the backward pass.',
}
MIB = 2**20


# --- figures --------------------------------------------------------------------------------------


def megapixels(row: dict[str, Any]) -> float:
    """Megapixels of an image."""
    return row['size'][0] * row['size'][1] / 1e6


def cost(row: dict[str, Any]) -> float | None:
    """What a row measured: median seconds, or peak bytes; None if it failed."""
    return statistics.median(row['seconds']) if 'seconds' in row else row.get('peak')


def share_of_products(row: dict[str, Any]) -> float | None:
    """Multiply-adds a second, as a share of those of the matrix product in the same turns.

    None where it is not known what was computed (in configs it depends on the boxes found) or the
    product could not be.
    """
    known = row.get('macs') and row.get('product_seconds')
    if not known or parse(row['candidate']).is_config:
        return None
    passes = 3 if row['mode'] == 'train' else 1
    rate = row['product_macs'] / statistics.median(row['product_seconds'])
    return passes * row['macs'] * row['batch'] / statistics.median(row['seconds']) / rate


def same_setting(row: dict[str, Any], rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the same mode, size and batch."""
    keys = ('mode', 'size', 'batch')
    return [other for other in rows if all(other[key] == row[key] for key in keys)]


def against(row: dict[str, Any], peer: str, rows: Sequence[dict[str, Any]]) -> float | None:
    """Cost of the peer divided by that of ``row``, for memory the other way round."""
    costs = [cost(other) for other in same_setting(row, rows) if other['candidate'] == peer]
    if not costs or not costs[0] or not cost(row):  # a peak can be 0
        return None
    ratio = costs[0] / cost(row)
    return 1 / ratio if row['mode'].endswith('memory') else ratio


def labels(texts: Iterable[str]) -> dict[str, str]:
    """Short names of candidates by text; the text where two would have the same."""
    short = {text: parse(text).label for text in texts}
    taken = list(short.values())
    return {text: name if taken.count(name) == 1 else text for text, name in short.items()}


def exponents(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, float]]:
    """Candidate, mode, batch and exponent, where three sizes or more were measured."""
    found = []
    for key in dict.fromkeys((row['candidate'], row['mode'], row['batch']) for row in rows):
        of_key = [r for r in rows if (r['candidate'], r['mode'], r['batch']) == key]
        points = [(megapixels(row), cost(row)) for row in of_key if cost(row) is not None]
        exponent = fit_exponent(*zip(*points, strict=True)) if points else None
        if exponent is not None:
            found.append((*key, exponent))
    return found


# --- accuracy that others have published ----------------------------------------------------------


@cache
def _models(folder: str) -> list[dict]:
    from hat_mm.zoo import metafiles

    path = ROOT / 'configs' / folder / 'metafile.yml'
    return metafiles.load(path)['Models'] if path.exists() else []


def _reported(models: Iterable[dict], metric: str) -> float | None:
    for model in models:
        for result in model.get('Results') or []:
            value = (result.get('Metrics') or {}).get(f'{metric} (authors)')
            if value is not None:
                return value
    return None


def published(candidate: Candidate) -> dict[str, float | None]:
    """Accuracy that the network's authors report; for ours as in the metafiles.

    Returns:
        ``top1``, ImageNet-1K in percent, and ``box_ap``, COCO with Cascade Mask R-CNN and the 3x
        schedule; None where nothing is known.
    """
    name = candidate.name
    for short, peer in PEERS.items():
        if name == f'timm/{peer.timm}' or (name == short and not candidate.arguments):
            return dict(top1=peer.top1, box_ap=peer.box_ap)
    if candidate.is_config:
        stem = Path(name).stem
        models = [m for m in _models(Path(name).parent.name) if stem == Path(m['Config']).stem]
        in_3x = [m for m in models if re.match(r'cascade-mask-rcnn_.*-3x_coco$', m['Name'])]
        return dict(top1=_reported(models, 'Top 1 Accuracy'), box_ap=_reported(in_3x, 'box AP'))
    arch = candidate.arguments.get('arch')
    released = re.fullmatch(r'authors/faster_vit_(\d)(?:_any_res|_224)', name)
    if released:
        name, arch = 'hat_mm.FasterViT', released[1]
    families = {'hat_mm.FasterViT': 'fastervit', 'hat_mm.HATNet': 'hat-net'}
    if name not in families:
        return dict(top1=None, box_ap=None)
    family = families[name]
    models = _models(family.replace('-', '_'))
    in_1k = [m for m in models if m['Name'].startswith(f'{family}-{arch}_3rdparty_in1k')]
    in_3x = [m for m in models if re.match(f'cascade-.*_{family}-{arch}_.*-3x_coco$', m['Name'])]
    return dict(top1=_reported(in_1k, 'Top 1 Accuracy'), box_ap=_reported(in_3x, 'box AP'))


# --- Markdown -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)


def cell(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return '' if value is None else format(value, form)


def significant(value: float | None, digits: int) -> str:
    """A number with so many digits that tell something, never with an exponent, or nothing."""
    if not value:
        return '' if value is None else '0'
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f'{value:.{max(decimals, 0)}f}'


def _first_cells(row: dict[str, Any]) -> list[str]:
    height, width = row['size']
    return [f'{height}×{width}', str(row['batch']), f'`{row["candidate"]}`']


def _time_cells(row: dict[str, Any], ratios: list[str]) -> list[str]:
    seconds, median = row['seconds'], cost(row)
    compiled = 'compile' in parse(row['candidate']).flags
    macs = None if row['macs'] is None else row['macs'] / 1e9
    return [
        significant(median, 4),
        f'{significant(min(seconds), 3)}–{significant(max(seconds), 3)}',
        significant(row['batch'] / median, 3),
        *ratios,
        f'{row["parameters"] / 1e6:.1f}',
        significant(macs, 3),
        cell(share_of_products(row), '.0%'),
        cell(row['first_seconds'] - median if compiled else None, '.0f'),
    ]


def _memory_cells(row: dict[str, Any], ratios: list[str]) -> list[str]:
    peak = row['peak'] / MIB
    cells = [f'{peak:.0f}', f'{peak / megapixels(row) / row["batch"]:.0f}']
    cells += ratios
    return cells + ([f'{row["held"] / MIB:.0f}'] if row['held'] is not None else [])


def _mode_table(mode: str, results: dict[str, Any]) -> str:
    rows = [row for row in results['rows'] if row['mode'] == mode]
    head, cells_of = ['image', 'batch', 'candidate'], _time_cells
    names = labels({row['candidate'] for row in results['rows']} | {*results['peers']})
    peers = [p for p in results['peers'] if any(row['candidate'] == p for row in rows)]
    if mode.endswith('memory'):
        head += ['peak MiB', 'MiB a megapixel', *(f'of {names[peer]}' for peer in peers)]
        head += ['held MiB'] * (mode == 'train-memory')
        cells_of = _memory_cells
    else:
        head += ['median s', 'min–max s', 'images/s']
        head += [f'speed-up over {names[peer]}' for peer in peers]
        head += ['params M', 'FLOPs G', 'of products', 'compiling s']
    lines = []
    for row in rows:
        ratios = [cell(against(row, peer, results['rows']), '.2f') for peer in peers]
        cells = ['failed'] if 'error' in row else cells_of(row, ratios)
        lines.append([*_first_cells(row), *cells, *[''] * (len(head) - 3 - len(cells))])
    errors = [f'- `{r["candidate"]}`, {r["size"]}: {r["error"]}' for r in rows if 'error' in r]
    return '\n\n'.join([table(head, lines), NOTES[mode], *['\n'.join(errors)] * bool(errors)])


def markdown(results: dict[str, Any]) -> str:
    """The tables of all modes, exponents, and what it was measured on."""
    parts = []
    for mode in dict.fromkeys(row['mode'] for row in results['rows']):
        parts += [f'## {TITLES[mode]}', _mode_table(mode, results)]
    grown = exponents(results['rows'])
    if grown:
        lines = [[TITLES[m], str(b), f'`{c}`', f'{e:.2f}'] for c, m, b, e in grown]
        parts += [
            '## Growth',
            table(['of', 'batch', 'candidate', 'exponent'], lines),
            'Time or memory grow with the pixels to the power of the exponent (least squares).',
        ]
    how = f'{results["rounds"]} rounds; memory: {results["processes"]} processes each'
    parts += [f'```bash\n{results["command"]}\n```', f'({how}; {describe(results)}.)']
    return '\n\n'.join(parts) + '\n'


def save(results: dict[str, Any], folder: Path) -> None:
    """Writes benchmark.json and benchmark.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + '\n'
    (folder / 'benchmark.json').write_text(text, encoding='utf-8')
    (folder / 'benchmark.md').write_text(markdown(results), encoding='utf-8')


# --- plots ----------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot, for files and not for windows."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    return pyplot


def plot_growth(
    panels: dict[str, dict[str, list[tuple[float, float]]]], xlabel: str, path: Path
) -> Path:
    """Draws curves with logarithmic axes, and their exponents where there are three points.

    Args:
        panels: Points of each curve by its label, by the label of the panel's vertical axis.
        xlabel: Label of the horizontal axes.
        path: PNG to write.

    Returns:
        ``path``.
    """
    plt = pyplot()
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for axes, (ylabel, curves) in zip(all_axes[0], panels.items(), strict=True):
        for label, points in curves.items():
            xs, ys = zip(*sorted(points), strict=True)
            exponent = fit_exponent(xs, ys)
            shown = '' if exponent is None else f': exponent {exponent:.2f}'
            axes.loglog(xs, ys, 'o-', label=label + shown, markersize=4)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xticks(ticks, [significant(x, 3) for x in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_accuracy(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Draws published accuracy against measured throughput, for rows of one setting.

    Returns:
        ``path``; None if nothing was drawn, because no accuracy is known.
    """
    panels = {}
    for key, label in (
        ('top1', 'ImageNet-1K top-1, %'),
        ('box_ap', 'COCO box AP, Cascade Mask R-CNN 3x'),
    ):
        found = [(row, published(parse(row['candidate']))[key]) for row in rows]
        points = [(row['batch'] / cost(row), y, row) for row, y in found if y is not None]
        if points:
            panels[label] = points
    if not panels:
        return None
    plt = pyplot()
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(3 + 5 * len(panels), 4.5), squeeze=False, layout='constrained'
    )
    height, width = rows[0]['size']
    candidates = [parse(row['candidate']) for row in rows]
    names = labels(row['candidate'] for row in rows)
    models = list(dict.fromkeys(candidate.base for candidate in candidates))
    forms = list(dict.fromkeys(candidate.flags for candidate in candidates))
    drawn = {}
    for axes, (label, points) in zip(all_axes[0], panels.items(), strict=True):
        for x, y, row in points:
            candidate = parse(row['candidate'])
            [drawn[names[row['candidate']]]] = axes.plot(
                x,
                y,
                'os^DvPX<>'[forms.index(candidate.flags) % 9],  # one marker for each set of flags
                color=plt.get_cmap('tab10')(models.index(candidate.base) % 10),
                linestyle='none',
                alpha=0.8,
            )
        axes.set_xlabel(f'images/s at {height}×{width}, batch {rows[0]["batch"]}, measured')
        axes.set_ylabel(f'{label}, reported by the authors', fontsize=8)
        axes.set_xlim(0, 1.1 * max(x for x, _, _ in points))
        axes.margins(y=0.2)
        axes.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), loc='outside right center', fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws growth with the pixels, if sizes allow, and accuracy against throughput.

    Returns:
        The PNGs that were written, one of a kind for each batch size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    units: dict[str, tuple[str, Callable[[dict], float]]] = {
        mode: ('MiB', lambda row: cost(row) / MIB) if mode.endswith('memory') else ('s', cost)
        for mode in TITLES
    }
    done = [row for row in results['rows'] if 'error' not in row]
    names = labels({row['candidate'] for row in done})
    grown, paths = exponents(done), []
    for batch in dict.fromkeys(row['batch'] for row in done):
        panels: dict[str, dict] = {}
        for text, mode, _, _ in (entry for entry in grown if entry[2] == batch):
            unit, value = units[mode]
            key = (text, mode, batch)
            panels.setdefault(f'{TITLES[mode]}, {unit}', {})[names[text]] = [
                (megapixels(row), value(row))
                for row in done
                if (row['candidate'], row['mode'], row['batch']) == key
            ]
        if panels:
            path = folder / f'growth_batch{batch}.png'
            paths.append(plot_growth(panels, 'megapixels', path))
        forward = [row for row in done if row['mode'] == 'forward' and row['batch'] == batch]
        if forward:
            rows = same_setting(forward[0], forward)
            height, width = forward[0]['size']
            path = folder / f'accuracy_{height}x{width}_batch{batch}.png'
            paths += filter(None, [plot_accuracy(rows, path)])
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """Writes tables and plots of earlier results."""
    parser = argparse.ArgumentParser(
        prog='benchmark report',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('results', type=Path, help='a benchmark.json')
    path = parser.parse_args(argv).results
    results = json.loads(path.read_text(encoding='utf-8'))
    save(results, path.parent)
    for png in plot(results, path.parent):
        print(png)
