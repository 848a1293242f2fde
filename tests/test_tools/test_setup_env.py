"""The set-up script, with stand-ins for interpreters and compilers and without a network."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'tools' / 'dev' / 'setup_env.py'
spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
setup_env = importlib.util.module_from_spec(spec)
sys.modules['setup_env'] = setup_env  # dataclasses look their module up
spec.loader.exec_module(setup_env)
SetupError = setup_env.SetupError


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Makes shell scripts that are all of PATH."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    monkeypatch.setenv('PATH', str(folder))
    monkeypatch.delenv('CXX', raising=False)

    def add(name, body):
        (folder / name).write_text(f'#!/bin/sh\n{body}\n', encoding='utf-8')
        (folder / name).chmod(0o755)
        return folder / name

    return add


def fake_python(version, include='/nowhere', ensurepip=True):
    """The body of a script that answers the probe as such an interpreter would."""
    return f"echo '{json.dumps(['/opt/python', version, str(include), ensurepip])}'"


@pytest.fixture
def include(tmp_path):
    folder = tmp_path / 'include'
    folder.mkdir()
    (folder / 'Python.h').touch()
    return folder


# --- Interpreters ---------------------------------------------------------------------------------


def test_a_shim_that_fails_is_passed_over(programs, include):
    programs('python3', 'echo "version manager: command not found" >&2; exit 127')
    programs('python3.12', 'echo "not what was asked"')
    programs('python3.11', fake_python([3, 11, 4], include))
    found = setup_env.find_python(None)
    assert (found.version, str(found)) == ((3, 11, 4), '3.11.4')


def test_the_default_python_comes_first_if_it_is_fit(programs, include):
    programs('python3', fake_python([3, 11, 2], include))
    programs('python3.12', fake_python([3, 12, 1], include))
    assert setup_env.find_python(None).version == (3, 11, 2)
    assert setup_env.find_python('python3.12').version == (3, 12, 1)


@pytest.mark.parametrize('version', [[3, 10, 13], [3, 13, 0], [2, 7, 18]])
def test_an_unsupported_python_is_named_with_the_choices(programs, include, version):
    programs('python3', fake_python(version, include))
    name = '.'.join(map(str, version))
    with pytest.raises(SetupError, match=rf'Python {re.escape(name)}; needed is 3\.11 or 3\.12'):
        setup_env.find_python(None)


def test_no_python_at_all(programs):
    with pytest.raises(SetupError, match=r'No working Python interpreter.*apt-get install python3'):
        setup_env.find_python(None)


def test_missing_headers_and_venv_say_which_package(programs):
    programs('python3', fake_python([3, 12, 3], ensurepip=False))
    with pytest.raises(SetupError) as error:
        setup_env.find_python(None)
    assert 'apt-get install python3.12-venv' in str(error.value)
    assert 'no Python.h in /nowhere' in str(error.value)
    assert 'apt-get install python3.12-dev' in str(error.value)


def test_of_two_unfit_pythons_the_right_version_is_reported(programs):
    programs('python3', fake_python([3, 13, 0]))
    programs('python3.11', fake_python([3, 11, 2]))
    with pytest.raises(SetupError, match=r'python3\.11-dev'):
        setup_env.find_python(None)


def test_this_interpreter_is_probed_rightly():
    found = setup_env.probe_python(sys.executable)
    assert found.version == sys.version_info[:3]
    assert Path(found.executable).resolve() == Path(sys.executable).resolve()
    assert not found.executable.startswith(sys.prefix) or sys.prefix == sys.base_prefix


# --- Compilers, disk, memory ----------------------------------------------------------------------


def test_the_real_compiler_passes(monkeypatch):
    monkeypatch.delenv('CXX', raising=False)
    python = setup_env.probe_python(sys.executable)
    assert setup_env.find_compiler(python) in ('c++', 'g++', 'clang++')


def test_a_broken_compiler_is_passed_over(programs, include):
    python = setup_env.Interpreter('/opt/python', (3, 11, 2), str(include), True)
    programs('c++', 'exit 1')
    programs('g++', 'exit 0')
    assert setup_env.find_compiler(python) == 'g++'


def test_no_compiler(programs, include):
    python = setup_env.Interpreter('/opt/python', (3, 11, 2), str(include), True)
    with pytest.raises(SetupError, match=r'(?s)No C\+\+ compiler.*apt-get.*build-essential'):
        setup_env.find_compiler(python)


def test_a_compiler_that_only_looks_like_one_is_quoted(programs, include):
    python = setup_env.Interpreter('/opt/python', (3, 11, 2), str(include), True)
    body = 'echo "probe.cpp:3:10: fatal error: optional: No such file or directory" >&2; exit 1'
    programs('c++', body)
    with pytest.raises(SetupError, match='fatal error: optional'):
        setup_env.find_compiler(python)


def test_the_compiler_that_was_named_is_the_only_one_tried(programs, include, monkeypatch):
    python = setup_env.Interpreter('/opt/python', (3, 11, 2), str(include), True)
    programs('g++', 'exit 0')
    monkeypatch.setenv('CXX', 'g++-99')
    with pytest.raises(SetupError, match=r'tried g\+\+-99'):
        setup_env.find_compiler(python)


def test_a_full_disk_is_reported_with_both_numbers(tmp_path, monkeypatch):
    free = 287 * 1024**2
    monkeypatch.setattr(
        setup_env.shutil, 'disk_usage', lambda _: setup_env.shutil._ntuple_diskusage(0, 0, free)
    )
    with pytest.raises(SetupError, match=r'0\.3 GiB of disk are free, about 4\.0 GiB are needed'):
        setup_env.check_disk(tmp_path, 4.0)
    assert setup_env.check_disk(tmp_path, 0.1) == pytest.approx(0.28, abs=0.01)


@pytest.mark.parametrize(
    ('memory', 'cores', 'asked', 'jobs'),
    [
        (24, 2, '', 2),
        (5, 8, '', 2),
        (1, 8, '', 1),
        (None, 8, '', 1),
        (1, 8, '6', 6),
        (24, 2, '0', 1),
    ],
)
def test_the_number_of_compilers_follows_cores_and_memory(monkeypatch, memory, cores, asked, jobs):
    available = memory and memory * setup_env.GIB
    monkeypatch.setattr(setup_env, 'available_memory', lambda: available)
    monkeypatch.setattr(setup_env.os, 'sched_getaffinity', lambda _: range(cores))
    monkeypatch.setenv('MAX_JOBS', asked)
    assert setup_env.build_jobs() == jobs


DEVICE = {'torch': '2.13.0+cu130', 'cuda': '13.0', 'cards': ['sm90'], 'home': None}


def test_nvcc_of_the_same_major_version_passes(programs):
    programs('nvcc', 'echo "Cuda compilation tools, release 13.2, V13.2.1"')
    setup_env.check_nvcc(DEVICE)


def test_nvcc_is_missing(programs):
    with pytest.raises(SetupError, match=r'nvcc does not run.*CUDA toolkit 13\.0'):
        setup_env.check_nvcc(DEVICE)


def test_nvcc_of_another_major_version(programs, tmp_path):
    path = programs('nvcc', 'echo "Cuda compilation tools, release 12.4, V12.4.1"')
    with pytest.raises(SetupError, match=r'of CUDA 12\.4, torch of CUDA 13\.0'):
        setup_env.check_nvcc({**DEVICE, 'home': str(path.parent.parent)})


# --- The cause of a failure -----------------------------------------------------------------------

COMPILE_LOG = """
  building 'mmcv._ext' extension
  [1/3] c++ -MMD -MF a.o.d -Werror=format-security -c a.cpp
  a.cpp:3:1: warning: unused variable 'error: x' [-Wunused-variable]
  [2/3] c++ -c b.cpp
  FAILED: b.o
  b.cpp:7:5: error: 'nms_kernel' was not declared in this scope
  b.cpp:9:5: error: expected ';' before 'return'
  ninja: build stopped: subcommand failed.
  RuntimeError: Error compiling objects for extension
  error: subprocess-exited-with-error
  x python setup.py bdist_wheel did not run successfully.
  note: This error originates from a subprocess, and is likely not a problem with pip.
  ERROR: Failed building wheel for mmcv
