"""What is common to the configs of all toolboxes."""

import importlib
import re
from typing import Any

from hat_mm import compat

# Settings that load weights beside ``init_cfg``; the last one is of StrongSORT's trackers.
WEIGHTS = ('pretrained', 'teacher_ckpt', 'postprocess_model')


def read(path: Any) -> Any:
    """Reads a config file.

    Raises:
        hat_mm.compat.DependencyError: A base is in a toolbox that is not installed.
    """
    try:
        return compat.require('mmengine').Config.fromfile(path)
    except ModuleNotFoundError as error:
        if found := re.match(r'(\w+) is not installed', str(error)):  # mmengine's words
            compat.require(found[1])
        raise


def innermost_dataset(loader: Any) -> Any:
    """The dataset of a dataloader's config, without those that wrap it."""
    dataset = loader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def find_test_dataset(cfg: Any) -> Any:
    """The innermost dataset of a config's tests, or an empty dict; also of no config."""
    loader = (cfg or {}).get('test_dataloader')
    return innermost_dataset(loader) if loader and loader.get('dataset') else {}


def find_dataset_meta(cfg: Any) -> dict[str, Any]:
    """The classes and colours of a config's test data, as its toolbox knows them."""
    dataset = find_test_dataset(cfg)
    kind = dataset.get('type')
    if isinstance(kind, str):
        datasets = importlib.import_module(f'{cfg.default_scope}.registry').DATASETS
        kind = datasets.get(kind)
    return {**getattr(kind, 'METAINFO', {}), **(dataset.get('metainfo') or {})}
