"""Exported files give what the models give, in onnxruntime and OpenVINO, at any size."""

import copy
import json
import logging
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from export import main
from mmengine.registry import DefaultScope
from test_deployment.tiny_models import KINDS, config, spread

import hat_mm
from hat_mm.engine import cli
from hat_mm.engine import export as exporter
from hat_mm.engine.build import build_model
from hat_mm.engine.cli import UserError
from hat_mm.engine.comparison import Difference, compare
from hat_mm.engine.graphs import inference_graph
from hat_mm_runtime import Model, ModelError

# Whole exports of these take too long for `make test`; their graphs are tested without.
SLOW = ('cascade_rcnn', 'dino', 'retinanet')


def of_kinds(*names):
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        'kind', [pytest.param(name, marks=slow) if name in SLOW else name for name in names]
    )


def build(kind):
    logging.getLogger('mmengine').setLevel(logging.ERROR)
    torch.manual_seed(0)
    return spread(build_model(config(kind)))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """Kind to model and file, each made once. Whether the results are equal is checked there."""
    made = {}

    def get(kind):
        if kind not in made:
            model = build(kind)
            path = tmp_path_factory.mktemp(kind) / 'model.onnx'
            made[kind] = model, hat_mm.export(model, None, path, scores=kind == 'semantic_fpn')
        return made[kind]

    return get


def images(batch, height, width):
    torch.manual_seed(height + width)
    return torch.randn(batch, 3, height, width)


