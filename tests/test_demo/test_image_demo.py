"""image_demo.py: files, folders, patterns and videos in; pictures and COCO's JSON out."""

import json
import os
from pathlib import Path

import cv2
import image_demo
import numpy as np
import pytest
import torch
from model_files import DETECTING, model_of, picture, write
from pycocotools.coco import COCO

from hat_mm.engine.cli import UserError


@pytest.fixture
def model(tmp_path):
    """A file that finds two boxes in every picture."""
    dets = np.array([[[10, 10, 20, 22, 0.9], [1, 2, 5, 6, 0.4]]], np.float32)
    return write(tmp_path / 'two.onnx', DETECTING, dets=dets, labels=np.array([[1, 0]]))


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


def test_everything_at_once(tmp_path, model, capsys):
    """Good files are done although one is broken, which the exit tells."""
    a = save(tmp_path / 'in/a.png', picture(40, 60))
    save(tmp_path / 'in/below/a.jpg', picture(30, 30))
    other = save(tmp_path / 'other/a.png', picture(32, 32))
    (tmp_path / 'in/broken.jpg').write_text('no picture')
    (tmp_path / 'in/notes.txt').write_text('is not tried')
    (tmp_path / 'in/folder.jpg').mkdir()
    save(tmp_path / 'in/results/vis/old.jpg', picture(8, 8))
    video = cv2.VideoWriter(
        str(tmp_path / 'in/clip.avi'), cv2.VideoWriter.fourcc(*'MJPG'), 10, (64, 48)
    )
    for i in range(3):
        video.write(picture(48, 64) // (i + 1))
    video.release()
    out = tmp_path / 'in/results'
    inputs = [str(tmp_path / 'in'), str(tmp_path / 'o*r')]
    with pytest.raises(UserError, match='1 of 5 files'):
        image_demo.main([*inputs, str(model), '--out-dir', str(out), '--score-thr', '0.5'])
    assert 'broken.jpg' in capsys.readouterr().err
    drawn = {str(path.relative_to(out / 'vis')) for path in (out / 'vis').rglob('*.*')}
    assert drawn - {'old.jpg'} == {'a.jpg', 'a_2.jpg', 'below/a.jpg', 'clip.mp4'}
    assert cv2.imread(str(out / 'vis/a.jpg')).shape == (40, 60, 3)
    clip = cv2.VideoCapture(str(out / 'vis/clip.mp4'))
    assert (clip.get(cv2.CAP_PROP_FRAME_COUNT), clip.get(cv2.CAP_PROP_FPS)) == (3, 10)
    clip.release()
    found = COCO(str(out / 'results.json'))
    assert len(found.imgs) == 3 + 3
    assert [found.cats[i]['name'] for i in sorted(found.cats)] == ['cat', 'dog', 'élan']
    [image] = [one for one in found.imgs.values() if one['file_name'] == str(a)]
    assert (image['width'], image['height']) == (60, 40)
    [one] = found.loadAnns(found.getAnnIds(imgIds=image['id']))
    assert one['bbox'] == [10, 10, 10, 12]
    assert one['score'] == pytest.approx(0.9)
    frames = sorted(one['frame'] for one in found.imgs.values() if 'frame' in one)
    assert frames == [0, 1, 2]
    assert str(other) in {one['file_name'] for one in found.imgs.values()}


def test_threshold_and_tiles(tmp_path, model):
    save(tmp_path / 'a.png', picture(64, 128))
    results = {}
    for name, options in {'all': ['--score-thr', '0.1'], 'tiles': ['--tiles', '64']}.items():
        out = tmp_path / name
        image_demo.main([str(tmp_path / 'a.png'), str(model), '--out-dir', str(out), *options])
        results[name] = json.loads((out / 'results.json').read_text())['annotations']
    assert len(results['all']) == 2
    assert len(results['tiles']) == 2 * 3  # 0.2 of overlap makes three tiles


def test_an_interrupted_run_keeps_its_results(tmp_path, model, monkeypatch):
    for name in 'ab':
        save(tmp_path / f'in/{name}.png', picture(20, 20))
    update = image_demo.ProgressBar.update

    def interrupt(bar, *args):
        update(bar, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(image_demo.ProgressBar, 'update', interrupt)
    with pytest.raises(KeyboardInterrupt):
        image_demo.main([str(tmp_path / 'in'), str(model), '--out-dir', str(tmp_path / 'out')])
    assert len(json.loads((tmp_path / 'out/results.json').read_text())['images']) == 1


def test_a_picture_that_the_model_cannot_take_is_left_out(tmp_path, capsys):
    """So is a video with a name that OpenCV would end the process at."""
    model = model_of('retinanet')
    config, weights = tmp_path / 'config.py', tmp_path / 'weights.pth'
    model.cfg.dump(config)
    torch.save(dict(state_dict=model.state_dict(), meta={}), weights)
    save(tmp_path / 'in/a.png', np.zeros((1, 3000, 3), np.uint8))
    save(tmp_path / 'in/b.png', picture(40, 60))
    name = os.fsencode(tmp_path / 'in') + b'/n\xff.avi'
    Path(os.fsdecode(name)).write_bytes(b'')
    words = [str(tmp_path / 'in'), str(config), str(weights), '--out-dir', str(tmp_path / 'out')]
    with pytest.raises(UserError, match='2 of 3 files'):
        image_demo.main(words)
    error = capsys.readouterr().err
    assert 'a.png: the test pipeline cannot prepare a picture of 3000x1' in error
    assert 'not UTF-8' in error
    assert [path.name for path in (tmp_path / 'out/vis').iterdir()] == ['b.jpg']


def test_words():
    args = image_demo.parse_args(['a.jpg', 'b c.png', 'some-model', 'epoch_1.pth'])
    assert (args.inputs, args.model) == (['a.jpg', 'b c.png'], 'some-model')
    assert args.weights == 'epoch_1.pth'
    assert image_demo.parse_args(['a.jpg', 'model.onnx']).weights is None
    with pytest.raises(SystemExit):
        image_demo.parse_args(['a.jpg', 'epoch_1.pth'])


def test_nothing_to_do(tmp_path, model):
    with pytest.raises(UserError, match='no picture or video'):
        image_demo.main([str(tmp_path / '*.jpg'), str(model), '--out-dir', str(tmp_path)])
