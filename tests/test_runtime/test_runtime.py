"""The runtime gives what the toolboxes give, from picture to result."""

import importlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope
from model_files import CLASSIFYING, DETECTING, META, SEGMENTING, picture, write
from test_deployment.tiny_models import config

import hat_mm
import hat_mm_runtime
from hat_mm_runtime import Model, ModelError, PictureError, images
from hat_mm_runtime.__main__ import main
from hat_mm_runtime.results import encode

ROOT = Path(__file__).resolve().parents[2]


def boxes_in(height, width, number=6):
    rng = np.random.default_rng(0)
    corners = rng.uniform(-5, [width, height], (number, 2))
    sides = rng.uniform(2, [width, height], (number, 2))
    scores = np.sort(rng.uniform(0.1, 1, number))[::-1]
    return np.float32(np.c_[corners, corners + sides, scores])[None]


# --- what the network is given --------------------------------------------------------------------

RESIZINGS = [
    ('mmdet', dict(type='Resize', scale=(133, 80), keep_ratio=True), 0),
    ('mmseg', dict(type='Resize', scale=(204, 51), keep_ratio=True), 0),
    ('mmdet', dict(type='Resize', scale=(90, 60), keep_ratio=False), 0),
    ('mmdet', dict(type='Resize', scale_factor=0.7, keep_ratio=True), 0),
    ('mmpretrain', dict(type='Resize', scale=48), 0),
    ('mmpretrain', dict(type='Resize', scale=(48, 40), interpolation='bicubic'), 0),
    ('mmpretrain', dict(type='ResizeEdge', scale=37, edge='short'), 0),
    ('mmpretrain', dict(type='ResizeEdge', scale=91, edge='long'), 0),
    ('mmpretrain', dict(type='ResizeEdge', scale=64, edge='width'), 0),
    (
        'mmpretrain',
        dict(type='ResizeEdge', scale=37, edge='short', backend='pillow', interpolation='bicubic'),
        3,
    ),
    ('mmpretrain', dict(type='Resize', scale=70, backend='pillow', interpolation='bilinear'), 3),
    ('mmdet', dict(type='ResizeShortestEdge', scale=40, max_size=90), 0),
    ('mmpretrain', dict(type='CenterCrop', crop_size=33), 0),
    ('mmpretrain', dict(type='CenterCrop', crop_size=(20, 40)), 0),
]


@pytest.mark.parametrize(('scope', 'step', 'tolerance'), RESIZINGS)
@settings(max_examples=10, deadline=None)
@given(height=st.integers(20, 150), width=st.integers(20, 150))
def test_resizing_is_the_toolboxes(scope, step, tolerance, height, width):
    transforms = __import__(f'{scope}.datasets').registry.TRANSFORMS
    with DefaultScope.overwrite_default_scope(scope):
        expected = transforms.build(step)(dict(img=picture(height, width)))['img']
    meta = dict(META, task='classification', mean=[0] * 3, std=[1] * 3, bgr_to_rgb=False)
    meta['resize'] = json.loads(json.dumps([step]))
    batch, size = images.prepare(picture(height, width), meta)
    assert batch.shape[2:] == size == expected.shape[:2]
    difference = np.abs(batch[0].transpose(1, 2, 0) - expected.astype(np.float32))
    assert difference.max() <= tolerance
    assert difference.mean() <= 0.1 * tolerance


@pytest.mark.parametrize('divisor', [1, 32])
def test_normalization_and_padding_are_the_toolboxes(divisor):
    preprocessor = __import__('mmdet.models').models.DetDataPreprocessor(
        mean=META['mean'], std=META['std'], bgr_to_rgb=True, pad_size_divisor=divisor
    )
    image = picture(70, 95)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    expected = preprocessor(dict(inputs=[tensor]))['inputs'].numpy()
    batch, size = images.prepare(image, dict(DETECTING, pad_size_divisor=divisor))
    assert size == (70, 95)
    assert batch.dtype == np.float32
    np.testing.assert_allclose(batch, expected, atol=1e-5)


