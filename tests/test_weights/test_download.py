"""Downloads from a server on this machine: sources in order, everything verified, nothing left."""

import ast
import hashlib
import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest
import torch
from mmengine.runner import CheckpointLoader, load_checkpoint
from test_backbones.archs import FAMILIES

from hat_mm import registry
from hat_mm.compat import DependencyError
from hat_mm.engine.cli import explain
from hat_mm.weights import download, fileio
from hat_mm.weights.download import DownloadError, fetch
from hat_mm.weights.official import OFFICIAL_FILES, OFFICIAL_PREFIXES, official_file

ROOT = Path(__file__).resolve().parents[2]


def checkpoint_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({'state_dict': {'a': value}}, buffer)
    return buffer.getvalue()


GOOD = checkpoint_bytes(torch.ones(1000))
OTHER = checkpoint_bytes(torch.zeros(1000))
HASH = hashlib.sha256(GOOD).hexdigest()
HASHED = f'model_20261121-{HASH[:8]}.pth'
PAGE = b'\n<!DOCTYPE html><html><body>Log in to the network</body></html>'


# --- the server ----------------------------------------------------------------------------------


class Reply:
    """What the server answers: a body, with changes to how it is sent.

    Attributes:
        send: Share of the body that is sent before the connection ends.
        how: ``length``, ``chunked`` or ``1.0`` (an end without notice).
    """

    def __init__(self, body=GOOD, how='length', send=1.0, status=200, location=None, pause=0.0):
        self.body, self.how, self.send, self.status = body, how, send, status
        self.location, self.pause = location, pause


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        reply = self.server.replies.get(self.path.partition('?')[0], Reply(b'', status=404))
        self.protocol_version = 'HTTP/1.0' if reply.how == '1.0' else 'HTTP/1.1'
        self.close_connection = True
        self.send_response(reply.status)
        if reply.location:
            self.send_header('Location', reply.location)
        if reply.how == 'length':
            self.send_header('Content-Length', str(len(reply.body)))
        elif reply.how == 'chunked':
            self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        time.sleep(reply.pause)
        body = reply.body[: int(len(reply.body) * reply.send)]
        if reply.how == 'chunked':
            for i in range(0, len(body), 1000):
                part = body[i : i + 1000]
                self.wfile.write(b'%x\r\n%s\r\n' % (len(part), part))
            if reply.send == 1.0:
                self.wfile.write(b'0\r\n\r\n')
        else:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope='module')
