"""The README's Python runs, its commands and links exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = ['README.md', 'CONTRIBUTING.md', 'WEIGHTS.md', 'CHANGELOG.md']
PAGES += [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob('docs/*.md'))]
PAGES += [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob('configs/**/*.md'))]


def blocks(language):
    return re.findall(rf'^```{language}\n(.*?)^```', README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks('bash') for line in block.splitlines() if line.strip()]


def test_there_is_something_to_test():
    assert len(blocks('python')) >= 2
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize('code', blocks('python'), ids=range(len(blocks('python'))))
def test_python_block_runs(code):
    exec(compile(code, 'README.md', 'exec'), {})


@pytest.mark.parametrize('command', COMMANDS)
def test_command_exists(command):
    words = shlex.split(command)
    if words[0] == 'make':
        done = subprocess.run(
            ['make', '-n', *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    assert words[0] in ('python', 'bash')
    assert (ROOT / words[1]).is_file()
    if words[1].endswith('.py'):
        program = [sys.executable, ROOT / words[1], '--help']
        help_text = subprocess.run(
            program, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for word in words[2:]:
            if word.startswith('--'):
                assert word in help_text
    configs = [word for word in words[2:] if word.startswith('configs/')]
    assert configs or '.mim/configs/' in words[2]
    assert all((ROOT / config).is_file() for config in configs)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r'\]\(([^)#]+)\)', text):
        if not target.startswith('http'):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize('page', PAGES)
def test_files_named_in_prose_exist(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r'`((?:hat_mm|tools|tests|configs|docs)/[\w./-]+)`', text):
        assert (ROOT / name).exists(), name