ERROR: Failed to build one or more wheels
"""


def test_the_cause_of_a_failed_compilation_is_the_compilers_error():
    lines, hint = setup_env.find_cause(COMPILE_LOG)
    assert lines == [
        'FAILED: b.o',
        "b.cpp:7:5: error: 'nms_kernel' was not declared in this scope",
        "b.cpp:9:5: error: expected ';' before 'return'",
    ]
    assert hint == ''


@pytest.mark.parametrize(
    ('line', 'hint'),
    [
        ('ERROR: [Errno 28] No space left on device', 'disk is full'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(: Temporary failure "
            "in name resolution')': /torch/",
            'could not be reached',
        ),
        ('ERROR: No matching distribution found for torch==2.13.0', 'no such version'),
        ('a.cpp:1:10: fatal error: Python.h: No such file or directory', 'python3-dev'),
    ],
)
def test_known_causes_come_with_advice(line, hint):
    output = 'Collecting things\n' * 300 + line + '\n' + COMPILE_LOG
    lines, advice = setup_env.find_cause(output)
    assert hint in advice
    assert lines[0] == line[:200]


def test_the_cause_is_short_whatever_the_output():
    many = ''.join(f'b.cpp:{i}:1: error: number {i}\n' for i in range(500))
    lines, _ = setup_env.find_cause(many)
    assert len(lines) == setup_env.CAUSE_LINES
    assert lines[0].endswith('number 0')
    unknown, _ = setup_env.find_cause('\n'.join(f'line {i}' for i in range(500)))
    assert unknown[-1] == 'line 499'
    assert len(unknown) <= setup_env.CAUSE_LINES
    assert setup_env.find_cause('') == ([], '')


# --- Running commands -----------------------------------------------------------------------------


@pytest.fixture
def runner(tmp_path):
    with setup_env.locked(tmp_path / 'env') as lock:
        yield setup_env.Runner(tmp_path / 'setup.log', lock)


def test_a_failure_shows_the_cause_and_the_log_keeps_it_all(runner, tmp_path, capsys):
    code = 'import sys; print("noise\\n" * 900); print("a.cpp:1:1: error: x"); sys.exit(3)'
    with pytest.raises(SetupError) as error:
        runner.run('building', [sys.executable, '-c', code])
    text = str(error.value)
    assert 'building: failed (exit status 3)' in text
    assert 'a.cpp:1:1: error: x' in text
    assert str(tmp_path / 'setup.log') in text
    assert len(text.splitlines()) < 6
    assert (tmp_path / 'setup.log').read_text().count('noise') > 900  # the command is logged too
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_commands_have_no_input(runner):
    runner.run('asking', [sys.executable, '-c', 'import sys; assert sys.stdin.read() == ""'])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal_is_one_line_and_elsewhere_sparse():
    screen, log = Terminal(), io.StringIO()
    on_screen = setup_env.Progress('mmcv', screen)
    in_log = setup_env.Progress('mmcv', log, every=3600)
    for step in range(1, 78):
        for progress in (on_screen, in_log):
            progress.read(f'  [{step}/77] c++ -c file{step}.cpp\n')
            progress.read('file.h:3: warning: [1/2] is not a counter\n')
            progress.tick()
    in_log.last -= 7200
    in_log.tick()
    on_screen.end('done')
    in_log.end('done')
    assert screen.getvalue().count('\n') == 1
    assert '\r\033[Kmmcv [57/77] 0s' in screen.getvalue()
    assert log.getvalue().splitlines() == ['mmcv ...', '  [77/77] 0s', '  done (0s)']


def alive(pid):
    """Whether a process runs; one that nobody waited for counts as gone."""
    try:
        state = Path(f'/proc/{pid}/stat').read_text(encoding='ascii').rsplit(')', 1)[1].split()[0]
    except OSError:
        return False
    return state not in 'ZX'


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_what_was_started(tmp_path, sign):
    """The set-up and the compilers below it end, with exit code 130 and no traceback."""
    pids = tmp_path / 'pids'
    body = f"""