def running_server():
    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(running_server):
    running_server.replies, running_server.requests = {}, []
    running_server.base = f'http://127.0.0.1:{running_server.server_port}/'
    return running_server


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder, not yet there; no setting of the user's counts."""
    for name in (download.FOLDER_VARIABLE, download.MIRRORS_VARIABLE, 'TORCH_HUB', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    return tmp_path / 'torch/hub/checkpoints'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder that HAT_MM_WEIGHTS names."""
    path = tmp_path / 'weights'
    path.mkdir()
    monkeypatch.setenv(download.FOLDER_VARIABLE, str(path))
    return path


@pytest.fixture
def lines(monkeypatch):
    """The lines of the log."""
    logged = []
    monkeypatch.setattr(download, 'print_log', lambda line, **_: logged.append(line))
    return logged


# --- a download ----------------------------------------------------------------------------------


@pytest.mark.parametrize('how', ['length', 'chunked', '1.0'])
def test_a_download_is_kept_in_the_cache_of_torch(server, cache, how):
    server.replies['/some/model.pth'] = Reply(how=how)
    path = fetch(server.base + 'some/model.pth')
    assert path == cache / 'model.pth'
    assert path.read_bytes() == GOOD
    assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) or 0o022)
    assert fetch(server.base + 'some/model.pth') == path
    assert server.requests == ['/some/model.pth']
    assert os.listdir(cache) == ['model.pth']


@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('length', r'truncated: [\d,]+ of [\d,]+ bytes'),
        ('chunked', 'truncated: its end is missing'),
        ('1.0', r'damaged \(cut off\?\)|is no checkpoint, or is damaged'),
    ],
)
@pytest.mark.parametrize('share', [0.0, 0.3, 0.999])
def test_a_truncated_download_is_named(server, cache, how, message, share):
    server.replies['/model.pth'] = Reply(how=how, send=share)
    with pytest.raises(DownloadError, match=rf'model\.pth: .*({message})'):
        fetch(server.base + 'model.pth')
    assert os.listdir(cache) == []


@pytest.mark.parametrize('how', ['length', 'chunked', '1.0'])
def test_a_truncated_download_with_a_checksum_is_named(server, cache, how):
    server.replies[f'/{HASHED}'] = Reply(how=how, send=0.7)
    with pytest.raises(DownloadError, match='truncated'):
        fetch(server.base + HASHED)
    assert os.listdir(cache) == []


def test_a_truncated_safetensors_file_without_length_is_named(server, cache, tmp_path):
    fileio.write(tmp_path / 'm.safetensors', {'state_dict': {'a': torch.ones(1000)}})
    body = (tmp_path / 'm.safetensors').read_bytes()
    server.replies['/m.safetensors'] = Reply(body, how='1.0', send=0.9)
    with pytest.raises(DownloadError, match='no safetensors file, or is damaged'):
        fetch(server.base + 'm.safetensors')
    server.replies['/m.safetensors'] = Reply(body, how='1.0')
    assert fetch(server.base + 'm.safetensors').read_bytes() == body


def test_an_altered_download_is_named(server, cache):
    """The first 8 digits count that end a name of OpenMMLab's, all of them where they are known."""
    server.replies |= {f'/{HASHED}': Reply(OTHER), '/model.pth': Reply(OTHER)}
    other = hashlib.sha256(OTHER).hexdigest()
    with pytest.raises(
        DownloadError, match=f'altered: its sha256 starts with {other[:8]}, not {HASH[:8]}'
    ):
        fetch(server.base + HASHED)
    with pytest.raises(DownloadError, match=f'altered: its sha256 is {other}, not {HASH}'):
        fetch(server.base + 'model.pth', HASH.upper())
    with pytest.raises(DownloadError, match=f'sha256 is {other}, not {HASH}'):
        fetch(server.base + f'model-{other[:8]}.pth', HASH, [server.base + 'model.pth'])
    assert os.listdir(cache) == []
    server.replies[f'/{HASHED}'] = Reply(GOOD)
    assert fetch(server.base + HASHED).read_bytes() == GOOD


@pytest.mark.parametrize(
    ('name', 'digest'),
    [
        ('model-1a2b3c4d.pth', '1a2b3c4d'),
        ('model-1a2b3c4d.pth.tar', '1a2b3c4d'),
        ('model_20261121-12345678.safetensors', '12345678'),
        ('model-20261121.pth', None),  # a date
        ('model_1a2b3c4d.pth', None),
        ('model-1a2b3c4.pth', None),
        ('model-1a2b3c4d5.pth', None),
        ('model-1a2b3c4d-small.pth', None),
        ('model-1A2B3C4D.pth', None),
    ],
)
def test_the_checksum_in_a_name(name, digest):
    assert download._known_digest(name, None) == digest


@pytest.mark.parametrize(
    ('reply', 'message'),
    [
        (Reply(PAGE), 'it is a web page'),
        (Reply(PAGE, how='1.0'), 'it is a web page'),
        (Reply(b'<html>'), 'it is a web page'),
        (Reply(b'version https://git-lfs.github.com/spec/v1\noid sha256:1'), 'git-lfs pull'),
        (Reply(PAGE, status=404), 'HTTP Error 404: Not Found'),
        (Reply(GOOD, status=503), 'HTTP Error 503: Service Unavailable'),
        (Reply(b''), 'damaged'),
        (Reply(b'garbage' * 100), 'is no checkpoint, or is damaged'),
        (Reply(checkpoint_bytes(eval)), 'it carries code'),
    ],
)
def test_what_is_no_checkpoint_is_named(server, cache, reply, message):
    server.replies['/model.pth'] = reply
    with pytest.raises(DownloadError, match=message):
        fetch(server.base + 'model.pth')
    assert os.listdir(cache) == []


def test_a_page_in_place_of_a_file_with_a_checksum_is_named(server, cache):
    server.replies[f'/{HASHED}'] = Reply(PAGE)
    with pytest.raises(DownloadError, match='it is a web page'):
        fetch(server.base + HASHED)


def test_a_server_that_keeps_silent(server, cache, monkeypatch):
    monkeypatch.setattr(download, '_TIMEOUT', 0.2)
    server.replies['/model.pth'] = Reply(pause=1.0)
    with pytest.raises(DownloadError, match='timed out'):
        fetch(server.base + 'model.pth')
    assert os.listdir(cache) == []


def test_a_missing_library_is_no_damage(server, cache, monkeypatch):
    def missing():
        raise DependencyError('pip install safetensors')

    monkeypatch.setattr(fileio, '_safetensors', missing)
    server.replies['/model.safetensors'] = Reply()
    with pytest.raises(DependencyError, match='pip install safetensors'):
        fetch(server.base + 'model.safetensors')
    assert os.listdir(cache) == []


@pytest.mark.parametrize('interruption', [KeyboardInterrupt, MemoryError])
def test_an_interrupted_download_leaves_nothing(server, cache, monkeypatch, interruption):
    server.replies['/model.pth'] = Reply()

    def interrupt(*_):
        assert len(os.listdir(cache)) == 1
        raise interruption

    monkeypatch.setattr(download, '_fault', interrupt)
    with pytest.raises(interruption):
        fetch(server.base + 'model.pth')
    assert os.listdir(cache) == []


def test_what_a_killed_download_left_is_removed_by_the_next(server, cache):
    cache.mkdir(parents=True)
    left, running = (cache / f'.part-{digit * 16}-model.pth' for digit in 'ab')
    others = cache / '.part-aaaaaaaaaaaaaaaa-other-model.pth'
    for path in (left, running, others):
        path.write_bytes(b'half')
    for path in (left, others):
        os.utime(path, (0, 0))
    server.replies['/model.pth'] = Reply()
    fetch(server.base + 'model.pth')
    assert set(os.listdir(cache)) == {'model.pth', running.name, others.name}


def test_progress_is_logged(server, cache, lines, monkeypatch):
    monkeypatch.setattr(download, '_REPORT_EVERY', 0.0)
    server.replies['/model.pth'] = Reply(GOOD + bytes(3 << 20))
    with pytest.raises(DownloadError):
        fetch(server.base + 'model.pth?key=secret')
    text = '\n'.join(lines)
    assert f'Downloading model.pth from {server.base}model.pth (3.2 MB)' in text
    assert f'model.pth from {server.base}model.pth: 1.0 MB' in text
    assert 'secret' not in text


def test_two_processes_fetch_the_same_file(server, cache, run_python):
    server.replies['/model.pth'] = Reply(pause=0.5)
    code = (
        'import hashlib, sys; from hat_mm.weights.download import fetch; '
        'print(hashlib.sha256(fetch(sys.argv[1]).read_bytes()).hexdigest())'
    )
    results = []

    def run():
        results.append(run_python('-c', code, server.base + 'model.pth'))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.stdout.split()[-1:] for r in results] == [[HASH]] * 2, results[0].stderr
    assert os.listdir(cache) == ['model.pth']


