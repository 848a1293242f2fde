"""Writes a config for every pair of a backbone and a task, from the table grid.yml.

A leaf (such a config) joins files of ``configs/_base_``, or a toolbox's own config, with a backbone
and holds only what follows from the pair. The metafiles, the model index, the grid in
``configs/README.md``, the settings and results in each family's README.md and the models in
docs/models.md come from the same table. The metafiles also hold figures, the authors' or measured;
these are kept, as is everything else there that the table does not define. ``--check`` writes
nothing and fails if a file is missing, differs, or is not in the table.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hat_mm.weights.official import OFFICIAL_FILES, OfficialFile
from hat_mm.zoo import metafiles
from hat_mm.zoo.metafiles import AUTHORS

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
TABLE = yaml.safe_load(Path(__file__).with_name('grid.yml').read_text(encoding='utf-8'))
TASKS: dict[str, dict[str, Any]] = TABLE['tasks']
IMAGENET = 'ImageNet-1K'
CLASSIFIERS = [file for file in OFFICIAL_FILES if file.detector is None]
FOLDERS: dict[str, str] = {
    backbone: folder
    for folder, collections in TABLE['families'].items()
    for backbones in collections.values()
    for backbone in backbones
}
"""Folder of each backbone's leaves."""
COLLECTIONS: dict[str, str] = {
    backbone: collection
    for collections in TABLE['families'].values()
    for collection, backbones in collections.items()
    for backbone in backbones
}

HEADER = 'Written by tools/dev/make_configs.py, which keeps what it does not know.'
METRICS = [
    *('Top 1 Accuracy', 'Top 5 Accuracy', 'box AP', 'box AP50', 'box AP75'),
    *('mask AP', 'mask AP50', 'mask AP75', 'PQ', 'mIoU', 'mIoU(ms+flip)'),
]
"""Metrics in the order of the tables' columns."""


@dataclass(frozen=True)
class Leaf:
    """A config of the grid.

    Attributes:
        backbone: Its backbone, a file of ``_base_/backbones``.
        task: Its column in the grid.
        path: Its path below ``configs``.
        bases: Files of ``_base_``, or configs of a toolbox, that it joins.
        model: The text after ``_base_``.
        metadata: What its metafile says about a training with it.
        settings: Which settings are published and which are assumed, for the metafile.
    """

    backbone: str
    task: str
    path: str
    bases: tuple[str, ...]
    model: str
    metadata: dict[str, Any]
    settings: dict[str, str]

    @property
    def name(self) -> str:
        """Name of its model."""
        return Path(self.path).stem

    @property
    def text(self) -> str:
        """Text of the file."""
        paths = (base if '::' in base else f'../_base_/{base}' for base in self.bases)
        lines = ''.join(f"    '{path}.py',\n" for path in paths)
        return f'_base_ = [\n{lines}]\n{self.model}'


LEAVES = tuple(
    Leaf(
        backbone=backbone,
        task=row['task'],
        path=f'{FOLDERS[backbone]}/{row["name"].format(backbone)}.py',
        bases=(*row['bases'], f'backbones/{backbone}'),
        model=''.join(row['model']),
        metadata={**TASKS[row['task']]['training'], **row.get('training', {})},
        settings={
            'Published Settings': '; '.join(row['published']),
            'Assumed Settings': '; '.join(row['assumed']),
        },
    )
    for row in TABLE['configs']
    for backbone in row['backbones']
)
LEAF_OF_CONFIG = {f'configs/{leaf.path}': leaf for leaf in LEAVES}


# --- metafiles ------------------------------------------------------------------------------------


