"""Model indexes in OpenMMLab's format: reads and writes metafiles, adds a training run to one."""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hat_mm import compat
from hat_mm.weights.addresses import check_address
from hat_mm.weights.atomic import replacing

from .publish import check_published
from .runs import Run

try:
    import yaml
except ImportError as error:
    raise compat.DependencyError('model indexes need a package: pip install pyyaml') from error

AUTHORS = ' (authors)'  # ends the name of a metric that the networks' authors report

_CONFIGS = Path(__file__).parents[1] / '.mim' / 'configs'
# What the fields that are added to may be.
_FIELDS = {'Metadata': dict, 'Results': dict | list, 'Config': str}


def read(path: str | Path) -> dict[str, Any]:
    """Reads a model index or a metafile.

    Raises:
        ValueError: It is no YAML, or holds no fields.
        OSError: It cannot be read.
    """
    path = Path(path)
    # The parser in C takes a tenth of the time.
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(encoding='utf-8'), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no YAML: {" ".join(str(error).split())}') from error
    if not isinstance(data, dict):
        raise ValueError(f'{path} is no model index: it holds no fields')
    return data


def load(path: str | Path) -> dict[str, Any]:
    """Reads a metafile.

    Raises:
        ValueError: It is no YAML, holds no ``Models``, or an entry has no name or refers to another
            file.
        OSError: It cannot be read.
    """
    data = read(path)
    if not isinstance(data.get('Models'), list):
        raise ValueError(f'{path} is no metafile: it has no list of Models')
    data['Collections'] = data.get('Collections') or []
    for key in ('Collections', 'Models'):
        for entry in data[key]:
            if not isinstance(entry, dict) or not isinstance(entry.get('Name'), str):
                raise ValueError(f'{path}: an entry of {key} has no Name: {str(entry)[:60]}')
            for field, kinds in _FIELDS.items():
                if not isinstance(entry.get(field), kinds | None):
                    raise ValueError(
                        f'{path}: {field} of {entry["Name"]!r} must stand in the file itself, not '
                        f'as {str(entry[field])[:60]!r}'
                    )
    return data


def text(data: dict[str, Any], header: str = '') -> str:
    """What a metafile holds, in the order of the dictionaries.

    Args:
        data: ``Collections`` and ``Models``.
        header: Comment in front, without the number sign.
    """
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return (f'# {header}\n' if header else '') + body


def dump(data: dict[str, Any], path: str | Path) -> None:
    """Writes a metafile whole or not at all; a comment in its first line stays."""
    path = Path(path)
    header = ''
    if path.exists():
        first = path.read_text(encoding='utf-8').partition('\n')[0]
        header = first.removeprefix('# ') if first.startswith('# ') else ''
    with replacing(path) as part:
        part.write_text(text(data, header), encoding='utf-8')


# --- adding a training run ---

# Fields of Metadata that are of one training and go when another one replaces it.
_OF_A_RUN = (
    'Checkpoint Epoch', 'Checkpoint Iteration', 'Training Memory (GB)', 'Training Resources',
    'Date', 'Software', 'Seed', 'SHA256',
)  # fmt: skip