# --- other sources -------------------------------------------------------------------------------


def test_sources_in_their_order(server, cache, folder, monkeypatch, lines):
    monkeypatch.setenv(download.MIRRORS_VARIABLE, f'{server.base}m1, {server.base}m2/,')
    mirrors = [server.base + 'm3/any-name', server.base + 'm4/model.pth']
    paths = ['/m1/model.pth', '/m2/model.pth', '/m3/any-name', '/m4/model.pth', '/at/model.pth']
    url = server.base + 'at/model.pth'
    with pytest.raises(DownloadError) as caught:
        fetch(url, mirrors=mirrors)
    assert server.requests == paths
    message = str(caught.value)
    places = [message.index(path + ': HTTP Error 404') for path in paths]
    assert places == sorted(places)
    assert message.index(f'HAT_MM_WEIGHTS, {folder}: has no such file') < places[0]
    assert 'a folder that the environment variable HAT_MM_WEIGHTS names' in message
    assert [line.startswith('model.pth: not from ') for line in lines] == [True] * 6
    assert lines[1] == f'model.pth: not from {server.base}m1/model.pth: HTTP Error 404: Not Found'

    for i in reversed(range(5)):
        cache.joinpath('model.pth').unlink(missing_ok=True)
        server.replies[paths[i]] = Reply()
        server.requests.clear()
        assert fetch(url, mirrors=mirrors) == cache / 'model.pth'
        assert server.requests == paths[: i + 1]

    server.requests.clear()
    assert fetch(url, mirrors=mirrors) == cache / 'model.pth'
    (folder / 'model.pth').write_bytes(GOOD)
    assert fetch(url, mirrors=mirrors) == folder / 'model.pth'
    assert server.requests == []


