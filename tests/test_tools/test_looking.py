"""The tools that look into models and trainings: attention, CAM, features, curves, browsers."""

import json
import subprocess
import sys
from pathlib import Path

import analyze_logs  # noqa: F401  can be imported
import attention_map
import cam
import cv2
import feature_map
import numpy as np
import pr_curve
import pytest
import torch
from model_files import model_of, picture

import hat_mm
from hat_mm.engine import cli
from hat_mm.engine.cli import UserError
from hat_mm.engine.overlays import overlay, stride_of, to_cells, to_picture
from hat_mm.engine.toolbox_tools import run_toolbox_tool

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py'


# --- maps on pictures -----------------------------------------------------------------------------


def test_a_map_lies_on_the_picture_where_its_cells_are():
    """A picture of 100x60, twice as large for the network, cells of 16 pixels."""
    matrix = np.array([[2.0, 0, 0], [0, 2.0, 0]])
    values = np.zeros((8, 13), np.float32)
    values[3, 5] = 1
    spread = to_picture(values, matrix=matrix, stride=16, size=(60, 100))
    rows, cols = np.nonzero(spread)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (24, 31, 40, 47)
    assert to_cells(np.array([[44.0, 28.0]]), matrix=matrix, stride=16).tolist() == [[5.5, 3.5]]


def test_stride_of_thin_maps():
    assert stride_of((192, 9), (12, 1)) == 16
    assert stride_of((9, 192), (1, 6)) == 32
    assert stride_of((100, 100), (25, 25)) == 4


def test_what_the_network_does_not_see_has_no_value():
    matrix = np.array([[1.0, 0, -20], [0, 1.0, 0]])  # a crop that starts at x = 20
    spread = to_picture(np.ones((4, 4)), matrix=matrix, stride=8, size=(32, 64))
    assert spread[:, 20:52].all()
    assert not spread[:, :20].any()
    assert not spread[:, 52:].any()


def test_overlay_is_brightest_where_values_are_high():
    image = np.full((10, 20, 3), 100, np.uint8)
    values = np.zeros((10, 20))
    values[:, 10:] = 2
    drawn = overlay(image, values).astype(int).sum(2)
    assert drawn[:, 10:].min() > drawn[:, :10].max()


# --- the tools on small models --------------------------------------------------------------------

SWIN_HAT = dict(embed_dims=16, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 4), window_size=4)


def small_model(kind):
    """The classifier has a FasterViT."""
    backbone = dict(type='hat_mm.SwinHAT', arch=SWIN_HAT, out_indices=(0, 1))
    return model_of(kind, None if kind == 'classifier' else backbone)


@pytest.fixture
def saved(tmp_path):
    """Words for config and checkpoint of a tiny model, and a picture."""

    def save(kind):
        model = small_model(kind)
        config, weights = tmp_path / f'{kind}.py', tmp_path / f'{kind}.pth'
        model.cfg.dump(config)
        torch.save(dict(state_dict=model.state_dict(), meta={}), weights)
        image = tmp_path / 'a.png'
        cv2.imwrite(str(image), picture(120, 200))
        return [str(image), str(config), str(weights), '--out-dir', str(tmp_path / 'out')]

    return save


@pytest.mark.parametrize('kind', ['mask_rcnn', 'classifier'])
def test_attention_map(saved, tmp_path, kind):
    attention_map.main([*saved(kind), '--box', '80', '40', '120', '80'])
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    stages = (0, 1) if kind == 'mask_rcnn' else (2, 3)
    assert names == {f'a_backbone.stages.{i}.png' for i in stages}
    assert all(cv2.imread(str(tmp_path / 'out' / name)).std() > 10 for name in names)


def test_attention_map_says_what_is_wrong(saved):
    words = saved('classifier')
    with pytest.raises(UserError, match=r"no stage head; there are \['backbone"):
        attention_map.main([*words, '--point', '100', '60', '--stages', 'head'])
    with pytest.raises(UserError, match='no place in the picture'):  # its pipeline crops
        attention_map.main([*words, '--point', '1', '60'])
    with pytest.raises(UserError, match='X1 <= X2'):
        attention_map.main([*words, '--box', '120', '40', '80', '80'])
    with pytest.raises(UserError, match='X1 <= X2'):
        attention_map.main([*words, '--point', 'nan', '60'])


