"""Set up the virtual environment of one stack; safe to interrupt and to run again.

`make` calls it before every target, so it recognises a finished environment at once. It runs on any
Python from 3.8 on, without packages. It checks what the build needs, installs the pins of
requirements/, compiles mmcv with its operators, and checks that the result can be imported.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Stack -> folder of its environment, distribution that is compiled, and file of its own pins.
STACKS = {
    'openmmlab': ('.venv', 'mmcv', 'openmmlab.txt'),
    'onedl': ('.venv-onedl', 'onedl-mmcv', 'onedl.txt'),
    'latest': ('.venv-latest', 'mmcv', 'openmmlab.txt'),
}
# Of these, the stack 'latest' has the newest versions that the package index gives.
UNPINNED = r'^(torch|torchvision|numpy|opencv-python|opencv-python-headless)==.*'
GIB = 1024**3
INSTALL_PYTHON = (
    'Python 3.11 or 3.12 is needed (Debian or Ubuntu: apt-get install python3.11 python3.11-venv '
    'python3.11-dev); another than the default is named by make setup PYTHON=/path/to/python3.11'
)


class SetupError(Exception):
    """Something a person has to fix; the message says what and how."""


# --- The machine ----------------------------------------------------------------------------------


class Interpreter(NamedTuple):
    """Facts about a Python interpreter; `executable` is the one outside virtual environments."""

    executable: str
    version: list
    include: str
    has_venv: bool


PROBE = """
import importlib.util as u, json, sys, sysconfig
print(json.dumps([sys._base_executable, sys.version_info[:3], sysconfig.get_paths()['include'],
                  all(u.find_spec(name) for name in ('venv', 'ensurepip'))]))