def add_entry(
    metafile: str | Path,
    run: Run,
    weights: str | Path,
    url: str,
    *,
    name: str | None = None,
    config: str | None = None,
    collection: str | None = None,
    force: bool = False,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Adds a run and its weights to a metafile, as a new model or to the one of that name.

    What the model of that name has beside them stays, so do the metrics of the networks' authors
    (:data:`AUTHORS`).

    Args:
        metafile: Is created if it does not exist.
        run: What the run has recorded.
        weights: The published file.
        url: Where it will be, without its name: https, file, or http of this machine.
        name: Name of the model; None is that of the config.
        config: The config, ``configs/…``; None looks for it by its name.
        collection: Collection of the metafile; None is the only one there, or the model's.
        force: Replaces the weights of a model that has some.

    Returns:
        The entry and what a person should know.

    Raises:
        ValueError: The weights are not a published file, the address, collection or config is
            unknown, or the model has weights.
        OSError: A file cannot be read or written.
    """
    metafile, weights = Path(metafile), Path(weights)
    digest = check_published(weights)
    _check_url(url)
    is_new = not metafile.exists()
    if is_new and not metafile.parent.is_dir():
        raise FileNotFoundError(f'folder {str(metafile.parent)!r} does not exist')
    data = {'Collections': [], 'Models': []} if is_new else load(metafile)
    name = name or run.stem
    if not re.fullmatch(r'\w[\w.+-]*', name):
        raise ValueError(f'{name!r} is no name of a model: letters, digits and _ . + - make one')
    entry = next((model for model in data['Models'] if model.get('Name') == name), None)
    old = copy.deepcopy(entry or {})
    if old.get('Weights') and not force:
        raise ValueError(f'{name} in {metafile} has weights already; --force replaces them')
    if entry is None:
        entry = {'Name': name}
        data['Models'].append(entry)

    collection = collection or old.get('In Collection')
    entry['In Collection'] = _collection(data, metafile, collection, is_new=is_new)
    entry['Config'], path = _config(config or old.get('Config'), run.stem, metafile)
    notes = [*run.notes, *_changed(old, run), *_differences(run.settings, path)]
    metadata = {k: v for k, v in (old.get('Metadata') or {}).items() if k not in _OF_A_RUN}
    entry['Metadata'] = metadata | run.metadata | {'SHA256': digest}
    entry['Results'] = _merged(old.get('Results'), run.results, replaced=bool(old.get('Weights')))
    entry['Weights'] = f'{url.rstrip("/")}/{weights.name}'
    dump(data, metafile)
    return entry, tuple(notes)


def _check_url(url: str) -> None:
    check_address(url)
    parts = urlsplit(url)
    if parts.query or parts.fragment or re.search(r'\s', url):
        raise ValueError(f'{url!r} must be the address of a folder, without ? and # and spaces')


def _collection(data: dict[str, Any], metafile: Path, name: str | None, *, is_new: bool) -> str:
    known = [c.get('Name') for c in data.get('Collections') or []]
    if is_new:
        if name is None:
            raise ValueError(f'{metafile} does not exist: --collection names the one to start')
        data['Collections'] = [{'Name': name}]
        return name
    if name is None:
        if len(known) != 1:
            raise ValueError(
                f'--collection has to choose one of {metafile}: '
                + (', '.join(known) or 'there is none')
            )
        return known[0]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f'{metafile} has no collection {name!r}'
            + (f', did you mean {", ".join(map(repr, near))}?' if near else '')
            + f' It has: {", ".join(known) or "none"}'
        )
    return name


def _config(config: str | None, stem: str, metafile: Path) -> tuple[str, Path]:
    """``configs/…`` as in metafiles, and the file."""
    if config is None:
        found = [
            path
            for folder in (
                metafile.resolve().parent.glob(f'{stem}.py'),
                _CONFIGS.rglob(f'{stem}.py'),
            )
            for path in sorted(folder)
            if 'configs' in path.parts and '_base_' not in path.parts
        ]
        if not found:
            raise ValueError(f'no config named {stem}.py is known: say --config configs/…')
        config = str(found[0])
    parts = Path(config).parts
    if 'configs' not in parts or Path(config).suffix != '.py':
        raise ValueError(f'{config!r} is no config below a folder configs/')
    inside = parts[len(parts) - parts[::-1].index('configs') :]
    if '..' in inside:
        raise ValueError(f'{config!r} leads out of configs/')
    files = [Path(config), _CONFIGS.joinpath(*inside)]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise ValueError(f'the config {config!r} does not exist')
    return Path('configs', *inside).as_posix(), path


# What decides the result of a training, and what in it does not.
_DECISIVE = (
    'model', 'data_preprocessor', 'load_from', 'optim_wrapper', 'param_scheduler', 'train_cfg',
    'auto_scale_lr', 'train_dataloader', 'val_dataloader', 'val_evaluator', 'custom_hooks',
)  # fmt: skip
_INDIFFERENT = {
    'num_workers', 'persistent_workers', 'pin_memory', 'collate_fn', 'data_root',
}  # fmt: skip


def _differences(settings: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Says where a run differs from the config that the entry names."""
    config = compat.require('mmengine').Config.fromfile(path, import_custom_modules=False)
    ours = dict(_flat({key: settings.get(key) for key in _DECISIVE}))
    theirs = dict(_flat({key: config.get(key) for key in _DECISIVE}))
    names = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if names:
        shown = ', '.join(f'{n} {theirs.get(n)!r} -> {ours.get(n)!r}' for n in names[:8])
        more = f' and {len(names) - 8} more' if len(names) > 8 else ''
        yield f'the run differs from its config: {shown}{more}'


def _flat(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _INDIFFERENT and not str(key).startswith('_'):
                yield from _flat(item, f'{name}.{key}' if name else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _flat(item, f'{name}.{index}')
    else:
        # Where the annotations lie is indifferent, which ones they are is not.
        yield name, Path(value).name if name.endswith('ann_file') and value else value


def _changed(old: Mapping[str, Any], run: Run) -> Iterator[str]:
    """Says what the metafile said otherwise."""
    before = {k: v for k, v in (old.get('Metadata') or {}).items() if k not in _OF_A_RUN}
    after = dict(run.metadata)
    for results, figures in ((_listed(old.get('Results')), before), (run.results, after)):
        for result in results:
            for metric, value in (result.get('Metrics') or {}).items():
                figures[f'{metric} on {result["Dataset"]}'] = value
    for key, value in after.items():
        if key in before and before[key] != value:
            yield f'{key} was {before[key]} in the metafile and is {value} now'


def _listed(results: Any) -> list[dict[str, Any]]:
    """The results of an entry, of which a single one needs no list."""
    return [results] if isinstance(results, dict) else results or []


def _merged(old: Any, new: Sequence[dict[str, Any]], *, replaced: bool) -> list[dict[str, Any]]:
    """Results with new metrics; of replaced weights only the authors' metrics are left."""
    results = _listed(old)
    if replaced:
        for result in results:
            metrics = result.get('Metrics') or {}
            result['Metrics'] = {k: v for k, v in metrics.items() if k.endswith(AUTHORS)}
    for result in new:
        same = [r for r in results if all(r.get(k) == result[k] for k in ('Task', 'Dataset'))]
        if same:
            others = same[0].get('Metrics') or {}
            others = {k: v for k, v in others.items() if k not in result['Metrics']}
            same[0]['Metrics'] = result['Metrics'] | others
        else:
            results.append(result)
    return [result for result in results if result.get('Metrics')]
