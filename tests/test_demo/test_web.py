"""web.py: models that it offers, messages, results of a session; all of the page in a browser."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import web
from model_files import CLASSIFYING, DETECTING, SEGMENTING, picture, write
from test_deployment.tiny_models import classifier, config, spread

import hat_mm
from hat_mm.engine.cli import UserError
from hat_mm.inference import Prepared
from hat_mm_runtime import PictureError

ROOT = Path(__file__).resolve().parents[2]


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


def two_boxes(path):
    """A file that finds a dog and, less surely, a cat in every picture."""
    dets = np.array([[[10, 10, 20, 22, 0.9], [1, 2, 15, 16, 0.4]]], np.float32)
    return write(path, DETECTING, dets=dets, labels=np.array([[1, 0]]))


# --- models ---------------------------------------------------------------------------------------


def test_finds_what_is_in_work_dirs(tmp_path):
    def trained(name, config, checkpoint):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / config).touch()
        (folder / 'epoch_6.pth').touch()
        (folder / 'last_checkpoint').write_text(checkpoint)

    trained('demo-openmmlab', 'mask-rcnn.py', str(tmp_path / 'demo-openmmlab/epoch_6.pth'))
    trained('demo-nuclei-onedl/upernet', 'config.py', '/moved/epoch_6.pth')
    trained('demo-broken', 'config.py', 'epoch_7.pth')
    (tmp_path / 'voc').mkdir()
    for name in ('a.onnx', 'voc/annotation.xml', 'b.xml', 'b.bin'):
        (tmp_path / name).touch()
    found = web.find_models(tmp_path)
    assert list(found) == ['demo-nuclei-onedl/upernet', 'demo-openmmlab', 'a.onnx', 'b.xml']
    assert found['demo-openmmlab'].model.endswith('mask-rcnn.py')
    upernet = found['demo-nuclei-onedl/upernet']
    assert upernet.weights == str(tmp_path / 'demo-nuclei-onedl/upernet/epoch_6.pth')
    assert [one.exported for one in found.values()] == [False, False, True, True]


def test_models_of_the_command_line(tmp_path):
    files = [str(tmp_path / name) for name in ('c.py', 'c.pth', 'm.onnx')]
    for file in files:
        Path(file).touch()
    settings, checkpoint, exported = files
    found = web.given_models([f'{settings}:{checkpoint}', exported, 'fastervit-0_3rdparty_in1k'])
    assert [*map(tuple, found.values())] == [
        (settings, checkpoint),
        (exported, None),
        ('fastervit-0_3rdparty_in1k', None),
    ]
    with pytest.raises(UserError, match=r'c\.py:CHECKPOINT'):
        web.given_models([settings])
    for wrong in ('nowhere.py:c.pth', f'{settings}:nowhere.pth', 'nowhere.onnx'):
        with pytest.raises(UserError, match=r'there is no file .nowhere'):
            web.given_models([wrong])


def test_nothing_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='make demo'):
        web.main([])


def test_models_are_kept_and_lent_to_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(web, 'MODELS_KEPT', 2)
    choices = [web.Choice(str(two_boxes(tmp_path / f'{i}.onnx'))) for i in range(3)]
    models = web.Models({})
    lent = []
    for choice in (choices[0], choices[0], choices[1], choices[2], choices[0]):
        with models.borrow(choice) as infer:
            lent.append(infer)
    assert lent[0] is lent[1]
    assert lent[4] is not lent[0]  # two others came between
    tried, got = threading.Event(), threading.Event()

    def second():
        tried.set()
        with models.borrow(choices[0]):
            got.set()

    with models.borrow(choices[0]):
        thread = threading.Thread(target=second)
        thread.start()
        assert tried.wait(10)
        assert not got.wait(0.1)
    thread.join(10)
    assert got.is_set()


# --- pictures and results -------------------------------------------------------------------------


def test_messages_name_the_file_and_the_cause(tmp_path, monkeypatch):
    (tmp_path / 'wrong.png').write_text('no picture')
    with pytest.raises(PictureError, match=r'^image wrong\.png cannot be read: it is no image'):
        web.load_picture(str(tmp_path / 'wrong.png'))
    large = str(save(tmp_path / 'large.png', picture(40, 50)))
    monkeypatch.setattr(web, 'LARGEST_PICTURE', 1999)
    with pytest.raises(PictureError, match=r'large\.png has .* million pixels'):
        web.load_picture(large)
    monkeypatch.undo()
    monkeypatch.setattr(web, 'SIDE', 25)
    assert web.load_picture(large).shape == (20, 25, 3)


def test_a_threshold_needs_no_network(tmp_path):
    models = web.Models({'two': web.Choice(str(two_boxes(tmp_path / 'two.onnx')))})
    session = web.find(models, 'two', str(save(tmp_path / 'a.png', picture(40, 60))))
    assert len(session.found) == 2
    assert len(web.above(session.found, 0.5)) == 1
    assert web.summary(session.found).splitlines()[2:] == ['| cat | 1 |', '| dog | 1 |']
    assert '| nothing | 0 |' in web.summary(web.above(session.found, 0.95))


def test_tables_of_other_tasks(tmp_path):
    scores = np.array([[0.2, 0.7, 0.1]], np.float32)
    classes = np.zeros((1, 1, 8, 8), np.int64)
    classes[..., :2] = 1
    files = {
        'cls': write(tmp_path / 'cls.onnx', CLASSIFYING, output=scores),
        'seg': write(tmp_path / 'seg.onnx', SEGMENTING, output=classes),
    }
    models = web.Models({name: web.Choice(str(path)) for name, path in files.items()})
    image = str(save(tmp_path / 'a.png', picture(8, 8)))
    tables = {name: web.summary(web.find(models, name, image).found) for name in files}
    assert '| dog | 0.700 |' in tables['cls'].splitlines()[2]
    assert '| cat | 75.0% |' in tables['seg'].splitlines()[2]


def test_speed(tmp_path, monkeypatch):
    """An exported file beside another one that stands for PyTorch."""
    image = str(save(tmp_path / 'a.png', picture(40, 60)))
    file = two_boxes(tmp_path / 'two.onnx')
    models = web.Models({'two': web.Choice(str(file))})
    session = web.find(models, 'two', image)
    with pytest.raises(UserError, match='two is an exported file'):
        web.compare(models, session, 0.3)
    monkeypatch.setattr(models, 'export', lambda name: file)
    text = web.compare(models, session, 0.5)
    assert text.count('| 1 dog |') == 2
    assert 'They agree' in text


class Network(torch.nn.Module):
    """As an inferencer's model, without a toolbox."""

    def __init__(self):
        super().__init__()
        self.backbone = hat_mm.FasterViT(arch=classifier()['backbone']['arch'])
        self.extract_feat = self.backbone.forward

    def prepare(self, image):
        inputs = torch.from_numpy(image[16:, 16:].transpose(2, 0, 1)[None] / np.float32(255))
        return Prepared(inputs, None, np.array([[1, 0, -16], [0, 1, -16]], float))