def test_a_bad_mirror_is_named_and_the_next_source_is_tried(server, cache, lines):
    server.replies |= {'/bad.pth': Reply(OTHER), '/short.pth': Reply(send=0.5), '/m.pth': Reply()}
    mirrors = [server.base + 'bad.pth', server.base + 'short.pth', 'http://127.0.0.1:9/m.pth']
    assert fetch(server.base + 'm.pth', HASH, mirrors).read_bytes() == GOOD
    named = [line for line in lines if 'not from' in line]
    assert 'altered' in named[0]
    assert 'truncated' in named[1]
    assert 'refused' in named[2]


def test_a_folder_that_is_not_there_is_named(server, cache, monkeypatch, lines):
    monkeypatch.setenv(download.FOLDER_VARIABLE, '/nowhere')
    server.replies['/model.pth'] = Reply()
    assert fetch(server.base + 'model.pth') == cache / 'model.pth'
    assert 'model.pth: not from HAT_MM_WEIGHTS, /nowhere: is no folder' in lines


@pytest.mark.parametrize(
    ('name', 'body', 'message'),
    [
        (HASHED, OTHER, 'altered'),
        (HASHED, GOOD[:-1], 'altered'),
        ('model.pth', GOOD[:-1], 'damaged'),
        ('model.pth', PAGE, 'web page'),
    ],
)
def test_a_wrong_file_in_the_folder_is_an_error(server, cache, folder, name, body, message):
    (folder / name).write_bytes(body)
    server.replies[f'/{name}'] = Reply()
    with pytest.raises(DownloadError, match=rf'{folder}/{name} \(in HAT_MM_WEIGHTS\).*{message}'):
        fetch(server.base + name)
    assert server.requests == []


@pytest.mark.parametrize(
    ('name', 'body', 'fault'),
    [
        (HASHED, OTHER, 'altered'),
        ('model.pth', GOOD[:-9], 'damaged'),
        ('model.pth', PAGE, 'web page'),
    ],
)
def test_a_wrong_file_in_the_cache_is_replaced(server, cache, lines, name, body, fault):
    cache.mkdir(parents=True)
    (cache / name).write_bytes(body)
    with pytest.raises(DownloadError, match=f'the cache, {cache}/{name}: .*{fault}'):
        fetch(server.base + name)
    assert (cache / name).read_bytes() == body
    server.replies[f'/{name}'] = Reply()
    assert fetch(server.base + name).read_bytes() == GOOD
    assert any(f'{name}: not from the cache' in line and fault in line for line in lines)


def test_a_cache_that_cannot_be_written(server, cache):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b'')
    server.replies['/model.pth'] = Reply()
    with pytest.raises(DownloadError, match='File exists'):
        fetch(server.base + 'model.pth')


def test_files_of_this_machine_are_used_in_place(cache, tmp_path, monkeypatch):
    (tmp_path / 'with space').mkdir()
    path = tmp_path / 'with space/model.pth'
    path.write_bytes(GOOD)
    cache.mkdir(parents=True)
    (cache / 'model.pth').write_bytes(OTHER)  # of another origin
    assert fetch(path.as_uri()) == path
    assert fetch(f'file://localhost{path.as_uri().removeprefix("file://")}', HASH) == path
    monkeypatch.setenv(download.MIRRORS_VARIABLE, path.parent.as_uri())
    (path.parent / HASHED).write_bytes(GOOD)
    assert fetch(f'https://127.0.0.1:9/{HASHED}') == path.parent / HASHED
    path.write_bytes(GOOD[:-1])
    with pytest.raises(DownloadError, match='damaged'):
        fetch(path.as_uri())
    path.unlink()
    with pytest.raises(DownloadError, match='No such file'):
        fetch(path.as_uri())