@pytest.mark.parametrize('kind', ['mask_rcnn', 'retinanet', 'upernet', 'classifier'])
def test_cam(saved, tmp_path, kind):
    cam.main([*saved(kind), '--score-thr', '0.02'])
    drawn = cv2.imread(str(tmp_path / 'out/a_layercam.png'))
    assert drawn.shape == (120, 200, 3)
    assert drawn.std() > 5


def test_cam_depends_on_the_class_and_leaves_no_hooks():
    infer = hat_mm.Inferencer(model_of('classifier'))
    image = picture(96, 96)
    one, other = (
        cam.cam(infer, image, label=label, layers=['backbone.stages.3'], method='gradcam')
        for label in (0, 1)
    )
    assert one.shape == (96, 96)
    assert not np.allclose(one, other)
    assert not any(m._forward_hooks for m in infer.model.backbone.stages)


def test_cam_says_what_is_wrong(saved):
    words = saved('retinanet')
    with pytest.raises(UserError, match='a lower --score-thr'):
        cam.main([*words, '--score-thr', '1'])
    with pytest.raises(UserError, match=r"none of .*'c0'"):
        cam.main([*words, '--category', 'zebra'])
    with pytest.raises(UserError, match=r"no module 'backbone\.stage'; did you mean backbone"):
        cam.main([*words, '--layers', 'backbone.stage'])
    with pytest.raises(UserError, match=r'backbone returns no map \(1, C, H, W\) but tuple'):
        cam.main([*words, '--layers', 'backbone'])
    with pytest.raises(UserError, match=r'returns no map .* but'):
        cam.main([*words, '--layers', 'backbone.stages.0.blocks.0.attn'])


def test_cam_leaves_gradients_and_mode_alone():
    infer = hat_mm.Inferencer(small_model('mask_rcnn'))
    infer.model.train()
    parameter = next(infer.model.parameters())
    parameter.grad = torch.ones_like(parameter)
    cam.cam(infer, picture(96, 96), threshold=0.02)
    assert infer.model.training
    assert parameter.grad.eq(1).all()
    assert sum(p.grad is not None for p in infer.model.parameters()) == 1
    with pytest.raises(UserError, match='there is no class 99'):
        cam.cam(infer, picture(96, 96), label=99)


@pytest.mark.parametrize('kind', ['mask_rcnn', 'classifier'])
def test_feature_map(saved, tmp_path, kind):
    words = saved(kind)
    feature_map.main([*words, '--layers', 'backbone.stages.1', '--channel-reduction', 'none'])
    feature_map.main(words)
    names = {path.name for path in (tmp_path / 'out').iterdir()}
    last = 1 if kind == 'mask_rcnn' else 3
    assert names >= {'a_backbone.stages.1.png', f'a_backbone.stages.{last}.png'}
    with pytest.raises(UserError, match='returns no map'):
        feature_map.main([*words, '--layers', 'backbone'])


@pytest.mark.parametrize('kind', ['mask_rcnn', 'upernet', 'classifier'])
def test_the_network_s_image_is_the_picture(kind):
    infer = hat_mm.Inferencer(model_of(kind))
    image = np.zeros((96, 160, 3), np.uint8)
    image[..., 2] = 200  # red
    inputs, *_ = infer.prepare(image)
    seen = feature_map.seen_by_network(infer.model, inputs)
    assert seen[40, 50].tolist() == pytest.approx([200, 0, 0], abs=1)


# --- trainings and tests --------------------------------------------------------------------------


