"""Imports run one way: layers, weights <- backbones, plugins <- engine, zoo <- what uses hat_mm."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'hat_mm'
TOOLBOXES = ('mmdet', 'mmseg', 'mmpretrain')
OUTSIDE = ('tools', 'demo', 'tests', 'shapes')

LOWEST = ('torch', 'hat_mm.layers', 'hat_mm.weights')
BACKBONES = (*LOWEST, 'mmengine', 'mmcv.cnn', 'hat_mm.backbones', 'hat_mm.registry')
HIGHEST = (
    *LOWEST,
    'numpy',
    'mmengine',
    'hat_mm',
    'hat_mm.configs',
    'hat_mm.backbones',
    'hat_mm.plugins',
)
# Folder or file of hat_mm -> all it may import beside the standard library; `hat_mm` is the package
# for its version, not the modules in it. What is not listed may import anything but the toolboxes,
# the tools, the demos and the tests.
ALLOWED = {
    'layers': ('torch', 'hat_mm.layers'),
    'configs.py': ('hat_mm.compat',),
    'weights': ('torch', 'mmengine', 'hat_mm', 'hat_mm.compat', 'hat_mm.weights'),
    'backbones': BACKBONES,
    'plugins.py': ('torch', 'hat_mm.layers', 'hat_mm.backbones', 'hat_mm.registry'),
    'necks.py': ('torch', 'hat_mm.layers', 'hat_mm.registry'),
    'detectors.py': ('torch', 'hat_mm.registry', 'hat_mm.weights'),
    'engine': (
        *HIGHEST,
        'mmcv.transforms',
        'cv2',
        'hat_mm_runtime',
        'hat_mm.compat',
        'hat_mm.registry',
        'hat_mm.engine',
    ),
    'interop': (*LOWEST, 'hat_mm.compat', 'hat_mm.backbones', 'hat_mm.interop'),
    'zoo': (*HIGHEST, 'yaml', 'modelindex', 'hat_mm.compat', 'hat_mm.registry', 'hat_mm.zoo'),
}
# The file that works round what the toolboxes do, by importing them where it must.
MAY_IMPORT_TOOLBOXES = ('compat.py',)


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    below = tuple(f'{package}.' for package in packages if package != 'hat_mm')
    return name in packages or name.startswith(below)


def imported_names(source: str, package: str) -> list[tuple[int, str]]:
    """Line and full name of every import in a module, the ones inside functions too.

    `from a import b` counts as `a.b`: `b` may be a module. `package` resolves relative imports.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split('.')
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = '.'.join([*start, *([node.module] if node.module else [])])
            found += [(node.lineno, f'{base}.{alias.name}') for alias in node.names]
    return found


def violations(path: Path, package: Path = PACKAGE) -> list[str]:
    """What one file of hat_mm imports against the rules, as `file:line: name`."""
    inside = path.relative_to(package)
    name = '.'.join(['hat_mm', *inside.parent.parts])
    allowed = ALLOWED.get(inside.parts[0])
    wrong = []
    for line, imported in imported_names(path.read_text(encoding='utf-8'), name):
        if is_within(imported, tuple(sys.stdlib_module_names)):
            continue
        banned = OUTSIDE if inside.name in MAY_IMPORT_TOOLBOXES else (*OUTSIDE, *TOOLBOXES)
        banned = is_within(imported, banned)
        if banned or (allowed is not None and not is_within(imported, allowed)):
            wrong.append(f'{path}:{line}: {imported}')
    return wrong


def test_direction_holds_in_every_module():
    files = sorted(PACKAGE.rglob('*.py'))
    assert {*ALLOWED} <= {file.relative_to(PACKAGE).parts[0] for file in files}
    assert [line for file in files for line in violations(file)] == []


def test_the_runtime_knows_nothing_of_the_rest():
    own = ('numpy', 'cv2', 'onnxruntime', 'openvino', 'hat_mm_runtime')
    files = sorted((ROOT / 'hat_mm_runtime').rglob('*.py'))
    found = [
        f'{file}:{line}: {name}'
        for file in files
        for line, name in imported_names(file.read_text(encoding='utf-8'), 'hat_mm_runtime')
        if not is_within(name, (*sys.stdlib_module_names, *own))
    ]
    assert files
    assert found == []


@pytest.mark.parametrize(
    ('file', 'source', 'count'),
    [
        ('layers/a.py', 'import torch.nn as nn\nfrom .b import c\nfrom math import pi\n', 0),
        ('layers/a.py', 'import numpy', 1),
        ('layers/a.py', 'from mmcv.cnn import build_norm_layer', 1),
        ('layers/a.py', 'from ..backbones import base', 1),
        ('layers/a.py', 'from .. import registry', 1),
        ('backbones/a.py', 'from mmcv.cnn import build_norm_layer\nfrom ..layers import b', 0),
        ('backbones/a.py', 'from mmcv import ops\nfrom mmcv.ops import nms', 2),
        ('backbones/a.py', 'def f():\n    import mmdet.models\n', 1),
        ('plugins.py', 'from hat_mm.backbones.base import check_ints', 0),
        ('plugins.py', 'from mmcv.cnn import build_norm_layer', 1),
        ('weights/a.py', 'import hat_mm\nfrom . import names\nfrom hat_mm import compat', 0),
        ('weights/a.py', 'from hat_mm import layers\nfrom ..registry import MODELS', 2),
        ('engine/a.py', 'from hat_mm.backbones import base\nfrom hat_mm.weights import names', 0),
        ('engine/a.py', 'from hat_mm.zoo import models', 1),
        ('zoo/a.py', 'from hat_mm.weights import fileio\nimport yaml', 0),
        ('zoo/a.py', 'from hat_mm.engine import cli\nfrom shapes import draw_scene', 2),
        ('registry.py', 'from mmseg.registry import MODELS', 1),
        ('registry.py', 'from mmengine.registry import MODELS\nimport mmdetection_like', 0),
        ('compat.py', 'import mmdet', 0),
        ('compat.py', 'from tests import golden', 1),
    ],
)
def test_direction_check_sees_violations(tmp_path, file, source, count):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding='utf-8')
    assert len(violations(path, tmp_path)) == count


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_hat_mm_pulls_in_no_toolbox():
    heavy = (*TOOLBOXES, 'mmcv', 'torchvision')
    code = f'import sys, hat_mm; print([name for name in {heavy!r} if name in sys.modules])'
    assert run_python(code) == '[]'


def test_import_hat_mm_works_with_no_toolbox_installed():
    code = """
import sys
for name in ('mmdet', 'mmseg', 'mmpretrain', 'mmcv', 'mmengine', 'torchvision'):
    sys.modules[name] = None  # makes its import an ImportError
import hat_mm
print(hat_mm.__version__)
"""
    assert run_python(code)


def test_a_public_name_says_what_it_needs():
    code = """
import sys
sys.modules['mmengine'] = None
import hat_mm
for name in ('FasterViT', 'get_model', 'Inferencer', 'export'):
    try:
        getattr(hat_mm, name)
    except hat_mm.compat.DependencyError as error:
        print(error)
"""
    said = run_python(code).splitlines()
    assert len(said) == 4
    for line in said:
        assert 'needs mmengine' in line and "pip install 'hat_mm[det]'" in line
