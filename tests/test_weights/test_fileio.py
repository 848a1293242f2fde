"""Checkpoint files: both formats, whole or not at all, and what is refused."""

import gzip
import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from random import Random

import pytest
import torch

from hat_mm.weights import atomic
from hat_mm.weights.fileio import check_target, read, write
from hat_mm.weights.names import UNUSED

CHECKPOINT = {
    'state_dict': {'a.weight': torch.arange(6.0).view(2, 3), 'a.count': torch.tensor(3)},
    'meta': {'arch': ['tiny'], 'epoch': 3, 'who': 'Zoë'},
    UNUSED: {'head.bias': torch.ones(2, dtype=torch.float16)},
}


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture(params=['.pth', '.pth.tar', '.pt', '.safetensors'])
def path(request, tmp_path):
    return tmp_path / f'some{request.param}'


def test_what_is_written_is_read(path):
    write(path, CHECKPOINT)
    back = read(path)
    # A safetensors file keeps its tensors sorted.
    back['state_dict'] = {name: back['state_dict'][name] for name in CHECKPOINT['state_dict']}
    assert_same(back, CHECKPOINT)
    assert os.listdir(path.parent) == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_views_bring_no_storage_along(path):
    write(path, {'state_dict': {'row': torch.zeros(1000, 1000)[0], 't': torch.rand(2, 3).t()}})
    assert path.stat().st_size < 20_000
    assert read(path)['state_dict']['row'].shape == (1000,)


def test_an_existing_file_stays_unless_forced(path):
    path.write_bytes(b'finished')
    with pytest.raises(FileExistsError, match='--force'):
        write(path, CHECKPOINT)
    assert path.read_bytes() == b'finished'
    write(path, CHECKPOINT, force=True)
    assert read(path)['meta']['epoch'] == 3


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    path.write_bytes(b'finished')

    def fail(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(atomic.os, 'fsync', fail)
    with pytest.raises(OSError, match=f'No space left on device: .*{path.name}'):
        write(path, CHECKPOINT, force=True)
    assert path.read_bytes() == b'finished'
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_one_error(path):
    code = (
        'import resource, torch; from hat_mm.weights.fileio import write\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n'
        'import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        f'try: write({str(path)!r}, {{"state_dict": {{"a": torch.rand(100_000)}}}})\n'
        'except OSError: print("refused")'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert done.stdout == 'refused\n', done.stderr
    assert os.listdir(path.parent) == []


def test_links_and_modes_stay(path):
    path.write_bytes(b'old')
    path.chmod(0o640)
    link = path.with_name(f'link{"".join(path.suffixes)}')
    link.symlink_to(path.name)
    write(link, CHECKPOINT, force=True)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert read(path)['meta']['epoch'] == 3


@pytest.mark.parametrize(
    ('name', 'error', 'message'),
    [
        ('some.onnx', ValueError, r'must end with one of \.pth'),
        ('nowhere/some.pth', FileNotFoundError, 'nowhere'),
        ('folder.pth', IsADirectoryError, 'is a folder'),
    ],
)
def test_targets_that_cannot_be(name, error, message, tmp_path):
    (tmp_path / 'folder.pth').mkdir()
    with pytest.raises(error, match=message):
        check_target(tmp_path / name, force=True)


def test_safetensors_hold_tensors_alone(tmp_path):
    with pytest.raises(ValueError, match="'epoch' is int"):
        write(tmp_path / 'some.safetensors', {'state_dict': {'epoch': 3}})


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.999])
def test_a_cut_off_file_is_named(path, share):
    write(path, CHECKPOINT)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(pickle.UnpicklingError, match=f'{path.name} was not loaded.*damaged'):
        read(path)


def test_a_cut_off_file_of_the_old_format_is_named(tmp_path):
    path = tmp_path / 'old.pth'
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)
    assert read(path)['meta']['epoch'] == 3
    data = path.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 40, 1, 0):
        path.write_bytes(data[:size])
        with pytest.raises(pickle.UnpicklingError, match=r'old.pth was not loaded.*damaged'):
            read(path)


