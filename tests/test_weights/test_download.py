"""Files from a folder, the cache and a server on this machine: everything is verified."""

import ast
import hashlib
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loopback import serving
from mmengine.runner import CheckpointLoader, load_checkpoint
from test_backbones.archs import FAMILIES

import hat_mm.registry  # noqa: F401  the loader
from hat_mm.engine.cli import explain
from hat_mm.weights import fileio
from hat_mm.weights.download import DownloadError, fetch
from hat_mm.weights.official import OFFICIAL_FILES, OFFICIAL_PREFIXES, official_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with a checkpoint and others, and the first digits of the checkpoint's sha256."""
    folder = tmp_path_factory.mktemp('files')
    torch.save({'state_dict': {'a': torch.ones(1000)}}, folder / 'model.pth')
    fileio.write(folder / 'model.safetensors', {'state_dict': {'a': torch.ones(1000)}})
    (folder / 'page.pth').write_bytes(b'<html>Log in to the network</html>')
    good = (folder / 'model.pth').read_bytes()
    (folder / 'cut.pth').write_bytes(good)
    (folder / 'cut.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    digest = hashlib.sha256(good).hexdigest()
    (folder / f'model_20261121-{digest[:8]}.pth').write_bytes(good)
    (folder / 'model-12345678.pth').write_bytes(good)
    (folder / 'model-20261121.pth').write_bytes(good)  # a date
    return folder, digest


@pytest.fixture
def requests():
    """The paths that the server was asked for."""
    return []


@pytest.fixture
def url(files, requests):
    """Address of the folder of files."""
    with serving(files[0], requests) as address:
        yield address


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, not yet there; no setting of the user's counts."""
    for name in ('HAT_MM_WEIGHTS', 'TORCH_HUB', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch/hub/checkpoints'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that HAT_MM_WEIGHTS names."""
    path = tmp_path / 'weights'
    path.mkdir()
    monkeypatch.setenv('HAT_MM_WEIGHTS', str(path))
    return path


# --- a download -----------------------------------------------------------------------------------


def test_a_download_is_kept_in_the_cache_of_torch(files, url, cache, requests):
    good = (files[0] / 'model.pth').read_bytes()
    path = fetch(f'{url}/model.pth?download=true#here')
    assert path == cache / 'model.pth'
    assert path.read_bytes() == good
    assert fetch(f'{url}/model.pth') == path
    assert len(requests) == 1
    assert os.listdir(cache) == ['model.pth']


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cut.pth', r'cut\.pth was not loaded: .* damaged'),
        ('cut.safetensors', r'cut\.safetensors was not loaded: .* damaged'),
        ('page.pth', 'it is a web page'),
        ('missing.pth', r'missing\.pth was not downloaded: HTTP Error 404.* HAT_MM_WEIGHTS'),
        ('model-12345678.pth', 'truncated or altered: its sha256 is .*, not 12345678'),
    ],
)
def test_what_is_wrong_with_a_download_is_named_and_nothing_stays(url, cache, name, message):
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(f'{url}/{name}?key=secret')
    assert os.listdir(cache) == []
    # In one line of the tools, and in other processes.
    line = explain(caught.value)
    assert line == str(caught.value)
    assert 'secret' not in line
    assert str(pickle.loads(pickle.dumps(caught.value))) == line


def test_checksums_that_are_known_count(files, url, cache):
    """That of the caller, or the first 8 digits at the end of a name."""
    digest = files[1]
    fetch(f'{url}/model-20261121.pth')
    fetch(f'{url}/model_20261121-{digest[:8]}.pth')
    fetch(f'{url}/model.pth', digest.upper())
    with pytest.raises(DownloadError, match=f'its sha256 is {digest}, not {"0" * 64}'):
        fetch(f'{url}/model.pth', '0' * 64)
    for wrong in ('', 'unknown', 12345678):
        with pytest.raises(ValueError, match=f'8 to 64 hexadecimal digits, not {wrong!r}'):
            fetch(f'{url}/model.pth', wrong)