def test_attention_is_traced_once(monkeypatch):
    network, image = Network().eval(), picture(96, 96)
    models = web.Models({'tiny': web.Choice('tiny')})
    infer = SimpleNamespace(model=network, prepare=network.prepare)
    monkeypatch.setattr(hat_mm, 'Inferencer', lambda *_: infer)
    session = web.Session('tiny', SimpleNamespace(image=image), 0.0, place=(40, 50))
    traced, trace = [], web.AttentionMaps.of
    monkeypatch.setattr(web.AttentionMaps, 'of', lambda *args: traced.append(1) or trace(*args))
    first = web.look(models, session, None)
    assert [title for _, title in first][:2] == ['rollout', 'block 0, tokens']
    assert all(one.shape == image.shape for one, _ in first)
    session.place = (60, 50)
    second = web.look(models, session, 'no stage of this model')
    assert len(traced) == 1
    assert not np.array_equal(first[0][0], second[0][0])
    session.place = (2, 2)
    with pytest.raises(UserError, match='no place in the picture that the network sees'):
        web.look(models, session, None)


# --- in a browser ---------------------------------------------------------------------------------

CHROMIUM = '/usr/bin/chromium'
OPTIONS = """
headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking
disable-component-update disable-sync
"""
# Loaded by the page's process before anything else: it reports who asks for other hosts.
GUARD = """
import os, socket, traceback

def guarded(function, where):
    def call(*args, **kwargs):
        address = args[where]
        host = address[0] if isinstance(address, tuple) else address
        local = host is None or str(host).startswith(('127.', '::1', 'localhost', '/'))
        if not local:
            with open(os.environ['WEB_GUARD'], 'a') as file:
                file.write(f'{address}\\n{"".join(traceback.format_stack())}\\n')
            raise OSError(f'no other host is to be reached: {address}')
        return function(*args, **kwargs)
    return call

socket.socket.connect = guarded(socket.socket.connect, 1)
socket.socket.connect_ex = guarded(socket.socket.connect_ex, 1)
socket.getaddrinfo = guarded(socket.getaddrinfo, 0)
"""