def packed(kind):
    """An archive, and names that leave their folder."""
    data = io.BytesIO()
    if kind == 'gzip':
        return gzip.compress(b'text')
    if kind == 'tar':
        with tarfile.open(fileobj=data, mode='w') as archive:
            archive.addfile(tarfile.TarInfo('../storages'))
        return data.getvalue()
    with zipfile.ZipFile(data, 'w') as archive:
        archive.writestr('a/data.pkl' if kind == 'traversal' else 'readme.txt', b'')
        if kind == 'traversal':
            archive.writestr('a/../../evil', b'')
    return data.getvalue()


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('gzip', 'is a gzip archive'),
        ('tar', 'is a tar archive'),
        ('zip', 'is a zip archive'),
        ('traversal', r"the name 'a/../../evil' in it leaves its folder"),
    ],
)
def test_archives_are_refused(kind, message, tmp_path):
    path = tmp_path / 'some.pth.tar'
    path.write_bytes(packed(kind))
    with pytest.raises(pickle.UnpicklingError, match=message):
        read(path)


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('new', [True, False])
@pytest.mark.parametrize('name', ['bad.pth', 'bad.safetensors'])
def test_code_is_never_run(name, new, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    sentinel = tmp_path / 'ran'
    file = {'state_dict': {'a': torch.zeros(1)}, 'args': Malicious(str(sentinel))}
    torch.save(file, tmp_path / name, _use_new_zipfile_serialization=new)
    with pytest.raises(pickle.UnpicklingError, match=f'{name} was not loaded'):
        read(tmp_path / name)
    assert not sentinel.exists()


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        read(path)


def test_written_files_need_no_hat_mm(path):
    write(path, CHECKPOINT)
    load = (
        'safetensors.torch.load_file(p)'
        if path.suffix == '.safetensors'
        else ("torch.load(p, weights_only=True)['state_dict']")
    )
    code = (
        f'import sys, torch; p = {str(path)!r}\n'
        'if p.endswith("safetensors"): import safetensors.torch\n'
        f'assert {load}["a.weight"].shape == (2, 3)\n'
        'assert "hat_mm" not in sys.modules'
    )
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@pytest.mark.parametrize('suffix', ['.pth', '.old.pth', '.safetensors'])
def test_a_file_with_flipped_bits_is_read_or_named(suffix, tmp_path):
    """Whatever torch and its libraries make of it, the error is one of two kinds."""
    path = tmp_path / f'some{suffix}'
    write(path, CHECKPOINT)
    if suffix == '.old.pth':
        torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    random = Random(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        broken[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        try:
            read(path)
        except (pickle.UnpicklingError, OSError) as error:
            refused += path.name in str(error)
    assert refused > 50


@pytest.mark.parametrize('header', ['no JSON', '[1]', 'null', '[' * 100_000])
def test_metadata_that_are_none(header, tmp_path):
    path = tmp_path / 'some.safetensors'
    tensors = {'a': torch.zeros(1)}
    importlib.import_module('safetensors.torch').save_file(tensors, path, {'hat_mm': header})
    with pytest.raises(pickle.UnpicklingError, match=r'some.safetensors was not loaded'):
        read(path)


def test_torchscript_is_named_without_advice(tmp_path, recwarn):
    path = tmp_path / 'some.pth'
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    with pytest.raises(pickle.UnpicklingError, match=r'carries code \(TorchScript\)'):
        read(path)


def test_log_history_of_mmengine_is_read_by_itself(tmp_path, run_python):
    history = importlib.import_module('mmengine.logging').HistoryBuffer([1.0], [1])
    torch.save({'state_dict': {}, 'message_hub': {'loss': history}}, tmp_path / 'epoch.pth')
    code = 'import sys; from hat_mm.weights.fileio import read; print(read(sys.argv[1]).keys())'
    assert "'message_hub'" in run_python('-c', code, str(tmp_path / 'epoch.pth')).stdout
