"""The tools with mmdet: the whole life of a checkpoint, and what users get wrong."""

import functools
import importlib
import itertools
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from hat_mm import FasterViT
from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')
IS_ONEDL = hasattr(importlib.import_module('mmengine.runner.checkpoint'), '_safe_torch_load')

RUNS = itertools.count()


pytestmark = pytest.mark.usefixtures('plain_dumps')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, toy_options):
    """Work dir of one epoch of training."""
    folder = tmp_path_factory.mktemp('trained')
    cli.train([TOY_CONFIG, '--work-dir', str(folder), '--cfg-options', *toy_options])
    return folder


@pytest.fixture
def tool(capsys, toy_options):
    """Run a tool on the toy config; returns exit status and what it wrote to stderr."""

    def run(function, *argv, options=()):
        # mmengine names loggers by config and second; each run of this process needs its own.
        own_name = f'experiment_name=run{next(RUNS)}'
        argv = [TOY_CONFIG, *map(str, argv), '--cfg-options', *toy_options, own_name, *options]
        status = cli.run_tool(functools.partial(function, argv), f'{function.__name__}.py')
        return status, capsys.readouterr().err

    return run


def error_line(stderr):
    assert 'Traceback' not in stderr
    [line] = [line for line in stderr.splitlines() if '.py: error: ' in line]
    return line


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_training_leaves_checkpoint_config_and_log(trained):
    assert (trained / 'epoch_1.pth').is_file()
    assert (trained / Path(TOY_CONFIG).name).is_file()
    assert list(trained.glob('*/*.log'))
    assert any(key.startswith('backbone.') for key in weights(trained / 'epoch_1.pth'))


def test_the_log_warns_of_another_batch(trained):
    [log] = trained.glob('*/*.log')
    assert (
        'WARNING - the learning rate is meant for 4 images a step, this run takes 2 '
        '(1 process x 2 images): --auto-scale-lr scales it, '
    ) in log.read_text()


@pytest.mark.parametrize(
    ('changes', 'processes', 'told'),
    [
        ({}, 2, None),
        ({}, 1, 'this run takes 8 (1 process x 8 images)'),
        ({'optim_wrapper.accumulative_counts': 2}, 1, None),
        (
            {'optim_wrapper.accumulative_counts': 3},
            2,
            '48 (2 processes x 8 images x 3 accumulated)',
        ),
        ({'auto_scale_lr.enable': True}, 1, None),
        ({'auto_scale_lr': None}, 1, None),
        ({'train_dataloader': None}, 1, None),  # mmengine says what is missing
        ({'optim_wrapper': None}, 1, 'this run takes 8'),
    ],
)
def test_which_batches_are_warned_of(changes, processes, told):
    cfg = Config(
        dict(
            train_dataloader=dict(batch_size=8),
            optim_wrapper=dict(type='OptimWrapper'),
            auto_scale_lr=dict(enable=False, base_batch_size=16),
        )
    )
    cfg.merge_from_dict(changes)
    warning = cli._batch_warning(cfg, processes)
    assert told in warning if told else warning is None


def test_scaling_beside_accumulation_is_refused(tool, tmp_path):
    """mmengine's scaling would count the images of one forward pass only."""
    status, stderr = tool(
        cli.train, '--work-dir', tmp_path, '--auto-scale-lr',
        options=['optim_wrapper.accumulative_counts=4'],
    )  # fmt: skip
    assert status == 1
    assert 'does not count optim_wrapper.accumulative_counts=4' in error_line(stderr)