def test_what_hugging_face_downloads_is_a_folder_of_weights(cache, tmp_path, monkeypatch):
    """``hf download`` makes a flat folder, or a cache of links."""
    local = tmp_path / 'local'
    (local / '.cache/huggingface/download').mkdir(parents=True)
    (local / '.cache/huggingface/download/model.pth.metadata').write_text('…')
    (local / 'model.pth').write_bytes(GOOD)
    repository = tmp_path / 'hub/models--user--repo'
    (repository / 'blobs').mkdir(parents=True)
    (repository / 'snapshots/abc').mkdir(parents=True)
    (repository / 'blobs/0123').write_bytes(GOOD)
    (repository / 'snapshots/abc/model.pth').symlink_to('../../blobs/0123')
    for folder in (local, repository / 'snapshots/abc'):
        monkeypatch.setenv(download.FOLDER_VARIABLE, str(folder))
        url = 'https://huggingface.co/user/repo/resolve/main/model.pth?download=true'
        assert fetch(url) == folder / 'model.pth'


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'url',
    [
        'http://example.com/model.pth',
        'http://127.0.0.1.example.com/model.pth',
        'http://10.0.0.1/model.pth',
        'http://0177.0.0.1/model.pth',
        'ftp://127.0.0.1/model.pth',
        's3://bucket/model.pth',
        'data:application/octet-stream,/model.pth',
        'HTTP://example.com/model.pth',
        'https:///model.pth',
        '/weights/model.pth',
        'model.pth',
    ],
)
def test_other_schemes_are_refused(cache, folder, monkeypatch, url):
    (folder / 'model.pth').write_bytes(GOOD)
    good = 'https://127.0.0.1:9/model.pth'
    scheme = url.partition(':')[0].lower() if ':' in url else ''
    message = f'its scheme is {scheme!r}.* allowed are https, file, and http to this machine'
    with pytest.raises(ValueError, match=message):
        fetch(url)
    with pytest.raises(ValueError, match=message):
        fetch(good, mirrors=[url])
    monkeypatch.setenv(download.MIRRORS_VARIABLE, url)
    with pytest.raises(ValueError, match=message):
        fetch(good)


def test_other_addresses_are_refused(cache):
    with pytest.raises(ValueError, match='on another machine'):
        fetch('file://server/model.pth')
    for url in ('http://127.0.0.1@example.com/m.pth', 'https://me:word@127.0.0.1/m.pth'):
        with pytest.raises(ValueError, match='user name') as caught:
            fetch(url)
        assert 'word' not in str(caught.value)
    with pytest.raises(TypeError, match='mirrors'):
        fetch('https://127.0.0.1:9/m.pth', mirrors='https://127.0.0.1:9/m.pth')
    with pytest.raises(TypeError, match='None'):
        fetch(None)


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('..%2f..%2fx.pth', '../../x.pth'),
        ('%2e%2e%2fx.pth', '../x.pth'),
        ('..', '..'),
        ('.hidden.pth', '.hidden.pth'),
        ('a%5cb.pth', 'a\\b.pth'),
        ('a%00.pth', 'a\0.pth'),
        ('a%252fb.pth', 'a%2fb.pth'),
        ('-rf.pth', '-rf.pth'),
        ('a b.pth', 'a b.pth'),
        ('%C3%A4.pth', 'ä.pth'),
        ('', ''),
        ('?file=model.pth', ''),
        ('#model.pth', ''),
    ],
)
def test_file_names_are_plain(cache, path, name):
    for base in ('https://127.0.0.1:9/some/', 'file:///tmp/'):
        with pytest.raises(ValueError, match='plain file name') as caught:
            fetch(base + path)
        assert repr(name) in str(caught.value)


def test_names_are_decoded_and_end_before_the_query(server, cache):
    server.replies['/a%2Bb-1.0.pth'] = Reply()
    path = fetch(server.base + 'a%2Bb-1.0.pth?download=true#here')
    assert path == cache / 'a+b-1.0.pth'
    assert server.requests == ['/a%2Bb-1.0.pth?download=true']


@pytest.mark.parametrize('sha256', ['', HASH[:8], HASH + '0', 'g' * 64])
def test_sha256_must_be_one(cache, sha256):
    with pytest.raises(ValueError, match='64 hexadecimal digits'):
        fetch('https://127.0.0.1:9/model.pth', sha256)


@pytest.mark.parametrize('status', [301, 302, 303, 307, 308])
def test_redirects_are_followed(server, cache, status):
    server.replies['/model.pth'] = Reply(b'', status=status, location='/there/blob')
    server.replies['/there/blob'] = Reply()
    assert fetch(server.base + 'model.pth').name == 'model.pth'


