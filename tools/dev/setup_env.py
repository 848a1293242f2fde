"""Build the virtual environment of one stack; safe to interrupt and to run again.

Needs nothing but a Python interpreter: `make setup`, `make demo` and `make test` call it. It
checks what the build needs before it starts, installs the pins of requirements/, compiles mmcv with
its operators (the compiled wheel is kept in the user's cache, so that a second checkout is quick),
proves that the result imports, and leaves a stamp that makes the next run a matter of a moment.
"""

from __future__ import annotations

import argparse
import contextlib
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
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORTED = ((3, 11), (3, 12))
GIB = 1024**3
# A compiler process of the mmcv build takes up to about 2 GiB.
MEMORY_PER_JOB = 2 * GIB
# Measured: the environment takes 1.7 GiB beside a CPU build of torch, the mmcv build 0.5 GiB.
DISK_FRESH_GIB = 4.0
DISK_WITH_TORCH_GIB = 1.5
# torch of a CUDA build brings some GiB of libraries along; a hint, as pip alone knows which it is.
DISK_CUDA_GIB = 12.0
CAUSE_LINES = 15
# Raise it when a change of this file must rebuild what earlier versions of it have set up.
STAMP_FORMAT = 1


@dataclass(frozen=True)
class Stack:
    """One set of packages that live together.

    Attributes:
        venv: Folder of the environment, relative to the repository.
        requirements: File with the pins.
        mmcv: Name of the distribution that is compiled.
    """

    venv: str
    requirements: str
    mmcv: str


STACKS = {
    'openmmlab': Stack('.venv', 'requirements/openmmlab.txt', 'mmcv'),
    'onedl': Stack('.venv-onedl', 'requirements/onedl.txt', 'onedl-mmcv'),
}
DEV_REQUIREMENTS = 'requirements/dev.txt'
PROJECT = 'hat-mm'
# Installed before anything else, so that nothing replaces torch and mmcv finds what it builds with.
BUILD_PACKAGES = ('torch', 'numpy', 'setuptools', 'wheel', 'ninja', 'packaging')


class SetupError(Exception):
    """Something a person has to fix; the message says what and how."""


# --- Requirement files ----------------------------------------------------------------------------


def normalise(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r'[-_.]+', '-', name).lower()


def read_pins(path: Path) -> dict[str, str]:
    """The `name==version` lines of a requirement file and of the files it includes.

    Raises:
        SetupError: A line is no exact pin.
    """
    pins = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        line = line.split('#')[0].strip()
        if not line:
            continue
        if line.startswith('-r '):
            pins.update(read_pins(path.parent / line[3:].strip()))
            continue
        name, found, version = line.partition('==')
        if not found:
            raise SetupError(f'{path}: "{line}" is no exact pin (name==version).')
        pins[normalise(name.strip())] = version.strip()
    return pins


# --- The machine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interpreter:
    """What one Python interpreter said of itself.

    Attributes:
        executable: The interpreter outside any virtual environment.
        version: Its version, three numbers.
        include: Folder that should hold Python.h.
        ensurepip: Whether it can set up virtual environments with pip in them.
    """

    executable: str
    version: tuple[int, ...]
    include: str
    ensurepip: bool

    @property
    def supported(self) -> bool:
        return self.version[:2] in SUPPORTED

    @property
    def has_headers(self) -> bool:
        return os.path.isfile(os.path.join(self.include, 'Python.h'))

    def __str__(self) -> str:
        return '.'.join(map(str, self.version))


PROBE = """
import importlib.util as u, json, sys, sysconfig
has = lambda name: u.find_spec(name) is not None
base = getattr(sys, '_base_executable', None) if sys.prefix != sys.base_prefix else None
print(json.dumps([base or sys.executable, sys.version_info[:3], sysconfig.get_paths()['include'],
                  has('venv') and has('ensurepip')]))
"""


