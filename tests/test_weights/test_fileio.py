"""Checkpoint files: both formats, whole or not at all, and what is refused."""

import gzip
import os
import pickle
import resource
import tarfile
import zipfile
from random import Random

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import load_file, save_file

from hat_mm.weights.fileio import check_target, latest_whole, read, write
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


@pytest.fixture(params=['.pth', '.pth.tar', '.safetensors'])
def path(request, tmp_path):
    return tmp_path / f'some{request.param}'


# --- writing --------------------------------------------------------------------------------------


def test_what_is_written_is_read(path):
    write(path, CHECKPOINT)
    back = read(path)
    # A safetensors file keeps its tensors sorted.
    back['state_dict'] = {name: back['state_dict'][name] for name in CHECKPOINT['state_dict']}
    assert_same(back, CHECKPOINT)
    assert os.listdir(path.parent) == [path.name]
    # The libraries read it by themselves.
    if path.suffix == '.safetensors':
        assert torch.equal(load_file(path)['a.weight'], CHECKPOINT['state_dict']['a.weight'])
    else:
        assert_same(torch.load(path, weights_only=True), CHECKPOINT)


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


def test_a_full_disk_is_an_error_and_leaves_the_old_file(path):
    path.write_bytes(b'finished')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=path.name):
            write(path, {'state_dict': {'a': torch.rand(100_000)}}, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b'finished'
    assert os.listdir(path.parent) == [path.name]


def test_a_link_is_followed(path):
    path.write_bytes(b'old')
    link = path.with_name(f'link{"".join(path.suffixes)}')
    link.symlink_to(path.name)
    write(link, CHECKPOINT, force=True)
    assert link.is_symlink()
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


# --- reading --------------------------------------------------------------------------------------


def on_meta(storage, location):
    assert location == 'cpu'
    return torch.UntypedStorage(storage.nbytes(), device='meta')


@pytest.mark.parametrize(
    ('location', 'device'),
    [
        (None, 'cpu'),
        ('meta', 'meta'),
        (torch.device('meta'), 'meta'),
        ({'cpu': 'meta'}, 'meta'),
        ({'cuda:0': 'meta'}, 'cpu'),
        (on_meta, 'meta'),
        (lambda storage, location: None, 'cpu'),
        (lambda storage, location: storage, 'cpu'),
    ],
)
def test_map_location_means_what_it_does_in_torch(path, location, device):
    write(path, CHECKPOINT)
    loaded = read(path, location)['state_dict']
    for name, value in CHECKPOINT['state_dict'].items():
        assert loaded[name].device.type == device
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert device == 'meta' or torch.equal(loaded[name], value)


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=path.name):
        read(path)


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB.'),
        RuntimeError('CUDA error: out of memory'),
    ],
)
def test_too_little_memory_is_no_damage(error, tmp_path, monkeypatch):
    """A training must not go on from an older checkpoint because of it."""
    resumable = {'state_dict': {}, 'meta': {}, 'message_hub': {}, 'optimizer': {}}
    for name in ('iter_1.pth', 'iter_2.pth'):
        torch.save(resumable, tmp_path / name)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    assert latest_whole(tmp_path)[0] == tmp_path / 'iter_2.pth'

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(torch, 'load', fail)
    with pytest.raises(type(error)):
        latest_whole(tmp_path)


def test_files_that_are_no_checkpoints_are_passed_over(tmp_path):
    torch.save([1, 2, 3], tmp_path / 'results.pth')
    torch.save({'meta': {}, 'message_hub': {}, 'optimizer': {}}, tmp_path / 'iter_1.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    path, problem = latest_whole(tmp_path)
    assert path == tmp_path / 'iter_1.pth'
    assert 'iter_2.pth' in problem


def test_log_history_of_mmengine_is_read(tmp_path):
    history = HistoryBuffer([1.0], [1])
    torch.save({'state_dict': {}, 'message_hub': {'loss': history}}, tmp_path / 'epoch.pth')
    assert read(tmp_path / 'epoch.pth')['message_hub']['loss'].current() == 1.0


@pytest.mark.parametrize('size', [0, 100, -100, -1])
def test_a_cut_off_file_is_named(path, size):
    write(path, CHECKPOINT)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(pickle.UnpicklingError, match=f'{path.name} was not loaded.*damaged'):
        read(path)


def packed(kind, path):
    if kind == 'gzip':
        path.write_bytes(gzip.compress(b'text'))
    elif kind == 'part of gzip':
        path.write_bytes(gzip.compress(b'text')[:12])
    elif kind == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('readme.txt', b'')
    else:
        with tarfile.open(path, kind) as archive:
            archive.addfile(tarfile.TarInfo('../storages'))


@pytest.mark.parametrize(
    ('kind', 'message'),
    [
        ('w', 'is a tar archive'),
        ('w:gz', 'is a tar archive'),
        ('gzip', 'is no checkpoint'),
        ('part of gzip', 'is no checkpoint'),
        ('zip', 'is no checkpoint'),
    ],
)
def test_archives_are_refused(kind, message, tmp_path):
    path = tmp_path / 'some.pth.tar'
    packed(kind, path)
    with pytest.raises(pickle.UnpicklingError, match=f'some.pth.tar was not loaded: it {message}'):
        read(path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'\n<!DOCTYPE html><html><body>Log in to the network</body></html>', 'web page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'git lfs pull'),
    ],
)
def test_what_is_often_there_in_place_of_a_file_is_named(text, message, path):
    path.write_bytes(text)
    with pytest.raises(pickle.UnpicklingError, match=f'{path.name} was not loaded: .*{message}'):
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
    for _ in range(100):
        broken = bytearray(data)
        broken[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(broken)
        try:
            read(path)
        except (pickle.UnpicklingError, OSError) as error:
            refused += path.name in str(error)
    assert refused > 10


@pytest.mark.parametrize('header', ['no JSON', '[1]', 'null', '[' * 100_000])
def test_metadata_that_are_none(header, tmp_path):
    path = tmp_path / 'some.safetensors'
    save_file({'a': torch.zeros(1)}, path, {'hat_mm': header})
    with pytest.raises(pickle.UnpicklingError, match=r'some.safetensors was not loaded'):
        read(path)