@pytest.mark.parametrize(
    'target',
    [
        'http://example.com/model.pth?key=secret',
        'http://10.0.0.1/model.pth?key=secret',
        'file:///etc/model.pth?key=secret',
        'ftp://127.0.0.1/model.pth?key=secret',
        'data:model.pth?key=secret',
        'http://user:secret@127.0.0.1/model.pth',
    ],
)
@pytest.mark.parametrize('status', [301, 308])
def test_redirects_to_what_is_not_allowed_are_refused(server, cache, target, status):
    server.replies['/model.pth'] = Reply(b'', status=status, location=target)
    scheme = target.partition(':')[0]
    with pytest.raises(DownloadError, match=f'redirects to {scheme}:.*not allowed') as caught:
        fetch(server.base + 'model.pth')
    assert 'secret' not in str(caught.value)
    assert os.listdir(cache) == []


def test_endless_redirects_end(server, cache):
    server.replies['/model.pth'] = Reply(b'', status=302, location='/model.pth')
    with pytest.raises(DownloadError, match='infinite loop'):
        fetch(server.base + 'model.pth')


def test_https_is_never_left_for_http():
    def redirect(target):
        return download._Redirects().redirect_request(
            Request('https://example.com/a.pth'), io.BytesIO(), 302, 'Found', {}, target
        )

    assert redirect('https://example.org/b').full_url == 'https://example.org/b'
    for target in ('http://example.com/a.pth', 'http://127.0.0.1/a.pth', 'file:///a.pth'):
        with pytest.raises(URLError, match='not allowed'):
            redirect(target)


def test_http_to_this_machine_takes_no_proxy(server, cache, monkeypatch):
    for name in ('http_proxy', 'all_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.delenv('no_proxy', raising=False)
    server.replies['/model.pth'] = Reply()
    assert fetch(server.base + 'model.pth').read_bytes() == GOOD


def test_https_takes_the_proxy(server, cache, monkeypatch):
    monkeypatch.setenv('https_proxy', server.base)
    monkeypatch.delenv('no_proxy', raising=False)
    with pytest.raises(DownloadError, match='Tunnel connection failed: 501'):
        fetch('https://example.com/model.pth')  # our server knows no CONNECT


def test_errors_are_one_line_of_the_tools_and_can_be_sent_to_other_processes(cache):
    with pytest.raises(DownloadError) as caught:
        fetch('http://127.0.0.1:9/model.pth')
    line = explain(caught.value)
    assert line == str(caught.value)
    assert line.startswith('no source has a good model.pth: http://127.0.0.1:9/model.pth: [Errno')
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), explain(copy)) == (line, line)


# --- through mmengine ----------------------------------------------------------------------------


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


def test_a_damaged_official_file_in_the_folder_is_one_line_of_the_tools(official, cache, folder):
    file, family, _ = official
    (folder / file.name).write_bytes(GOOD[:-1])
    backbone = family.backbone(family.tiny(), init_cfg=dict(type='Pretrained', checkpoint=file.url))
    with pytest.raises(DownloadError) as caught:
        backbone.init_weights()
    assert f'{file.name} (in HAT_MM_WEIGHTS) is wrong: ' in explain(caught.value)


def test_official_addresses_use_checksum_and_mirrors_of_the_table(
    official, server, cache, monkeypatch
):
    """And a file of the same name on another host does not."""
    file, _, _ = official
    good = GOOD
    server.replies[f'/{file.name}'] = Reply(good)
    row = replace(
        file,
        url=f'https://127.0.0.1:9/{file.name}',  # where nobody answers
        sha256=hashlib.sha256(good).hexdigest(),
        mirrors=(server.base + file.name,),
    )
    monkeypatch.setattr('hat_mm.weights.official.OFFICIAL_FILES', (row,))
    for url in (row.url, f'{row.url}?download=true'):
        assert fetch(url).read_bytes() == good
        shutil.rmtree(cache)
    server.replies[f'/{file.name}'] = Reply(good + b' ')
    with pytest.raises(download.DownloadError, match='truncated or altered'):
        fetch(row.url)


def test_the_table_is_for_its_own_addresses_alone():
    file = OFFICIAL_FILES[0]
    assert official_file(file.url) is file
    assert official_file(f'{file.url}?download=true') is file
    assert official_file(file.name) is file
    assert official_file(f'https://example.com/{file.name}') is None
    assert official_file(f'https://example.com/?{file.url}') is None


