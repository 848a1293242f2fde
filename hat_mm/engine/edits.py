"""Changes of a config, and the config that inherits from it and makes them."""

from __future__ import annotations

import copy
import keyword
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from hat_mm import compat
from hat_mm.weights.fileio import replacing

from .cli import TOOLBOXES, UserError

__all__ = ['Edit', 'Edits', 'base_of', 'configs_of', 'find', 'literal', 'write']

WIDTH = 100
"""Most characters of a line, where it can be broken."""


class Edit(NamedTuple):
    """A changed setting.

    Attributes:
        value: Its new value; a dict with ``_delete_`` replaces one that is there.
        why: The reason, in a few words.
    """

    value: Any
    why: str


class Edits(dict[str, Edit]):
    """Edits of a config, by the names of the settings as ``--cfg-options`` takes them.

    Args:
        cfg: The config; it is not changed.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg

    def old(self, path: str) -> Any:
        """A setting of the config before the edits; None if it is not there."""
        found: Any = self.cfg
        for key in path.split('.'):
            try:
                found = found[int(key)] if isinstance(found, (list, tuple)) else found.get(key)
            except (AttributeError, IndexError, ValueError):
                return None
        return found

    def put(self, path: str, value: Any, why: str, replace: bool = False) -> None:
        """Adds an edit, unless the setting is so already.

        Args:
            path: Name of the setting.
            value: Its new value. If the old one is a tuple, a list becomes one, too: some parts
                take nothing else.
            why: The reason.
            replace: Whether a dict replaces the old one, instead of updating it.
        """
        old = self.old(path)
        if isinstance(old, tuple) and isinstance(value, list):
            value = tuple(value)
        if old == value and old is not None:
            return
        parent, _, key = path.rpartition('.')
        there = old is not None or key in ((self.old(parent) if parent else self.cfg) or {})
        if value is None and (not there or old is None):
            return
        if isinstance(value, dict) and there and (replace or not isinstance(old, dict)):
            value = {'_delete_': True, **value}
        self[path] = Edit(copy.deepcopy(value), why)

    def override(self, path: str, value: Any) -> None:
        """Takes a setting of ``--cfg-options``, if need be into an edit of a whole part."""
        for name, edit in self.items():
            if path.startswith(f'{name}.') and isinstance(edit.value, dict):
                *parents, key = path.removeprefix(f'{name}.').split('.')
                part = edit.value
                for parent in parents:
                    part = part.setdefault(parent, {})
                    if not isinstance(part, dict):
                        raise UserError(f'--cfg-options: {path} is in no dict, but in {part!r}')
                part[key] = value
                return
        for name in [name for name in self if name.startswith(f'{path}.')]:
            del self[name]
        self[path] = Edit(value, 'by --cfg-options')

    def apply(self) -> Any:
        """The config with the edits."""
        new = copy.deepcopy(self.cfg)
        try:
            new.merge_from_dict({path: copy.deepcopy(edit.value) for path, edit in self.items()})
        except (TypeError, LookupError, AttributeError, ValueError) as error:
            raise UserError(f'--cfg-options do not fit the config: {error}', status=2) from error
        return new

    def text(self, base: str, notes: list[str]) -> str:
        """The config that inherits from ``base``, makes the edits, and ends with the notes."""
        tree: dict[str, Any] = {}
        for path, edit in self.items():
            *parents, name = path.split('.')
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[name] = edit
        lines = [f'_base_ = [{base!r}]']
        for name, node in tree.items():
            lines += _setting(f'{name} = ', node, _Part(f'_base_.{name}', self.old(name)), '', '')
        for note in notes:
            lines += _comment(f'Not decided here: {note}.', '')
        return '\n'.join(lines) + '\n'


def write(out: Path, text: str, expected: Any) -> None:
    """Writes a config, if reading it gives what is expected.

    Raises:
        UserError: It does not, or cannot be read.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:
        part.write_text(text, encoding='utf-8')
        try:
            read = compat.require('mmengine.config').Config.fromfile(part)
        except Exception as error:
            text = f'{type(error).__name__}: {error}'
            raise UserError(f'these settings cannot be written: {text}') from error
        if repr(_unscoped(read.to_dict())) != repr(_unscoped(expected.to_dict())):
            raise UserError('these settings cannot be written: the file would say something else')


def _unscoped(cfg: Any) -> Any:
    """Without the scope that mmengine notes in all parts that come from a toolbox."""
    if isinstance(cfg, dict):
        return {key: _unscoped(cfg[key]) for key in sorted(cfg, key=str) if key != '_scope_'}
    return [_unscoped(value) for value in cfg] if isinstance(cfg, (list, tuple)) else cfg


# --- where a config is ----------------------------------------------------------------------------


def configs_of(toolbox: str) -> Path:
    """The folder of the configs in a toolbox's wheel."""
    return Path(str(compat.require(toolbox).__file__)).parent / '.mim/configs'