def test_pr_curve(tmp_path, capsys):
    box = [10.0, 10.0, 20.0, 20.0]
    coco = dict(
        images=[dict(id=0, file_name='a.png', height=100, width=100)],
        categories=[dict(id=3, name='thing')],
        annotations=[
            dict(id=1, image_id=0, category_id=3, bbox=box, area=400, iscrowd=0),
        ],
    )
    (tmp_path / 'truth.json').write_text(json.dumps(coco))
    found = [dict(image_id=0, category_id=3, bbox=box, score=0.9)]
    (tmp_path / 'found.json').write_text(json.dumps(found))
    words = [str(tmp_path / name) for name in ('truth.json', 'found.json')]
    pr_curve.main([*words, '--out', str(tmp_path / 'out/curve.png')])
    assert 'AP 1.000, AP50 1.000' in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / 'out/curve.png')) is not None
    with pytest.raises(UserError, match='no list of detections'):
        pr_curve.main([words[0], words[0]])


@pytest.mark.parametrize(
    'config',
    [TOY.name, 'fastervit-tiny_upernet_shapes.py', 'fastervit-tiny_shapes.py'],
)
@pytest.mark.parametrize('tool', ['confusion_matrix.py', 'browse_dataset.py'])
def test_each_toolbox_has_the_tool(monkeypatch, capsys, config, tool):
    monkeypatch.setattr(sys, 'argv', [tool, str(TOY.with_name(config)), '--help'])
    with pytest.raises(SystemExit) as ended:
        run_toolbox_tool(tool)
    assert ended.value.code == 0
    assert '--cfg-options' in capsys.readouterr().out


def test_toolbox_tools_say_what_is_wrong(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['confusion_matrix.py'])
    with pytest.raises(UserError, match='CONFIG --help'):
        run_toolbox_tool('confusion_matrix.py')
    monkeypatch.setattr(sys, 'argv', ['nothing.py', str(TOY)])
    with pytest.raises(UserError, match='mmdet has no tool nothing'):
        run_toolbox_tool('nothing.py')


def test_browse_dataset(tmp_path, toy_options):
    program = [sys.executable, ROOT / 'tools/analysis_tools/browse_dataset.py', TOY]
    options = [option for option in toy_options if option.startswith('train_dataloader')]
    subprocess.run(
        [*program, '--not-show', '--output-dir', tmp_path, '--cfg-options', *options],
        check=True,
        cwd=ROOT,
    )
    assert len(list(tmp_path.glob('*.png'))) == 4


@pytest.mark.usefixtures('plain_dumps')
def test_tensorboard(tmp_path, toy_options):
    """The option of the docs writes files that TensorBoard reads, and curves of the losses."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    option = 'visualizer.vis_backends.0.type=TensorboardVisBackend'
    assert option in (ROOT / 'docs/looking.md').read_text()
    options = [*toy_options, option, 'default_hooks.logger.interval=1']
    cli.train([str(TOY), '--work-dir', str(tmp_path), '--cfg-options', *options])
    [file] = tmp_path.glob('*/vis_data/events.out.tfevents.*')
    events = accumulator.EventAccumulator(str(file.parent)).Reload()
    losses = events.Scalars('loss')
    assert [event.step for event in losses] == [1, 2]
    assert all(event.value > 0 for event in losses)


# --- on trained models ----------------------------------------------------------------------------


@pytest.mark.slow
def test_cam_lies_on_the_objects():
    """Of the demo's detector, where boxes cover less than a quarter of the picture."""
    work_dir = ROOT / 'work_dirs/cam-test'
    program = [sys.executable, ROOT / 'demo/shapes_demo.py', '--work-dir', work_dir]
    subprocess.run(program, check=True, cwd=ROOT)  # finished steps are skipped
    infer = hat_mm.Inferencer(TOY, (work_dir / 'last_checkpoint').read_text().strip())
    coco = json.loads((ROOT / 'data/shapes/annotations/val.json').read_text())
    ratios = []
    for image in coco['images']:
        inside = np.zeros((image['height'], image['width']), bool)
        for one in coco['annotations']:
            if one['image_id'] == image['id']:
                x, y, w, h = map(round, one['bbox'])
                inside[y : y + h, x : x + w] = True
        if inside.mean() < 0.25:
            values = cam.cam(infer, cv2.imread(str(ROOT / 'data/shapes/val' / image['file_name'])))
            ratios.append(values[inside].sum() / values.sum() / inside.mean())
    assert len(ratios) >= 10
    assert np.median(ratios) > 2
    assert np.mean(ratios) > 2