def tiny_detector(folder):
    """Config and checkpoint of a RetinaNet with a tiny FasterViT, as the command line has them."""
    cfg = config('retinanet')
    cfg.model.backbone = dict(classifier()['backbone'], out_indices=(2, 3))
    cfg.model.bbox_head.anchor_generator.strides = [16, 32]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(160, 96), keep_ratio=True),
        dict(type='PackDetInputs'),
    ]
    cfg.test_dataloader = dict(
        dataset=dict(pipeline=pipeline, metainfo=dict(classes=['cat', 'dog', 'élan']))
    )
    cfg.dump(folder / 'tiny.py')
    model = spread(hat_mm.get_model(cfg))
    # Scores around a half, which is what a threshold tells apart.
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.1)
    torch.nn.init.zeros_(model.bbox_head.retina_cls.bias)
    torch.save({'state_dict': model.state_dict()}, folder / 'tiny.pth')
    return f'{folder / "tiny.py"}:{folder / "tiny.pth"}'


@contextlib.contextmanager
def serving(folder, *arguments):
    """Starts demo/web.py and gives its address."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    (folder / 'sitecustomize.py').write_text(GUARD)
    path = os.pathsep.join([str(ROOT), str(folder)])
    process = subprocess.Popen(
        [sys.executable, ROOT / 'demo/web.py', '--port', port, *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': path, 'WEB_GUARD': str(folder / 'guard.txt')}
        | {'PYTHONUNBUFFERED': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if f'http://127.0.0.1:{port}' in line:
                break
        else:
            raise AssertionError(''.join(lines))
        # What it prints later must not fill the pipe.
        threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
        yield f'http://127.0.0.1:{port}'
    finally:
        process.terminate()
        process.wait(20)
    assert not (folder / 'guard.txt').exists(), (folder / 'guard.txt').read_text()
    assert 'Traceback' not in ''.join(lines), ''.join(lines)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    """Address of the page with two models."""
    pytest.importorskip('gradio', reason='`make web` installs gradio')
    folder = tmp_path_factory.mktemp('web')
    for name, size in {'wide.png': (96, 160), 'high.png': (160, 96)}.items():
        save(folder / name, picture(*size))
    (folder / 'wrong.png').write_text('no picture')
    with open(folder / 'large.png', 'wb') as file:
        file.truncate(21 * 10**6)
    file = two_boxes(folder / 'two.onnx')
    with serving(folder, '--models', tiny_detector(folder), str(file)) as address:
        yield address, folder


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='`make web` installs playwright')
    if not Path(CHROMIUM).exists():
        pytest.skip(f'there is no {CHROMIUM}')
    with api.sync_playwright() as playwright:
        arguments = [f'--{option}' for option in OPTIONS.split()]
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield one
        one.close()


@pytest.fixture
def visit(site, browser):
    """Opens the page as another visitor; fails on any request that leaves this machine."""
    address, folder = site
    asked, contexts = [], []

    def open_page():
        contexts.append(browser.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(40_000)
        for kind in ('request', 'websocket'):
            page.on(kind, lambda one: asked.append(one.url))
        page.goto(address)
        page.get_by_label('Model').wait_for()
        return page

    yield open_page, folder
    for context in contexts:
        context.close()
    assert asked
    hosts = {urllib.parse.urlsplit(url).hostname for url in asked if not url.startswith('data:')}
    assert hosts - {None} == {'127.0.0.1'}  # blob: has no host


def upload(page, path):
    page.locator('#picture input[type=file]').set_input_files(path)


def choose(page, name):
    page.get_by_label('Model').click()
    page.get_by_role('option', name=name).click()


def source(page, where):
    """Address of a shown picture, which is new whenever its content is."""
    return page.locator(f'{where} img').first.get_attribute('src')


def wait_for_other(page, where, old):
    page.wait_for_function(
        '([where, old]) => {const image = document.querySelector(`${where} img`);'
        ' return image && image.getAttribute("src") !== old && image.naturalWidth}',
        arg=[where, old],
    )


def point(page, x, y):
    """Clicks a pixel of the second tab's picture, which stands in the middle of its element."""
    page.get_by_role('tab', name='Where does it look?').click()
    wait_for_other(page, '#place', '')
    image = page.locator('#place img').first
    margin = image.evaluate(
        'it => [it.clientWidth - it.naturalWidth, it.clientHeight - it.naturalHeight]'
    )
    assert min(margin) >= 0
    image.click(position=dict(x=margin[0] / 2 + x, y=margin[1] / 2 + y))