def find(source: str) -> Path:
    """The file of ``mmdet::…`` or of a path.

    Raises:
        UserError: The toolbox is unknown, or it is a folder.
    """
    toolbox, colons, name = source.partition('::')
    if colons and toolbox not in TOOLBOXES:
        raise UserError(f'{toolbox!r} in {source!r} is no toolbox: one of {", ".join(TOOLBOXES)}')
    path = configs_of(toolbox) / name if colons else Path(source)
    if path.is_dir():
        raise UserError(f'{source!r} is a folder, not a config')
    return path


def base_of(source: str, folder: Path) -> str:
    """The name of a config in ``_base_`` of one in ``folder``."""
    if '::' in source:
        return source
    path = Path(source).resolve()
    for toolbox in TOOLBOXES:
        try:
            root = configs_of(toolbox).resolve()
        except compat.DependencyError:
            continue
        if path.is_relative_to(root):
            return f'{toolbox}::{path.relative_to(root)}'
    return os.path.relpath(path, folder.resolve())


# --- the text -------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A part of the config that is inherited from: its name in the text, and its value."""

    name: str
    value: Any

    def get(self, key: str) -> _Part:
        if isinstance(self.value, (list, tuple)):
            return _Part(f'{self.name}[{key}]', self.value[int(key)])
        value = self.value.get(key) if isinstance(self.value, dict) else None
        plain = _is_name(key) and not hasattr(dict, key)
        return _Part(f'{self.name}.{key}' if plain else f'{self.name}[{key!r}]', value)


def _setting(start: str, node: Any, part: _Part, end: str, indent: str) -> list[str]:
    """Lines of a setting that is merged with the inherited one, as mmengine merges dicts."""
    if isinstance(node, Edit) or isinstance(part.value, (list, tuple)):
        return _anew(start, node, part, end, indent)
    inner = []
    for key, child in node.items():
        before, after = _key(key, f'{indent}    ')
        inner += _setting(before, child, part.get(key), f'{after},', f'{indent}    ')
    if len(inner) == 1 and inner[0].count('#') == 1:  # on one line if it fits
        setting, _, why = inner[0].strip().partition('  # ')
        line = f'{start}dict({setting.rstrip(",")}){end}  # {why}'
        if len(line) <= WIDTH:
            return [line]
    return [f'{start}dict(', *inner, f'{indent}){end}']


def _anew(start: str, node: Any, part: _Part, end: str, indent: str) -> list[str]:
    """Lines of a setting that mmengine does not merge: a list, or what is in one."""
    deeper = f'{indent}    '
    if node is None:
        return [f'{start}{part.name}{end}']
    if isinstance(node, Edit):
        return _value(start, node, end, indent)
    if isinstance(part.value, (list, tuple)):
        inner = []
        for i in map(str, range(len(part.value))):
            inner += _anew(deeper, node.get(i), part.get(i), ',', deeper)
        return [f'{start}[', *inner, f'{indent}]{end}']
    inner = [f'{deeper}{part.name},'] if isinstance(part.value, dict) else []
    for key, child in node.items():
        before, after = _key(key, deeper)
        inner += _anew(before, child, part.get(key), f'{after},', deeper)
    return [f'{start}dict(', *inner, f'{indent}){end}']


def _value(start: str, edit: Edit, end: str, indent: str) -> list[str]:
    """Lines of a value, one for each entry of a dict that does not fit on one line."""
    line, comment = f'{start}{literal(edit.value)}{end}', f'  # {edit.why}' if edit.why else ''
    if len(line + comment) <= WIDTH:
        return [line + comment]
    if not (isinstance(edit.value, dict) and edit.value):
        return [*(_comment(edit.why, indent) if edit.why else []), line]
    entries = []
    for key, entry in edit.value.items():
        before, after = _key(key, f'{indent}    ')
        entries += _value(before, Edit(entry, ''), f'{after},', f'{indent}    ')
    return [f'{start}dict({comment}', *entries, f'{indent}){end}']


def _key(key: str, indent: str) -> tuple[str, str]:
    """What is before and after a value in the brackets of ``dict()``."""
    if _is_name(key):
        return f'{indent}{key}=', ''
    return f'{indent}**{{{key!r}: ', '}'


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier() and not keyword.iskeyword(key)


def literal(value: Any) -> str:
    """A value as it is written in a config."""
    if isinstance(value, dict) and all(map(_is_name, value)):
        return f'dict({", ".join(f"{key}={literal(entry)}" for key, entry in value.items())})'
    if isinstance(value, dict):
        return f'{{{", ".join(f"{key!r}: {literal(entry)}" for key, entry in value.items())}}}'
    if isinstance(value, list):
        return f'[{", ".join(map(literal, value))}]'
    if isinstance(value, tuple):
        return f'({", ".join(map(literal, value))}{"," if len(value) == 1 else ""})'
    if isinstance(value, float) and not math.isfinite(value):
        return f'float({str(value)!r})'
    return repr(value)


def _comment(text: str, indent: str) -> list[str]:
    lines = [f'{indent}#']
    for word in text.split():
        if len(lines[-1]) + len(word) >= WIDTH:
            lines.append(f'{indent}#')
        lines[-1] += f' {word}'
    return lines