@pytest.mark.parametrize(('height', 'width', 'fitted'), [(60, 80, (48, 64)), (99, 33, (64, 21))])
def test_a_file_of_one_size_gets_it(height, width, fitted):
    for meta in (DETECTING, SEGMENTING, dict(META, task='features')):
        meta = dict(meta, static=[64, 64])
        batch, size = images.prepare(picture(height, width), meta)
        assert batch.shape == (1, 3, 64, 64)
        assert size == fitted
        assert not batch[..., fitted[0] :, :].any()
    crop = dict(CLASSIFYING, static=[30, 30], resize=[dict(type='CenterCrop', crop_size=30)])
    _, size = images.prepare(picture(height, width), crop)
    assert size == (30, 30)
    batch, _ = images.prepare(picture(height, width), dict(crop, resize=[]))
    assert batch.shape == (1, 3, 30, 30)
    with pytest.raises(ModelError, match=r'takes 40x30 .* its test pipeline gives 30x30'):
        images.prepare(picture(height, width), dict(crop, static=[40, 30]))


def test_pictures_that_are_too_thin():
    with pytest.raises(PictureError, match='a picture of 2x400 would have 0x50 pixels'):
        step = dict(type='Resize', scale=[50, 50], keep_ratio=True)
        images.prepare(picture(400, 2), dict(META, task='detection', resize=[step]))
    with pytest.raises(PictureError, match='a picture of 1x9000 would have 256x2304000 pixels'):
        step = dict(type='ResizeEdge', scale=256, backend='pillow', interpolation='bicubic')
        images.prepare(picture(9000, 1), dict(CLASSIFYING, resize=[step]))


def test_pictures_that_the_system_does_not_give(files, capsys, monkeypatch):
    def fail(*args):
        raise PermissionError(13, 'Permission denied')

    with monkeypatch.context() as patch:
        patch.setattr(np, 'fromfile', fail)
        assert main([str(files / name) for name in ('model.onnx', 'a.png', 'b.png')]) == 1
    error = capsys.readouterr().err
    assert error.count('cannot be read: [Errno 13] Permission denied') == 2
    large = bytearray((files / 'a.png').read_bytes())
    large[16:24] = (60000).to_bytes(4) * 2  # width and height in a PNG's header
    (files / 'large.png').write_bytes(large)
    with pytest.raises(PictureError, match=r"large\.png' cannot be read"):
        images.read(files / 'large.png')


def test_names_that_are_no_unicode(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b'a\xff.png')
    Path(os.fsdecode(path)).write_bytes(cv2.imencode('.png', picture(20, 30))[1].tobytes())
    np.testing.assert_array_equal(images.read(os.fsdecode(path)), picture(20, 30))


def test_unknown_transforms():
    for step in (dict(type='Rot90'), dict(type='Resize', scale=[9, 9], interpolation='hamming')):
        with pytest.raises(ModelError, match=r'asks for .*(Rot90|hamming).*cannot do'):
            images.prepare(picture(9, 9), dict(META, task='detection', resize=[step]))


# --- what is made of its outputs ------------------------------------------------------------------


def by_toolbox(kind, path, image, size):
    """What tools/test.py makes of the file."""
    cfg = config(kind)
    scale = (size[1] / image.shape[1], size[0] / image.shape[0])
    structures = __import__(f'{cfg.default_scope}.structures').structures
    structure = dict(mmdet='DetDataSample', mmseg='SegDataSample')[cfg.default_scope]
    sample = getattr(structures, structure)(
        metainfo=dict(ori_shape=image.shape[:2], img_shape=size, scale_factor=scale)
    )
    resized = torch.from_numpy(cv2.resize(image, size[::-1]).transpose(2, 0, 1).copy())
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = hat_mm.ExportedModel(cfg.model, str(path))
    [result] = model.test_step(dict(inputs=[resized], data_samples=[sample]))
    return result


