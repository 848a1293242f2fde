"""What a wheel and a source archive of hat_mm hold, and what they ask for."""

import os
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
SHIPPED = ('configs', 'demo', 'tools', 'model-index.yml')
PACKAGES = ('hat_mm', 'hat_mm_runtime')
METADATA = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'LICENSE', 'README.md')


def files_below(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob('*') if path.is_file())
    return {path.as_posix() for path in found if '__pycache__' not in path.parts}


def shipped_files() -> set[str]:
    """What `hat_mm/.mim` has to hold."""
    folders = (name for name in SHIPPED if (ROOT / name).is_dir())
    files = {f'{folder}/{name}' for folder in folders for name in files_below(ROOT / folder)}
    return files | {'model-index.yml'}


def copy_sources(target: Path) -> Path:
    """Copy what a package is built from, links as links; the tests may run beside each other."""
    target.mkdir()
    for name in (*PACKAGES, *SHIPPED, *METADATA):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True)
        else:
            shutil.copy2(ROOT / name, target)
    return target


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


def unpack(sdist: Path, target: Path) -> Path:
    with tarfile.open(sdist) as tar:
        tar.extractall(target, filter='data')
    (unpacked,) = target.iterdir()
    return unpacked


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    """A source archive built from a copy of the tree, and the wheel built from that archive."""
    folder = tmp_path_factory.mktemp('packaging')
    source = copy_sources(folder / 'source')
    sdist = build('sdist', source, folder / 'sdist')
    wheel = build('wheel', unpack(sdist, folder / 'unpacked'), folder / 'wheel')
    assert sorted(path.name for path in (source / 'hat_mm' / '.mim').iterdir()) == sorted(SHIPPED)
    return sdist, wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_a_checkout_has_links_to_what_mim_looks_for():
    links = {path.name: os.readlink(path) for path in (ROOT / 'hat_mm' / '.mim').iterdir()}
    assert links == {name: f'../../{name}' for name in SHIPPED}


def test_the_wheel_holds_the_package_and_what_mim_looks_for(archives):
    files = contents(archives[1])
    shipped = {name for name in files if name.startswith('hat_mm/.mim/')}
    assert shipped == {f'hat_mm/.mim/{name}' for name in shipped_files()}
    packages = {f'{p}/{name}' for p in PACKAGES for name in files_below(ROOT / p)}
    assert {name for name in files if '.dist-info/' not in name} == packages | shipped
    for name in shipped:
        assert files[name] == (ROOT / name.removeprefix('hat_mm/.mim/')).read_bytes(), name


def test_the_source_archive_holds_copies_not_links(archives):
    with tarfile.open(archives[0]) as tar:
        members = tar.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.partition('/')[2] for member in members if member.isfile()}
    assert shipped_files() | {f'hat_mm/.mim/{name}' for name in shipped_files()} <= names
    assert {*METADATA} <= names
    assert not [name for name in names if '__pycache__' in name or name.endswith('.pyc')]


def test_a_tree_without_links_gives_the_same_wheel(archives, tmp_path):
    """Such as a downloaded zip of the repository, in which pip and Windows see text files."""
    source = copy_sources(tmp_path / 'source')
    for link in (source / 'hat_mm' / '.mim').iterdir():
        text = os.readlink(link)
        link.unlink()
        link.write_text(text)
    (source / 'configs' / 'fastervit' / '__pycache__').mkdir()
    (source / 'configs' / 'fastervit' / '__pycache__' / 'a.cpython-311.pyc').touch()
    found, expected = contents(build('wheel', source, tmp_path / 'wheel')), contents(archives[1])
    assert found == expected


def test_a_tree_without_the_index_of_models_gives_no_wheel(tmp_path):
    source = copy_sources(tmp_path / 'source')
    (source / 'model-index.yml').unlink()
    with pytest.raises(AssertionError, match=r'No such file.*model-index\.yml'):
        build('wheel', source, tmp_path / 'wheel')
    # The links of the tree and what they led to are still there.
    assert (source / 'hat_mm' / '.mim' / 'configs' / 'fastervit').is_dir()


def test_the_wheel_requires_torch_and_numpy_alone(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
        metadata = Parser().parsestr(wheel.read(name).decode())
    required = metadata.get_all('Requires-Dist')
    hard = [line for line in required if 'extra ==' not in line]
    assert sorted(line.split('>')[0] for line in hard) == ['numpy', 'torch']
    extras = ['det', 'seg', 'cls', 'large', 'data', 'panoptic', 'interop', 'bench', 'vis', 'demo']
    extras += ['deploy', 'docs', 'test', 'dev']
    assert {*metadata.get_all('Provides-Extra')} == {*extras}
    assert metadata['License-Expression'] == 'Apache-2.0'


def test_the_version_of_the_package_is_the_one_of_its_metadata_and_of_the_citation():
    metadata = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert hat_mm.__version__ == metadata['project']['version']
    assert f'\nversion: {hat_mm.__version__}\n' in (ROOT / 'CITATION.cff').read_text()