def test_a_wrong_file_in_the_cache_is_downloaded_again(files, url, cache):
    cache.mkdir(parents=True)
    good = (files[0] / 'model.pth').read_bytes()
    (cache / 'model.pth').write_bytes(good[:-9])
    assert fetch(f'{url}/model.pth').read_bytes() == good
    # But it stays where there is no other.
    (cache / 'missing.pth').write_bytes(good[:-9])
    with pytest.raises(DownloadError, match='404'):
        fetch(f'{url}/missing.pth')
    assert (cache / 'missing.pth').exists()


def test_nobody_answers(cache):
    with pytest.raises(DownloadError, match=r'model\.pth was not downloaded: .*refused'):
        fetch('https://127.0.0.1:9/model.pth')


# --- without a network ----------------------------------------------------------------------------


def test_the_folder_comes_first(files, url, cache, folder, requests):
    assert fetch(f'{url}/model.pth') == cache / 'model.pth'
    # As in a cache of Hugging Face's, files may be links.
    (folder / 'model.pth').symlink_to(files[0] / 'model.pth')
    assert fetch(f'{url}/model.pth') == folder / 'model.pth'
    assert len(requests) == 1


def test_a_wrong_file_in_the_folder_is_an_error(url, cache, folder, requests):
    (folder / 'model.pth').write_bytes(b'garbage')
    with pytest.raises(DownloadError, match=rf'{folder}/model\.pth was not loaded'):
        fetch(f'{url}/model.pth')
    assert requests == []


def test_files_of_this_machine_are_used_in_place(files, cache, tmp_path):
    path = tmp_path / 'with space/model.pth'
    path.parent.mkdir()
    path.write_bytes((files[0] / 'model.pth').read_bytes())
    assert fetch(path.as_uri()) == path
    assert fetch(f'file://localhost{path.as_uri().removeprefix("file://")}', files[1]) == path
    path.unlink()
    with pytest.raises(DownloadError, match='No such file'):
        fetch(path.as_uri())
    assert not cache.exists()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('address', 'message'),
    [
        ('http://example.com/model.pth', 'not allowed'),
        ('http://127.0.0.1.example.com/model.pth', 'not allowed'),
        ('http://10.0.0.1/model.pth', 'not allowed'),
        ('ftp://127.0.0.1/model.pth', 'not allowed'),
        ('data:application/octet-stream,/model.pth', 'not allowed'),
        ('https:///model.pth', 'not allowed'),
        ('file://server/model.pth', 'not allowed'),
        ('model.pth', 'not allowed'),
        ('https://me:word@127.0.0.1/model.pth', 'user name'),
        ('https://127.0.0.1:9/some/', 'name of a file'),
        ('https://127.0.0.1:9/some/..', 'name of a file'),
        ('https://127.0.0.1:9/?file=model.pth', 'name of a file'),
    ],
)
def test_other_addresses_are_refused(cache, folder, address, message):
    (folder / 'model.pth').write_bytes(b'')
    with pytest.raises(ValueError, match=message) as caught:
        fetch(address)
    assert 'word' not in str(caught.value)


def test_an_address_is_a_string(cache):
    with pytest.raises(TypeError, match='None'):
        fetch(None)


# --- through mmengine -----------------------------------------------------------------------------


@pytest.fixture(params=OFFICIAL_PREFIXES)
def official(request):
    """An official file, and a tiny backbone with what its file would hold."""
    file = next(file for file in OFFICIAL_FILES if file.url.startswith(request.param))
    family = FAMILIES[file.family]
    return file, family, family.state(family.tiny())


def test_an_official_address_loads_from_the_folder_without_a_network(official, cache, folder):
    file, family, state = official
    torch.save({'state_dict': state}, folder / file.name)
    for arguments in ({'init_cfg': dict(type='Pretrained', checkpoint=file.url)}, {}):
        backbone = family.backbone(family.tiny(), out_indices=(3,), **arguments)
        if arguments:
            backbone.init_weights()
        else:
            load_checkpoint(backbone, file.url)
        native = family.name_map.to_native(state)
        assert native
        for name, value in native.items():
            assert torch.equal(backbone.state_dict()[name], value)


