"""The tutorial notebook: clean as committed, found from two folders, right from top to bottom."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / 'demo/hat_mm_tutorial.ipynb'
CELLS = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
CODE = [''.join(cell['source']) for cell in CELLS if cell['cell_type'] == 'code']
MINUTES = 10


def test_the_notebook_is_stripped_and_compiles():
    """Outputs would grow the repository with every run, and show what no code has made."""
    assert len(CODE) > 10
    for cell in CELLS:
        if cell['cell_type'] == 'code':
            assert cell['outputs'] == []
            assert cell['execution_count'] is None
    for i, code in enumerate(CODE):
        compile(code, f'code cell {i}', 'exec')


@pytest.mark.parametrize('folder', ['.', 'demo'])
def test_it_finds_the_checkout(folder):
    done = subprocess.run(
        [sys.executable, '-c', f'{CODE[0]}\nprint(os.getcwd())'],
        cwd=ROOT / folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(ROOT)


def test_links_lead_somewhere():
    text = '\n'.join(''.join(c['source']) for c in CELLS if c['cell_type'] == 'markdown')
    targets = [part.partition(')')[0].partition('#')[0] for part in text.split('](')[1:]]
    assert len(targets) > 10
    for target in targets:
        assert (NOTEBOOK.parent / target).is_file(), target


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In a folder of its own, where all that it writes stays."""
    reason = 'pip install -r requirements/notebook.txt, or make notebook'
    nbclient = pytest.importorskip('nbclient', reason=reason)
    nbformat = pytest.importorskip('nbformat', reason=reason)
    pytest.importorskip('ipykernel', reason=reason)
    pytest.importorskip('pytorch_grad_cam', reason=reason)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'demo').mkdir()
    for path in (NOTEBOOK, ROOT / 'demo/shapes.py'):
        shutil.copy2(path, tmp_path / 'demo')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.delenv('MPLBACKEND', raising=False)
    for name in ('JUPYTER_RUNTIME_DIR', 'IPYTHONDIR'):  # not in the user's home
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(tmp_path / 'demo/hat_mm_tutorial.ipynb', as_version=4)
    nbformat.validate(notebook)
    end = time.monotonic() + 60 * MINUTES
    client = nbclient.NotebookClient(
        notebook,
        # What is left of the minutes for the whole notebook.
        timeout_func=lambda cell: max(1, round(end - time.monotonic())),
        kernel_name='python3',
        resources={'metadata': {'path': str(tmp_path / 'demo')}},
    )
    try:
        client.execute()
    finally:
        # The user sees what a failed run has shown.
        nbformat.write(notebook, tmp_path / 'executed.ipynb')
    made = {path.name for path in (tmp_path / 'work_dirs/tutorial').iterdir()}
    assert {'config.py', 'data', 'train', 'attention', 'cam', 'detector.onnx'} <= made
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get('outputs', ())
        if 'image/png' in output.get('data', ())
    ]
    assert len(pictures) >= 6
