"""Model indexes in OpenMMLab's format: reads and writes metafiles, adds a training run to one."""

import copy
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import yaml

from . import compat
from .publish import check_published
from .runs import Run

AUTHORS = ' (authors)'  # ends the name of a metric that the networks' authors report

_CONFIGS = Path(__file__).parent / '.mim' / 'configs'


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
        ValueError: It is no YAML, or holds no ``Models``.
        OSError: It cannot be read.
    """
    data = read(path)
    if not isinstance(data.get('Models'), list):
        raise ValueError(f'{path} is no metafile: it has no list of Models')
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
    part = path.with_name(f'.{path.name}.{os.getpid()}.part')
    try:
        part.write_text(text(data, header), encoding='utf-8')
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


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
    data = load(metafile) if metafile.exists() else {'Collections': [], 'Models': []}
    if not metafile.exists() and not metafile.parent.is_dir():
        raise FileNotFoundError(f'folder {str(metafile.parent)!r} does not exist')
    name = name or run.stem
    entry = next((model for model in data['Models'] if model.get('Name') == name), None)
    old = copy.deepcopy(entry or {})
    if old.get('Weights') and not force:
        raise ValueError(f'{name} in {metafile} has weights already; --force replaces them')
    if entry is None:
        entry = {'Name': name}
        data['Models'].append(entry)

    entry['In Collection'] = _collection(
        data, metafile, collection or old.get('In Collection'), is_new=not metafile.exists()
    )
    entry['Config'], path = _config(config or old.get('Config'), run.stem, metafile)
    notes = [*run.notes, *_changed(old, run.metadata), *_differences(run.settings, path)]
    metadata = {k: v for k, v in (old.get('Metadata') or {}).items() if k not in _OF_A_RUN}
    entry['Metadata'] = metadata | run.metadata | {'SHA256': digest}
    entry['Results'] = _merged(old.get('Results'), run.results, replaced=bool(old.get('Weights')))
    entry['Weights'] = f'{url.rstrip("/")}/{quote(weights.name)}'
    dump(data, metafile)
    return entry, tuple(notes)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.username or parts.password:
        raise ValueError('the address must not hold a name or password: everyone will read it')
    local = parts.hostname in ('localhost', '127.0.0.1', '::1')
    if (
        parts.query
        or parts.fragment
        or not (
            (parts.scheme == 'https' and parts.hostname)
            or url.startswith('file:///')
            or (parts.scheme == 'http' and local)
        )
    ):
        raise ValueError(f'{url!r} must be an address of https (or file, or http of this machine)')


def _collection(data: dict[str, Any], metafile: Path, name: str | None, *, is_new: bool) -> str:
    known = [c.get('Name') for c in data.get('Collections') or []]
    if is_new:
        if name is None:
            raise ValueError(f'{metafile} does not exist: --collection names the one to start')
        data['Collections'] = [{'Name': name}]
        return name
    if name is None:
        if len(known) != 1:
            raise ValueError(f'{metafile} has several collections, choose: {", ".join(known)}')
        return known[0]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f'{metafile} has no collection {name!r}'
            + (f', did you mean {", ".join(map(repr, near))}?' if near else '')
            + f' It has: {", ".join(known) or "none"}'
        )
    return name


def _config(config: str | None, stem: str, metafile: Path) -> tuple[str, Path | None]:
    """``configs/…`` as in metafiles, and the file, if it is known."""
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
    return Path('configs', *inside).as_posix(), path


# What decides the result of a training, and what in it does not.
_DECISIVE = (
    'model', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'train_dataloader',
    'val_dataloader', 'val_evaluator', 'custom_hooks',
)  # fmt: skip
_INDIFFERENT = {
    'num_workers', 'persistent_workers', 'pin_memory', 'collate_fn', 'data_root', 'ann_file',
}  # fmt: skip


def _differences(settings: Mapping[str, Any], path: Path | None) -> Iterator[str]:
    """Says where a run differs from the config that the entry names."""
    if path is None:
        yield 'the config was not found: the settings of the run were not compared with it'
        return
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
        yield name, value


def _changed(old: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[str]:
    before = old.get('Metadata') or {}
    for key, value in metadata.items():
        if key in before and key not in _OF_A_RUN and before[key] != value:
            yield f'{key} was {before[key]} in the metafile and is {value} now'


def _merged(old: Any, new: Sequence[dict[str, Any]], *, replaced: bool) -> list[dict[str, Any]]:
    """Results with new metrics; of replaced weights only the authors' metrics are left."""
    results = copy.deepcopy([old] if isinstance(old, dict) else old or [])
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