@pytest.mark.parametrize('pasted', [False, True])
def test_detections(tmp_path, pasted):
    image, size = picture(90, 135), (64, 96)
    rng = np.random.default_rng(1)
    masks = rng.random((1, 6, 28, 28), np.float32)
    if pasted:
        masks = rng.random((1, 6, 64, 96)) > 0.5
    dets, labels = boxes_in(*size), np.int64([[0, 1, 2, 0, 7, 1]])
    meta = dict(DETECTING, resize=[dict(type='Resize', scale=[96, 64], keep_ratio=True)])
    path = write(tmp_path / 'a.onnx', meta, dets=dets, labels=labels, masks=masks)
    found = Model(path)(image)
    expected = by_toolbox('mask_rcnn', path, image, size).pred_instances
    np.testing.assert_allclose(found.boxes, expected.bboxes.numpy(), atol=1e-4)
    np.testing.assert_array_equal(found.scores, expected.scores.numpy())
    np.testing.assert_array_equal(found.labels, expected.labels.numpy())
    assert found.masks.any(axis=(1, 2)).all()
    assert (found.masks == expected.masks.numpy()).mean() > 0.999
    assert found.names == ['cat', 'dog', 'élan', 'cat', 'class 7', 'dog']
    assert str(found) == '2 cat, 2 dog, 1 élan, 1 class 7'
    best = Model(path)(image, score_thr=float(found.scores[2]))
    assert len(best) == 3
    np.testing.assert_array_equal(best.masks, found.masks[:3])


@pytest.mark.parametrize('scores', [True, False])
@pytest.mark.parametrize('channels', [5, 1])
def test_segmentation(tmp_path, scores, channels):
    image, size = picture(90, 135), (64, 64)
    rng = np.random.default_rng(1)
    coarse = rng.standard_normal((8, 8, channels), np.float32)
    output = cv2.resize(coarse, size).reshape(*size, channels).transpose(2, 0, 1)[None].copy()
    if not scores:
        output = output.argmax(1)[:, None] if channels > 1 else np.int64(output > 0.2)
    threshold = 0.3 if channels == 1 else None
    step = dict(type='Resize', scale=[64, 64], keep_ratio=False)
    meta = dict(SEGMENTING, out_channels=channels, threshold=threshold, resize=[step])
    path = write(tmp_path / 'a.onnx', meta, output=output)
    found = Model(path)(image)
    # As mmseg does it.
    planes = torch.from_numpy(output)
    if not scores:
        planes = torch.nn.functional.one_hot(planes[:, 0]).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(planes, image.shape[:2], mode='bilinear')[0]
    expected = resized.argmax(0) if len(resized) > 1 else (resized.sigmoid()[0] > 0.3)
    assert found.map.shape == (90, 135)
    assert len(np.unique(found.map)) > 1
    assert (found.map == expected.numpy()).mean() > 0.999


def test_classification(tmp_path):
    path = write(tmp_path / 'a.onnx', CLASSIFYING, output=np.float32([[0.1, 0.7, 0.2]]))
    found = Model(path)(picture(40, 50))
    assert found.label == 1
    assert str(found) == 'dog 0.70'
    assert [item['name'] for item in found.to_json()] == ['dog', 'élan', 'cat']


def test_drawing(tmp_path):
    dets = np.float32([[[10, 20, 30, 50, 0.9]]])
    masks = np.zeros((1, 1, 28, 28), np.float32)
    masks[..., :14] = 1
    labels = np.int64([[1]])
    path = write(tmp_path / 'a.onnx', DETECTING, dets=dets, labels=labels, masks=masks)
    image = np.full((90, 135, 3), 100, np.uint8)
    before = image.copy()
    drawn = Model(path)(image).draw()
    assert (image == before).all()
    assert drawn[50, 25].tolist() == drawn[35, 10].tolist() == [0, 255, 0]  # the box
    assert drawn[35, 15].tolist() == [50, 177, 50]  # half the mask
    assert drawn[35, 25].tolist() == [100, 100, 100]  # the other half
    assert (drawn[52:] == 100).all()
    classes = np.zeros((1, 1, 90, 135), np.int64)
    classes[..., 60:] = 2
    drawn = Model(write(tmp_path / 'b.onnx', SEGMENTING, output=classes))(image).draw()
    assert drawn[0, 0].tolist() == [50, 50, 177]
    assert drawn[0, 134].tolist() == [177, 50, 50]
    label = write(tmp_path / 'c.onnx', CLASSIFYING, output=np.float32([[1, 0, 0]]))
    assert (Model(label)(image).draw() != image).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30))