def test_safetensors_load_from_paths_and_addresses(server, cache, tmp_path):
    family = FAMILIES['FasterViT']
    source = family.backbone(family.tiny())
    path = tmp_path / 'tiny.safetensors'
    fileio.write(path, {'state_dict': source.state_dict()})
    server.replies['/tiny.safetensors'] = Reply(path.read_bytes())
    for checkpoint in (str(path), path.as_uri(), server.base + 'tiny.safetensors?download=true'):
        backbone = family.backbone(
            family.tiny(), init_cfg=dict(type='Pretrained', checkpoint=checkpoint)
        )
        backbone.init_weights()
        for name, value in source.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], value)
    with pytest.raises(FileNotFoundError) as caught:
        load_checkpoint(backbone, str(tmp_path / 'missing.safetensors'))
    assert 'missing.safetensors' in str(caught.value)


@pytest.fixture(params=['safetensors', 'pth', 'old.pth'])
def small_file(request, tmp_path):
    """A file whose loader is ours: tensors of two types, one of them a number."""
    path = tmp_path / f'tiny.{request.param}'
    state = {'a': torch.arange(6.0).view(2, 3), 'n': torch.tensor(3)}
    if request.param == 'old.pth':
        torch.save({'state_dict': state}, path, _use_new_zipfile_serialization=False)
    else:
        fileio.write(path, {'state_dict': state})
    return str(path), state


def on_meta(storage, location):
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
def test_map_location_means_what_it_does_in_torch(small_file, location, device):
    path, state = small_file
    loaded = download.load_from_hat_mm(path, location)['state_dict']
    for name, value in state.items():
        assert loaded[name].device.type == device
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert device == 'meta' or torch.equal(loaded[name], value)


def test_a_function_as_map_location_sees_what_torch_shows_it(small_file):
    path, state = small_file
    seen = []

    def doubled(storage, location):
        seen.append((type(storage), storage.nbytes(), location))
        return storage.clone()

    loaded = download.load_from_hat_mm(path, doubled)['state_dict']
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in state.items()
    }
    assert sorted(seen, key=lambda call: call[1]) == [
        (torch.UntypedStorage, 8, 'cpu'),
        (torch.UntypedStorage, 24, 'cpu'),
    ]


def test_a_wrong_map_location_is_no_damaged_file(small_file):
    path, _ = small_file

    def fails(storage, location):
        raise ZeroDivisionError('mine')

    with pytest.raises(ZeroDivisionError, match='mine'):
        download.load_from_hat_mm(path, fails)
    for wrong in ('nowhere', {'cpu': 'nowhere'}):
        with pytest.raises(RuntimeError, match='nowhere'):
            download.load_from_hat_mm(path, wrong)


def test_map_location_through_mmengine(tmp_path):
    path = str(tmp_path / 'tiny.safetensors')
    fileio.write(path, {'state_dict': {'a': torch.ones(3)}})
    loaded = CheckpointLoader.load_checkpoint(path, on_meta)
    assert loaded['state_dict']['a'].device.type == 'meta'


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


def test_a_second_import_registers_again(monkeypatch):
    saved = dict(vars(registry))
    for child in (registry.MODELS, registry.HOOKS, registry.OPTIM_WRAPPER_CONSTRUCTORS):
        monkeypatch.delitem(child.parent.children, 'hat_mm')  # mmengine takes a scope once
    try:
        importlib.reload(registry)
    finally:
        vars(registry).update(saved)  # the classes are registered in the first ones
    assert [*CheckpointLoader._schemes.values()].count(download.load_from_hat_mm) == 5


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


def test_processes_of_a_machine_download_once_and_fail_together(server, cache, tmp_path):
    fileio.write(tmp_path / 'm.safetensors', {'state_dict': {'a': torch.ones(9)}})
    body = (tmp_path / 'm.safetensors').read_bytes()
    server.replies['/good.safetensors'] = Reply(body, pause=0.5)
    server.replies['/cut.safetensors'] = Reply(body, send=0.5)
    urls = [server.base + f'{name}.safetensors' for name in ('good', 'cut', 'missing')]
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
    assert server.requests.count('/good.safetensors') == 1
    assert os.listdir(cache) == ['good.safetensors']