def test_test_script_evaluates_dumps_and_paints(trained, toy_options, run_python, tmp_path):
    out = tmp_path / 'predictions' / 'out.pkl'
    done = run_python(
        'tools/test.py', TOY_CONFIG, str(trained / 'epoch_1.pth'), '--work-dir', str(tmp_path),
        '--out', str(out), '--show-dir', 'painted', '--cfg-options', *toy_options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'coco/bbox_mAP' in done.stdout + done.stderr
    predictions = pickle.loads(out.read_bytes())
    assert len(predictions) == 2
    assert set(predictions[0]['pred_instances']) >= {'boxes', 'scores', 'labels', 'masks'} or set(
        predictions[0]['pred_instances']
    ) >= {'bboxes', 'scores', 'labels', 'masks'}
    assert len(list(tmp_path.glob('*/painted/*.png'))) == 2


@pytest.mark.skipif(IS_ONEDL, reason='the onedl forks load their own checkpoints, though unsafely')
def test_test_script_fails_without_the_repairs(trained, toy_options, run_python, tmp_path):
    done = run_python(
        'tools/test.py', TOY_CONFIG, str(trained / 'epoch_1.pth'), '--work-dir', str(tmp_path),
        '--cfg-options', *toy_options, HAT_MM_NO_COMPAT='1',
    )  # fmt: skip
    assert done.returncode != 0
    assert 'torchvision::nms does not exist' in done.stderr or 'Weights only load' in done.stderr


def test_deploy_predicts_the_same(trained, toy_options, shapes, forms, tmp_path):
    truth = json.loads((shapes / 'annotations/val.json').read_text())
    path, out = tmp_path / 'truth.json', tmp_path / 'out.pkl'

    def tested(*flags):
        path.write_text(json.dumps(truth))
        metrics = cli.test(
            [TOY_CONFIG, str(trained / 'epoch_1.pth'), '--work-dir', str(tmp_path), *flags,
             '--out', str(out), '--cfg-options', *toy_options, f'test_evaluator.ann_file={path}',
             f'experiment_name=run{next(RUNS)}']
        )  # fmt: skip
        return metrics, pickle.loads(out.read_bytes())

    # Two steps of training find nothing: metrics are of worth with what is found as the truth.
    _, predictions = tested()
    truth['annotations'] = as_annotations(predictions, truth['categories'])
    metrics, _ = tested()
    assert metrics['coco/bbox_mAP'] > 0.5
    assert metrics['coco/segm_mAP'] > 0.5
    assert forms and not any(forms)

    forms.clear()
    deployed_metrics, deployed = tested('--deploy')
    assert forms and all(forms)
    assert deployed_metrics == pytest.approx(metrics, abs=1e-3)
    for prediction, expected in zip(deployed, predictions, strict=True):
        found, expected = prediction['pred_instances'], expected['pred_instances']
        torch.testing.assert_close(found['scores'], expected['scores'], rtol=0, atol=1e-5)
        torch.testing.assert_close(found['bboxes'], expected['bboxes'], rtol=0, atol=1e-2)
        assert torch.equal(found['labels'], expected['labels'])


def test_a_channels_last_backbone_predicts_the_same(trained, toy_options, tmp_path, monkeypatch):
    from mmdet.apis import inference_detector, init_detector

    layouts, maps = set(), []
    forward = FasterViT.forward

    def spy(backbone, x):
        weight = backbone.stem.conv1.weight
        layouts.add(weight.is_contiguous(memory_format=torch.channels_last))
        results = forward(backbone, x)
        maps.extend(results)
        return results

    monkeypatch.setattr(FasterViT, 'forward', spy)
    checkpoint, out = str(trained / 'epoch_1.pth'), tmp_path / 'out.pkl'
    cli.test(
        [TOY_CONFIG, checkpoint, '--work-dir', str(tmp_path), '--out', str(out),
         '--cfg-options', *toy_options, f'experiment_name=run{next(RUNS)}']
    )  # fmt: skip
    assert layouts == {True}
    # RoI operators of mmcv read any memory as if it were contiguous.
    assert all(x.is_contiguous() for x in maps)

    config = str(trained / Path(TOY_CONFIG).name)
    model = init_detector(config, checkpoint, device='cpu', palette='random')
    for prediction in pickle.loads(out.read_bytes()):
        found = prediction['pred_instances']
        expected = inference_detector(model, prediction['img_path']).pred_instances
        torch.testing.assert_close(found['scores'], expected.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(found['bboxes'], expected.bboxes, rtol=0, atol=1e-2)
        assert torch.equal(found['labels'], expected.labels)
    assert layouts == {True, False}


def as_annotations(predictions, categories):
    """Annotations of COCO that say what a detector has predicted."""
    annotations = []
    for prediction in predictions:
        found = prediction['pred_instances']
        boxes = found['bboxes'].tolist()
        for (x, y, right, bottom), mask, label in zip(
            boxes, found['masks'], found['labels'].tolist(), strict=True
        ):
            counts = mask['counts']
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=prediction['img_id'],
                    category_id=categories[label]['id'],
                    bbox=[x, y, right - x, bottom - y],
                    area=(right - x) * (bottom - y),
                    segmentation=dict(
                        size=mask['size'],
                        counts=counts.decode() if isinstance(counts, bytes) else counts,
                    ),
                    iscrowd=0,
                )
            )
    return annotations


def test_tta(trained, tool, tmp_path):
    status, stderr = tool(
        cli.test, trained / 'epoch_1.pth', '--work-dir', tmp_path, '--tta',
        options=[
            'test_evaluator.metric=bbox', 'model.roi_head.mask_head=None',
            'model.roi_head.mask_roi_extractor=None',
        ],
    )  # fmt: skip
    assert status == 0, stderr


def test_tta_of_masks_says_that_mmdet_has_none(trained, tool, tmp_path):
    status, stderr = tool(cli.test, trained / 'epoch_1.pth', '--work-dir', tmp_path, '--tta')
    assert status == 1
    assert 'TTA of instance segmentation does not support now' in error_line(stderr)


def test_init_detector_loads_the_checkpoint(trained, toy_options, shapes):
    from mmdet.apis import inference_detector, init_detector

    checkpoint = trained / 'epoch_1.pth'
    model = init_detector(
        str(trained / Path(TOY_CONFIG).name), str(checkpoint), device='cpu', palette='random'
    )
    saved = weights(checkpoint)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    image = next((shapes / 'val').iterdir())
    assert len(inference_detector(model, str(image)).pred_instances) <= 5