def test_masks_as_coco_has_them(seed):
    from pycocotools import mask as coco

    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 12, 2)) > rng.choice([0, 0.5, 1])
    rle = json.loads(json.dumps(encode(mask)))
    np.testing.assert_array_equal(coco.decode(coco.frPyObjects(rle, *mask.shape)), mask)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    outputs = dict(dets=boxes_in(90, 135), labels=np.int64([[0, 1, 2, 0, 1, 1]]))
    write(tmp_path / 'model.onnx', DETECTING, **outputs)
    cv2.imwrite(str(tmp_path / 'a.png'), picture(90, 135))
    cv2.imwrite(str(tmp_path / 'b.png'), picture(50, 60))
    return tmp_path


def test_command(files, capsys):
    arguments = [str(files / name) for name in ('model.onnx', 'a.png', 'b.png')]
    assert main([*arguments, '--out', str(files / 'out'), '--score-thr', '0']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(' (')[0] for line in lines] == [
        f'{files / name}: 2 cat, 3 dog, 1 élan' for name in ('a.png', 'b.png')
    ]
    assert cv2.imread(str(files / 'out' / 'a_result.png')).shape == (90, 135, 3)
    assert cv2.imread(str(files / 'out' / 'b_result.png')).shape == (50, 60, 3)
    assert main([*arguments, '--json', '--score-thr', '0.5']) == 0
    first, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    found = Model(files / 'model.onnx')(files / 'a.png', 0.5)
    assert [item['score'] for item in first['results']] == found.scores.tolist()
    x1, y1, x2, y2 = found.boxes[0]
    assert first['results'][0]['bbox'] == pytest.approx([x1, y1, x2 - x1, y2 - y1])


def test_pictures_that_cannot_be_read_are_left_out(files, capsys):
    (files / 'c.png').write_bytes(b'no picture')
    (files / 'd.png').touch()
    names = ('model.onnx', 'no.png', 'c.png', 'd.png', '.', 'a.png')
    assert main([str(files / name) for name in names]) == 1
    out, error = capsys.readouterr()
    assert out.startswith(f'{files / "a.png"}: ')
    assert "no.png' does not exist" in error
    assert "c.png' cannot be read: it is no image, or is damaged" in error
    assert "d.png' cannot be read: it is no image, or is damaged" in error
    assert "' is a folder" in error


def test_no_picture_is_replaced(files, capsys):
    (files / 'more').mkdir()
    cv2.imwrite(str(files / 'more' / 'a.jpg'), picture(50, 60))
    cv2.imwrite(str(files / 'a_result.png'), picture(20, 30))
    before = {path: path.read_bytes() for path in files.glob('*.*')}
    model, one, other = (str(files / name) for name in ('model.onnx', 'a.png', 'more/a.jpg'))
    assert main([model, one, str(files / 'a_result.png'), '--out', str(files)]) == 1
    assert 'a.png would replace the picture' in capsys.readouterr().err
    assert main([model, one, other, '--out', str(files / 'out')]) == 1
    assert 'would have the same name, a_result.png' in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.glob('*.*')} == before


