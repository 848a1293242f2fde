"""The set-up script in a checkout of stand-ins: small packages in a folder, nothing is compiled."""

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools' / 'dev' / 'setup_env.py'

# Builds the stand-ins of mmcv and hat_mm, as setuptools would build the real ones.
BACKEND = """
import os, sys, time, zipfile

NAME, VERSION, FILES = {!r}, {!r}, {!r}

def write_wheel(folder, name, version, files):
    distribution = name.replace('-', '_') + '-' + version
    info = distribution + '.dist-info/'
    files = {{
        **files,
        info + 'METADATA': f'Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n',
        info + 'WHEEL': 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n',
    }}
    record = ''.join(f'{{path}},,\\n' for path in [*files, info + 'RECORD'])
    wheel = distribution + '-py3-none-any.whl'
    with zipfile.ZipFile(os.path.join(folder, wheel), 'w') as archive:
        for path, text in {{**files, info + 'RECORD': record}}.items():
            archive.writestr(path, text)
    return wheel

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = os.path.join(folder, NAME.replace('-', '_') + '-' + VERSION + '.dist-info')
    os.mkdir(info)
    with open(os.path.join(info, 'METADATA'), 'w') as file:
        file.write(f'Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: {{VERSION}}\\n')
    return os.path.basename(info)

def build_wheel(folder, settings=None, metadata=None):
    print('[1/2] c++ a.cpp', os.environ['MAX_JOBS'], os.environ['CXX'], flush=True)
    if os.environ.get('STAND_IN') == 'slow':
        print('process', os.getpid(), flush=True)
        time.sleep(60)
    if os.environ.get('STAND_IN') == 'wrong':
        sys.exit('a.cpp:7:5: error: nms was not declared')
    return write_wheel(folder, NAME, VERSION, FILES)

def build_editable(folder, settings=None, metadata=None):
    return write_wheel(folder, NAME, VERSION, FILES)
"""
BUILD_SYSTEM = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
TORCH = """
class tensor(list):
    def __init__(self, values, device):
        super().__init__(values)
    def tolist(self):
        return list(self)
class cuda:
    is_available = staticmethod(lambda: False)
"""
MMCV = {
    'mmcv/__init__.py': '',
    'mmcv/_ext.so': '',
    'mmcv/ops.py': 'import torch\ndef nms(*_): return None, torch.tensor([0, 2], "cpu")\n',
}
MODULES = {
    'onedl-mmengine': ('mmengine', ''),
    'onedl-mmdetection': ('mmdet', ''),
    'onedl-mmsegmentation': ('mmseg', ''),
    'onedl-mmpretrain': ('mmpretrain', ''),
    'torch': ('torch', TORCH),
    'opencv-python': ('cv2', ''),
    'pytest': ('pytest', ''),
}


def checkout(folder):
    """A folder that has of a checkout what the set-up reads; the forks have the harder names."""
    (folder / 'tools' / 'dev').mkdir(parents=True)
    (folder / 'requirements').mkdir()
    shutil.copy(SCRIPT, folder / 'tools' / 'dev')
    pins = {'onedl-mmcv': '2.1.0', **dict.fromkeys(MODULES, '1.0')}
    common, dev = ('torch', 'opencv-python'), ('pytest',)
    own = [name for name in pins if name not in (*common, *dev)]
    for file, names in (('common', common), ('dev', dev), ('onedl', own)):
        text = ''.join(f'{name}=={pins[name]}\n' for name in names)
        (folder / 'requirements' / f'{file}.txt').write_text(f'# Pins.\n{text}')
    (folder / 'pyproject.toml').write_text(BUILD_SYSTEM)
    (folder / 'setup.py').touch()
    return folder