@of_kinds(*KINDS)
def test_any_size_in_both_engines(exported, kind):
    model, path = exported(kind)
    file = Model(path)
    names = file.names
    compiled = openvino.Core().compile_model(path, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for size in [(64, 96), (97, 211), (320, 256)]:
        x = images(1, *size)
        done = compare(file.run(x.numpy()), model, x, file.meta)
        assert done.small, f'onnxruntime, {size}: {done.text}'
        outputs = dict(zip(names, compiled([x.numpy()]).values(), strict=True))
        done = compare(outputs, model, x, file.meta)
        assert done.small, f'OpenVINO, {size}: {done.text}'


@of_kinds(*KINDS)
def test_names_and_operators(exported, kind):
    _, path = exported(kind)
    file = onnx.load(path)
    assert {item.domain for item in file.opset_import} == {''}
    names = [output.name for output in file.graph.output]
    wanted = {'mask_rcnn': ['dets', 'labels', 'masks']}
    usual = ['dets', 'labels'] if KINDS[kind][0] == 'mmdet' else ['output']
    assert names == wanted.get(kind, usual)
    assert [value.name for value in file.graph.input] == ['input']
    assert str(hat_mm.__path__[0]).encode() not in path.read_bytes()


@of_kinds('upernet', 'semantic_fpn', 'classifier')
def test_any_number_of_images(exported, kind):
    _, path = exported(kind)
    file = Model(path)
    x = images(3, 64, 96).numpy()
    [together] = file.run(x).values()
    apart = np.concatenate([file.run(image[None])['output'] for image in x])
    np.testing.assert_allclose(together, apart, atol=1e-5)


@of_kinds('mask_rcnn', 'dino', 'semantic_fpn', 'upernet', 'classifier')
def test_tested_with_a_config(exported, kind):
    """The same predictions in the size of the original image, for a batch that is padded."""
    model, path = exported(kind)
    cfg = config(kind)
    samples = []
    for ori_shape, size in [((90, 135), (64, 96)), ((100, 100), (64, 64))]:
        scale = (size[1] / ori_shape[1], size[0] / ori_shape[0])
        samples.append(dict(ori_shape=ori_shape, img_shape=size, scale_factor=scale))
    if KINDS[kind][0] != 'mmdet':
        samples = [dict(item, img_shape=(64, 64)) for item in samples]
    structure = {
        'mmdet': lambda: __import__('mmdet.structures').structures.DetDataSample,
        'mmseg': lambda: __import__('mmseg.structures').structures.SegDataSample,
        'mmpretrain': lambda: __import__('mmpretrain.structures').structures.DataSample,
    }[cfg.default_scope]()
    data = dict(
        inputs=[torch.randint(256, (3, *item['img_shape']), dtype=torch.uint8) for item in samples],
        data_samples=[structure(metainfo=item) for item in samples],
    )
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        tested = hat_mm.ExportedModel(cfg.model, str(path))
    found = tested.test_step(copy.deepcopy(data))
    for i, result in enumerate(found):
        # Alone, because a batch pads images to the largest one.
        one = {name: [value[i]] for name, value in data.items()}
        [expected] = model.test_step(copy.deepcopy(one))
        if cfg.default_scope == 'mmdet':
            a, b = result.pred_instances, expected.pred_instances
            assert len(a) == len(b) > 0
            torch.testing.assert_close(a.bboxes, b.bboxes, atol=1e-2, rtol=0)
            assert torch.equal(a.labels, b.labels)
            if 'masks' in b:
                assert (a.masks == b.masks).float().mean() > 0.999
        elif cfg.default_scope == 'mmseg':
            a, b = result.pred_sem_seg.data, expected.pred_sem_seg.data
            assert a.shape == b.shape == (1, *samples[i]['ori_shape'])
            assert (a == b).float().mean() > (0.999 if kind == 'semantic_fpn' else 0.9)
        else:
            torch.testing.assert_close(result.pred_score, expected.pred_score)
            assert torch.equal(result.pred_label, expected.pred_label)


@of_kinds('mask_rcnn', 'dino', 'upernet', 'classifier')
@torch.no_grad()
def test_run_without_pytorch(exported, kind):
    """The runtime finds in a picture what the model's own test step finds."""
    model, path = exported(kind)
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (9, 13, 3), np.uint8), (224, 160))
    found = Model(path)(image)
    scope = KINDS[kind][0]
    structure = dict(mmdet='DetDataSample', mmseg='SegDataSample', mmpretrain='DataSample')[scope]
    sample = getattr(__import__(f'{scope}.structures').structures, structure)(
        metainfo=dict(ori_shape=(160, 224), img_shape=(160, 224), scale_factor=(1.0, 1.0))
    )
    if scope == 'mmseg':
        model.data_preprocessor.size = (160, 224)
    tensor = torch.from_numpy(image.transpose(2, 0, 1).copy())
    [expected] = model.test_step(dict(inputs=[tensor], data_samples=[sample]))
    if scope == 'mmdet':
        expected = expected.pred_instances
        assert len(found) == len(expected) > 0
        np.testing.assert_allclose(found.boxes, expected.bboxes.numpy(), atol=1e-2)
        np.testing.assert_array_equal(found.labels, expected.labels.numpy())
        if 'masks' in expected:
            assert (found.masks == expected.masks.numpy()).mean() > 0.999
    elif scope == 'mmseg':
        assert (found.map == expected.pred_sem_seg.data[0].numpy()).mean() > 0.99
    else:
        np.testing.assert_allclose(found.scores, expected.pred_score.numpy(), atol=1e-5)


def test_the_comparison_sees_what_is_wrong(exported):
    model, path = exported('mask_rcnn')
    file = Model(path)
    x = images(1, 128, 160)
    right = file.run(x.numpy())

    def accepts(**changed):
        return compare({**right, **changed}, model, x, file.meta).small

    assert accepts()
    assert not accepts(masks=right['masks'] * 0)
    twice = {name: np.concatenate([output, output], 1) for name, output in right.items()}
    assert not accepts(**twice)
    assert not accepts(dets=right['dets'] + np.float32([1, 0, 1, 0, 0]))
    assert not accepts(dets=right['dets'] - np.float32([0, 0, 0, 0, 0.01]))
    assert not accepts(labels=1 - right['labels'])