def test_models_that_cannot_be_run(files, capsys):
    assert main([str(files / 'no.onnx'), str(files / 'a.png')]) == 1
    assert "no.onnx' does not exist" in capsys.readouterr().err
    with pytest.raises(ModelError, match=r'must end with one of \.onnx, \.xml'):
        Model(files / 'a.png')
    write(files / 'backbone.onnx', dict(META, task='features'), stage0=np.zeros(1, np.float32))
    with pytest.raises(ModelError, match='is a backbone'):
        Model(files / 'backbone.onnx')(files / 'a.png')
    assert main([str(files / name) for name in ('backbone.onnx', 'a.png', 'b.png')]) == 1
    assert capsys.readouterr().err.count('is a backbone') == 1
    for threads in ('0', '-1', 'x'):
        with pytest.raises(SystemExit):
            main([str(files / 'model.onnx'), str(files / 'a.png'), f'--threads={threads}'])
        assert 'is not a positive integer' in capsys.readouterr().err
    model = onnx.load(files / 'model.onnx')
    del model.metadata_props[:]
    onnx.save(model, files / 'other.onnx')
    with pytest.raises(ModelError, match=r'was not written by hat_mm\.export'):
        Model(files / 'other.onnx')
    write(files / 'older.onnx', dict(task='detection'), dets=boxes_in(9, 9))
    with pytest.raises(ModelError, match='was written by another version of hat_mm'):
        Model(files / 'older.onnx')
    for suffix in ('.onnx', '.xml'):
        (files / f'broken{suffix}').write_bytes(b'no model')
        with pytest.raises(ModelError, match='cannot be opened'):
            Model(files / f'broken{suffix}')


def test_arrays_that_are_no_picture(files):
    model = Model(files / 'model.onnx')
    for wrong in (np.zeros((9, 9)), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)):
        with pytest.raises(ValueError, match=r'must be \(H, W, 3\) of uint8, got \('):
            model(wrong)


# --- where nothing else is installed --------------------------------------------------------------


def test_without_torch(files, tmp_path):
    """In an environment with NumPy, OpenCV, onnxruntime, OpenVINO and nothing else."""
    core = openvino.Core()
    model = core.read_model(files / 'model.onnx')
    model.set_rt_info(json.dumps(DETECTING), [hat_mm_runtime.META])
    openvino.save_model(model, files / 'model.xml', compress_to_fp16=False)
    venv.create(tmp_path / 'venv', symlinks=True)
    [packages] = (tmp_path / 'venv').glob('lib/*/site-packages')
    for module in ('numpy', 'cv2', 'onnxruntime', 'openvino'):
        source = Path(importlib.import_module(module).__file__).parent
        for folder in (source, source.with_name(f'{module}.libs')):
            if folder.exists():
                (packages / folder.name).symlink_to(folder)
    (packages / 'hat_mm_runtime').symlink_to(ROOT / 'hat_mm_runtime')
    python = tmp_path / 'venv' / 'bin' / 'python'
    unwanted = ('PYTHONPATH', 'ORT_DISABLE_TELEMETRY', 'XDG_CACHE_HOME')
    environment = {key: value for key, value in os.environ.items() if key not in unwanted}
    environment['HOME'] = str(tmp_path / 'home')
    (tmp_path / 'home').mkdir()

    def run(*arguments):
        return subprocess.run(
            [python, *arguments],
            capture_output=True,
            text=True,
            cwd=files,
            env=environment,
            timeout=300,
        )

    for module in ('torch', 'mmengine', 'mmcv', 'hat_mm'):
        assert f"No module named '{module}'" in run('-c', f'import {module}').stderr
    expected = [
        dict(image=name, results=Model(files / 'model.onnx')(files / name, 0.3).to_json())
        for name in ('a.png', 'b.png')
    ]
    for name in ('model.onnx', 'model.xml'):
        done = run('-m', 'hat_mm_runtime', name, 'a.png', 'b.png', '--json', '--out', 'out')
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert found == json.loads(json.dumps(expected))
    assert list((tmp_path / 'home').iterdir()) == []  # where onnxruntime keeps what it reports
    (packages / 'onnxruntime').unlink()
    done = run('-m', 'hat_mm_runtime', 'model.onnx', 'a.png')
    assert done.returncode == 1
    assert done.stderr == "error: No module named 'onnxruntime'\n"


def test_imports_nothing_of_hat_mm():
    code = 'import sys, hat_mm_runtime; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    loaded = {name.partition('.')[0] for name in done.stdout.split()}
    assert not loaded & {'torch', 'mmengine', 'mmcv', 'hat_mm', 'onnxruntime', 'openvino'}
