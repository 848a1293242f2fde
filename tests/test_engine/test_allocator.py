"""The allocator's setting: memory stays with the process, where and when it is meant to."""

import json
import logging
import os
import platform

import pytest

import hat_mm
from hat_mm.engine import allocator, environment

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='only the allocator of glibc is set'
)
# A fresh interpreter in which nobody has decided anything.
UNDECIDED = dict.fromkeys(('HAT_MM_NO_MALLOPT', 'GLIBC_TUNABLES', 'LD_PRELOAD'), '')
UNDECIDED |= {name: '' for name in os.environ if name.startswith('MALLOC_')}


# --- what it promises -----------------------------------------------------------------------------

# Prints the minor page faults of each round, of passes and of single blocks, by thread. Of each MiB
# of a block a page is touched. More than 64 MiB fit into no arena of a thread's own, and glibc 2.36
# may take seven rounds to reuse an aligned block.
ROUNDS = """
import ctypes, json, resource, sys, threading
import hat_mm, torch

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would hide small ones
if sys.argv[1] == 'tuned':
    assert hat_mm.tune_allocator()
model, x = hat_mm.FasterViT(arch=0).eval(), torch.rand(1, 3, *map(int, sys.argv[2:]))
found = {}

def run_pass():
    with torch.no_grad():
        model(x)

def use_block():
    torch.empty(2**29, dtype=torch.uint8)[:: 2**20] = 1

def count(name, work, rounds):
    found[name] = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        found[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

def measure(thread):
    count(f'passes in the {thread} thread', run_pass, 6)
    count(f'blocks in the {thread} thread', use_block, 16)

worker = threading.Thread(target=measure, args=('worker',))
worker.start()
worker.join()
measure('main')
print(json.dumps(found))
"""


# The size in the documents takes a minute on two cores.
@pytest.fixture(
    scope='module', params=['640 1024', pytest.param('800 1280', marks=pytest.mark.slow)]
)
def faults(request, run_python):
    """What a fresh interpreter prints, with the allocator tuned and with hat_mm imported alone."""
    found = {}
    for setting in ('default', 'tuned'):
        done = run_python('-c', ROUNDS, setting, *request.param.split(), **UNDECIDED)
        assert done.returncode == 0, done.stderr
        found[setting] = json.loads(done.stdout)
    return found


@needs_glibc
@pytest.mark.parametrize('thread', ['main', 'worker'])
def test_from_the_fourth_pass_on_memory_is_there(thread, faults):
    default, tuned = (faults[setting][f'passes in the {thread} thread'] for setting in faults)
    assert min(default[3:]) > 5000
    # Once in a while a block fits into none of the gaps and the heap grows, in one of the passes.
    assert min(tuned[3:]) <= 0.05 * default[3], faults


@needs_glibc
@pytest.mark.parametrize('thread', ['main', 'worker'])
def test_a_block_too_large_for_an_arena_of_a_thread_is_used_again(thread, faults):
    default, tuned = (faults[setting][f'blocks in the {thread} thread'] for setting in faults)
    assert min(default) >= 512
    assert tuned[-1] <= 0.05 * 512, faults


# --- who decides ----------------------------------------------------------------------------------


@pytest.fixture
def undecided(monkeypatch):
    for name in UNDECIDED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('glibc', '2.36'))


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('HAT_MM_NO_MALLOPT', '1'),
        ('GLIBC_TUNABLES', 'glibc.cpu.x86_ibt=off:glibc.malloc.arena_max=4'),
        ('MALLOC_ARENA_MAX', '4'),
        ('LD_PRELOAD', '/usr/lib/libother.so:/usr/lib/libjemalloc.so.2'),
        ('LD_PRELOAD', '/opt/libtcmalloc_minimal.so.4'),
    ],
)
def test_what_the_user_has_set_stays(name, value, undecided, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    with caplog.at_level(logging.DEBUG, 'hat_mm'):
        assert hat_mm.tune_allocator() is False
    assert name in caplog.text


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        ('HAT_MM_NO_MALLOPT', ''),
        ('MALLOC_ARENA_MAX', ''),
        ('GLIBC_TUNABLES', 'glibc.cpu.x86_ibt=off'),
        ('LD_PRELOAD', '/usr/lib/libiomp5.so'),
    ],
)
def test_other_settings_are_no_decision(name, value, undecided, monkeypatch):
    monkeypatch.setenv(name, value)
    assert allocator.objection() == ''


@pytest.mark.parametrize('library', [('', ''), ('musl', '1.2.5')])
def test_other_c_libraries_are_left_alone(library, undecided, monkeypatch, caplog):
    monkeypatch.setattr(platform, 'libc_ver', lambda: library)
    with caplog.at_level(logging.DEBUG, 'hat_mm'):
        assert hat_mm.tune_allocator() is False
    assert 'the C library is not glibc' in caplog.text


# --- who calls it ---------------------------------------------------------------------------------

SHOW_LOG = """
import logging, runpy, sys
import torch

logging.basicConfig(level=logging.DEBUG)
torch.cuda.is_available = lambda: {gpu}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@needs_glibc
@pytest.mark.parametrize(
    ('command', 'environment', 'gpu', 'tuned'),
    [
        (['tools/train.py', '--help'], {}, False, True),
        (['tools/train.py', '--help'], {}, True, None),
        (['tools/test.py', '--help'], {'HAT_MM_NO_MALLOPT': '1'}, False, False),
    ],
)
def test_tools_call_it_on_a_cpu(command, environment, gpu, tuned, run_python):
    done = run_python('-c', SHOW_LOG.format(gpu=gpu), *command, **{**UNDECIDED, **environment})
    assert done.returncode == 0, done.stderr
    assert ('freed memory stays with the process' in done.stderr) is (tuned is True)
    assert ('allocator left alone' in done.stderr) is (tuned is False)


def test_what_came_of_it_in_words(undecided, monkeypatch):
    monkeypatch.setattr(environment, 'tune_allocator', lambda: True)
    assert environment.tune() == 'tuned'
    monkeypatch.undo()
    monkeypatch.setenv('HAT_MM_NO_MALLOPT', '1')
    assert environment.tune() == 'not tuned (HAT_MM_NO_MALLOPT is set)'
