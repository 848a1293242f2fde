"""Writes a config that inherits from another one and changes a few of its settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from hat_mm import compat

from .cli import UserError
from .swap import Edit, Swap

TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
WIDTH = 100
"""Most characters of a line, where it can be broken."""


# --- where a config is ----------------------------------------------------------------------------


def configs_of(toolbox: str) -> Path:
    """The folder of the configs in a toolbox's wheel."""
    return Path(str(compat.require(toolbox).__file__)).parent / '.mim/configs'


def find(source: str) -> Path:
    """The file of ``mmdet::…`` or of a path."""
    toolbox, colons, name = source.partition('::')
    if not colons:
        return Path(source)
    if toolbox not in TOOLBOXES:
        raise UserError(f'{toolbox!r} in {source!r} is no toolbox: one of {", ".join(TOOLBOXES)}')
    return configs_of(toolbox) / name


def base_of(source: str, folder: Path) -> str:
    """The name of a config in ``_base_`` of one in ``folder``."""
    if '::' in source:
        return source
    path = Path(source).resolve()
    for toolbox in TOOLBOXES:
        try:
            root = configs_of(toolbox).resolve()
        except UserError:  # the toolbox is not installed
            continue
        if path.is_relative_to(root):
            return f'{toolbox}::{path.relative_to(root)}'
    return os.path.relpath(path, folder.resolve())


# --- the text -------------------------------------------------------------------------------------


def config_text(swap: Swap, base: str) -> str:
    """The config that makes the edits of a swap."""
    tree: dict[str, Any] = {}
    for path, edit in swap.edits.items():
        *parents, name = path.split('.')
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = edit
    lines = [f'_base_ = [{base!r}]']
    for name, node in tree.items():
        lines += _setting(name, node, Inherited(f'_base_.{name}', swap.cfg[name]), '')
    lines += [line for note in swap.notes for line in _comment(f'Not decided here: {note}.', '')]
    return '\n'.join(lines) + '\n'


def _comment(text: str, indent: str) -> list[str]:
    lines = [f'{indent}#']
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH:
            lines.append(f'{indent}#')
        lines[-1] += f' {word}'
    return lines


class Inherited(NamedTuple):
    """A part of the config that is inherited from.

    Attributes:
        name: Its name in the text, such as ``_base_.model``.
        value: What it is in the new config; a list is as long as in the old one.
    """

    name: str
    value: Any

    def get(self, key: str) -> Inherited:
        """A part of this part."""
        if isinstance(self.value, list):
            return Inherited(f'{self.name}[{key}]', self.value[int(key)])
        return Inherited(f'{self.name}.{key}', self.value.get(key))


def _setting(name: str, node: Any, part: Inherited, indent: str) -> list[str]:
    """Lines of ``name=value``, with a comma unless it is at the top of the file."""
    equals, end = ('=', ',') if indent else (' = ', '')
    if isinstance(node, Edit):
        return _value(f'{indent}{name}{equals}', node, end, indent)
    start = f'{indent}{name}{equals}'
    if isinstance(part.value, list):
        return [f'{start}[', *_items(node, part, f'{indent}    '), f'{indent}]{end}']
    inner = _settings(node, part, f'{indent}    ')
    if len(inner) == 1 and inner[0].count('#') == 1:  # on one line if it fits
        setting, _, why = inner[0].strip().partition('  # ')
        line = f'{start}dict({setting.rstrip(",")}){end}  # {why}'
        if len(line) <= WIDTH:
            return [line]
    return [f'{start}dict(', *inner, f'{indent}){end}']


def _settings(node: dict[str, Any], part: Inherited, indent: str) -> list[str]:
    return [
        line for key, child in node.items() for line in _setting(key, child, part.get(key), indent)
    ]


def _items(node: dict[str, Any], part: Inherited, indent: str) -> list[str]:
    """Lines of the items of a list. They are not merged with the inherited ones, but made anew."""
    lines = []
    for i in map(str, range(len(part.value))):
        item = part.get(i)
        if i in node:
            lines += [f'{indent}dict(', *_anew(node[i], item, f'{indent}    '), f'{indent}),']
        else:
            lines.append(f'{indent}{item.name},')
    return lines


def _anew(node: dict[str, Any], part: Inherited, indent: str) -> list[str]:
    """What is between the brackets of ``dict(inherited, key=value, …)``."""
    lines = [f'{indent}{part.name},']
    for key, child in node.items():
        if isinstance(child, Edit):
            lines += _setting(key, child, part, indent)
        else:
            inner = _anew(child, part.get(key), f'{indent}    ')
            lines += [f'{indent}{key}=dict(', *inner, f'{indent}),']
    return lines


def _value(start: str, edit: Edit, end: str, indent: str) -> list[str]:
    """Lines of a value, one for each entry of a dict that does not fit on one line."""
    line, comment = f'{start}{literal(edit.value)}{end}', f'  # {edit.why}' if edit.why else ''
    if len(line + comment) <= WIDTH:
        return [line + comment]
    if not (isinstance(edit.value, dict) and edit.value):
        return [*(_comment(edit.why, indent) if edit.why else []), line]
    entries = []
    for key, entry in edit.value.items():
        entries += _value(f'{indent}    {key}=', Edit(entry, ''), ',', f'{indent}    ')
    return [f'{start}dict({comment}', *entries, f'{indent}){end}']


def literal(value: Any) -> str:
    """A value as it is written in a config."""
    if isinstance(value, dict) and all(str(key).isidentifier() for key in value):
        return f'dict({", ".join(f"{key}={literal(entry)}" for key, entry in value.items())})'
    if isinstance(value, dict):
        return f'{{{", ".join(f"{key!r}: {literal(entry)}" for key, entry in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(literal, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(literal, value))}{"," if len(value) == 1 else ""})'
    return repr(value)