@pytest.mark.parametrize('named', [True, False])
def test_resume(named, trained, tool, tmp_path):
    work_dir = tmp_path / 'resumed'
    work_dir.mkdir()
    checkpoint = work_dir / 'epoch_1.pth'
    checkpoint.write_bytes((trained / 'epoch_1.pth').read_bytes())
    (work_dir / 'last_checkpoint').write_text(str(checkpoint))
    argument = [str(checkpoint)] if named else []
    status, stderr = tool(
        cli.train, '--work-dir', work_dir, '--resume', *argument,
        options=['train_cfg.max_epochs=2'],
    )  # fmt: skip
    assert status == 0, stderr
    resumed = torch.load(work_dir / 'epoch_2.pth', weights_only=True)
    assert resumed['meta']['epoch'] == 2
    assert resumed['meta']['iter'] == 4
    losses = resumed['message_hub']['log_scalars']['train/loss']
    assert len(losses.data[0]) == 4  # the history of both runs


# --- what users get wrong -------------------------------------------------------------------------


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize('flag', ['test', '--resume', 'load_from', 'init_cfg'])
def test_malicious_checkpoint_is_refused(flag, tool, tmp_path):
    target = tmp_path / 'ran'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'meta': {'epoch': 1, 'iter': 2, 'x': Evil(target)}}, path)
    work_dir = tmp_path / 'work'
    if flag == 'test':
        result = tool(cli.test, path, '--work-dir', work_dir)
    elif flag == '--resume':
        result = tool(cli.train, '--work-dir', work_dir, '--resume', path)
    elif flag == 'load_from':
        result = tool(cli.train, '--work-dir', work_dir, options=[f'load_from={path}'])
    else:
        options = [
            'model.backbone.init_cfg.type=Pretrained',
            f'model.backbone.init_cfg.checkpoint={path}',
        ]
        result = tool(cli.train, '--work-dir', work_dir, options=options)
    status, stderr = result
    assert status == 1
    assert f'{path} was not loaded: it carries code' in error_line(stderr)
    assert not target.exists()


def test_code_in_the_config_of_a_checkpoint_is_never_run(trained, tool, tmp_path):
    target = tmp_path / 'ran'
    content = torch.load(trained / 'epoch_1.pth', weights_only=True)
    content['meta']['config'] = f'import os\nos.mkdir({str(target)!r})\n'
    torch.save(content, tmp_path / 'evil.pth')
    status, stderr = tool(
        cli.train, '--work-dir', tmp_path / 'work', '--resume', tmp_path / 'evil.pth'
    )
    assert status == 1
    assert 'the config text it carries is code' in error_line(stderr)
    assert not target.exists()


def test_no_checkpoint_at_all(tool, tmp_path):
    path = tmp_path / 'text.pth'
    path.write_text('hello')
    status, stderr = tool(cli.test, path, '--work-dir', tmp_path)
    assert status == 1
    assert f'{path} was not loaded: it is no checkpoint' in error_line(stderr)


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (['train_dataloader.dataset.data_root=no/such/'],
         ["data folder 'no/such/' does not exist", 'docs/datasets.md']),
        (['train_dataloader.dataset.ann_file=annotations/none.json'],
         ['CocoDataset: ', 'none.json', 'docs/datasets.md says what belongs into data_root']),
        (['model.backbone.arch=9'], ['hat_mm.FasterViT: ', '9']),
        (['model.backbone.archh=0'], ['hat_mm.FasterViT: ', "unexpected keyword argument 'archh'"]),
        (['model.backbone.type=FasterViT'],
         ['FasterViT is not in the mmdet::model registry', "type='hat_mm.FasterViT'"]),
        (['model.backbone.type=hat_mm.FasterVit'],
         ['hat_mm.FasterVit is not in the ', "type='hat_mm.FasterViT'"]),
        (['model.backbone.out_indices=(0,7)'], ['hat_mm.FasterViT: ', 'out_indices', '7']),
        (['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=no.pth'],
         ['no.pth']),
        (['load_from=no.pth'], ["checkpoint 'no.pth' does not exist"]),
        (['default_hooks.timer.type=NoTimer'], ['NoTimer is not in the ']),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(options, parts, tool, tmp_path):
    status, stderr = tool(cli.train, '--work-dir', tmp_path, options=options)
    assert status == 1
    line = error_line(stderr)
    for part in parts:
        assert part in line


# --- two processes --------------------------------------------------------------------------------


def test_dist_train_over_gloo(toy_options, tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [
            ROOT / 'tools/dist_train.sh', TOY_CONFIG, '2', '--work-dir', tmp_path,
            '--cfg-options', *toy_options, 'train_dataloader.batch_size=1',
            'model.backbone.norm_cfg.type=SyncBN',
        ],
        env={
            **os.environ,
            'PYTHON': sys.executable,
            'PORT': str(port),
            'CUDA_VISIBLE_DEVICES': '',
            'GLOO_SOCKET_IFNAME': 'lo',
            'OMP_NUM_THREADS': '1',
            'MKL_NUM_THREADS': '1',
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)
    assert checkpoint['meta']['iter'] == 2  # four images, two processes
    assert not any(key.startswith('module.') for key in checkpoint['state_dict'])