def _results_of(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an entry as a list; the file may hold a single one without a list."""
    results = model.get('Results') or []
    return [results] if isinstance(results, dict) else results


def _with_results(task: str, old: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an entry, at least one for everything that the task measures.

    Even without figures it says what the model is for.
    """
    results = _results_of(old)
    known = [result.get('Task') for result in results]
    dataset = TASKS[task]['training']['Training Data']
    return results + [
        {'Task': measured, 'Dataset': dataset, 'Metrics': {}}
        for measured in TASKS[task]['measures']
        if measured not in known
    ]


def leaf_entry(leaf: Leaf, old: dict[str, Any]) -> dict[str, Any]:
    """The entry of a leaf, with what is known about a training with it."""
    [file] = [file for file in OFFICIAL_FILES if file.detector == leaf.name] or [None]
    facts = leaf.settings if old.get('Weights') and not file else leaf.metadata | leaf.settings
    official = _facts_of(file) if file else {}
    return old | {
        'Name': leaf.name,
        'In Collection': COLLECTIONS[leaf.backbone],
        'Config': f'configs/{leaf.path}',
        'Metadata': (old.get('Metadata') or {}) | facts | official.pop('Metadata', {}),
        'Results': _with_results(leaf.task, old),
        **official,
    }


def official_entry(file: OfficialFile, old: dict[str, Any]) -> dict[str, Any]:
    """The entry of a classifier's file, with the figures that were counted and measured with it."""
    facts = _facts_of(file)
    [config] = [
        config
        for config, leaf in LEAF_OF_CONFIG.items()
        if leaf.backbone == file.backbone and leaf.task == IMAGENET
    ]
    return old | {
        'Name': official_name(file),
        'In Collection': COLLECTIONS[file.backbone],
        'Config': config,
        'Metadata': (old.get('Metadata') or {}) | facts.pop('Metadata'),
        'Results': _with_results(IMAGENET, old),
        **facts,
    }


def _facts_of(file: OfficialFile) -> dict[str, Any]:
    """What the entry of an official file says about it."""
    facts: dict[str, Any] = {
        'Training Data': file.trained_on[0] if len(file.trained_on) == 1 else [*file.trained_on],
        'Licence': file.licence,
    }
    if file.sha256:
        facts['SHA256'] = file.sha256
    return {
        'Metadata': facts,
        'Weights': file.url,
        'Converted From': {'Weights': file.url},
    }


def official_name(file: OfficialFile) -> str:
    """The name of the entry of an official file."""
    side = '' if file.input_size == 224 else f'-{file.input_size}px'
    return f'{file.backbone}_3rdparty_in1k{side}'


def metafile(folder: str) -> dict[str, Any]:
    """The metafile of a family, in OpenMMLab's format: its collections, leaves, official files."""
    path = CONFIGS / folder / 'metafile.yml'
    data = metafiles.load(path)
    old = {model['Name']: model for model in data['Models']}
    if len(old) < len(data['Models']):
        raise SystemExit(f'{path} has several models of one name')
    entries = [
        leaf_entry(leaf, old.pop(leaf.name, {}))
        for leaf in LEAVES
        if FOLDERS[leaf.backbone] == folder
    ]
    entries += [
        official_entry(file, old.pop(official_name(file), {}))
        for file in CLASSIFIERS
        if FOLDERS[file.backbone] == folder
    ]
    return data | {'Models': [*entries, *old.values()]}


# --- pages ----------------------------------------------------------------------------------------


def _rows(rows: list[list[str]]) -> str:
    return ''.join(f'| {" | ".join(row)} |\n' for row in rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return _rows([head, ['---'] * len(head), *rows])


def _link(text: str, target: str | None) -> str:
    return f'[{text}]({target})' if target else text


def grid() -> str:
    """The grid of backbones and tasks, each cell a link to its config."""
    cells: dict[tuple[str, str], list[str]] = {}
    for leaf in LEAVES:
        text = "authors' detector" if '_authors_' in leaf.name else 'config'
        cells.setdefault((leaf.backbone, leaf.task), []).append(_link(text, leaf.path))
    rows = [[name, *(', '.join(cells.get((name, task), ())) for task in TASKS)] for name in FOLDERS]
    left_out = ''.join(f'- {reason}\n' for reason in TABLE['left_out'])
    return f'{_table(["backbone", *TASKS], rows)}\nLeft out:\n\n{left_out}'


def settings(folder: str) -> str:
    """Which settings of a family's configs are published and which are assumed."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for leaf in LEAVES:
        if FOLDERS[leaf.backbone] == folder:
            short = leaf.backbone.removeprefix(f'{folder.replace("_", "-")}-')
            rows.setdefault((leaf.task, *leaf.settings.values()), []).append(short)
    head = '| task | backbones | published by the authors | assumed, and where from |\n'
    lines = [
        [task, ', '.join(dict.fromkeys(names)), *texts] for (task, *texts), names in rows.items()
    ]
    return f'{head}|---|---|---|---|\n{_rows(lines)}'


def _figures(model: dict[str, Any]) -> dict[str, float]:
    """All metrics of an entry."""
    return {
        metric: figure
        for result in _results_of(model)
        for metric, figure in (result.get('Metrics') or {}).items()
    }


def _by_task(models: list[dict[str, Any]]) -> dict[str | None, list[dict[str, Any]]]:
    """Entries by the task of their config, None for configs that are not in the table."""
    groups = {task: [] for task in (IMAGENET, *TASKS, None)}
    for model in models:
        leaf = LEAF_OF_CONFIG.get(model.get('Config'))
        groups[leaf and leaf.task].append(model)
    return groups


def _column(metric: str) -> tuple[bool, int]:
    """Sorts metrics: the authors' first, then by METRICS."""
    name = metric.removesuffix(AUTHORS)
    return name == metric, METRICS.index(name) if name in METRICS else len(METRICS)


# Counted figures in the tables of results: heading, unit, decimals.
_COUNTED = {'Parameters': ('parameters, M', 1e6, 1), 'FLOPs': ('FLOPs, G', 1e9, 2)}


def results(folder: str, models: list[dict[str, Any]]) -> str:
    """A table for each task with figures: the authors', then measured ones, with the weights."""
    tables = []
    for task, group in _by_task(models).items():
        group = [model for model in group if _figures(model)]
        if not group:
            continue
        title, measures = task or 'Others', TASKS[task]['measures'].values() if task else ()
        if task and TASKS[task]['training']['Training Data'].lower() not in title.lower():
            title += f', {TASKS[task]["training"]["Training Data"]}'
        metrics = sorted({*measures, *(m for model in group for m in _figures(model))}, key=_column)
        counted = [key for key in _COUNTED if any(key in m.get('Metadata', ()) for m in group)]
        rows = []
        for model in group:
            config = model.get('Config') and f'../../{model["Config"]}'
            row = [_link(model['Name'], config and config.replace(f'../../configs/{folder}/', ''))]
            for key in counted:
                _, unit, decimals = _COUNTED[key]
                fact = model.get('Metadata', {}).get(key)
                row.append('' if fact is None else f'{fact / unit:.{decimals}f}')
            row += [str(_figures(model).get(metric, '')) for metric in metrics]
            rows.append([*row, _link('file', model['Weights']) if model.get('Weights') else ''])
        head = [title, *(_COUNTED[key][0] for key in counted), *metrics, 'weights']
        tables.append(_table(head, rows))
    return '\n'.join(tables) or 'No model has been trained with these configs yet.\n'


def _cells(model: dict[str, Any], metrics: list[str]) -> Iterator[str]:
    """An entry's cells in docs/models.md: the authors' figures, ours in bold with the weights."""
    figures = _figures(model)
    authors, ours = ([figures.get(metric + end) for metric in metrics] for end in (AUTHORS, ''))
    if None not in authors:
        yield _link(' / '.join(map(str, authors)), f'../{model["Config"]}')
    if None not in ours and model.get('Weights'):
        yield f'**{_link(" / ".join(map(str, ours)), model["Weights"])}**'


def models_table(folder: str, models: list[dict[str, Any]]) -> str:
    """The table of a family's backbones with their figures."""
    rows: dict[str, list[str]] = {}
    parameters = {model['Name']: model.get('Metadata', {}).get('Parameters') for model in models}
    files = [file for file in CLASSIFIERS if FOLDERS[file.backbone] == folder]
    head = ['arch', 'channels', 'parameters, M'] if files else ['backbone', 'its parameters, M']
    for file in files:
        base = runpy.run_path(str(CONFIGS / f'_base_/backbones/{file.backbone}.py'))
        channels = ', '.join(map(str, base['channels']))
        count = f'{parameters[official_name(file)] / 1e6:.1f}'
        rows[file.backbone] = [f'`{file.arch}`', channels, count]
    for name, count in TABLE['parameters'].items():
        if FOLDERS[name] == folder:
            rows[name] = [f'`{name}`', f'{count / 1e6:.1f}']
    for task, group in _by_task(models).items():
        if not task or not any(_figures(model) for model in group):
            continue
        metrics = list(TASKS[task]['measures'].values())
        head.append(f'{task}, {" / ".join(metrics).replace("AP / mask", "/ mask")}')
        for name, row in rows.items():
            cells: list[str] = []
            for model in group:
                if LEAF_OF_CONFIG[model['Config']].backbone == name:
                    cells += _cells(model, metrics)
            row.append(', '.join(cells))
    return _table(head, list(rows.values()))


def with_part(text: str, name: str, part: str) -> str:
    """Puts a generated part between its two markers in a page."""
    mark = f'<!-- {name}: tools/dev/make_configs.py -->\n'
    pattern = re.compile(f'{re.escape(mark)}.*?<!-- end of {name} -->\n', re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f'a page has no marks for its {name}: {mark.strip()}')
    return pattern.sub(lambda _: f'{mark}\n{part}\n<!-- end of {name} -->\n', text)


# --- the files ------------------------------------------------------------------------------------


def files() -> dict[Path, str]:
    """Text of all generated files, by path."""
    root = CONFIGS.parent
    wanted = {CONFIGS / leaf.path: leaf.text for leaf in LEAVES}
    imports = [f'configs/{folder}/metafile.yml' for folder in TABLE['families']]
    wanted[root / 'model-index.yml'] = metafiles.text({'Import': imports})
    parts = [(CONFIGS / 'README.md', 'grid', grid())]
    for folder in TABLE['families']:
        index = metafile(folder)
        wanted[CONFIGS / folder / 'metafile.yml'] = metafiles.text(index, HEADER)
        models = index['Models']
        page = CONFIGS / folder / 'README.md'
        parts.append((page, 'settings', settings(folder)))
        parts.append((page, 'results', results(folder, models)))
        parts.append((root / 'docs/models.md', f'models of {folder}', models_table(folder, models)))
    for page, name, part in parts:
        text = wanted.get(page) or page.read_text(encoding='utf-8')
        wanted[page] = with_part(text, name, part)
    return wanted


def main(argv: list[str] | None = None) -> int:
    """Writes or checks the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--check', action='store_true', help='write nothing; fail if files differ')
    args = parser.parse_args(argv)
    wanted = files()
    there = {path for folder in TABLE['families'] for path in (CONFIGS / folder).rglob('*.py')}
    unknown = sorted(there - set(wanted))
    stale = [
        path
        for path, text in wanted.items()
        if not path.is_file() or path.read_text(encoding='utf-8') != text
    ]
    for path in unknown:
        print(f'{path.relative_to(CONFIGS.parent)}: not in the table', file=sys.stderr)
    for path in stale:
        if args.check:
            print(f'{path.relative_to(CONFIGS.parent)}: differs from the table', file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding='utf-8')
    print(f'{len(LEAVES)} configs, {len(stale)} files {"differ" if args.check else "written"}')
    return 1 if unknown or (args.check and stale) else 0


if __name__ == '__main__':
    sys.exit(main())