import signal, sys
# Ignored in jobs that a shell has put in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(SCRIPT.parent)!r})
import setup_env
class Slow(setup_env.Environment):
    def ready(self):
        return False
    def set_up(self):
        self.runner.run('slow', ['sh', '-c', 'sleep 300 & echo $$ $! > {pids}; wait'])
setup_env.Environment = Slow
setup_env.ROOT = setup_env.Path({str(tmp_path)!r})
sys.exit(setup_env.main([]))
"""
    (tmp_path / 'requirements').mkdir()
    (tmp_path / 'requirements' / 'openmmlab.txt').write_text('mmcv==2.1.0\n')
    (tmp_path / 'requirements' / 'dev.txt').touch()
    process = subprocess.Popen(
        [sys.executable, '-c', body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert 'run it again' in errors
    assert 'Traceback' not in errors
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_a_second_set_up_waits_for_the_first(tmp_path, capsys):
    order = []

    def second():
        with setup_env.locked(tmp_path / 'env'):
            order.append('second')

    with setup_env.locked(tmp_path / 'env'):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append('first')
    thread.join(30)
    assert order == ['first', 'second']
    assert 'another set-up of env is running' in capsys.readouterr().out


# --- Pins -----------------------------------------------------------------------------------------


def test_pins_follow_includes_and_must_be_exact(tmp_path):
    (tmp_path / 'a.txt').write_text('# pins\n-r b.txt\nTyping_Extensions==4.16.0  # why\n')
    (tmp_path / 'b.txt').write_text('torch==2.13.0\n')
    expected = {'torch': '2.13.0', 'typing-extensions': '4.16.0'}
    assert setup_env.read_pins(tmp_path / 'a.txt') == expected
    (tmp_path / 'b.txt').write_text('torch>=2.13.0\n')
    with pytest.raises(SetupError, match=r'"torch>=2\.13\.0" is no exact pin'):
        setup_env.read_pins(tmp_path / 'a.txt')


@pytest.mark.parametrize('name', sorted(setup_env.STACKS))
def test_a_stack_holds_its_own_five_packages_and_the_build_tools(name):
    stack = setup_env.STACKS[name]
    pins = setup_env.read_pins(ROOT / stack.requirements)
    assert {*setup_env.BUILD_PACKAGES, stack.mmcv, 'torchvision', 'ninja'} <= {*pins}
    forks = {pin for pin in pins if pin.startswith('onedl-')}
    originals = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation', 'mmpretrain'} & {*pins}
    assert sorted([len(forks), len(originals)]) == [0, 5]
    if name == 'openmmlab':
        major = int(pins['setuptools'].split('.')[0])
        assert 78 <= major < 81


def test_the_example_requirements_are_the_default_stack():
    default = setup_env.read_pins(ROOT / 'requirements' / 'openmmlab.txt')
    assert setup_env.read_pins(ROOT / 'requirements.txt') == default


# --- An environment between runs ------------------------------------------------------------------


def install(site, name, version, complete=True):
    """Write what pip leaves of an installed package."""
    info = site / f'{name.replace("-", "_")}-{version}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    (info / 'RECORD').touch()
    if complete:
        (info / 'INSTALLER').write_text('pip\n')
    return info


@pytest.fixture
def project(tmp_path):
    """A repository of few pins."""
    (tmp_path / 'requirements').mkdir()
    (tmp_path / 'requirements' / 'openmmlab.txt').write_text('torch==2.13.0\nmmcv==2.1.0\n')
    (tmp_path / 'requirements' / 'dev.txt').write_text('pytest==9.2.0\n')
    (tmp_path / 'pyproject.toml').touch()
    (tmp_path / 'setup.py').touch()
    (tmp_path / '.venv').mkdir()
    return tmp_path


@pytest.fixture
def finished(project):
    """An environment that has been set up, and the folder of its packages."""
    command = [sys.executable, '-m', 'venv', '--without-pip', project / '.venv']
    subprocess.run(command, check=True)
    environment = setup_env.Environment(project, 'openmmlab')
    (site,) = (project / '.venv').glob('lib/python3*/site-packages')
    install(site, 'torch', '2.13.0+cpu')
    install(site, 'mmcv', '2.1.0')
    install(site, 'pytest', '9.2.0')
    install(site, 'hat-mm', '0.1.0')
    (site / 'mmcv').mkdir()
    (site / 'mmcv' / '_ext.cpython-311-x86_64-linux-gnu.so').touch()
    found = environment.survey()
    environment.write_stamp(
        key=environment.key(), project=environment.project_key(), python=found['python']
    )
    return environment, site


def test_a_finished_environment_is_left_alone(finished, monkeypatch, capsys):
    environment, _ = finished
    monkeypatch.setattr(setup_env, 'ROOT', environment.root)
    before = sorted(environment.path.rglob('*'))
    assert setup_env.main([]) == 0
    assert sorted(environment.path.rglob('*')) == before
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    'change',
    [
        lambda env, site: env.stamp.unlink(),
        lambda env, site: env.stamp.write_text('{"key": "'),
        lambda env, site: (env.root / 'requirements/dev.txt').write_text('pytest==9.3.0\n'),
        lambda env, site: (env.root / 'pyproject.toml').write_text('[project]\n'),
        lambda env, site: next(site.glob('torch-*')).rename(site / 'torch-2.14.0.dist-info'),
        lambda env, site: next(site.glob('mmcv/_ext*')).unlink(),
        lambda env, site: next(site.glob('hat_mm-*/METADATA')).unlink(),
        lambda env, site: (env.python.unlink(), env.python.symlink_to('/nowhere/python')),
        lambda env, site: (env.path / 'pyvenv.cfg').unlink(),
    ],
    ids=['no stamp', 'half a stamp', 'other pins', 'other project', 'other torch', 'no operators']
    + ['not installed', 'python gone', 'no environment'],
)
def test_any_change_makes_the_set_up_run(finished, change):
    environment, site = finished
    assert environment.ready()
    change(environment, site)
    if next(site.glob('torch-2.14*'), None):
        metadata = site / 'torch-2.14.0.dist-info' / 'METADATA'
        metadata.write_text(metadata.read_text().replace('2.13.0', '2.14.0'))
    assert not setup_env.Environment(environment.root, 'openmmlab').ready()


def test_a_moved_checkout_is_not_taken_for_ready(finished):
    environment, _ = finished
    moved = environment.root.with_name(environment.root.name + '-moved')
    environment.root.rename(moved)
    assert not setup_env.Environment(moved, 'openmmlab').ready()


def test_what_a_killed_pip_left_is_removed(finished):
    environment, site = finished
    partial = install(site, 'rich', '15.0.0', complete=False)
    (site / '~orch').mkdir()
    (site / '~orch-2.13.0.dist-info').mkdir()
    environment.remove_partial_installs()
    assert not partial.exists()
    assert list(site.glob('~*')) == []
    assert environment.ready()


def test_a_half_made_environment_is_made_anew(project, capsys):
    """A dangling interpreter and half a pip: what an interrupt or a removed Python leaves."""
    path = project / '.venv'
    (path / 'bin').mkdir()
    (path / 'bin' / 'python').symlink_to('/nowhere/python')
    (path / 'lib' / 'python3.11' / 'site-packages' / 'pip').mkdir(parents=True)
    (path / 'setup.log').write_text('kept\n')
    environment = setup_env.Environment(project, 'openmmlab')
    with setup_env.locked(path) as lock:
        environment.runner = setup_env.Runner(environment.log, lock)
        environment.check_machine()
        environment.make_venv()
    assert environment.fresh
    assert environment.survey() is not None
    assert (path / 'setup.log').read_text().startswith('kept\n')
    done = environment.ask('import pip')
    assert done.returncode == 0, done.stderr


def test_all_that_is_missing_is_said_at_once(project, programs, monkeypatch):
    programs('python3', fake_python([3, 9, 2]))
    monkeypatch.setattr(
        setup_env.shutil, 'disk_usage', lambda _: setup_env.shutil._ntuple_diskusage(0, 0, 0)
    )
    (project / '.venv' / 'kept').touch()
    environment = setup_env.Environment(project, 'openmmlab')
    with pytest.raises(SetupError) as error:
        environment.check_machine()
    assert 'Python 3.9.2' in str(error.value)
    assert 'GiB are needed' in str(error.value)
    assert (project / '.venv' / 'kept').exists()


# --- mmcv -----------------------------------------------------------------------------------------


class Builds(setup_env.Environment):
    """Records what install_mmcv does instead of running pip.

    `works` tells, for the wheel that was installed last, whether its operators load.
    """

    def __init__(self, root, works):
        super().__init__(root, 'openmmlab')
        self.interpreter = setup_env.Interpreter('/opt/python', (3, 11, 2), '/nowhere', True)
        self.works, self.installed, self.steps = works, None, []

    def checked(self, code):
        return json.dumps({'torch': '2.13.0+cpu', 'cuda': None, 'cards': [], 'home': None})

    def survey(self):
        return {'versions': {'mmcv': '2.1.0'} if self.installed else {}}

    def ask(self, code, *arguments):
        good = self.works(self.installed) if self.installed else False
        return subprocess.CompletedProcess([], 0 if good else 1, '', 'ImportError: undefined')

    def install_wheel(self, wheel, how):
        self.steps.append(how)
        self.installed = wheel.read_text()

    def build_wheel(self, device):
        self.steps.append('build')
        wheel = self.path / 'build' / 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
        wheel.parent.mkdir()
        wheel.write_text('built')
        return wheel


def test_a_compiled_mmcv_is_kept_and_used_again(project, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(project / 'cache'))
    first = Builds(project, works=lambda wheel: True)
    first.install_mmcv()
    assert first.steps == ['build', 'as compiled']
    assert not (first.path / 'build').exists()
    second = Builds(project, works=lambda wheel: True)
    second.install_mmcv()
    assert second.steps == ['from the cache']
    second.install_mmcv()  # it is in place
    assert second.steps == ['from the cache']


def test_a_cached_mmcv_that_does_not_fit_is_built_anew(project, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(project / 'cache'))
    Builds(project, works=lambda wheel: True).install_mmcv()
    (cached,) = (project / 'cache').rglob('*.whl')
    cached.write_text('without operators')
    environment = Builds(project, works=lambda wheel: wheel == 'built')
    environment.install_mmcv()
    assert environment.steps == ['from the cache', 'build', 'as compiled']
    assert cached.read_text() == 'built'


def test_an_mmcv_that_does_not_load_is_no_success_and_not_kept(project, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(project / 'cache'))
    with pytest.raises(SetupError, match=r'(?s)compiled but does not work.*undefined'):
        Builds(project, works=lambda wheel: False).install_mmcv()
    assert list((project / 'cache').rglob('*.whl')) == []


def test_the_key_of_a_cached_wheel_tells_builds_apart(project):
    environment = Builds(project, works=lambda wheel: True)
    cpu = json.loads(environment.checked(''))
    keys = {environment.wheel_key(cpu), environment.wheel_key(DEVICE)}
    keys.add(environment.wheel_key({**DEVICE, 'cards': ['sm80']}))
    keys.add(environment.wheel_key({**cpu, 'torch': '2.12.0+cpu'}))
    environment.interpreter = setup_env.Interpreter('/opt/python', (3, 12, 1), '', True)
    keys.add(environment.wheel_key(cpu))
    assert len(keys) == 5
    assert all(re.fullmatch(r'[\w.+-]+', key) for key in keys)


def test_a_failed_copy_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    wheel = tmp_path / 'a.whl'
    wheel.write_text('wheel')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(setup_env.shutil, 'copyfileobj', fail)
    with pytest.raises(OSError, match='disk full'):
        setup_env.keep_wheel(wheel, tmp_path / 'cache')
    assert list((tmp_path / 'cache').iterdir()) == []


def test_sources_are_unpacked_as_a_whole(tmp_path):
    (tmp_path / 'mmcv-2.1.0').mkdir()
    (tmp_path / 'mmcv-2.1.0' / 'setup.py').write_text('setup()')
    with tarfile.open(tmp_path / 'mmcv-2.1.0.tar.gz', 'w:gz') as tar:
        tar.add(tmp_path / 'mmcv-2.1.0', 'mmcv-2.1.0')
    (tmp_path / 'source.tmp').mkdir()  # left by an interrupted run
    setup_env.unpack(tmp_path / 'mmcv-2.1.0.tar.gz', tmp_path / 'source')
    assert (tmp_path / 'source' / 'setup.py').read_text() == 'setup()'
    assert not (tmp_path / 'source.tmp').exists()


# --- make -----------------------------------------------------------------------------------------


def make(*arguments, path=None):
    """Run make as from a shell of its own, also when make runs these tests."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k != 'STACK'}
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
    assert 'STACK=openmim is unknown; it is openmmlab (the default) or onedl' in done.stderr


def test_make_says_what_to_install_without_python(tmp_path):
    (tmp_path / 'sh').symlink_to('/bin/sh')
    done = make('setup', path=tmp_path)
    assert done.returncode != 0
    assert 'python3 is missing' in done.stderr
    assert 'apt-get install' in done.stderr


def test_demo_test_and_lint_set_up_first():
    for target in ('demo', 'test', 'test-slow', 'lint'):
        lines = make('--dry-run', target, 'STACK=onedl').stdout
        assert lines.index('tools/dev/setup_env.py --stack onedl') < lines.index('.venv-onedl/bin')


def test_ci_runs_lint_and_tests():
    script = ROOT / '.ci' / 'run'
    assert os.access(script, os.X_OK)
    assert re.findall(r'^make (\w+)$', script.read_text(), re.MULTILINE) == ['lint', 'test']
