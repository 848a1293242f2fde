"""What a wheel and a source archive of hat_mm hold, and what they ask for."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import hat_mm

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ('hat_mm', 'configs', 'tools', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'LICENSE')


def files_below(folder: str) -> set[str]:
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob('*') if path.is_file())
    return {path.as_posix() for path in found if '__pycache__' not in path.parts}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build as pip does, without a network: call the backend in the environment as it is."""
    target.mkdir()
    code = f'from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))'
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=source, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    """A source archive built from a copy of the tree, and the wheel built from that archive."""
    folder = tmp_path_factory.mktemp('packaging')
    source = folder / 'source'
    source.mkdir()
    for name in (*SOURCES, 'README.md', 'model-index.yml'):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name)
        elif path.exists() or name in SOURCES:
            shutil.copy2(path, source)
    sdist = build('sdist', source, folder / 'sdist')
    with tarfile.open(sdist) as tar:
        tar.extractall(folder / 'unpacked', filter='data')
    (unpacked,) = (folder / 'unpacked').iterdir()
    wheel = build('wheel', unpacked, folder / 'wheel')
    assert not list(unpacked.glob('hat_mm/.mim'))
    return sdist, wheel


def test_the_wheel_holds_the_package_and_what_mim_looks_for(archives):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    assert files_below('hat_mm') <= names
    shipped = files_below('configs') | files_below('tools')
    assert {f'hat_mm/.mim/{name}' for name in shipped} <= names
    if (ROOT / 'model-index.yml').exists():
        assert 'hat_mm/.mim/model-index.yml' in names
    tops = {name.split('/')[0] for name in names if '.dist-info' not in name}
    assert tops == {'hat_mm'}
    assert not [name for name in names if '__pycache__' in name]


def test_the_wheel_requires_torch_and_numpy_alone(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
        metadata = Parser().parsestr(wheel.read(name).decode())
    required = metadata.get_all('Requires-Dist')
    hard = [line for line in required if 'extra ==' not in line]
    assert sorted(line.split('>')[0] for line in hard) == ['numpy', 'torch']
    assert {*metadata.get_all('Provides-Extra')} == {'det', 'seg', 'cls', 'large', 'test', 'dev'}
    assert metadata['License-Expression'] == 'Apache-2.0'


def test_the_version_of_the_package_is_the_one_of_its_metadata():
    metadata = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert hat_mm.__version__ == metadata['project']['version']