def test_an_image_without_objects(exported, tmp_path):
    model, path = exported('mask_rcnn')
    meta = Model(path).meta
    file = onnx.load(path)
    for tensor in file.graph.initializer:
        if tensor.name.endswith('fc_cls.bias'):
            bias = np.array([0, 0, 0, 100], np.float32)  # nothing but background
            tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
            break
    else:
        raise AssertionError('the graph has no bias of classes')
    onnx.save(file, tmp_path / 'nothing.onnx')
    x = images(1, 64, 96).numpy()
    by_onnx = list(Model(tmp_path / 'nothing.onnx').run(x).values())
    by_openvino = openvino.Core().compile_model(tmp_path / 'nothing.onnx', 'CPU')([x]).values()
    found = dict(zip(('dets', 'labels', 'masks'), by_onnx, strict=True))
    assert not compare(found, model, images(1, 64, 96), meta).small
    for outputs in (by_onnx, list(by_openvino)):
        assert [output.shape for output in outputs] == [(1, 0, 5), (1, 0), (1, 0, 28, 28)]


def test_openvino_file_in_half_precision(tmp_path):
    model = build('semantic_fpn')
    path = hat_mm.export(model, None, tmp_path / 'model.xml', precision='fp16', static=(64, 96))
    assert sorted(file.name for file in tmp_path.iterdir()) == ['model.bin', 'model.xml']
    weights = sum(tensor.numel() for tensor in model.state_dict().values())
    assert path.with_suffix('.bin').stat().st_size < 3 * weights
    file = Model(path)
    assert file.meta['precision'] == 'fp16'
    x = images(1, 64, 96)
    assert compare(file.run(x.numpy()), model, x, file.meta).small


def test_onnx_file_in_half_precision_and_of_one_size(tmp_path):
    model = build('semantic_fpn')
    path = hat_mm.export(model, None, tmp_path / 'model.onnx', precision='fp16', static=(64, 96))
    file = Model(path)
    x = images(1, 64, 96)
    assert compare(file.run(x.numpy()), model, x, file.meta).small
    kinds = [tensor.data_type for tensor in onnx.load(path).graph.initializer]
    assert onnx.TensorProto.FLOAT16 in kinds
    with pytest.raises(ModelError, match=r'one image of 64x96 .* got 1 of 96x64'):
        file.run(images(1, 96, 64).numpy())


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporter, 'compare', lambda *args: Difference('a lot', False))
    (tmp_path / 'model.onnx').write_text('the one before')
    with pytest.raises(UserError, match='differs from PyTorch in 1 of 1'):
        hat_mm.export(build('semantic_fpn'), None, tmp_path / 'model.onnx', static=(64, 64))
    assert [file.name for file in tmp_path.iterdir()] == ['model.onnx']
    assert (tmp_path / 'model.onnx').read_text() == 'the one before'
    assert '64x64: a lot' in capsys.readouterr().out


@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_graphs_predict_what_the_models_predict(kind):
    """All kinds, without the time that an export takes."""
    model = build(kind)
    graph = inference_graph(copy.deepcopy(model))
    meta = dict(precision='fp32', task=graph.task, **graph.settings())
    x = images(1, 96, 128)
    outputs = {
        name: output.numpy() for name, output in zip(graph.output_names, graph(x), strict=True)
    }
    assert compare(outputs, model, x, meta).small


@torch.no_grad()
def test_boxes_that_are_too_small():
    model = build('retinanet')
    model.test_cfg.min_bbox_size = 30
    dets, _ = inference_graph(copy.deepcopy(model))(images(1, 96, 128))
    sides = dets[0, :, 2:4] - dets[0, :, :2]
    assert len(sides) > 0
    assert sides.min() > 30


def test_what_the_file_carries(exported):
    _, path = exported('mask_rcnn')
    meta = Model(path).meta
    assert meta['task'] == 'detection'
    assert meta['mean'] == pytest.approx([123.675, 116.28, 103.53])
    assert meta['bgr_to_rgb'] is True
    assert meta['pad_size_divisor'] == 32
    assert meta['test_cfg']['rcnn']['score_thr'] == 0.2
    assert meta['versions']['hat_mm'] == hat_mm.__version__