@pytest.mark.slow
def test_result_slider_and_attention(visit):
    open_page, folder = visit
    page = open_page()
    upload(page, folder / 'wide.png')
    wait_for_other(page, '#result', '')
    counts = page.locator('#counts')
    counts.get_by_text('s for the picture by').wait_for()
    first, seconds = source(page, '#result'), counts.locator('p').inner_text()
    before = counts.locator('table').inner_text()
    page.get_by_label(re.compile('number input for Least score')).fill('0.7')
    page.keyboard.press('Enter')
    wait_for_other(page, '#result', first)
    assert counts.locator('table').inner_text() != before
    assert counts.locator('p').inner_text() == seconds  # the network did not run again
    point(page, 60, 60)
    page.locator('#attention').get_by_text('block 0, tokens').wait_for()
    wait_for_other(page, '#attention', '')
    first = source(page, '#attention')
    point(page, 120, 30)
    wait_for_other(page, '#attention', first)
    first = source(page, '#attention')
    page.get_by_role('radio').nth(1).click()  # another stage
    wait_for_other(page, '#attention', first)


@pytest.mark.slow
def test_messages(visit):
    open_page, folder = visit
    page = open_page()
    upload(page, folder / 'wrong.png')
    page.get_by_text('wrong.png cannot be read: it is no image').wait_for()
    page.get_by_text('Drop Image Here').wait_for()  # it is taken away, and another can follow
    upload(page, folder / 'large.png')
    page.get_by_text(re.compile('exceed.*20.*large.png')).wait_for()
    page.get_by_role('tab', name='Speed').click()
    page.get_by_role('button', name='Compare').click()
    page.get_by_text('choose a picture first').wait_for()
    upload(page, folder / 'wide.png')
    page.get_by_role('tab', name='Find').click()
    choose(page, 'two.onnx')
    page.locator('#counts').get_by_text(re.compile(r'by .*two\.onnx')).wait_for()
    point(page, 40, 40)
    page.get_by_text('an exported file has no modules to look into').wait_for()


@pytest.mark.slow
def test_two_visitors_get_their_own_results(visit):
    open_page, folder = visit
    pages = [open_page(), open_page()]
    choose(pages[1], 'two.onnx')
    for page, name in zip(pages, ('wide.png', 'high.png'), strict=True):
        upload(page, folder / name)
    sizes, texts = [], []
    for page in pages:
        page.locator('#counts').get_by_text('s for the picture by').wait_for()
        wait_for_other(page, '#result', '')
        image = page.locator('#result img').first
        sizes.append(image.evaluate('image => [image.naturalWidth, image.naturalHeight]'))
        texts.append(page.locator('#counts').inner_text())
    assert sizes == [[160, 96], [96, 160]]
    assert ['two.onnx' in text for text in texts] == [False, True]
    # A redrawn result is of the visitor's own picture as well.
    old = source(pages[0], '#result')
    pages[0].get_by_label(re.compile('number input for Least score')).fill('0.7')
    pages[0].keyboard.press('Enter')
    wait_for_other(pages[0], '#result', old)
    image = pages[0].locator('#result img').first
    assert image.evaluate('image => image.naturalWidth') == 160
