"""Runs the tests of the backbones and layers on several versions of torch and of Python.

A cell is a torch, a family of packages (OpenMMLab's or the OneDL forks) and a Python. For each one
a temporary environment gets that torch, mmengine, mmcv without its compiled operators, the newest
versions of what these need, and no toolbox; it is deleted after the tests. What is found goes to a
file as soon as it is there, and cells in it are left out, so the check can be interrupted; to run a
cell again, remove its line. --render writes the tables of docs/compatibility.md.

An environment takes up to 9 GB while it is there. The Pythons are found by their names,
python3.11 and so on, or given with --pythons.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from setup_env import probe_python

ROOT = Path(__file__).resolve().parents[2]
TORCHS = ('2.6', '2.9', '2.13', 'latest')
PYTHONS = ('3.11', '3.12', '3.13')
# Family -> file of its pins. OneDL has no wheel of mmcv: its source, built where pip has no torch,
# becomes one without operators.
FAMILIES = {'OpenMMLab': 'openmmlab.txt', 'OneDL': 'onedl.txt'}
OWN = ('setuptools', 'mmengine', 'mmcv', 'onedl-mmengine', 'onedl-mmcv')
TESTS = ('tests/test_backbones', 'tests/test_plugins.py')
NEEDED = ('pytest', 'pytest-xdist', 'hypothesis', 'rich', 'pillow', 'opencv-python', 'model-index')
SHOWN = ('torch', 'mmengine', 'mmcv', 'numpy', 'opencv-python')
BAD = ('failure', 'error')
SECONDS = 3600
"""Most seconds for one step of a cell."""


def packages(torch: str, family: str) -> list[str]:
    """What pip is to install."""
    pins = (ROOT / 'requirements' / FAMILIES[family]).read_text(encoding='utf-8').splitlines()
    own = [pin for pin in pins if pin.split('==')[0] in OWN]
    own = [re.sub('^mmcv==', 'mmcv-lite==', pin) for pin in own]
    return ['torch' if torch == 'latest' else f'torch=={torch}.*', *own, *NEEDED]


def run(command: list[Any], log: Path, **variables: str) -> str:
    """Runs a command, with its output in a file.

    Returns:
        Why it ended; empty if well.
    """
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')} | variables
    with log.open('a') as file:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f'more than {SECONDS} s'
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not status:
        return ''
    lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith('ERROR:')]
    return (errors or lines or [f'exit status {status}'])[-1][:300]


def versions(python: Path) -> dict[str, str]:
    """What pip has installed, of the packages that matter."""
    command = [python, '-m', 'pip', 'list', '--format', 'json', '--disable-pip-version-check']
    found = json.loads(subprocess.check_output(command))
    names = {re.sub('^onedl-|-lite$', '', one['name']): one['version'] for one in found}
    return {name: names[name] for name in SHOWN}


def counts(report: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and the first that failed."""
    cases = list(ElementTree.parse(report).iter('testcase'))
    bad = {case.get('name'): child for case in cases for child in case if child.tag in BAD}
    skipped = sum(case.find('skipped') is not None for case in cases)
    first = [f'{name}: {child.get("message", "")[:200]}' for name, child in [*bad.items()][:10]]
    passed = len(cases) - skipped - len(bad)
    return dict(passed=passed, failed=len(bad), skipped=skipped, failures=first)