def test_what_a_config_says_of_data():
    cfg = config('retinanet')
    cfg.test_dataloader = dict(
        dataset=dict(
            type='CocoDataset',
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            ],
        )
    )
    meta = exporter._describe(build_model(cfg), cfg, dict(dataset_meta=dict(CLASSES=('a', 'b'))))
    assert meta['classes'] == ['a', 'b']
    assert len(meta['palette']) == 80
    assert meta['resize'] == [dict(type='Resize', scale=[1333, 800], keep_ratio=True)]
    json.dumps(meta)


@pytest.mark.slow
def test_small_images_of_dino(exported):
    _, path = exported('dino')
    with pytest.raises(ModelError, match=r'failed on an image of 8x8 .* DINO needs 40 places'):
        Model(path).run(images(1, 8, 8).numpy())


CONFIG = 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['no.py', '{ckpt}', 'a.onnx'], "config file 'no.py' does not exist"),
        ([CONFIG, 'no.pth', 'a.onnx'], "checkpoint 'no.pth' does not exist"),
        ([CONFIG, '{ckpt}', 'a.onnx'], 'does not fit the model: it lacks .* backbone'),
        ([CONFIG, '{ckpt}', 'a.trt'], "'a.trt' must end with one of .onnx, .xml"),
        ([CONFIG, '{ckpt}', 'no/a.onnx'], 'would be in a folder that does not exist'),
        ([CONFIG, '{ckpt}', 'a.onnx', '--opset', '11'], 'opset=11 must be at least 20'),
        ([CONFIG, '{ckpt}', 'a.onnx', '--images', 'x.jpg'], "'x.jpg' does not exist"),
        ([CONFIG, '{ckpt}', 'a.onnx', '--images', '{ckpt}'], 'it is no image, or is damaged'),
        (['FasterViT', '{ckpt}', 'a.onnx'], "'FasterViT' is neither a config"),
    ],
)
def test_bad_command_lines(tmp_path, monkeypatch, arguments, message):
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'small.pth')
    arguments = [text.replace('{ckpt}', str(tmp_path / 'small.pth')) for text in arguments]
    arguments[2] = str(tmp_path / arguments[2]) if '.onnx' in arguments[2] else arguments[2]
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert [file.name for file in tmp_path.iterdir()] == ['small.pth']


def test_deploy_is_for_checkpoints(tmp_path):
    path = tmp_path / 'model.onnx'
    path.touch()
    with pytest.raises(UserError, match='--deploy is for checkpoints'):
        cli.test([CONFIG, str(path), '--deploy', '--work-dir', str(tmp_path)])


def test_unsupported_models(tmp_path):
    cfg = config('retinanet')
    cfg.model.bbox_head.type = 'ATSSHead'
    cfg.model.bbox_head.norm_cfg = None
    with pytest.raises(UserError, match='ATSSHead cannot be exported; instead of it: RetinaHead'):
        hat_mm.export(build_model(cfg), None, tmp_path / 'a.onnx')
    cfg = config('retinanet')
    cfg.model.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(UserError, match=r'nms=.*soft_nms.* cannot be exported'):
        hat_mm.export(build_model(cfg), None, tmp_path / 'a.onnx')
    with pytest.raises(UserError, match='Linear cannot be exported; what can: ImageClassifier'):
        hat_mm.export(torch.nn.Linear(1, 1), None, tmp_path / 'a.onnx')
    with pytest.raises(UserError, match='scores is for segmentors, the model is ImageClassifier'):
        hat_mm.export(build('classifier'), None, tmp_path / 'a.onnx', scores=True)
    with pytest.raises(UserError, match='paste_masks is for detectors with masks'):
        hat_mm.export(build('retinanet'), None, tmp_path / 'a.onnx', paste_masks=True)


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnxscript', None)
    with pytest.raises(ImportError, match=r"pip install 'hat_mm\[deploy\]'"):
        hat_mm.export(SimpleNamespace(), None, tmp_path / 'a.onnx')
