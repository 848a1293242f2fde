"""Reads and writes model indexes in OpenMMLab's format: metafiles and what imports them."""

import os
from pathlib import Path
from typing import Any

import yaml

AUTHORS = ' (authors)'  # ends the name of a metric that the networks' authors report


def load(path: str | Path) -> dict[str, Any]:
    """Reads a metafile.

    Raises:
        ValueError: It is no YAML, or holds no ``Models``.
        OSError: It cannot be read.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is no YAML: {" ".join(str(error).split())}') from error
    if not isinstance(data, dict) or not isinstance(data.get('Models'), list):
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
