"""What the configs of the toolboxes say about their data."""

import importlib
from typing import Any


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
