"""The demo: all its steps on a few images, going on after an interruption, and its failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shapes_demo as demo
from mmengine.config import Config
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOYS = ROOT / 'configs/toy'
SMALL = (
    *('--num-train', '4', '--num-val', '2', '--cfg-options', 'train_cfg.max_epochs=1'),
    *('train_cfg.val_interval=10', 'train_dataloader.num_workers=0'),
    *('train_dataloader.persistent_workers=False', 'test_dataloader.num_workers=0'),
    'test_dataloader.persistent_workers=False',
)


def run_demo(folder, *args):
    return subprocess.run(
        [sys.executable, str(ROOT / 'demo/shapes_demo.py'), '--work-dir', 'work', *args],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_from_nothing_to_pictures_and_a_second_run(tmp_path):
    """Of the default, as the tools are tried with all toolboxes elsewhere."""
    options = (*SMALL, 'model.test_cfg.rcnn.max_per_img=5')
    first = run_demo(tmp_path, *options)
    assert first.returncode == 0, first.stderr[-2000:]
    for row in ('box mAP', 'mask mAP', 'minutes', 'peak memory', 'pictures'):
        assert f'\n{row}' in first.stdout
    assert len(list((tmp_path / 'work/pictures').rglob('*.png'))) == 2
    assert 1000 < (tmp_path / 'work/pictures.png').stat().st_size < 300_000
    state = json.loads((tmp_path / 'work/demo.json').read_text())
    assert 0 <= state['metrics']['coco/segm_mAP'] <= 1
    assert 100 < state['memory'] / 2**20 < 10_000
    assert set(state['seconds']) == {'data set', 'training', 'test'}

    second = run_demo(tmp_path, *options)
    assert second.returncode == 0, second.stderr[-2000:]
    assert 'All steps: done before' in second.stdout
    assert '$ python' not in second.stdout
    assert second.stdout.splitlines()[-5:] == first.stdout.splitlines()[-5:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'metric', 'overview'),
    [
        ('cascade-mask-rcnn_fastervit-tiny_fpn_shapes', 'coco/segm_mAP', 'pictures.png'),
        ('mask-rcnn_hat-net-toy_fpn_shapes', 'coco/segm_mAP', 'pictures.png'),
        ('fastervit-tiny_upernet_shapes', 'mIoU', 'pictures.png'),
        ('mask2former_fastervit-tiny_shapes-panoptic', 'panoptic/PQ', 'pictures.png'),
        ('fastervit-tiny_shapes', 'confusion_matrix/result', 'confusion_matrix.png'),
    ],
)
def test_the_other_demos(tmp_path, config, metric, overview):
    done = run_demo(tmp_path, str(TOYS / f'{config}.py'), *SMALL)
    assert done.returncode == 0, done.stderr[-2000:]
    assert metric in json.loads((tmp_path / 'work/demo.json').read_text())['metrics']
    assert (tmp_path / 'work' / overview).is_file()


def test_confusion_matrix(tmp_path):
    cfg = Config(dict(metainfo=dict(classes=('circle', 'square', 'triangle'))))
    metrics = {'confusion_matrix/result': [[5, 0, 1], [0, 6, 0], [2, 0, 4]]}
    demo.paint_confusion(tmp_path, metrics, cfg, tmp_path / 'matrix.png')
    with Image.open(tmp_path / 'matrix.png') as picture:
        assert min(picture.size) > 200


def steps_of(monkeypatch, folder, *options, config='mask-rcnn_fastervit-tiny_fpn_shapes', fail=()):
    """Runs the demo with tools that only leave what the next step needs; returns their names."""
    calls = []

    def run_step(title, command):
        calls.append(f'{title} --resume' if '--resume' in command else title)
        if title in fail:
            raise demo.DemoError(f'{title} failed with status 1')
        if title == 'Training':
            (folder / 'last_checkpoint').write_text('epoch_6.pth')
        if title == 'Test':
            (folder / 'test/now').mkdir(parents=True, exist_ok=True)
            metrics = {'coco/bbox_mAP': 0.5, 'coco/segm_mAP': 0.4, 'mIoU': 50.0}
            (folder / 'test/now/now.json').write_text(json.dumps(metrics))
            (folder / 'pictures').mkdir(exist_ok=True)
            Image.new('RGB', (600, 200), 'red').save(folder / 'pictures/0.png')

    monkeypatch.setattr(demo, 'run_step', run_step)
    args = [str(TOYS / f'{config}.py'), '--work-dir', str(folder), *options]
    return calls if demo.main(args) == 0 else [*calls, 'error']


def test_goes_on_where_it_stopped(monkeypatch, tmp_path):
    assert steps_of(monkeypatch, tmp_path, fail=['Training']) == ['Data set', 'Training', 'error']
    (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')  # training got this far
    assert steps_of(monkeypatch, tmp_path, fail=['Test']) == [
        *('Data set', 'Training --resume', 'Test', 'error'),
    ]
    assert steps_of(monkeypatch, tmp_path) == ['Data set', 'Test']
    assert steps_of(monkeypatch, tmp_path) == []


def test_another_config_starts_anew(monkeypatch, tmp_path, capsys):
    everything = ['Data set', 'Training', 'Test']
    assert steps_of(monkeypatch, tmp_path) == everything
    assert steps_of(monkeypatch, tmp_path, '--cfg-options', 'train_cfg.max_epochs=2') == everything
    segmentor = 'fastervit-tiny_upernet_shapes'
    assert steps_of(monkeypatch, tmp_path, config=segmentor) == everything
    assert '\nmIoU         0.500\n' in capsys.readouterr().out
    assert steps_of(monkeypatch, tmp_path, '--num-train', '300', config=segmentor) == everything


def test_a_failing_step_is_an_error_with_its_name():
    with pytest.raises(demo.DemoError, match='Training failed with status 3'):
        demo.run_step('Training', ['-c', 'raise SystemExit(3)'])


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert demo.main(['configs/toy/none.py', '--work-dir', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('shapes_demo.py: error: there is no config configs/toy/none.py; ')
    assert error.count('\n') == 1
    assert demo.main(['--work-dir', str(tmp_path / 'file/work')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('shapes_demo.py: error: ')
    assert error.count('\n') == 1