def probe_python(command: str | Path) -> Interpreter | None:
    """Ask an interpreter about itself; None if it does not run (a version manager's shim, say)."""
    try:
        answer = subprocess.run(
            [str(command), '-I', '-c', PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        executable, version, include, ensurepip = json.loads(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Interpreter(executable, tuple(version), include, ensurepip)


def find_python(wanted: str | None) -> Interpreter:
    """The first interpreter that can carry the environment.

    Args:
        wanted: The one the user asked for, or None to look for one.

    Raises:
        SetupError: None is fit; says what the best one lacks.
    """
    names = [wanted] if wanted else ['python3', 'python3.12', 'python3.11', 'python']
    running = []
    for name in names:
        found = probe_python(name)
        if found is None:
            continue
        if not python_problems(found):
            return found
        running.append(found)
    if not running:
        raise SetupError(
            f'No working Python interpreter (tried {", ".join(names)}). Install Python 3.11 or '
            '3.12; on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev'
        )
    # Of several, the one of a right version needs the least.
    best = sorted(running, key=lambda found: not found.supported)[0]
    raise SetupError('\n'.join(python_problems(best)))


def python_problems(python: Interpreter) -> list[str]:
    """What an interpreter lacks, each with what to install."""
    if not python.supported:
        return [
            f'{python.executable} is Python {python}; needed is 3.11 or 3.12. Install one (Debian '
            'or Ubuntu: apt-get install python3.11 python3.11-venv python3.11-dev), or name it: '
            'make setup PYTHON=/path/to/python3.11'
        ]
    short = '{}.{}'.format(*python.version)
    problems = []
    if not python.ensurepip:
        problems.append(
            f'{python.executable} cannot make virtual environments (module venv or ensurepip is '
            f'missing). Debian or Ubuntu: apt-get install python{short}-venv'
        )
    if not python.has_headers:
        problems.append(
            f'The headers of {python.executable} are missing (no Python.h in {python.include}). '
            f'Debian or Ubuntu: apt-get install python{short}-dev'
        )
    return problems


CPP_PROBE = """
#include <Python.h>
#include <optional>
#include <string_view>
#include <vector>
std::optional<std::vector<int>> answer(std::string_view s) { return {{(int)s.size()}}; }
extern "C" long probe() { return PyLong_AsLong(PyLong_FromLong(answer("x")->at(0))); }
"""


def find_compiler(python: Interpreter) -> str:
    """A C++ compiler that really turns C++17 with Python's headers into a shared library.

    Raises:
        SetupError: There is none; quotes what the best one said.
    """
    wanted = os.environ.get('CXX')
    names = [wanted] if wanted else ['c++', 'g++', 'clang++']
    said = ''
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, 'probe.cpp')
        source.write_text(CPP_PROBE, encoding='utf-8')
        for name in names:
            command = [*name.split(), '-std=c++17', '-fPIC', '-shared', f'-I{python.include}']
            command += [str(source), '-o', str(Path(folder, 'probe.so'))]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            except (OSError, subprocess.SubprocessError):
                continue
            if done.returncode == 0:
                return name
            lines = find_cause(done.stdout + done.stderr)[0][:3]
            said = said or '\n'.join([f'{name} failed:', *(f'    {line}' for line in lines)])
    what = said or f'No C++ compiler found (tried {", ".join(names)}).'
    raise SetupError(
        f'{what}\nNeeded is a C++17 compiler. Install GCC 9 or newer; on Debian or Ubuntu: apt-get '
        'install build-essential (or name one: make setup CXX=/path/to/g++)'
    )


def check_disk(folder: Path, needed_gib: float) -> float:
    """The free space where the environment lies, in GiB.

    Raises:
        SetupError: It is less than `needed_gib`.
    """
    free = shutil.disk_usage(folder).free / GIB
    if free < needed_gib:
        raise SetupError(
            f'{folder}: {free:.1f} GiB of disk are free, about {needed_gib:.1f} GiB are needed. '
            'Free some (pip cache purge empties the cache of pip) or put the checkout elsewhere.'
        )
    return free


def available_memory() -> int | None:
    """Bytes that new processes can use, within the limits of a container; None if unknown."""
    known = []
    with contextlib.suppress(OSError, AttributeError):
        text = Path('/proc/meminfo').read_text(encoding='ascii')
        known.append(int(re.search(r'MemAvailable:\s+(\d+) kB', text).group(1)) * 1024)
    with contextlib.suppress(OSError, ValueError):
        known.append(int(Path('/sys/fs/cgroup/memory.max').read_text(encoding='ascii')))
    return min(known) if known else None


def build_jobs() -> int:
    """How many compilers to run at once: one a core, as far as the memory goes."""
    if os.environ.get('MAX_JOBS', '').isdigit():
        return max(1, int(os.environ['MAX_JOBS']))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = available_memory()
    return max(1, min(cores or 1, memory // MEMORY_PER_JOB if memory else 1))


# --- Running commands -----------------------------------------------------------------------------

# What a failing build prints that is no cause: pip's frames round the real error.
NOISE = re.compile(
    r'subprocess-exited-with-error|did not run successfully|This error originates from|'
    r'See above for output|exit code: \d|Failed building wheel|metadata-generation-failed|'
    r'ninja: build stopped|Error compiling objects|Failed to build|legacy-install-failure|'
    r'returned non-zero exit status|WARNING: |warning: '
)
CAUSES = (
    # (what the line looks like, what to do about it)
    (
        re.compile(r'No space left on device|Disk quota exceeded'),
        'The disk is full: free some space.',
    ),
    (
        re.compile(r'Killed signal|internal compiler error: Killed|virtual memory exhausted'),
        'The compiler ran out of memory: close programs or run `make setup MAX_JOBS=1`.',
    ),
    (
        re.compile(
            r'name resolution|NewConnectionError|ConnectTimeout|Read timed out|'
            r'Network is unreachable|Connection refused|ProxyError|SSLError|ConnectionResetError'
        ),
        'The package index could not be reached: check the network or the settings of pip.',
    ),
    (
        re.compile(r'Could not find a version|No matching distribution'),
        'The package index offers no such version for this Python: check the settings of pip.',
    ),
    (
        re.compile(r'do not match the hashes|BadZipFile|Bad CRC'),
        'A download was damaged: run it again.',
    ),
    (
        re.compile(r'Python\.h: No such file|pyconfig\.h: No such file'),
        'The Python headers are missing; on Debian or Ubuntu: apt-get install python3-dev',
    ),
    (re.compile(r'(fatal )?error: |^\s*ERROR: |Error: |^FAILED: |undefined reference'), ''),
)


def find_cause(output: str) -> tuple[list[str], str]:
    """Pick the lines of a failed command's output that say why.

    Args:
        output: All that the command printed.

    Returns:
        At most CAUSE_LINES lines, and a hint on what to do, empty if none is known.
    """
    lines = [line.strip()[:200] for line in output.splitlines() if line.strip()]
    found, hint = {}, ''
    for pattern, advice in CAUSES:
        hits = [line for line in lines if pattern.search(line)]
        # pip says some known causes in a WARNING; elsewhere warnings and its frames are noise.
        hits = [line for line in hits if not NOISE.search(line)] or (hits if advice else [])
        if hits:
            hint = hint or advice
            found.update(dict.fromkeys(hits[:5] if advice else hits))
    return list(found)[:CAUSE_LINES] or lines[-CAUSE_LINES:], hint


class Progress:
    """Says how far a step is: one line rewritten on a terminal, a line now and then elsewhere.

    Args:
        title: What is being done.
        stream: Where to write; the form follows from whether it is a terminal.
        every: Seconds between two lines where it is none.
    """

    COUNT = re.compile(r'^\s*\[(\d+)/(\d+)\]')

    def __init__(self, title: str, stream=None, every: float = 60.0) -> None:
        self.title = title
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.every = every
        self.start = self.last = time.monotonic()
        self.count = ''
        if not self.live:
            self._write(f'{title} ...\n')

    def read(self, line: str) -> None:
        """Take the counter of ninja's lines."""
        match = self.COUNT.match(line)
        if match:
            self.count = '[{}/{}] '.format(*match.groups())

    def tick(self) -> None:
        now = time.monotonic()
        if self.live:
            self._write(f'\r\033[K{self.title} {self.count}{seconds(now - self.start)}')
        elif now - self.last >= self.every:
            self.last = now
            self._write(f'  {self.count}{seconds(now - self.start)}\n')

    def end(self, how: str) -> None:
        start = f'\r\033[K{self.title}' if self.live else ' '
        self._write(f'{start} {how} ({seconds(time.monotonic() - self.start)})\n')

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


def seconds(value: float) -> str:
    minutes, rest = divmod(int(value), 60)
    return f'{minutes}m{rest:02d}s' if minutes else f'{rest}s'


class Runner:
    """Runs commands with all their output in one log file.

    Args:
        log: The log file; it is appended to.
        lock: A descriptor that the commands inherit, so that what outlives a killed set-up still
            holds its lock.
    """

    def __init__(self, log: Path, lock: int) -> None:
        self.log = log
        self.lock = lock

    def run(self, title: str, command: list, env: dict | None = None, cwd=None) -> None:
        """Run a command to its end.

        Raises:
            SetupError: It failed; with the cause and the path of the log.
        """
        command = [str(part) for part in command]
        progress = Progress(title)
        kept = []
        with self.log.open('a', encoding='utf-8', errors='replace') as log:
            log.write(f'\n$ {" ".join(command)}\n')
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                text=True,
                errors='replace',
                start_new_session=True,
                pass_fds=(self.lock,),
            )

            def read() -> None:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    kept.append(line)
                    progress.read(line)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            try:
                while process.poll() is None:
                    progress.tick()
                    reader.join(0.25)
                    if not reader.is_alive():
                        process.wait()
                reader.join(5)
            except BaseException:
                stop(process)
                progress.end('stopped')
                raise
        if process.returncode:
            progress.end('failed')
            lines, hint = find_cause(''.join(kept))
            raise SetupError(
                '\n'.join(
                    [f'{title}: failed (exit status {process.returncode}):']
                    + [f'    {line}' for line in lines]
                    + [hint] * bool(hint)
                    + [f'All of the output: {self.log}']
                )
            )
        progress.end('done')


def stop(process: subprocess.Popen) -> None:
    """End a command and all that it started."""
    for sign, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


# --- The environment ------------------------------------------------------------------------------

# Run by the environment's Python without importing any of the packages: the versions present.
LIST_VERSIONS = """
import glob, importlib.metadata as m, json, os, sys, sysconfig
site = sysconfig.get_paths()['purelib']
versions = {d.metadata['Name']: d.version for d in m.distributions(path=[site])}
print(json.dumps({'prefix': sys.prefix, 'python': sys.version, 'versions': versions,
                  'ops': bool(glob.glob(os.path.join(site, 'mmcv', '_ext*')))}))
"""
# The compiled operators load beside the installed torch and compute.
CHECK_OPS = """
import sys, torch
from mmcv.ops import get_compiling_cuda_version, nms, roi_align
boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 30., 30.]])
_, keep = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
assert keep.tolist() == [0, 2], keep
rois = torch.tensor([[0., 0., 0., 4., 4.]])
assert roi_align(torch.ones(1, 1, 8, 8), rois, (2, 2)).shape == (1, 1, 2, 2)
built = get_compiling_cuda_version()
if sys.argv[1] != 'cpu' and 'not available' in built:
    sys.exit('mmcv was compiled without CUDA')
"""
CHECK_IMPORTS = CHECK_OPS + 'import mmengine, mmdet, mmseg\n'
DEVICE = """
import json, torch
cuda = bool(torch.version.cuda and torch.cuda.is_available())
cards = sorted({'sm%d%d' % torch.cuda.get_device_capability(i)
                for i in range(torch.cuda.device_count())}) if cuda else []
home = None
if cuda:
    from torch.utils.cpp_extension import CUDA_HOME as home
print(json.dumps({'torch': torch.__version__, 'cuda': torch.version.cuda if cuda else None,
                  'cards': cards, 'home': home}))
"""


class Environment:
    """The virtual environment of one stack.

    Args:
        root: The repository.
        stack: One of STACKS.
        python: Interpreter the user asked for, or None.
    """

    def __init__(self, root: Path, stack: str, python: str | None = None) -> None:
        self.root = root
        self.stack = STACKS[stack]
        self.wanted = python
        self.path = root / self.stack.venv
        self.python = self.path / 'bin' / 'python'
        self.stamp = self.path / 'setup.json'
        self.log = self.path / 'setup.log'
        self.pins = read_pins(root / self.stack.requirements)
        self.dev_pins = read_pins(root / DEV_REQUIREMENTS)
        self.fresh = False
        self.runner = None

    # What is there

    def key(self) -> str:
        """Changes when the pins, the path or the interpreter change."""
        parts = [STAMP_FORMAT, sorted(self.pins.items()), sorted(self.dev_pins.items())]
        return hashlib.sha256(repr([*parts, str(self.path)]).encode()).hexdigest()

    def project_key(self) -> str:
        """Changes when the project has to be installed anew."""
        names = ('pyproject.toml', 'setup.py')
        return hashlib.sha256(b'\0'.join((self.root / n).read_bytes() for n in names)).hexdigest()

    def read_stamp(self) -> dict:
        try:
            stamp = json.loads(self.stamp.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, **fields: str) -> None:
        temporary = self.stamp.with_suffix('.tmp')
        temporary.write_text(json.dumps(fields, indent=1) + '\n', encoding='utf-8')
        os.replace(temporary, self.stamp)

    def ask(self, code: str, *arguments: str, timeout: int = 300) -> subprocess.CompletedProcess:
        """Run code in the environment."""
        command = [str(self.python), '-I', '-c', code, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=self.variables()
        )

    def survey(self) -> dict | None:
        """Versions in the environment; None if its Python does not run or belongs elsewhere."""
        try:
            answer = self.ask(LIST_VERSIONS, timeout=60)
            found = json.loads(answer.stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        if os.path.realpath(found['prefix']) != os.path.realpath(self.path):
            return None
        found['versions'] = {normalise(k): v for k, v in found['versions'].items() if k}
        return found

    def ready(self) -> bool:
        """Whether an earlier run has finished and nothing has changed since. Takes a moment."""
        stamp = self.read_stamp()
        if stamp.get('key') != self.key() or stamp.get('project') != self.project_key():
            return False
        if not self.python_fits():
            return False
        found = self.survey()
        if found is None or found['python'] != stamp.get('python') or not found['ops']:
            return False
        return PROJECT in found['versions'] and not self.differing(found['versions'])

    def python_fits(self) -> bool:
        """Whether the environment has the Python that was asked for."""
        if not self.wanted:
            return True
        asked, used = probe_python(self.wanted), probe_python(self.python)
        return bool(asked and used and asked.version == used.version)

    def differing(self, versions: dict[str, str]) -> list[str]:
        """Names of the pins that the environment does not hold."""
        pins = {**self.pins, **self.dev_pins}
        # A local label says how torch was built (2.13.0+cpu), not another release.
        return [n for n, v in pins.items() if versions.get(n, '').split('+')[0] != v]

    # Steps

    def set_up(self) -> None:
        """Bring the environment to the state that the stamp stands for."""
        self.check_machine()
        for _ in range(2):
            self.make_venv()
            self.install_torch()
            self.install_packages()
            self.install_mmcv()
            self.install_project()
            problem = self.verify()
            if not problem:
                found = self.survey()
                if found is not None:
                    python, project = found['python'], self.project_key()
                    self.write_stamp(key=self.key(), project=project, python=python)
                    return
            if self.fresh:
                break
            # What was there before was damaged in a way that pip does not see.
            say(f'{self.path.name} does not work, making it anew:\n{problem}')
            self.clear()
        raise SetupError(f'The packages are installed but do not work:\n{problem}\nLog: {self.log}')

    def check_machine(self) -> None:
        """Fail early, before the minutes of downloads and compilation.

        Raises:
            SetupError: Something is missing; names all of it.
        """
        problems = []
        present = probe_python(self.python)
        healthy = present is not None and present.supported and self.python_fits()
        usable = healthy and not python_problems(present)
        self.interpreter = None
        try:
            self.interpreter = present if usable else find_python(self.wanted)
        except SetupError as error:
            problems.append(str(error))
        compiler = None
        if self.interpreter is not None:
            try:
                compiler = find_compiler(self.interpreter)
            except SetupError as error:
                problems.append(str(error))
        has_torch = any(self.path.glob('lib/python3*/site-packages/torch'))
        try:
            needed = DISK_WITH_TORCH_GIB if has_torch else DISK_FRESH_GIB
            free = check_disk(self.path, needed)
        except SetupError as error:
            problems.append(str(error))
        if problems:
            raise SetupError('\n'.join(problems))
        self.compiler = compiler
        if not usable:
            self.clear()
        say(f'checks: Python {self.interpreter}, {compiler} compiles, {free:.0f} GiB of disk free')
        if not has_torch and free < DISK_CUDA_GIB:
            say(f'  if pip takes a CUDA build of torch, it needs {DISK_CUDA_GIB:.0f} GiB')

    def clear(self) -> None:
        """Empty the environment's folder, except for the log and the lock."""
        for entry in self.path.iterdir():
            if entry.name in (self.log.name, LOCK_NAME):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def make_venv(self) -> None:
        if self.survey() is not None:
            done = subprocess.run(
                [str(self.python), '-m', 'pip', '--version'], capture_output=True, timeout=120
            )
            if done.returncode == 0:
                self.remove_partial_installs()
                return
        self.clear()
        self.fresh = True
        command = [self.interpreter.executable, '-m', 'venv', self.path]
        self.runner.run(f'virtual environment {self.path.name}', command, self.variables())

    def remove_partial_installs(self) -> None:
        """Take away what a killed pip left, so that pip does not take it for installed.

        pip writes a package's INSTALLER and RECORD last, and renames what it is about to remove to
        a name with a tilde.
        """
        for site in self.path.glob('lib/python3*/site-packages'):
            for info in site.glob('*.dist-info'):
                if not ((info / 'INSTALLER').is_file() and (info / 'RECORD').is_file()):
                    shutil.rmtree(info)
            for left in site.glob('~*'):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink()

    def pip(self, title: str, *arguments: str, **extra: str) -> None:
        command = [self.python, '-m', 'pip', *arguments]
        self.runner.run(title, command, self.variables(**extra), cwd=self.root)

    def install_torch(self) -> None:
        found = self.survey() or {'versions': {}}
        if not {*BUILD_PACKAGES} & {*self.differing(found['versions'])}:
            return
        pinned = [f'{name}=={self.pins[name]}' for name in BUILD_PACKAGES]
        constraint = self.path / 'constraints.txt'
        constraint.write_text('\n'.join(f'{n}=={v}' for n, v in self.pins.items()) + '\n')
        title = f'torch {self.pins["torch"]} and the build tools'
        self.pip(title, 'install', *pinned, '-c', str(constraint))

    def install_packages(self) -> None:
        """All but mmcv, from one list, so that pip sees every pin at once."""
        found = self.survey() or {'versions': {}}
        missing = {*self.differing(found['versions'])} - {self.stack.mmcv}
        if not missing:
            return
        pins = {**self.pins, **self.dev_pins}
        pins.pop(self.stack.mmcv)
        listed = self.path / 'packages.txt'
        listed.write_text('\n'.join(f'{n}=={v}' for n, v in pins.items()) + '\n')
        self.pip(f'{len(missing)} packages', 'install', '--no-build-isolation', '-r', str(listed))
        # OpenCV's usual build needs the libraries of a desktop, which a server may lack.
        if self.ask('import cv2').returncode:
            headless = f'opencv-python-headless=={self.pins["opencv-python"]}'
            self.pip(
                'OpenCV without a display (libGL is not there)',
                *('install', '--no-deps', '--force-reinstall', headless),
            )

    # mmcv

    def install_mmcv(self) -> None:
        """Install mmcv with its operators: from the cache, or compiled here."""
        name, version = self.stack.mmcv, self.pins[self.stack.mmcv]
        device = json.loads(self.checked(DEVICE))
        target = 'cuda' if device['cuda'] else 'cpu'
        found = self.survey() or {'versions': {}}
        if found['versions'].get(name) == version and not self.ask(CHECK_OPS, target).returncode:
            return
        cache = cache_folder() / self.wheel_key(device)
        cached = sorted(cache.glob('*.whl'))
        if cached:
            self.install_wheel(cached[0], 'from the cache')
            if not self.ask(CHECK_OPS, target).returncode:
                return
            say('  the cached file does not fit, compiling it anew')
            cached[0].unlink()
        if device['cuda']:
            check_nvcc(device)
        check_disk(self.path, DISK_WITH_TORCH_GIB)
        wheel = self.build_wheel(device)
        self.install_wheel(wheel, 'as compiled')
        answer = self.ask(CHECK_OPS, target)
        if answer.returncode:
            lines, hint = find_cause(answer.stderr)
            text = '\n'.join([*lines, hint]).strip()
            raise SetupError(f'{name} was compiled but does not work:\n{text}\nLog: {self.log}')
        try:
            keep_wheel(wheel, cache)
        except OSError as error:
            say(f'  not kept for other checkouts: {error}')
        shutil.rmtree(self.path / 'build')

    def wheel_key(self, device: dict) -> str:
        """Names all that a compiled mmcv depends on."""
        name, version = self.stack.mmcv, self.pins[self.stack.mmcv]
        python = 'py{}.{}'.format(*self.interpreter.version)
        cuda = f'cuda{device["cuda"]}' if device['cuda'] else 'cpu'
        parts = [f'{name}-{version}', python, f'torch-{device["torch"]}', cuda, *device['cards']]
        return '_'.join([*parts, platform.system().lower(), platform.machine()])

    def install_wheel(self, wheel: Path, how: str) -> None:
        title = f'{self.stack.mmcv} {self.pins[self.stack.mmcv]} {how}'
        options = ('--no-deps', '--no-index', '--force-reinstall')
        self.pip(title, 'install', *options, str(wheel))

    def build_wheel(self, device: dict) -> Path:
        """Compile mmcv with its operators.

        The source is unpacked and built inside the environment's folder, so that an interrupted
        build goes on where it stopped.
        """
        name, version = self.stack.mmcv, self.pins[self.stack.mmcv]
        build = self.path / 'build'
        source = build / 'source'
        common = ('--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', name)
        if not (source / 'setup.py').is_file():
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            title = f'source of {name} {version}'
            self.pip(title, 'download', *common, '-d', str(build), f'{name}=={version}')
            unpack(next(build.glob('*.tar.gz')), source)
        jobs = build_jobs()
        flags = {
            # After the compiler's own -g: debug symbols cost time and hundreds of MB.
            'CFLAGS': f'{os.environ.get("CFLAGS", "")} -g0'.strip(),
            'CXXFLAGS': f'{os.environ.get("CXXFLAGS", "")} -g0'.strip(),
            'CXX': self.compiler,
            'MMCV_WITH_OPS': '1',
            'FORCE_CUDA': '1' if device['cuda'] else '0',
            'MAX_JOBS': str(jobs),
        }
        wheels = build / 'wheel'
        shutil.rmtree(wheels, ignore_errors=True)
        say(f'  compiling with {jobs} at a time: 15 to 30 minutes of one core in all')
        self.pip(
            f'{name} {version} with its operators',
            *('wheel', '-v', *common, '-w', str(wheels), str(source)),
            **flags,
        )
        return next(wheels.glob('*.whl'))

    # Project and proof

    def install_project(self) -> None:
        found = self.survey() or {'versions': {}}
        known = self.read_stamp().get('project') == self.project_key()
        if known and PROJECT in found['versions']:
            return
        options = ('--no-deps', '--no-build-isolation', '--no-index')
        self.pip('hat_mm, editable', 'install', *options, '-e', str(self.root))

    def verify(self) -> str:
        """What is wrong with the environment, empty if nothing is."""
        found = self.survey()
        if found is None:
            return f'{self.python} does not run'
        wrong = self.differing(found['versions'])
        if wrong:
            return 'other versions than pinned: ' + ', '.join(wrong)
        answer = self.ask(CHECK_IMPORTS, 'cpu')
        return '' if answer.returncode == 0 else '\n'.join(find_cause(answer.stderr)[0])

    def checked(self, code: str) -> str:
        answer = self.ask(code)
        if answer.returncode:
            raise SetupError('\n'.join(find_cause(answer.stderr)[0]))
        return answer.stdout

    def variables(self, **extra: str) -> dict[str, str]:
        """The variables that commands of the set-up run with."""
        env = dict(os.environ)
        # These would mix other packages in, or send ours elsewhere.
        for name in ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_USER'):
            env.pop(name, None)
        env.update(
            PATH=f'{self.path / "bin"}{os.pathsep}{env.get("PATH", os.defpath)}',
            VIRTUAL_ENV=str(self.path),
            PIP_DISABLE_PIP_VERSION_CHECK='1',
            PIP_NO_INPUT='1',
            PYTHONUNBUFFERED='1',
        )
        return {**env, **extra}


def check_nvcc(device: dict) -> None:
    """Check the CUDA compiler, which mmcv's operators need where a GPU is present.

    Args:
        device: What the installed torch says: its CUDA version and the toolkit it found.

    Raises:
        SetupError: nvcc is missing or of another major version than torch.
    """
    wanted = device['cuda']
    nvcc = os.path.join(device['home'], 'bin', 'nvcc') if device['home'] else 'nvcc'
    advice = (
        f'Install the CUDA toolkit {wanted} (the compiler nvcc, not only the driver) and set '
        'CUDA_HOME to its folder, or use a CPU build of torch.'
    )
    try:
        said = subprocess.run([nvcc, '--version'], capture_output=True, text=True, timeout=60)
        release = re.search(r'release (\d+)\.(\d+)', said.stdout)
    except (OSError, subprocess.SubprocessError):
        release = None
    if release is None:
        raise SetupError(
            f'torch is built for CUDA {wanted} and a GPU is present, but {nvcc} does not run. '
            + advice
        )
    if release.group(1) != wanted.split('.')[0]:
        raise SetupError(
            f'{nvcc} is of CUDA {".".join(release.groups())}, torch of CUDA {wanted}: the first '
            f'numbers must agree. {advice}'
        )


def cache_folder() -> Path:
    """Where compiled wheels are kept for other checkouts of this user."""
    base = os.environ.get('XDG_CACHE_HOME')
    return (Path(base) if base else Path.home() / '.cache') / 'hat_mm' / 'wheels'


def keep_wheel(wheel: Path, folder: Path) -> None:
    """Put a wheel into the cache, so that no reader ever sees half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, suffix='.tmp')
    try:
        with os.fdopen(descriptor, 'wb') as out, wheel.open('rb') as data:
            shutil.copyfileobj(data, out)
        os.chmod(temporary, 0o644)
        os.replace(temporary, folder / wheel.name)
    except BaseException:
        os.unlink(temporary)
        raise


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the one folder of a source archive as `folder`, at once or not at all."""
    temporary = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(temporary, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(temporary, filter='data') if hasattr(
            tarfile, 'data_filter'
        ) else tar.extractall(temporary)
    next(temporary.iterdir()).rename(folder)
    temporary.rmdir()


# --- Command line ---------------------------------------------------------------------------------

LOCK_NAME = '.lock'


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def locked(folder: Path):
    """Hold the environment for this process; wait for another set-up of it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f'another set-up of {folder.name} is running, waiting for it')
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--stack', default='openmmlab', choices=sorted(STACKS))
    parser.add_argument(
        '--python', help='interpreter for the environment (default: the first that is fit)'
    )
    return parser.parse_args(argv)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        environment = Environment(ROOT, args.stack, args.python or None)
        if environment.ready():
            return 0
        with locked(environment.path) as lock:
            if environment.ready():  # the set-up that was waited for did it
                return 0
            say(f'setting up {environment.path.name} (stack {args.stack})')
            environment.runner = Runner(environment.log, lock)
            environment.set_up()
            say(f'{environment.path.name} is ready')
    except SetupError as error:
        print(f'\nset-up failed: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ninterrupted; run it again and it goes on from here', file=sys.stderr)
        return 130
    except OSError as error:
        print(f'\nset-up failed: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