class Checkout:
    """A checkout of stand-ins with a package index of its own."""

    def __init__(self, folder):
        self.root = checkout(folder / 'checkout')
        self.venv = self.root / '.venv-onedl'
        self.cache = folder / 'cache'
        index = folder / 'index'
        index.mkdir()
        code = BACKEND.format('hat-mm', '0.1', {'hat_mm.py': ''})
        (self.root / 'backend.py').write_text(code)
        backend = {}
        exec(code, backend)
        for name, (module, text) in MODULES.items():
            backend['write_wheel'](index, name, '1.0', {f'{module}.py': text})
        source = folder / 'onedl_mmcv-2.1.0'
        source.mkdir()
        (source / 'pyproject.toml').write_text(BUILD_SYSTEM)
        (source / 'backend.py').write_text(BACKEND.format('onedl-mmcv', '2.1.0', MMCV))
        (source / 'PKG-INFO').write_text('Metadata-Version: 2.1\n')
        with tarfile.open(index / 'onedl_mmcv-2.1.0.tar.gz', 'w:gz') as tar:
            tar.add(source, source.name)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(('PIP_', 'CXX'))}
        self.env.update(
            PIP_CONFIG_FILE=os.devnull,
            PIP_NO_INDEX='1',
            PIP_FIND_LINKS=str(index),
            XDG_CACHE_HOME=str(self.cache),
            MAX_JOBS='1',
        )

    def start(self, **variables):
        command = [sys.executable, self.root / 'tools/dev/setup_env.py', '--stack', 'onedl']
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(
            command,
            env={**self.env, **variables},
            start_new_session=True,
            **pipes,
        )

    def run(self, **variables):
        process = self.start(**variables)
        output, _ = process.communicate(timeout=600)
        return process.returncode, output

    def ready(self):
        return load(self.root).Environment('onedl').ready()

    def compilations(self):
        return (self.venv / 'setup.log').read_text().count('[1/2] c++')

    def file(self, pattern):
        (path,) = self.venv.glob(f'lib/*/*/{pattern}')
        return path


