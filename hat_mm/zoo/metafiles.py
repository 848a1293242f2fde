"""Metafiles in OpenMMLab's format: reading, writing, adding a training run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from hat_mm.weights.addresses import check_address
from hat_mm.weights.fileio import replacing

from .publish import check_published
from .runs import Run

AUTHORS = ' (authors)'  # suffix of the names of metrics that the networks' authors report

_CONFIGS = Path(__file__).parents[1] / '.mim' / 'configs'
# Fields of Metadata that belong to one training and are removed when another replaces it.
_OF_A_RUN = (
    'Checkpoint Epoch', 'Checkpoint Iteration', 'Training Memory (GB)', 'Training Resources',
    'Date', 'Software', 'Seed', 'SHA256',
)  # fmt: skip
# Settings that affect the result of a training, and settings within them that do not.
_DECISIVE = (
    'model', 'data_preprocessor', 'load_from', 'optim_wrapper', 'param_scheduler', 'train_cfg',
    'auto_scale_lr', 'train_dataloader', 'val_dataloader', 'custom_hooks',
)  # fmt: skip
_INDIFFERENT = (
    'num_workers', 'persistent_workers', 'pin_memory', 'collate_fn', 'data_root', 'ann_file',
)  # fmt: skip


def load(path: str | Path) -> dict[str, Any]:
    """Reads a metafile.

    Raises:
        ValueError: It is not YAML, or holds no ``Models`` with names.
        OSError: It cannot be read.
    """
    # The C parser takes a tenth of the time.
    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    try:
        data = yaml.load(Path(path).read_text(encoding='utf-8'), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no YAML: {error}') from error
    models = data.get('Models') if isinstance(data, dict) else None
    if not isinstance(models, list):
        raise ValueError(f'{path} is no metafile: it has no list of Models')
    for entry in models:
        if not isinstance(entry, dict) or 'Name' not in entry:
            raise ValueError(f'{path}: an entry of Models has no Name: {str(entry)[:60]}')
    data['Collections'] = data.get('Collections') or []
    return data


def text(data: dict[str, Any], header: str = '') -> str:
    """The text of a metafile, in the order of the dictionaries.

    Args:
        data: ``Collections`` and ``Models``.
        header: Comment for the first line, without the number sign.
    """
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
    return (f'# {header}\n' if header else '') + body


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
    """Adds a run and its weights to a metafile, as a new model or to the model of that name.

    Other fields of that model stay, and so do metrics of the networks' authors (:data:`AUTHORS`)
    and a comment in the first line of the file.

    Args:
        metafile: The metafile, which is created if it does not exist.
        run: What the run recorded.
        weights: The published file.
        url: URL of its folder: https, file, or http to this machine.
        name: Name of the model; None for that of the config.
        config: The config, ``configs/…``; None searches for it by the name of the run's config.
        collection: Collection of the metafile; None for the model's, or the only one there.
        force: Replaces the weights of a model that has some.

    Returns:
        The entry, and notes for the user.

    Raises:
        ValueError: The weights are not a published file, the URL is not allowed, the collection or
            config is unknown, or the model has weights.
        OSError: A file cannot be read or written.
    """
    metafile, weights = Path(metafile), Path(weights)
    digest = check_published(weights)
    check_address(url)
    header = ''
    data: dict[str, Any] = {'Collections': [], 'Models': []}
    if metafile.exists():
        data = load(metafile)
        first = metafile.read_text(encoding='utf-8').partition('\n')[0]
        header = first.removeprefix('# ') if first.startswith('# ') else ''
    elif collection:
        data['Collections'] = [{'Name': collection}]
    name = name or run.stem
    entry = next((model for model in data['Models'] if model['Name'] == name), None)
    if entry is None:
        entry = {'Name': name}
        data['Models'].append(entry)
    replaced = bool(entry.get('Weights'))
    if replaced and not force:
        raise ValueError(f'{name} in {metafile} has weights already; --force replaces them')

    entry['In Collection'] = _collection(data, collection or entry.get('In Collection'), metafile)
    path = _config(config or entry.get('Config'), run.stem, metafile)
    inside = path.parts[len(path.parts) - path.parts[::-1].index('configs') :]
    entry['Config'] = Path('configs', *inside).as_posix()
    old = {k: v for k, v in (entry.get('Metadata') or {}).items() if k not in _OF_A_RUN}
    entry['Metadata'] = old | run.metadata | {'SHA256': digest}
    entry['Results'] = _merged(entry.get('Results'), run.results, replaced)
    entry['Weights'] = f'{url.rstrip("/")}/{weights.name}'
    with replacing(metafile) as part:
        part.write_text(text(data, header), encoding='utf-8')
    return entry, (*run.notes, *_differences(run.settings, path))


def _collection(data: dict[str, Any], name: str | None, metafile: Path) -> str:
    known = [collection['Name'] for collection in data['Collections']]
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        raise ValueError(
            f'--collection has to name one of {metafile}, not {name!r}: '
            f'{", ".join(known) or "it has none"}'
        )
    return name


def _config(config: str | None, stem: str, metafile: Path) -> Path:
    """The file of a config, which must be below a folder ``configs``."""
    if config is None:
        found = [metafile.absolute().with_name(f'{stem}.py'), *_CONFIGS.rglob(f'{stem}.py')]
    else:
        found = [Path(config), _CONFIGS.parent / config]
    for path in found:
        if path.is_file() and 'configs' in path.parts:
            return path
    raise ValueError(f'there is no config {config or f"{stem}.py"}: say --config configs/…')


def _merged(old: Any, new: list[dict[str, Any]], replaced: bool) -> list[dict[str, Any]]:
    """Adds new metrics to results; if weights are replaced, keeps only the authors' metrics."""
    results = [old] if isinstance(old, dict) else old or []
    if replaced:
        for result in results:
            metrics = result.get('Metrics') or {}
            result['Metrics'] = {k: v for k, v in metrics.items() if k.endswith(AUTHORS)}
    for result in new:
        what = (result['Task'], result['Dataset'])
        same = next((r for r in results if (r.get('Task'), r.get('Dataset')) == what), None)
        if same is None:
            results.append(result)
        else:
            others = {k: v for k, v in same['Metrics'].items() if k not in result['Metrics']}
            same['Metrics'] = result['Metrics'] | others
    return [result for result in results if result['Metrics']]


def _differences(settings: Mapping[str, Any], path: Path) -> Iterator[str]:
    """Yields notes on where a run differs from the config that the entry names."""
    config = Config.fromfile(path, import_custom_modules=False)
    ours = dict(_flat({key: settings.get(key) for key in _DECISIVE}))
    theirs = dict(_flat({key: config.get(key) for key in _DECISIVE}))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f'not as in the config: {name} {theirs.get(name)!r} -> {ours.get(name)!r}'


def _flat(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, item in value.items():
        if key not in _INDIFFERENT:
            yield from _flat(item, f'{name}.{key}'.lstrip('.'))
