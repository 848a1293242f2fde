"""The tools that measure backbones: tables with figures in them, one-line errors."""

import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from repo_tools import tool

ROOT = Path(__file__).resolve().parents[1]
TOYS = {
    'FasterViT': ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py',
    'HATNet': ROOT / 'configs/toy/mask-rcnn_hat-net-toy_fpn_shapes.py',
}


def table(text):
    """Cells of the Markdown table in ``text``, without its head."""
    rows = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_times_in_turns(run_python):
    done = run_python(
        *(
            'tools/benchmark.py',
            'hat_mm.HATNet:arch=tiny,out_indices=(3,)',
            'mmdet.ResNet:depth=18',
        ),
        *('--size', '33', '65', '--size', '32', '32', '--rounds', '2'),
    )
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row[0] for row in rows] == ['33×65', '33×65', '32×32', '32×32']
    assert rows[0][1] == '`hat_mm.HATNet:arch=tiny,out_indices=(3,)`'
    for ours, peer in (rows[:2], rows[2:]):
        assert peer[4] == '1.00'
        assert float(ours[4]) == pytest.approx(float(ours[2]) / float(peer[2]), rel=0.2)
    assert f'torch {torch.__version__}' in done.stdout


def test_memory_grows_with_the_image(run_python):
    done = run_python(
        *('tools/benchmark.py', 'hat_mm.HATNet', '--memory'),
        *('--size', '256', '256', '--size', '512', '512'),
    )
    assert done.returncode == 0, done.stderr
    small, large = (float(row[3]) for row in table(done.stdout))
    # The hidden map of an inverted residual in stage 0 alone: 384 channels in float32.
    assert large >= 128 * 128 * 384 * 4 / 2**20
    assert 2 < large / small < 8


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('HATNet', "'HATNet' has no scope; write for example hat_mm.HATNet"),
        ('hat_mm.HATNet:arch', "'arch' in 'hat_mm.HATNet:arch' is not KEY=VALUE"),
        ('hat_mm.HATNet:arch=tny', "unknown arch 'tny'"),
        ('hat_mm.Hatnet', 'hat_mm.Hatnet is not in the'),
        ('hat_mm.HATNet:in_channels=1', 'takes no image of 3 channels: HATNet takes images'),
    ],
)
def test_bad_backbones_are_one_line(run_python, argument, message):
    done = run_python('tools/benchmark.py', argument)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr


def test_arguments_may_hold_commas_in_nested_brackets():
    text = "depth=50,plugins=[{'cfg': {'type': 'A'}, 'stages': (False, True)}],arch=tiny"
    split = tool('benchmark').split_arguments(text)
    assert split == ['depth=50', text[len('depth=50,') : -len(',arch=tiny')], 'arch=tiny']


@pytest.mark.parametrize('family', TOYS)
def test_padding_effect(family, run_python, shapes, tmp_path):
    register_all_modules()
    model = MODELS.build(Config.fromfile(str(TOYS[family])).model)
    model.init_weights()
    checkpoint = tmp_path / 'start.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    done = run_python(
        *('tools/padding_effect.py', str(TOYS[family]), str(checkpoint)),
        *('--images', '2', '--pad', '0.1', '1'),
        *('--cfg-options', f'test_dataloader.dataset.data_root={shapes}/'),
    )
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row[0] for row in rows] == ['10%', '100%']
    little, much = ([float(cell.rstrip('%')) for cell in row[1:]] for row in rows)
    assert all(change > 0 for change in much)
    # HAT-Net's norms see the zeros wherever they are; FasterViT's windows only where they meet.
    assert (much[0] > 1.5 * little[0]) is (family == 'HATNet')


def test_padding_effect_of_no_detector_is_one_line(run_python, tmp_path):
    config = tmp_path / 'none.py'
    config.write_text('model = dict()\n')
    done = run_python('tools/padding_effect.py', str(config), 'none.pth')
    assert done.returncode == 1
    assert re.search('has no model.backbone', done.stderr.splitlines()[-1])
