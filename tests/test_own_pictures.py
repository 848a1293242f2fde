"""The tutorial on a user's own pictures, command by command, with a short training."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import trees

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs/own_pictures.md').read_text()
STEPS = re.findall(r'^```(bash|python)\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL)
EPOCHS = 20


def test_the_page_goes_the_whole_way():
    text = ' '.join(code for _, code in STEPS)
    for tool in ('trees.py', 'new_config.py', 'train.py', 'test.py', 'export.py', 'hat_mm_runtime'):
        assert tool in text


@pytest.mark.slow
def test_every_step_runs(tmp_path):
    wheel = ROOT / 'data/wheels' / trees.WHEEL.name
    if not wheel.is_file():
        pytest.skip(f'{wheel} is not there: tools/dataset_converters/trees.py downloads it')
    for name in ('tools', 'configs'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/wheels').symlink_to(wheel.parent)
    (tmp_path / 'work_dirs').mkdir()
    environment = {**os.environ, 'MPLBACKEND': 'agg', 'PYTHONPATH': str(ROOT)}
    commands = []
    for language, code in STEPS:
        if language == 'python':
            # After so short a training no score is high.
            commands.append([sys.executable, '-c', code.replace('>= 0.3', '>= 0.05')])
        for line in code.splitlines() if language == 'bash' else ():
            words = shlex.split(line.replace('epoch_182', f'epoch_{EPOCHS}'))
            words += ['--epochs', str(EPOCHS)] if 'tools/misc/new_config.py' in words else []
            commands.append([sys.executable, *words[1:]])
    for command in commands:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    made = {path.name for path in (tmp_path / 'work_dirs/trees').rglob('*') if path.is_file()}
    assert {'curves.png', 'errors.jpg', 'trees.onnx', 'precision_recall.png'} <= made
    assert {f'epoch_{EPOCHS}.pth', 'OSBS_029_result.png'} <= made