"""


def probe_python(command: str) -> Interpreter | None:
    """Query an interpreter; None if it does not run (a version manager's shim, for example)."""
    try:
        said = subprocess.check_output([command, '-I', '-c', PROBE], stderr=subprocess.DEVNULL)
        return Interpreter(*json.loads(said))
    except (OSError, ValueError, TypeError, subprocess.CalledProcessError):
        return None


def python_problem(python: Interpreter) -> str:
    """What an interpreter lacks and what to install; empty if it is suitable."""
    if python.version[:2] not in ([3, 11], [3, 12]):
        version = '.'.join(map(str, python.version))
        return f'{python.executable} is Python {version}. {INSTALL_PYTHON}'
    missing = [] if python.has_venv else ['the modules venv and ensurepip']
    if not Path(python.include, 'Python.h').is_file():
        missing.append(f'its headers (Python.h in {python.include})')
    package = 'python{}.{}'.format(*python.version)
    return missing and (
        f'{python.executable} lacks {" and ".join(missing)}; on Debian or Ubuntu: '
        f'apt-get install {package}-venv {package}-dev'
    )


def find_python(wanted: str | None) -> tuple[Interpreter | None, str]:
    """The first suitable interpreter (only `wanted`, if given), and the problem if none is."""
    names = [wanted] if wanted else ['python3', 'python3.12', 'python3.11', 'python']
    found = [python for python in map(probe_python, names) if python]
    fit = [python for python in found if not python_problem(python)]
    if fit:
        return fit[0], ''
    problems = '\n'.join(dict.fromkeys(map(python_problem, found)))
    tried = ', '.join(names)
    return None, problems or f'No working Python interpreter (tried {tried}). {INSTALL_PYTHON}'


def compiler_problem(compiler: str) -> str:
    """Why a C++ compiler cannot build a C++17 library; empty if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text('#include <optional>\nstd::optional<int> answer() { return 42; }\n')
        command = [*compiler.split(), '-std=c++17', '-fPIC', '-shared', str(source)]
        command += ['-o', f'{folder}/probe.so']
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            return ''
        except OSError as error:
            said = error.strerror
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip()[:500]
    return (
        f'The C++ compiler {compiler} does not work: {said}\nInstall GCC 9 or newer (Debian or '
        'Ubuntu: apt-get install build-essential), or name one: make setup CXX=/path/to/g++'
    )


def build_jobs() -> int:
    """How many compilers to run at once: MAX_JOBS, or one per core and per 2 GiB of memory."""
    if os.environ.get('MAX_JOBS', '').isdigit():
        return max(1, int(os.environ['MAX_JOBS']))
    cores = len(os.sched_getaffinity(0))
    available = re.search(r'MemAvailable:\s+(\d+) kB', Path('/proc/meminfo').read_text())
    return max(1, min(cores, int(available.group(1)) * 1024 // (2 * GIB)))


# --- Why a command failed -------------------------------------------------------------------------

CAUSES = {
    'the disk is full': 'No space left on device|Disk quota exceeded',
    'the compiler ran out of memory, try `make setup MAX_JOBS=1`': 'Killed signal|memory exhausted',
    'the package index cannot be reached, check the network and the settings of pip': (
        'connection broken by|Read timed out|name resolution|Network is unreachable'
    ),
    'the package index has no such version for this Python': 'No matching distribution',
    'it does not compile': ': (fatal )?error: |CUDA_HOME environment|detected CUDA version',
}


def explain(output: str) -> str:
    """The likely cause with the line that shows it, or the last lines of the output."""
    lines = [line.strip()[:300] for line in output.splitlines() if line.strip()]
    for cause, pattern in CAUSES.items():
        for line in lines:
            if re.search(pattern, line):
                return f'{cause} ({line})'
    return '\n    '.join(['the last lines are', *lines[-15:]])


# --- The environment ------------------------------------------------------------------------------

# Checks that the operators load with the installed torch and compute, on a GPU if there is one.
CHECK_OPERATORS = """
import hat_mm, torch
from mmcv.ops import nms
device = 'cuda' if torch.cuda.is_available() else 'cpu'
boxes = [[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 30., 30.]]
scores = torch.tensor([0.9, 0.8, 0.7], device=device)
kept = nms(torch.tensor(boxes, device=device), scores, 0.5)[1].tolist()
assert kept == [0, 2], kept
"""


class Environment:
    """The virtual environment of one stack, with the requested interpreter, if any."""

    def __init__(self, stack: str, wanted: str | None = None) -> None:
        folder, self.mmcv, own = STACKS[stack]
        self.latest = stack == 'latest'
        self.wanted = wanted
        self.path = ROOT / folder
        self.python = self.path / 'bin' / 'python'
        self.compiler = os.environ.get('CXX') or 'c++'
        self.stamp = self.path / 'setup.json'
        self.log = self.path / 'setup.log'
        self.lock = self.path / '.lock'
        files = ('common.txt', 'dev.txt', own)
        self.common, self.dev, self.own = (ROOT / 'requirements' / name for name in files)
        self.pins = [line for line in self.own.read_text().splitlines() if '==' in line]
        self.env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
        self.env['PATH'] = f'{self.path / "bin"}{os.pathsep}{self.env.get("PATH", os.defpath)}'

    # What is there

    def key(self) -> str:
        """A hash of everything on which the environment depends."""
        inputs = [ROOT / 'pyproject.toml', ROOT / 'setup.py', self.common, self.dev, self.own]
        contents = [str(self.path).encode(), *(path.read_bytes() for path in inputs)]
        return hashlib.sha256(b'\0'.join(contents)).hexdigest()

    def contents(self) -> list:
        """The interpreter, the packages with their versions, and mmcv's compiled module."""
        patterns = ('pyvenv.cfg', 'lib/*/*/*.dist-info/RECORD', 'lib/*/*/mmcv/_ext*')
        files = [file for pattern in patterns for file in self.path.glob(pattern)]
        return sorted([os.path.realpath(self.python), *map(str, files)])

    def ready(self) -> bool:
        """Whether an earlier run has finished and everything it made is still there. Fast."""
        try:
            stamp = json.loads(self.stamp.read_text())
            same = stamp['key'] == self.key() and {*stamp['contents']} <= {*self.contents()}
        except (OSError, ValueError, TypeError, KeyError):
            return False
        return same and self.python.exists() and self.is_wanted()

    def is_wanted(self) -> bool:
        """Whether the environment has the Python that the user requested, if any."""
        if not self.wanted:
            return True
        asked, used = probe_python(self.wanted), probe_python(str(self.python))
        return bool(asked and used and asked.version == used.version)

    def usable(self) -> bool:
        """Whether packages can be installed into the existing environment."""
        settings = self.path / 'pyvenv.cfg'
        # A moved environment still names its old place.
        if not settings.is_file() or f'{self.path}\n' not in settings.read_text():
            return False
        python = probe_python(str(self.python))
        fit = python is not None and not python_problem(python) and self.is_wanted()
        return fit and not self.failure('import pip')

    def failure(self, code: str) -> str:
        """The error that Python code raises in the environment; empty if it succeeds."""
        command = [self.python, '-I', '-c', code]
        done = subprocess.run(command, capture_output=True, text=True, env=self.env)
        return (done.stderr.strip() or 'killed').splitlines()[-1] if done.returncode else ''

    # Steps

    def set_up(self) -> None:
        """Set the environment up and write the stamp, or raise SetupError."""
        fresh = not self.usable()
        python = self.check_machine(fresh)
        if fresh:
            self.clear()
            self.run(f'virtual environment {self.path.name}', [python, '-m', 'venv', self.path])
        self.install_packages()
        problem = self.failure('import hat_mm, mmengine')
        if not problem:
            self.install_mmcv()
            problem = self.failure('import hat_mm, mmdet, mmseg, mmpretrain')
        if not problem:
            stamp = {'key': self.key(), 'contents': self.contents()}
            self.stamp.write_text(json.dumps(stamp, indent=1))
        elif fresh:
            raise SetupError(f'the packages are installed but do not work: {problem}')
        else:
            # The existing environment is damaged in a way that pip does not notice.
            print(f'{self.path.name} does not work ({problem}), making it anew')
            self.clear()
            self.set_up()

    def check_machine(self, fresh: bool) -> str:
        """Find a Python; report all that is missing before the build, which takes minutes."""
        python, no_python = find_python(self.wanted if fresh else str(self.python))
        no_compiler = compiler_problem(self.compiler)
        free = shutil.disk_usage(self.path).free / GIB
        # Measured: 1.7 GiB beside a CPU build of torch, and 0.5 GiB for the build of mmcv.
        needed = 1.5 if not fresh and any(self.path.glob('lib/*/*/torch')) else 4.0
        no_disk = free < needed and (
            f'{self.path}: {free:.1f} GiB of disk are free, about {needed} GiB are needed (12 GiB '
            'with a CUDA build of torch). `pip cache purge` empties the cache of pip.'
        )
        problems = [problem for problem in (no_python, no_compiler, no_disk) if problem]
        if problems:
            raise SetupError('\n'.join(problems))
        version = '.'.join(map(str, python.version))
        print(f'checks: Python {version}, {self.compiler} compiles, {free:.0f} GiB of disk free')
        return python.executable

    def clear(self) -> None:
        """Empty the environment's folder, except for the log and the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry not in (self.log, self.lock):
                entry.unlink()

    def run(self, title: str, command: list, **variables: str) -> None:
        """Run a command with its output in the log."""
        started = time.monotonic()
        live = sys.stdout.isatty()
        print(f'{title} ...')
        with self.log.open('ab') as log:
            log.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
            log.flush()
            before = log.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.env, **variables},
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            self.watch(process, live, started, before)
        finally:
            if process.poll() is None:  # interrupted: with all that it has started
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if process.returncode:
            cause = explain(self.log.read_bytes()[before:].decode(errors='replace'))
            raise SetupError(f'{title}: {cause}\nAll of the output: {self.log}')
        print('{}  done ({:.0f} s)'.format('\r\033[K' if live else '', time.monotonic() - started))

    def watch(self, process: subprocess.Popen, live: bool, started: float, before: int) -> None:
        """Wait for a process; show the time and ninja's counter."""
        count = ''
        while process.poll() is None:
            try:
                process.wait(1 if live else 60)
            except subprocess.TimeoutExpired:
                latest = self.log.read_bytes()[before:][-100_000:].decode(errors='replace')
                count = (re.findall(r'^\s*(\[\d+/\d+\] )', latest, re.MULTILINE) or [count])[-1]
                line = '  {}{}m{:02d}s'.format(count, *divmod(int(time.monotonic() - started), 60))
                print(f'\r{line}' if live else f'{line}\n', end='', flush=True)

    def pip(self, title: str, *arguments: str | Path, **variables: str) -> None:
        self.run(title, [self.python, '-m', 'pip', *arguments], **variables)

    def install_packages(self) -> None:
        """Install all but mmcv in one step, so that pip sees every pin at once; then hat_mm."""
        for info in self.path.glob('lib/*/*/*.dist-info'):
            if not (info / 'RECORD').is_file():  # pip was killed and would consider it installed
                shutil.rmtree(info)
        others = [pin for pin in self.pins if not pin.startswith(f'{self.mmcv}==')]
        files = (self.common, self.dev)
        if self.latest:
            files = [self.unpin(file) for file in files]
        lists = [word for file in files for word in ('-r', file)]
        self.pip('torch, the toolboxes and what they need', 'install', *lists, *others)
        # OpenCV's default build needs desktop libraries, which a server may lack.
        if self.failure('import cv2'):
            (opencv,) = self.path.glob('lib/*/*/opencv_python-*.dist-info')
            version = opencv.stem.partition('-')[2]
            words = ('install', '--no-deps', '--force-reinstall')
            self.pip('OpenCV without a display', *words, f'opencv-python-headless=={version}')
        words = ('install', '--no-deps', '--no-build-isolation', '--no-index')
        self.pip('hat_mm, editable', *words, '-e', ROOT)

    def unpin(self, file: Path) -> Path:
        """A copy of a list of requirements, for the stack 'latest'."""
        copy = self.path / file.name
        copy.write_text(re.sub(UNPINNED, r'\1', file.read_text(), flags=re.M))
        return copy

    def install_mmcv(self) -> None:
        """Install mmcv with its operators: from the user's cache, or compiled here."""
        pin = next(pin for pin in self.pins if pin.startswith(f'{self.mmcv}=='))
        name = pin.replace('==', '-')
        found = self.path.glob(f'lib/*/*/{name.replace("onedl-", "onedl_")}.dist-info')
        if any(found) and not self.failure(CHECK_OPERATORS):
            return
        # Everything that a compiled mmcv depends on, except the GPU: on another one it fails the
        # check.
        (torch,) = self.path.glob('lib/*/*/torch-*.dist-info')
        build = [name, torch.parts[-3], torch.stem, platform.system(), platform.machine()]
        base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        cache = Path(base, 'hat_mm', 'wheels', '_'.join(build).lower())
        install = ('install', '--no-deps', '--no-index', '--force-reinstall')
        for wheel in cache.glob('*.whl'):
            self.pip(f'{name} from the cache', *install, wheel)
            if not self.failure(CHECK_OPERATORS):
                return
            print('  the cached file does not fit, compiling it anew')
        wheel = self.compile_mmcv(pin)
        self.pip(f'{name} as compiled', *install, wheel)
        problem = self.failure(CHECK_OPERATORS)
        if problem:
            raise SetupError(f'{name} was compiled but does not work: {problem}')
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f'{wheel.name}.{os.getpid()}.part'
        shutil.copyfile(wheel, part)
        os.replace(part, cache / wheel.name)  # so that no other set-up sees a partial file
        shutil.rmtree(self.path / 'build')

    def compile_mmcv(self, pin: str) -> Path:
        """Compile mmcv in a folder where an interrupted build can continue; returns the wheel."""
        build = self.path / 'build' / pin
        common = ('--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', self.mmcv)
        self.pip(f'source of {pin}', 'download', *common, '-d', build, pin)
        (archive,) = build.glob('*.tar.gz')
        shutil.unpack_archive(str(archive), str(build / 'source'))
        (source,) = (build / 'source').iterdir()
        if self.standard() != 'c++17':  # which mmcv names after all flags that can be given
            script = source / 'setup.py'
            script.write_text(script.read_text().replace('c++17', self.standard()))
        jobs = str(build_jobs())
        flags = f'{os.environ.get("CPPFLAGS", "")} -g0'
        self.pip(
            f'{pin} with its operators ({jobs} files at a time, minutes)',
            *('wheel', '-v', *common, '-w', build / 'wheel', source),
            MMCV_WITH_OPS='1',
            MAX_JOBS=jobs,
            CXX=self.compiler,
            # Added to Python's own flags, because debug symbols cost time and hundreds of MB.
            CPPFLAGS=f'{flags} {self.precompile(build, flags)}',
        )
        return next((build / 'wheel').glob('*.whl'))

    def standard(self) -> str:
        """The standard of C++ that torch's headers need: C++20 from torch 2.14 on."""
        headers = self.path.glob('lib/*/*/torch/include/ATen/ATen.h')
        needs_20 = any('C++20 or later' in header.read_text() for header in headers)
        return 'c++20' if needs_20 else 'c++17'

    def precompile(self, build: Path, flags: str) -> str:
        """Compile the header that every file of mmcv begins with once; returns the flag for it.

        Parsing it takes most of the build. GCC uses the compiled header where all other flags are
        the same as here, and otherwise, as in a build for a GPU, reads the header itself. Clang
        would end with an error.
        """
        compiler = self.compiler.split()
        version = subprocess.run([*compiler, '--version'], stdout=subprocess.PIPE, text=True).stdout
        if 'Free Software Foundation' not in version:
            return ''
        header = build / 'torch.h'
        header.write_text('#include <torch/types.h>\n')
        code = (
            'import sysconfig, torch.utils.cpp_extension as e\n'
            "print(sysconfig.get_config_var('CFLAGS'), *('-I' + path for path in "
            "[*e.include_paths(), sysconfig.get_paths()['include']]))"
        )
        try:
            own = subprocess.check_output(
                [self.python, '-I', '-c', code], env=self.env, stderr=subprocess.DEVNULL, text=True
            )
            words = [*compiler, '-x', 'c++-header', *own.split(), *flags.split(), '-fPIC']
            words += [
                f'-std={self.standard()}',
                '-DTORCH_API_INCLUDE_EXTENSION_H',
                '-DTORCH_EXTENSION_NAME=_ext',
            ]
            self.run('header of torch', [*words, str(header), '-o', f'{header}.gch'])
        except (subprocess.CalledProcessError, SetupError):
            return ''
        return f'-include {header}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--stack', default='openmmlab', choices=sorted(STACKS))
    parser.add_argument('--python', help='interpreter to use (default: the first that is fit)')
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    environment = Environment(args.stack, args.python)
    if environment.ready():
        return 0
    try:
        environment.path.mkdir(exist_ok=True)
        with environment.lock.open('a') as lock:
            print(f'setting up {environment.path.name}; all output is in {environment.log}')
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another set-up to finish
            if not environment.ready():
                environment.set_up()
    except (SetupError, OSError) as error:
        print(f'\nset-up failed: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted; run it again and it goes on from here', file=sys.stderr)
        return 130
    print(f'{environment.path.name} is ready')
    return 0


if __name__ == '__main__':
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) == signal.SIG_DFL:
            signal.signal(sign, signal.default_int_handler)  # ends the running step, too
    sys.exit(main())
