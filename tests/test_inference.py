"""Inferencer: pictures in, results out, for all tasks, beside what the toolboxes give."""

import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, Compose, LoadImageFromFile
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from model_files import CLASSIFYING, DETECTING, PIPELINES, model_of, picture, write

import hat_mm
from hat_mm.engine.cli import UserError
from hat_mm.inference import PanopticSegmentation
from hat_mm_runtime import Classification, Detections, ModelError, PictureError, Segmentation

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet'])
def test_detections_are_the_toolbox_s(kind):
    model, image = model_of(kind), picture(120, 200)
    loaded = [dict(type='mmdet.LoadImageFromNDArray'), *PIPELINES['mmdet'][1:]]
    found = hat_mm.Inferencer(model)(image, score_thr=0.0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        apis = importlib.import_module('mmdet.apis')
        pipeline = Compose(loaded)
        expected = apis.inference_detector(model, image, pipeline).pred_instances
    assert isinstance(found, Detections)
    assert len(found) == len(expected) > 3
    assert np.array_equal(found.boxes, expected.bboxes.numpy())
    assert np.array_equal(found.scores, expected.scores.numpy())
    assert found.names[0] == f'c{int(expected.labels[0])}'
    assert (found.masks is not None) == (kind == 'mask_rcnn')
    middle = float(np.median(found.scores))
    fewer = hat_mm.Inferencer(model)(image, score_thr=middle)
    assert len(fewer) == (found.scores >= middle).sum() < len(found)
    assert found.draw().shape == image.shape


def test_segmentation_has_the_picture_s_size():
    model, image = model_of('upernet'), picture(90, 150)
    found = hat_mm.Inferencer(model)(image)
    assert isinstance(found, Segmentation)
    assert found.map.shape == (90, 150)
    assert 'c' in str(found)


def test_classification_sums_to_one():
    found = hat_mm.Inferencer(model_of('classifier'))(picture(90, 150))
    assert isinstance(found, Classification)
    assert found.scores.sum() == pytest.approx(1, abs=1e-5)
    assert found.name(found.label).startswith('c')


def test_loading_to_float32_is_kept():
    """CenterNet's next step asks for it; a config may name its steps by classes, too."""
    model = model_of('retinanet')
    pipeline = model.cfg.test_dataloader.dataset.pipeline
    pipeline[0] = ConfigDict(type=LoadImageFromFile, to_float32=True)
    seen = []

    class Record(BaseTransform):
        def transform(self, results):
            seen.append(results['img'].dtype)
            return results

    pipeline.insert(1, ConfigDict(type=Record))
    hat_mm.Inferencer(model)(picture(64, 64))
    assert seen == [np.float32]


def test_panoptic(monkeypatch):
    infer = hat_mm.Inferencer(model_of('mask_rcnn'))
    image = picture(4, 6)
    # Two objects of class 1, background of class 2, and 3 for no segment.
    numbers = torch.tensor([[1, 1, 1001, 1001, 2, 3]]).repeat(4, 1)[None]
    sample = DetDataSample(pred_panoptic_seg=PixelData(sem_seg=numbers))
    monkeypatch.setattr(infer, 'run', lambda image: sample)
    found = infer(image)
    assert isinstance(found, PanopticSegmentation)
    assert list(found.labels) == [1, 2, 1]
    assert found.map[0].tolist() == [0, 0, 2, 2, 1, -1]
    assert str(found) == '2 c1, 1 c2'
    assert [one['category_id'] for one in found.to_json()] == [1, 2, 1]
    assert found.draw().shape == image.shape


def test_tiles_find_the_same_object_everywhere(tmp_path):
    """A file that finds one box in every tile: the boxes lie where the tiles do."""
    box = np.array([[[10, 10, 20, 22, 0.9]]], np.float32)
    path = write(tmp_path / 'a.onnx', DETECTING, dets=box, labels=np.array([[1]]))
    image = picture(64, 128)
    whole = hat_mm.Inferencer(path)(image)
    assert whole.boxes.tolist() == [[10, 10, 20, 22]]
    tiles = hat_mm.Inferencer(path, tile=64, overlap=0.0)(image)
    assert sorted(tiles.boxes.tolist()) == [[10, 10, 20, 22], [74, 10, 84, 22]]
    assert tiles.names == ['dog', 'dog']


def test_tiles_keep_masks():
    found = hat_mm.Inferencer(model_of('mask_rcnn'), tile=64)(picture(100, 100), score_thr=0.1)
    assert found.masks is not None
    assert found.masks.shape == (len(found), 100, 100)
    for mask, (x1, y1, x2, y2) in zip(found.masks, found.boxes, strict=True):
        rows, cols = np.nonzero(mask)
        assert rows.min() >= y1 - 2 and cols.min() >= x1 - 2
        assert rows.max() <= y2 + 2 and cols.max() <= x2 + 2


@pytest.mark.parametrize('tile', [None, 64])
def test_nothing_found_has_masks_of_no_objects(tile):
    infer = hat_mm.Inferencer(model_of('mask_rcnn'), tile=tile)
    assert infer(picture(96, 128), score_thr=1.0).masks.shape == (0, 96, 128)


@pytest.mark.parametrize('kind', ['mask_rcnn', 'upernet', 'classifier'])
def test_prepare_says_where_the_picture_is(kind):
    """A bright spot lies in the network's image where the matrix puts it."""
    infer = hat_mm.Inferencer(model_of(kind))
    image = np.zeros((120, 200, 3), np.uint8)
    cv2.circle(image, (90, 70), 6, (255, 255, 255), -1)
    inputs, _, matrix = infer.prepare(image)
    brightness = inputs[0].sum(0) - inputs[0].sum(0).min()
    rows, cols = np.nonzero((brightness > brightness.max() / 2).numpy())
    assert matrix @ (90.5, 70.5, 1) == pytest.approx([cols.mean() + 0.5, rows.mean() + 0.5], abs=1)


# --- errors ---------------------------------------------------------------------------------------


def test_errors(tmp_path):
    model = model_of('upernet')
    with pytest.raises(UserError, match='tiles are for detectors'):
        hat_mm.Inferencer(model, tile=512)
    with pytest.raises(UserError, match='32 pixels or more'):
        hat_mm.Inferencer(model_of('retinanet'), tile=16)
    with pytest.raises(ModelError, match='does not exist'):
        hat_mm.Inferencer('nowhere.onnx')
    path = write(tmp_path / 'a.onnx', CLASSIFYING, output=np.ones((1, 3), np.float32))
    with pytest.raises(UserError, match='runs on the CPU'):
        hat_mm.Inferencer(path, device='cuda')
    with pytest.raises(UserError, match='no modules to look into'):
        hat_mm.Inferencer(path).prepare(picture(8, 8))
    infer = hat_mm.Inferencer(model)
    with pytest.raises(PictureError, match='uint8'):
        infer(np.zeros((8, 8, 3)))
    with pytest.raises(PictureError, match='does not exist'):
        infer('nowhere.jpg')
    with pytest.raises(UserError, match='names no weights'):
        hat_mm.Inferencer(ROOT / 'configs/toy/fastervit-tiny_shapes.py')
    with pytest.raises(UserError, match='did you mean'):
        hat_mm.Inferencer('mask-rcnn_fastervit-0')
    with pytest.raises(UserError, match="device 'gpu' cannot be used"):
        hat_mm.Inferencer(ROOT / 'configs/toy/fastervit-tiny_shapes.py', device='gpu')
    with pytest.raises(UserError, match='must come from get_model'):
        hat_mm.Inferencer(model, 'nowhere.pth')
    model.cfg.pop('test_dataloader')
    with pytest.raises(UserError, match='no test_dataloader'):
        hat_mm.Inferencer(model)


@pytest.mark.parametrize('kind', ['retinanet', 'upernet'])
def test_a_picture_that_is_too_thin(kind):
    with pytest.raises(PictureError, match='picture of 3000x1'):
        hat_mm.Inferencer(model_of(kind))(np.zeros((1, 3000, 3), np.uint8))


@pytest.mark.parametrize('kind', ['mask_rcnn', 'upernet', 'classifier'])
def test_nothing_of_the_model_changes(kind):
    """Nor does it matter in which mode the model is, or that its dataset is wrapped."""
    model = model_of(kind)
    dataset = model.cfg.test_dataloader.dataset
    model.cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=dataset)
    dataset.pipeline[0].type = 'hat_mm.LoadImageOrSkip'
    text, state = model.cfg.pretty_text, {k: v.clone() for k, v in model.state_dict().items()}
    first = hat_mm.Inferencer(model)(picture(90, 150))
    model.train()
    second = hat_mm.Inferencer(model)(picture(90, 150))
    assert first.to_json() == second.to_json()
    assert model.training
    assert model.cfg.pretty_text == text
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