def load(root):
    """The script of a checkout as a module."""
    spec = importlib.util.spec_from_file_location('setup_env', root / 'tools/dev/setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A checkout after its first set-up."""
    made = Checkout(tmp_path_factory.mktemp('set-up'))
    status, output = made.run()
    assert status == 0, output
    made.output = output
    return made


# --- An environment is made, recognised and repaired ----------------------------------------------


def test_the_first_set_up_compiles_mmcv_and_keeps_the_wheel(finished):
    assert re.search(r'checks: Python 3\.1[12]\.\d+, c\+\+ compiles, \d+ GiB', finished.output)
    assert '.venv-onedl is ready' in finished.output
    assert len(finished.output.splitlines()) < 25
    assert finished.compilations() == 1
    assert len([*finished.cache.glob('hat_mm/wheels/onedl-mmcv-2.1.0_*/*.whl')]) == 1
    program = [
        finished.venv / 'bin/python',
        '-Ic',
        'import hat_mm, mmdet; from mmcv.ops import nms',
    ]
    subprocess.run(program, check=True)


def test_a_finished_environment_is_left_alone(finished):
    before = {path: path.stat().st_mtime for path in finished.venv.rglob('*')}
    assert finished.run() == (0, '')
    assert {path: path.stat().st_mtime for path in finished.venv.rglob('*')} == before


@pytest.mark.parametrize(
    'pattern',
    [
        '.venv-onedl/setup.json',
        '.venv-onedl/pyvenv.cfg',
        '.venv-onedl/bin/python',
        '.venv-onedl/lib/*/*/torch-1.0.dist-info',
        '.venv-onedl/lib/*/*/hat_mm-0.1.dist-info/RECORD',
        '.venv-onedl/lib/*/*/mmcv/_ext.so',
        'requirements/dev.txt',
    ],
)
def test_an_environment_that_lacks_something_is_not_ready(finished, pattern):
    (path,) = finished.root.glob(pattern)
    aside = path.with_name('aside')
    path.rename(aside)
    if path.name == 'dev.txt':
        path.write_text('pytest==1.1\n')
    ready = finished.ready()
    aside.replace(path)
    assert not ready
    assert finished.ready()


def test_a_moved_checkout_and_half_a_stamp_are_not_ready(finished):
    moved = finished.root.with_name('moved')
    finished.root.rename(moved)
    ready = load(moved).Environment('onedl').ready()
    moved.rename(finished.root)
    assert not ready
    stamp = finished.venv / 'setup.json'
    text = stamp.read_text()
    stamp.write_text(text[:50])
    ready = finished.ready()
    stamp.write_text(text)
    assert not ready


def test_what_a_killed_pip_left_and_a_wheel_that_does_not_work_are_replaced(finished):
    finished.file('pytest-1.0.dist-info/RECORD').unlink()
    finished.file('mmcv/_ext.so').unlink()
    finished.file('mmcv/ops.py').unlink()
    (wheel,) = finished.cache.rglob('*.whl')
    backend = {}
    exec(BACKEND.format('', '', ''), backend)
    backend['write_wheel'](wheel.parent, 'onedl-mmcv', '2.1.0', {**MMCV, 'mmcv/ops.py': ''})
    status, output = finished.run()
    assert status == 0, output
    assert 'the cached file does not fit' in output
    assert finished.file('pytest-1.0.dist-info/RECORD').exists()
    assert finished.ready()
    assert finished.compilations() == 2


@pytest.mark.slow
def test_a_damaged_environment_is_made_anew_with_the_cached_wheel(finished):
    finished.file('mmengine.py').write_text('raise ImportError("half a file")')
    finished.file('mmcv/_ext.so').unlink()
    before = finished.compilations()
    status, output = finished.run()
    assert status == 0, output
    assert 'does not work (ImportError: half a file), making it anew' in output
    assert 'onedl-mmcv-2.1.0 from the cache' in output
    assert finished.ready()
    assert finished.compilations() == before


def runs(pid):
    """Whether a process runs; one that has ended, but that nobody has waited for, does not."""
    try:
        return bool(Path(f'/proc/{pid}/cmdline').read_bytes())
    except OSError:
        return False


def test_a_build_that_fails_or_is_interrupted_says_so(finished, tmp_path):
    finished.file('mmcv/ops.py').unlink()
    finished.file('mmcv/_ext.so').unlink()
    variables = dict(XDG_CACHE_HOME=str(tmp_path), CXX='g++')
    status, output = finished.run(STAND_IN='wrong', **variables)
    assert status == 1
    log = finished.venv / 'setup.log'
    assert '[1/2] c++ a.cpp 1 g++' in log.read_text()  # MAX_JOBS and CXX reach the build
    cause = 'it does not compile (a.cpp:7:5: error: nms was not declared)'
    assert 'set-up failed: onedl-mmcv==2.1.0 with its operators' in output
    assert output.rstrip().endswith(f': {cause}\nAll of the output: {log}')

    process = finished.start(STAND_IN='slow', **variables)
    deadline = time.monotonic() + 300
    while finished.compilations() < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    while not (found := re.findall(r'process (\d+)', log.read_text())):
        time.sleep(0.1)
    process.terminate()  # this one alone
    output, _ = process.communicate(timeout=300)
    while runs(found[-1]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(found[-1])
    assert process.returncode == 130
    assert 'interrupted; run it again' in output
    assert 'Traceback' not in output
    assert list(tmp_path.rglob('*.whl')) == []
    assert not finished.ready()


@pytest.fixture
def builder(tmp_path):
    """An environment whose Python only names the folder of a small header of torch."""
    environment = load(checkout(tmp_path / 'checkout')).Environment('onedl')
    environment.path.mkdir()
    environment.python = tmp_path / 'python'
    environment.python.write_text(f'#!/bin/sh\necho -O2 -I{tmp_path}\n')
    environment.python.chmod(0o755)
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch/types.h').write_text('inline int answer() { return 42; }\n')
    return environment


def test_the_compiled_header_is_used(builder, tmp_path):
    flag = builder.precompile(tmp_path, '-g0')
    [compiled] = tmp_path.glob('*.gch')
    source = tmp_path / 'a.cpp'
    source.write_text('int main() { return answer(); }\n')
    options = f'-O2 -I{tmp_path} -g0 -fPIC -std=c++17 {flag} -DMMCV_WITH_CUDA -H -c'.split()
    options += ['-DTORCH_API_INCLUDE_EXTENSION_H', '-DTORCH_EXTENSION_NAME=_ext']  # torch adds them
    done = subprocess.run(
        ['c++', *options, source], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert f'! {compiled}' in done.stderr


@pytest.mark.parametrize('reason', ['header', 'clang'])
def test_without_a_compiled_header_the_build_goes_on(builder, tmp_path, reason):
    if reason == 'header':
        (tmp_path / 'torch/types.h').write_text('#error other compiler\n')
    else:
        builder.compiler = f'{tmp_path}/clang++'
        Path(builder.compiler).write_text('#!/bin/sh\necho Debian clang version 19\n')
        Path(builder.compiler).chmod(0o755)
    assert builder.precompile(tmp_path, '-g0') == ''
    assert not [*tmp_path.glob('*.gch')]


@pytest.mark.parametrize('standard', ['17', '20'])
def test_mmcv_is_compiled_by_the_standard_that_torch_needs(builder, standard):
    header = builder.path / 'lib/python3.11/site-packages/torch/include/ATen/ATen.h'
    header.parent.mkdir(parents=True)
    header.write_text(f'#error C++{standard} or later compatible compiler is required\n')
    assert builder.standard() == f'c++{standard}'


# --- What is checked first ------------------------------------------------------------------------


def fake_python(version, include='/nowhere', has_venv=True):
    """The body of a script that answers as such an interpreter would."""
    return f"echo '{json.dumps(['/opt/python', version, str(include), has_venv])}'"


def refused(folder, programs, **variables):
    """What the set-up says on a machine whose only programs are these shell scripts."""
    root = checkout(folder / 'checkout')
    path = folder / 'bin'
    path.mkdir()
    for name, body in programs.items():
        (path / name).write_text(f'#!/bin/sh\n{body}\n')
        (path / name).chmod(0o755)
    command = [sys.executable, root / 'tools/dev/setup_env.py', '--stack', 'onedl']
    env = {'PATH': str(path), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert sorted(p.name for p in (root / '.venv-onedl').iterdir()) == ['.lock']
    return done.stderr


def test_without_python_and_compiler_both_are_named(tmp_path):
    said = refused(tmp_path, {'python3': 'echo "version manager: no python3" >&2; exit 127'})
    assert 'No working Python interpreter (tried python3, python3.12' in said
    assert 'apt-get install python3.11 python3.11-venv python3.11-dev' in said
    assert 'The C++ compiler c++ does not work: No such file or directory' in said
    assert 'apt-get install build-essential' in said


@pytest.mark.parametrize('version', [[3, 10, 13], [3, 13, 0], [2, 7, 18]])
def test_an_unsupported_python_is_named_with_the_choices(tmp_path, version):
    said = refused(tmp_path, {'python3': fake_python(version), 'c++': 'exit 0'})
    name = '.'.join(map(str, version))
    assert f'/opt/python is Python {name}. Python 3.11 or 3.12 is needed' in said
    assert 'C++' not in said


def test_missing_headers_venv_and_a_broken_compiler_are_quoted(tmp_path):
    compiler = 'echo "probe.cpp:1:10: fatal error: optional: No such file" >&2; exit 1'
    programs = {'python3': fake_python([3, 12, 3], has_venv=False), 'g++-13': compiler}
    said = refused(tmp_path, programs, CXX='g++-13')
    assert '/opt/python lacks the modules venv and ensurepip and its headers (Python.h in' in said
    assert 'apt-get install python3.12-venv python3.12-dev' in said
    assert 'C++ compiler g++-13 does not work: probe.cpp:1:10: fatal error: optional' in said


@pytest.fixture
def setup_env():
    return load(ROOT)


def test_the_first_fit_python_is_taken(setup_env, tmp_path, monkeypatch):
    (tmp_path / 'Python.h').touch()
    versions = {'python3': [3, 13, 0], 'python3.12': [3, 12, 1], 'python3.11': [3, 11, 2]}
    for name, version in versions.items():
        (tmp_path / name).write_text(f'#!/bin/sh\n{fake_python(version, include=tmp_path)}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert setup_env.find_python(None)[0].version == [3, 12, 1]
    assert setup_env.find_python('python3.11')[0].version == [3, 11, 2]
    assert setup_env.find_python('python3')[0] is None


def test_a_full_disk_is_reported_with_both_numbers(tmp_path, monkeypatch):
    setup_env = load(checkout(tmp_path / 'checkout'))
    environment = setup_env.Environment('onedl')
    environment.path.mkdir()
    free = setup_env.shutil._ntuple_diskusage(0, 0, 287 * 1024**2)
    monkeypatch.setattr(setup_env.shutil, 'disk_usage', lambda _: free)
    with pytest.raises(setup_env.SetupError, match=r'0\.3 GiB of disk are free, about 4\.0 GiB'):
        environment.check_machine(fresh=True)


@pytest.mark.parametrize(
    ('memory', 'cores', 'asked', 'jobs'),
    [(24, 2, '', 2), (5, 8, '', 2), (1, 8, '', 1), (1, 8, '6', 6)],
)
def test_compilers_follow_cores_and_memory(setup_env, monkeypatch, memory, cores, asked, jobs):
    monkeypatch.setattr(Path, 'read_text', lambda _: f'MemAvailable: {memory * 1024**2} kB\n')
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(cores))
    monkeypatch.setenv('MAX_JOBS', asked)
    assert setup_env.build_jobs() == jobs


# --- Failures and progress ------------------------------------------------------------------------

COMPILE_LOG = """
  [1/3] c++ -Werror=format-security -c a.cpp
  a.cpp:3:1: warning: unused variable 'x' [-Wunused-variable]
  FAILED: b.o
  b.cpp:7:5: error: 'nms_kernel' was not declared in this scope
  b.cpp:9:5: error: expected ';' before 'return'
  error: subprocess-exited-with-error
  ERROR: Failed building wheel for mmcv
"""


@pytest.mark.parametrize(
    ('line', 'cause'),
    [
        ('ERROR: [Errno 28] No space left on device', 'disk is full'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        (
            "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(': "
            "Temporary failure in name resolution')': /torch/",
            'cannot be reached',
        ),
        ('ERROR: No matching distribution found for torch==2.13.0', 'no such version'),
        ('OSError: CUDA_HOME environment variable is not set.', 'does not compile'),
    ],
)
def test_a_known_cause_is_one_line(setup_env, line, cause):
    said = setup_env.explain('Collecting things\n' * 300 + line + '\n' + COMPILE_LOG)
    assert cause in said
    assert said.endswith(f'({line})')


def test_the_compilers_first_error_or_else_the_last_lines_are_shown(setup_env):
    said = setup_env.explain(COMPILE_LOG)
    assert (
        said
        == "it does not compile (b.cpp:7:5: error: 'nms_kernel' was not declared in this scope)"
    )
    unknown = setup_env.explain('\n'.join(f'line {i}' for i in range(500)))
    assert unknown.splitlines()[-1].strip() == 'line 499'
    assert len(unknown.splitlines()) < 20


def test_progress_on_a_terminal_is_one_line_with_ninjas_counter(tmp_path, monkeypatch):
    environment = load(checkout(tmp_path / 'checkout')).Environment('onedl')
    environment.path.mkdir()
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, 'stdout', screen)
    code = 'import time; print("  [56/77] c++\\n  [57/77] c++", flush=True); time.sleep(1.5)'
    environment.run('mmcv', [sys.executable, '-c', code])
    title, progress = screen.getvalue().split('\n', 1)
    assert title == 'mmcv ...'
    assert '\r  [57/77] 0m01s' in progress
    assert re.fullmatch(r'\x1b\[K  done \(\d s\)\n', progress.rpartition('\r')[2])
    assert progress.count('\n') == 1


# --- Pins -----------------------------------------------------------------------------------------


def pins(path):
    """The `name==version` lines of a requirement file and of those that it includes."""
    found = {}
    for line in path.read_text().splitlines():
        line = line.split('#')[0].strip()
        if line.startswith('-r '):
            found.update(pins(path.parent / line[3:]))
        elif line:
            name, version = line.split('==')
            found[name] = version
    return found


@pytest.mark.parametrize('stack', ['openmmlab', 'onedl'])
def test_a_stack_pins_its_own_five_packages_and_what_builds_them(stack):
    found = pins(ROOT / 'requirements' / f'{stack}.txt')
    assert {'torch', 'torchvision', 'numpy', 'setuptools', 'wheel', 'ninja', 'packaging'} <= {
        *found
    }
    forks = {name for name in found if name.startswith('onedl-')}
    originals = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'} & {*found}
    assert (len(forks), len(originals)) == ((5, 0) if stack == 'onedl' else (0, 5))
    if stack == 'openmmlab':
        assert 78 <= int(found['setuptools'].split('.')[0]) < 81


def test_the_latest_stack_leaves_five_pins_of_the_default_one_open(tmp_path):
    root = checkout(tmp_path / 'checkout')
    shutil.copytree(ROOT / 'requirements', root / 'requirements', dirs_exist_ok=True)
    environment = load(root).Environment('latest')
    environment.path.mkdir()
    assert environment.pins == load(root).Environment('openmmlab').pins
    pinned, opened = set(), set()
    for file in (environment.common, environment.dev):
        pinned.update(file.read_text().splitlines())
        opened.update(environment.unpin(file).read_text().splitlines())
    names = {'torch', 'torchvision', 'numpy', 'opencv-python', 'opencv-python-headless'}
    assert opened - pinned == names
    assert {line.split('==')[0] for line in pinned - opened} == names


def test_the_example_requirements_are_the_default_stack():
    assert pins(ROOT / 'requirements.txt') == pins(ROOT / 'requirements' / 'openmmlab.txt')


# --- make -----------------------------------------------------------------------------------------


def make(*arguments, path=None):
    """Run make as from a shell of its own, also when make runs these tests."""
    chosen = ('STACK', 'PYTHON')
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k not in chosen}
    if path is not None:
        env['PATH'] = str(path)
    command = [shutil.which('make'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)


def test_make_lists_its_targets():
    done = make('help')
    assert done.returncode == 0
    for target in ('setup', 'demo', 'test', 'test-slow', 'lint'):
        assert re.search(rf'^  make {target} +\w', done.stdout, re.MULTILINE)


def test_an_unknown_stack_is_an_error_with_the_choices():
    done = make('setup', 'STACK=openmim')
    assert done.returncode != 0
    assert 'STACK=openmim is unknown; it is openmmlab (the default), onedl or latest' in done.stderr


def test_make_says_what_to_install_without_python(tmp_path):
    (tmp_path / 'sh').symlink_to('/bin/sh')
    done = make('setup', path=tmp_path)
    assert done.returncode != 0
    assert 'python3 is missing' in done.stderr
    assert 'apt-get install' in done.stderr


def test_targets_set_up_first():
    for target in ('demo', 'test', 'test-slow', 'lint'):
        lines = make('--dry-run', target, 'STACK=onedl').stdout
        assert lines.index('tools/dev/setup_env.py --stack onedl') < lines.index('.venv-onedl/bin')