def test_an_official_address_has_the_checksum_of_the_table(files, url, cache, monkeypatch):
    row = replace(OFFICIAL_FILES[0], url=f'{url}/model.pth', sha256='0' * 64)
    monkeypatch.setattr('hat_mm.weights.official.OFFICIAL_FILES', (row,))
    with pytest.raises(DownloadError, match='truncated or altered'):
        fetch(f'{row.url}?download=true')
    assert fetch(row.url.replace('127.0.0.1', 'localhost')).is_file()


def test_the_table_is_for_its_own_addresses_alone():
    file = OFFICIAL_FILES[0]
    assert official_file(file.url) is file
    assert official_file(f'{file.url}?download=true') is file
    assert official_file(file.name) is file
    assert official_file(f'https://example.com/{file.name}') is None
    assert official_file(f'https://example.com/?{file.url}') is None


def test_safetensors_load_from_paths_and_addresses(cache, tmp_path):
    family = FAMILIES['FasterViT']
    source = family.backbone(family.tiny())
    path = tmp_path / 'tiny.safetensors'
    fileio.write(path, {'state_dict': source.state_dict()})
    with serving(tmp_path) as url:
        for checkpoint in (str(path), path.as_uri(), f'{url}/tiny.safetensors?download=true'):
            backbone = family.backbone(
                family.tiny(), init_cfg=dict(type='Pretrained', checkpoint=checkpoint)
            )
            backbone.init_weights()
            for name, value in source.state_dict().items():
                assert torch.equal(backbone.state_dict()[name], value)
    loaded = CheckpointLoader.load_checkpoint(str(path), 'meta')
    assert loaded['state_dict']['stem.conv1.weight'].device.type == 'meta'
    with pytest.raises(FileNotFoundError) as caught:
        load_checkpoint(backbone, str(tmp_path / 'missing.safetensors'))
    assert 'missing.safetensors' in str(caught.value)


@pytest.mark.parametrize(
    ('path', 'loader'),
    [
        *((prefix + 'any.pth', 'hat_mm') for prefix in OFFICIAL_PREFIXES),
        ('https://huggingface.co/user/repo/resolve/main/model.safetensors', 'hat_mm'),
        ('https://huggingface.co/user/repo/resolve/main/model.safetensors?download=true', 'hat_mm'),
        ('file:///weights/model.safetensors', 'hat_mm'),
        ('weights/model.safetensors', 'hat_mm'),
        ('https://huggingface.co/user/repo/resolve/main/model.pth', 'http'),
        ('https://huggingfaceXco/ahatamiz/FasterViT/resolve/main/model.pth', 'http'),
        ('https://example.com/model.pth?from=x.safetensors', 'http'),
        ('s3://bucket/model.safetensors', 'ceph'),
        ('weights/model.pth', 'local'),
        ('weights/safetensors', 'local'),
    ],
)
def test_other_paths_keep_the_loaders_of_mmengine(path, loader):
    assert CheckpointLoader._get_checkpoint_loader(path).__name__ == f'load_from_{loader}'


PROCESS = """
import os, sys
import torch
from mmengine.runner import CheckpointLoader
import hat_mm.registry
rank = int(os.environ['RANK'])
torch.distributed.init_process_group(
    'gloo', init_method='file://' + sys.argv[1], rank=rank, world_size=2)
outcomes = []
for url in sys.argv[2:]:
    try:
        CheckpointLoader.load_checkpoint(url)
        outcomes.append('loaded')
    except OSError as error:
        outcomes.append(type(error).__name__)
torch.distributed.destroy_process_group()
print(outcomes)
"""


def test_processes_of_a_machine_download_once_and_fail_together(url, cache, tmp_path, requests):
    urls = [f'{url}/{name}.safetensors' for name in ('model', 'cut', 'missing')]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, str(tmp_path / 'store'), *urls],
            env={
                **os.environ,
                'PYTHONPATH': str(ROOT),
                'RANK': str(rank),
                'LOCAL_RANK': str(rank),
                'GLOO_SOCKET_IFNAME': 'lo',
                'OMP_NUM_THREADS': '1',
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for output in outputs:
        assert ast.literal_eval(output.splitlines()[-1]) == [
            'loaded', 'DownloadError', 'DownloadError'
        ]  # fmt: skip
    assert requests.count('/model.safetensors') == 1
    assert os.listdir(cache) == ['model.safetensors']