def check(torch: str, family: str, version: str, python: str, jobs: int) -> dict[str, Any]:
    """Makes the environment of a cell and runs the tests there.

    Returns:
        The cell, with ``versions`` and the counts, or with ``why`` the tests have not run.
    """
    start = time.perf_counter()
    today = datetime.date.today().isoformat()
    cell = dict(torch=torch, family=family, python=version, date=today)
    with TemporaryDirectory(prefix='hat_mm_compatibility_') as folder:
        inside, log, report = (Path(folder, name) for name in ('bin/python', 'log', 'report.xml'))
        # Only wheels; pip builds in environments of their own, which have no torch.
        kinds = ('--only-binary', ':all:', '--no-binary', 'onedl-mmcv', '--no-cache-dir')
        wanted = packages(torch, family)
        why = run([python, '-m', 'venv', folder], log) or run(
            [inside, '-m', 'pip', 'install', *kinds, *wanted], log
        )
        if not why:
            cell['versions'] = versions(inside)
            options = ('-q', '-p', 'no:cacheprovider', '-n', jobs, '--dist', 'loadfile')
            # The checkout is tested, not installed: Pythons that it refuses can be tried, too.
            why = run(
                [inside, '-m', 'pytest', *options, '--junit-xml', report, *TESTS],
                log,
                PYTHONDONTWRITEBYTECODE='1',
            )
        if report.exists():
            cell |= counts(report)
        else:
            cell['why'] = why
        shutil.copyfile(log, ROOT / 'work_dirs' / f'compatibility-{torch}-{family}-{version}.log')
    return cell | dict(seconds=round(time.perf_counter() - start))


# --- tables ---------------------------------------------------------------------------------------

BEGIN = '<!-- begin of tables: tools/dev/check_compatibility.py -->'
END = '<!-- end of tables -->'


def tables(known: list[dict[str, Any]]) -> str:
    """The table of cells, and the one of versions."""
    found = {(one['torch'], one['family'], one['python']): one for one in known}
    columns = [f'Python {version}' for version in PYTHONS]
    lines = [row('torch', 'packages', *columns), row(*['---'] * (2 + len(PYTHONS)))]
    for torch, family in product(TORCHS, FAMILIES):
        cells = [outcome(found.get((torch, family, version))) for version in PYTHONS]
        lines.append(row(torch, family, *cells))
    columns = ['passed', 'failed', 'skipped', 'seconds', 'date']
    lines += ['', row('Python', *SHOWN, *columns), row(*['---'] * (1 + len(SHOWN) + len(columns)))]
    for key in product(TORCHS, FAMILIES, PYTHONS):
        one = found.get(key, {})
        if 'passed' in one:
            used = [one['versions'][name] for name in SHOWN]
            lines.append(row(key[2], *used, *(one[name] for name in columns)))
    return '\n'.join(lines)


def row(*cells: Any) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def outcome(one: dict[str, Any] | None) -> str:
    if one is None:
        return 'not run'
    if 'why' in one:
        return 'not possible: ' + one['why'].replace('|', '\\|')
    return f'{one["failed"]} failed' if one['failed'] else 'passed'


def render(page: Path, known: list[dict[str, Any]]) -> None:
    """Puts the tables between the marks of a page."""
    text = page.read_text(encoding='utf-8')
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f'{before}{BEGIN}\n\n{tables(known)}\n\n{END}{after}', encoding='utf-8')


def main(argv: list[str] | None = None) -> None:
    """Checks the cells that have not been checked, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--torchs', nargs='+', choices=TORCHS, default=list(TORCHS))
    parser.add_argument('--families', nargs='+', choices=FAMILIES, default=list(FAMILIES))
    names = [f'python{version}' for version in PYTHONS]
    parser.add_argument('--pythons', nargs='+', default=names, metavar='PROGRAM')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'compatibility.jsonl')
    parser.add_argument('--render', type=Path, metavar='PAGE', help='only write the tables')
    args = parser.parse_args(argv)
    lines = args.out.read_text(encoding='utf-8').splitlines() if args.out.exists() else []
    known = [json.loads(line) for line in lines]
    if args.render:
        render(args.render, known)
        return
    done = {(one['torch'], one['family'], one['python']) for one in known}
    (ROOT / 'work_dirs').mkdir(exist_ok=True)
    for name in args.pythons:
        python = probe_python(name)
        if python is None:
            print(f'{name} does not run')
            continue
        version = '{}.{}'.format(*python.version)
        for torch, family in product(args.torchs, args.families):
            if (torch, family, version) in done:
                continue
            print(f'torch {torch}, {family}, Python {version} ...', flush=True)
            known.append(check(torch, family, version, python.executable, args.jobs))
            with args.out.open('a', encoding='utf-8') as file:
                file.write(json.dumps(known[-1]) + '\n')
    print(tables(known))


if __name__ == '__main__':
    main()
