"""The GPU check, run on the CPU with tiny archs."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from backbone_checks import Check, Skip

ROOT = Path(__file__).resolve().parents[2]


def run(*words, **environment):
    return subprocess.run(
        ['bash', ROOT / 'tools' / 'dev' / 'gpu_check.sh', *map(str, words)],
        env={**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_dry_run(tmp_path):
    # Much time, for a busy processor.
    done = run('--device', 'cpu', '--quick', '--minutes', '30', '--out', tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / 'gpu_check.json').read_text())
    checks = {check['name']: check for check in results['checks']}
    assert {check['status'] for check in checks.values()} == {'PASS'}
    assert [*checks][:6] == ['parity', 'kernels', 'ddp', 'fsdp2', 'checkpointing', 'growth']
    assert 'attention' in checks['kernels']['reason']
    assert len(results['rows']) + len(results['unreached']) == 3
    assert all(min(row['seconds']) > 0 and row['macs'] for row in results['rows'][:2])
    page = (tmp_path / 'gpu_check.md').read_text()
    assert all(f'| {name} ' in page for name in checks)
    assert '| images/s ' in page
    assert '| parity ' in done.stdout


def passing(device, quick):
    yield 'half', 0.5, 1.0
    yield 'a kernel', 3, None


def wrong(device, quick):
    yield 'not a number', math.nan, 1.0
    yield 'half', 0.5, 1.0


def broken(device, quick):
    yield from ()
    raise ValueError('no such\nthing')


def dying(device, quick):
    yield 'first', 0.0, 1.0
    os._exit(1)


def endless(device, quick):
    yield 'first', 0.0, 1.0
    time.sleep(600)


def impossible(device, quick):
    yield from ()
    raise Skip('no compiler')


def test_failures_leave_other_checks_alone():
    # The endless one comes when processes are running, the last when another has been replaced.
    functions = (passing, impossible, endless, wrong, broken, dying)
    checks = [Check(f.__name__, f, 0.01 if f is endless else 1.0) for f in functions]
    with gpu_check.workers_of(2) as workers:
        found = gpu_check.run_checks(
            checks, 'cpu', True, budget=600, end=time.monotonic() + 600, workers=workers
        )
    reasons = {result.name: (result.status, result.reason) for result in found}
    assert reasons == {
        'broken': ('FAIL', 'ValueError: no such thing'),
        'wrong': ('FAIL', 'not a number: nan > 1'),
        'dying': ('FAIL', 'the process died; out of memory?'),
        'endless': ('FAIL', 'stopped after 6 s; figures so far: 1'),
        'impossible': ('SKIP', 'no compiler'),
        'passing': ('PASS', 'a kernel; nearest to its limit: half 0.5 (limit 1)'),
    }


def test_a_failure_is_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, 'QUICK', [Check('broken', broken), Check('passing', passing)])
    monkeypatch.setattr(gpu_check, 'QUICK_PLAN', [])
    assert gpu_check.main(['--device=cpu', '--quick', f'--out={tmp_path}']) == 1
    assert 'FAIL broken' in capsys.readouterr().out
    results = json.loads((tmp_path / 'gpu_check.json').read_text())
    assert [c['status'] for c in results['checks']] == ['FAIL', 'PASS', 'FAIL']


def test_time_that_is_used_up_is_said():
    with gpu_check.workers_of(1) as workers:
        [found] = gpu_check.run_checks(
            [Check('late', passing)], 'cpu', True, budget=60, end=time.monotonic(), workers=workers
        )
        plan = [(['timm/resnet50'], 'bf16', [((32, 32), 1)]), (['timm/b', 'c'], 'bf16', [])]
        rows, unreached = gpu_check.measure(
            plan, 'cpu', end=time.monotonic(), workers=workers, absent={'/b': 'not installed'}
        )
    assert (found.status, found.reason) == ('SKIP', 'no time is left for it')
    assert rows == []
    assert unreached == ['timm/resnet50@bf16 32×32 batch 1', 'timm/b@bf16 (not installed)']


def test_what_is_missing_is_named(tmp_path):
    done = run('--device', 'cpu', PYTHON='python-that-is-not-there')
    assert done.returncode != 0
    assert 'python-that-is-not-there' in done.stderr
    done = run('--wheels', tmp_path / 'none')
    assert done.returncode == 2
    assert f'--wheels {tmp_path}/none is no folder' in done.stderr
    (tmp_path / 'cv2.py').write_text('raise ImportError("libGL.so.1")')
    done = run('--device', 'cpu', PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert 'lacks opencv-python-headless==' in done.stderr
    assert 'gpu_check.txt says how to fetch them' in done.stderr
