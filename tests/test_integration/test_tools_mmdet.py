"""The tools with mmdet: the whole life of a checkpoint, and what must not pass."""

import functools
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

from hat_mm import FasterViT
from hat_mm.engine import cli

ROOT = Path(__file__).resolve().parents[2]
TOY_CONFIG = str(ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py')

RUNS = itertools.count()


pytestmark = pytest.mark.usefixtures('plain_dumps')


@pytest.fixture(scope='module')
def tool(toy_options):
    """Run a tool on the toy config; returns what it returns."""

    def run(function, *argv, options=()):
        # mmengine names loggers by config and second; each run of this process needs its own.
        own_name = f'experiment_name=run{next(RUNS)}'
        argv = [TOY_CONFIG, *map(str, argv), '--cfg-options', *toy_options, own_name, *options]
        return function(argv)

    return run


@pytest.fixture(scope='module')
def trained(tmp_path_factory, tool):
    """Work dir of one epoch of training."""
    folder = tmp_path_factory.mktemp('trained')
    tool(cli.train, '--work-dir', folder)
    return folder


def weights(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_training_leaves_checkpoint_config_and_log(trained):
    assert any(key.startswith('backbone.') for key in weights(trained / 'epoch_1.pth'))
    assert (trained / Path(TOY_CONFIG).name).is_file()
    [log] = trained.glob('*/*.log')
    assert (
        'WARNING - the learning rate is meant for 4 images a step, this run takes 2 '
    ) in log.read_text()


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
    assert {'scores', 'labels', 'masks'} <= set(predictions[0]['pred_instances'])
    assert len(list(tmp_path.glob('*/painted/*.png'))) == 2


@pytest.fixture(scope='module')
def predicted(trained, tool, tmp_path_factory):
    """What the trained detector predicts, and how its backbone computed it."""
    out = tmp_path_factory.mktemp('predicted') / 'out.pkl'
    seen = []
    forward = FasterViT.forward

    @functools.wraps(forward)
    def spy(backbone, x):
        maps = forward(backbone, x)
        weight = backbone.stem.conv1.weight
        layout = weight.is_contiguous(memory_format=torch.channels_last)
        seen.append((layout, all(x.is_contiguous() for x in maps), backbone.deploy))
        return maps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FasterViT, 'forward', spy)
        tool(cli.test, trained / 'epoch_1.pth', '--work-dir', out.parent, '--out', out)
    return pickle.loads(out.read_bytes()), set(seen)


def assert_same(found, expected):
    torch.testing.assert_close(found['scores'], expected['scores'], rtol=0, atol=1e-5)
    torch.testing.assert_close(found['bboxes'], expected['bboxes'], rtol=0, atol=1e-2)
    assert torch.equal(found['labels'], expected['labels'])


def test_a_channels_last_backbone_predicts_what_mmdet_predicts(trained, predicted):
    from mmdet.apis import inference_detector, init_detector

    predictions, seen = predicted
    # RoI operators of mmcv read any memory as if it were contiguous.
    assert seen == {(True, True, False)}
    checkpoint, config = str(trained / 'epoch_1.pth'), str(trained / Path(TOY_CONFIG).name)
    model = init_detector(config, checkpoint, device='cpu', palette='random')
    saved = weights(checkpoint)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    for prediction in predictions:
        expected = inference_detector(model, prediction['img_path']).pred_instances
        assert_same(prediction['pred_instances'], expected)


def test_deploy_predicts_the_same(trained, predicted, tool, shapes, forms, tmp_path):
    predictions, _ = predicted
    # Two steps of training find nothing: metrics are of worth with what is found as the truth.
    truth = json.loads((shapes / 'annotations/val.json').read_text())
    truth['annotations'] = as_annotations(predictions, truth['categories'])
    path, out = tmp_path / 'truth.json', tmp_path / 'out.pkl'
    path.write_text(json.dumps(truth))
    metrics = tool(
        cli.test, trained / 'epoch_1.pth', '--work-dir', tmp_path, '--deploy', '--out', out,
        options=[f'test_evaluator.ann_file={path}'],
    )  # fmt: skip
    assert not forms[0]  # the check of the strides, before
    assert forms[1:] and all(forms[1:])
    assert metrics['coco/bbox_mAP'] > 0.5
    assert metrics['coco/segm_mAP'] > 0.5
    for prediction, expected in zip(pickle.loads(out.read_bytes()), predictions, strict=True):
        assert_same(prediction['pred_instances'], expected['pred_instances'])


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
    metrics = tool(
        cli.test, trained / 'epoch_1.pth', '--work-dir', tmp_path, '--tta',
        options=[
            'test_evaluator.metric=bbox', 'model.roi_head.mask_head=None',
            'model.roi_head.mask_roi_extractor=None',
        ],
    )  # fmt: skip
    assert 'coco/bbox_mAP' in metrics


def test_resume(trained, tool, tmp_path):
    checkpoint = tmp_path / 'epoch_1.pth'
    checkpoint.write_bytes((trained / 'epoch_1.pth').read_bytes())
    (tmp_path / 'last_checkpoint').write_text(str(checkpoint))
    tool(cli.train, '--work-dir', tmp_path, '--resume', options=['train_cfg.max_epochs=2'])
    resumed = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert resumed['meta']['epoch'] == 2
    assert resumed['meta']['iter'] == 4
    losses = resumed['message_hub']['log_scalars']['train/loss']
    assert len(losses.data[0]) == 4  # the history of both runs


# --- what must not pass ---------------------------------------------------------------------------


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refusal(run, capsys):
    """The line that a tool ends with."""
    assert cli.run_tool(run, 'train.py') == 1
    stderr = capsys.readouterr().err
    assert 'Traceback' not in stderr
    [line] = [line for line in stderr.splitlines() if 'train.py: error: ' in line]
    return line


@pytest.mark.parametrize('flag', ['--resume', 'init_cfg'])
def test_malicious_checkpoint_is_refused(flag, tool, tmp_path, capsys):
    target = tmp_path / 'ran'
    path = tmp_path / 'evil.pth'
    torch.save({'state_dict': {}, 'meta': {'epoch': 1, 'iter': 2, 'x': Evil(target)}}, path)
    argv, options = ['--work-dir', tmp_path / 'work'], []
    if flag == '--resume':
        argv += ['--resume', path]
    else:
        options = [
            'model.backbone.init_cfg.type=Pretrained',
            f'model.backbone.init_cfg.checkpoint={path}',
        ]
    line = refusal(lambda: tool(cli.train, *argv, options=options), capsys)
    assert f'{path} was not loaded: it carries code' in line
    assert not target.exists()


def test_code_in_the_config_of_a_checkpoint_is_never_run(trained, tool, tmp_path, capsys):
    target = tmp_path / 'ran'
    content = torch.load(trained / 'epoch_1.pth', weights_only=True)
    content['meta']['config'] = f'import os\nos.mkdir({str(target)!r})\n'
    torch.save(content, tmp_path / 'evil.pth')
    argv = ['--work-dir', tmp_path / 'work', '--resume', tmp_path / 'evil.pth']
    assert 'the config text it carries is code' in refusal(lambda: tool(cli.train, *argv), capsys)
    assert not target.exists()


@pytest.mark.parametrize(
    ('option', 'error', 'part'),
    [
        ('model.backbone.arch=9', ValueError, '9'),
        ('model.backbone.type=FasterViT', KeyError, 'FasterViT is not in the mmdet::model'),
    ],
)  # fmt: skip
def test_wrong_settings_keep_their_traceback(option, error, part, tool, tmp_path):
    with pytest.raises(error, match=part):
        tool(cli.train, '--work-dir', tmp_path, options=[option])


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
