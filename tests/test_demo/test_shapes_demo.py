"""The demo: all its steps on a few images, going on after an interruption, and its failures."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import shapes_demo as demo
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOYS = ROOT / 'configs/toy'
SMALL = (
    *('--num-train', '4', '--num-val', '2', '--cfg-options', 'train_cfg.max_epochs=1'),
    'train_cfg.val_interval=10',
)
SMALL_RCNN = (*SMALL, 'model.test_cfg.rcnn.max_per_img=5')


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


def check_first_run(tmp_path, done, rows, best, overview):
    """What a first run has printed and left; ``best`` has the greatest value of each metric."""
    assert done.returncode == 0, done.stderr[-2000:]
    for row in (*rows, 'minutes', 'peak memory', 'pictures'):
        assert f'\n{row}' in done.stdout
    assert len(list((tmp_path / 'work/pictures').rglob('*.png'))) == 2
    assert 1000 < (tmp_path / 'work' / overview).stat().st_size < 300_000
    state = json.loads((tmp_path / 'work/demo.json').read_text())
    for name, greatest in best.items():
        assert 0 <= state['metrics'][name] <= greatest
    assert state['memory'] > 100 * 2**20
    return state


def test_from_nothing_to_pictures_and_a_second_run(tmp_path):
    first = run_demo(tmp_path, *SMALL_RCNN)
    best = {'coco/bbox_mAP': 1, 'coco/segm_mAP': 1}
    check_first_run(tmp_path, first, ['box mAP', 'mask mAP'], best, 'pictures.png')
    assert (tmp_path / 'data/shapes/val/000001.png').is_file()

    checkpoint = tmp_path / 'work/epoch_1.pth'
    written = checkpoint.stat().st_mtime_ns
    second = run_demo(tmp_path, *SMALL_RCNN)
    assert second.returncode == 0, second.stderr[-2000:]
    assert 'Training: done before' in second.stdout
    assert 'Test: done before' in second.stdout
    assert checkpoint.stat().st_mtime_ns == written
    assert second.stdout.splitlines()[-5:] == first.stdout.splitlines()[-5:]


def test_cascade(tmp_path):
    config = TOYS / 'cascade-mask-rcnn_fastervit-tiny_fpn_shapes.py'
    done = run_demo(tmp_path, str(config), *SMALL_RCNN)
    best = {'coco/bbox_mAP': 1, 'coco/segm_mAP': 1}
    check_first_run(tmp_path, done, ['box mAP', 'mask mAP'], best, 'pictures.png')


def test_segmentation(tmp_path):
    done = run_demo(tmp_path, str(TOYS / 'fastervit-tiny_upernet_shapes.py'), *SMALL)
    state = check_first_run(tmp_path, done, ['mIoU'], {'mIoU': 100}, 'pictures.png')
    assert f'\nmIoU         {state["metrics"]["mIoU"] / 100:.3f}\n' in done.stdout
    assert (tmp_path / 'data/shapes-semantic/annotations/validation/000001.png').is_file()


def test_classification(tmp_path):
    done = run_demo(tmp_path, str(TOYS / 'fastervit-tiny_shapes.py'), *SMALL)
    best = {'accuracy/top1': 100}
    state = check_first_run(tmp_path, done, ['top-1'], best, 'confusion_matrix.png')
    matrix = state['metrics']['confusion_matrix/result']
    assert [sum(row) for row in matrix] == [1, 1, 0]  # a circle and a square
    right = sum(matrix[i][i] for i in range(3))
    assert state['metrics']['accuracy/top1'] == 50 * right
    assert (tmp_path / 'data/shapes-classes/val/square/000001.png').is_file()


def test_a_foreign_data_folder_stops_it(tmp_path):
    (tmp_path / 'data/shapes').mkdir(parents=True)
    (tmp_path / 'data/shapes/mine').touch()
    done = run_demo(tmp_path, *SMALL_RCNN)
    assert done.returncode == 1
    assert 'is not a toy set' in done.stderr
    assert done.stderr.splitlines()[-1].startswith('shapes_demo.py: error: Data set failed')
    assert 'Traceback' not in done.stderr


def test_a_failing_step_is_an_error_with_its_name():
    with pytest.raises(demo.DemoError, match='Training failed with status 3'):
        demo.run_step('Training', ['-c', 'raise SystemExit(3)'])


def test_memory_counts_child_processes():
    child = 'x = b"x" * (200 << 20); import time; time.sleep(1.5)'
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'
    seconds, peak = demo.run_step('Child', ['-c', parent])
    assert 1.5 <= seconds < 60
    assert 200 << 20 <= peak < 400 << 20


def steps_of(monkeypatch, args, fail=()):
    """Runs the demo with tools that only leave what the next step needs; returns their names."""
    calls = []

    def run_step(title, command):
        calls.append(f'{title} --resume' if '--resume' in command else title)
        if title in fail:
            raise demo.DemoError(f'{title} failed with status 1')
        if title == 'Training':
            (args.work_dir / 'last_checkpoint').write_text('epoch_6.pth')
        if title == 'Test':
            (args.work_dir / 'test/now').mkdir(parents=True, exist_ok=True)
            metrics = {'coco/bbox_mAP': 0.5, 'coco/segm_mAP': 0.4}
            (args.work_dir / 'test/now/now.json').write_text(json.dumps(metrics))
            (args.work_dir / 'pictures').mkdir(exist_ok=True)
            Image.new('RGB', (600, 200), 'red').save(args.work_dir / 'pictures/0.png')
        return 1.0, 0

    monkeypatch.setattr(demo, 'run_step', run_step)
    try:
        demo.demo(args)
    except demo.DemoError:
        calls.append('error')
    return calls


def arguments(folder, *options, config=TOYS / 'mask-rcnn_fastervit-tiny_fpn_shapes.py'):
    return argparse.Namespace(
        config=config, work_dir=folder, num_train=None, num_val=None, cfg_options=list(options)
    )


def test_goes_on_where_it_stopped(monkeypatch, tmp_path):
    args = arguments(tmp_path)
    assert steps_of(monkeypatch, args, fail=('Training',)) == [
        *('Data set', 'Training', 'error'),
    ]
    (tmp_path / 'last_checkpoint').write_text('epoch_2.pth')  # training got this far
    assert steps_of(monkeypatch, args, fail=('Test',)) == [
        *('Data set', 'Training --resume', 'Test', 'error'),
    ]
    assert steps_of(monkeypatch, args) == ['Data set', 'Test']
    assert steps_of(monkeypatch, args) == ['Data set']


def test_another_config_starts_anew(monkeypatch, tmp_path):
    everything = ['Data set', 'Training', 'Test']
    assert steps_of(monkeypatch, arguments(tmp_path)) == everything
    other = arguments(tmp_path, 'train_cfg.max_epochs=2')
    assert steps_of(monkeypatch, other) == everything
    hat_net = TOYS / 'mask-rcnn_hat-net-toy_fpn_shapes.py'
    assert steps_of(monkeypatch, arguments(tmp_path, config=hat_net)) == everything
    more = arguments(tmp_path, config=hat_net)
    more.num_train = 300
    assert steps_of(monkeypatch, more) == everything


def test_a_config_that_is_not_there_is_one_line(tmp_path, capsys):
    assert demo.main(['configs/toy/none.py', '--work-dir', str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith('shapes_demo.py: error: there is no config configs/toy/none.py; ')
    assert error.count('\n') == 1


def test_no_write_permission_is_one_line(tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert demo.main(['--work-dir', str(tmp_path / 'file/work')]) == 1
    error = capsys.readouterr().err
    assert error.startswith('shapes_demo.py: error: ')
    assert error.count('\n') == 1
