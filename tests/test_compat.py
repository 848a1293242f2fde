"""Each known breakage: there without the repair, gone with it, on whichever stack is installed."""

import argparse
import functools
import importlib
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model.wrappers import MMDistributedDataParallel
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.structures import PixelData
from PIL import Image
from torch import nn

import hat_mm
from hat_mm import compat

checkpoint_module = importlib.import_module('mmengine.runner.checkpoint')
ROOT = Path(__file__).resolve().parents[1]
IS_ONEDL = hasattr(checkpoint_module, '_safe_torch_load')
IS_CPU_TORCH = torch.version.cuda is None and torch.version.hip is None


# --- the breakages, seen in a fresh interpreter with and without the repairs ----------------------

# Prints {name: None or the error}, and under 'said' the names that the log has at debug level
# after each probe. Each probe does what OpenMMLab's users do.
PROBES = r"""
import json, logging, os, sys
said = []
class Names(logging.Handler):
    def emit(self, record):
        if record.levelno == logging.DEBUG:
            said.append(record.getMessage().partition(': ')[0])
logger = logging.getLogger('hat_mm.compat')
logger.addHandler(Names())
logger.setLevel(logging.DEBUG)
import hat_mm
import torch
folder = sys.argv[1]

class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.path.join(folder, self.name),))
    def __init__(self, name):
        self.name = name

def evil_file(name, path):
    torch.save({'state_dict': {}, 'meta': Evil(name)}, path)
    return path

def torchvision():
    import torchvision

def toolbox():
    import mmengine.runner, mmengine.dist, mmengine.model, mmengine.utils

def plain_data():
    path = os.path.join(folder, 'plain.pth')
    from mmengine.runner import CheckpointLoader
    import numpy
    torch.save({'state_dict': {}, 'best': numpy.float64(1)}, path)
    CheckpointLoader.load_checkpoint(path)

def training_checkpoint():
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader
    path = os.path.join(folder, 'training.pth')
    torch.save({'message_hub': {'loss': HistoryBuffer([1.0], [1])}, 'state_dict': {}}, path)
    CheckpointLoader.load_checkpoint(path)

def malicious_file():
    from mmengine.runner import CheckpointLoader
    CheckpointLoader.load_checkpoint(evil_file('local', os.path.join(folder, 'evil.pth')))

def malicious_url():
    from mmengine.runner import CheckpointLoader
    torch.hub.set_dir(folder)
    os.makedirs(os.path.join(folder, 'checkpoints'), exist_ok=True)
    evil_file('url', os.path.join(folder, 'checkpoints', 'evil.pth'))  # as if downloaded before
    CheckpointLoader.load_checkpoint('https://nowhere.invalid/evil.pth')

def malicious_getattr():
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader
    class Attribute:
        def __reduce__(self):
            return (getattr, (HistoryBuffer, '__init__'))
    path = os.path.join(folder, 'getattr.pth')
    torch.save({'state_dict': {}, 'meta': Attribute()}, path)
    CheckpointLoader.load_checkpoint(path)

def no_pkg_resources():
    import mmengine
    sys.modules['pkg_resources'] = None
    mmengine.utils.get_installed_path('numpy')

def process_group():
    from mmengine.dist import init_dist
    from mmengine.model import MMDistributedDataParallel
    os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')
    store = torch.distributed.TCPStore('127.0.0.1', 0, 1, True, wait_for_workers=False)
    os.environ['MASTER_PORT'] = str(store.port)
    del store
    init_dist('pytorch', 'nccl')

def plain_model():
    from mmengine.model import MMDistributedDataParallel
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
    MMDistributedDataParallel(module=torch.nn.Conv2d(3, 4, 1))

def wrapped_model():
    from mmengine.model import MMDistributedDataParallel
    for _ in range(2):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.SyncBatchNorm(4))
        wrapped = MMDistributedDataParallel(module=model, device_ids=[0])
        wrapped(torch.rand(2, 3, 4, 4)).sum().backward()

found, steps = {}, {'import': list(said)}
for probe in (torchvision, toolbox, plain_data, training_checkpoint, malicious_file, malicious_url,
              malicious_getattr, no_pkg_resources, process_group, plain_model, wrapped_model):
    said.clear()
    try:
        probe()
        found[probe.__name__] = None
    except BaseException as error:
        found[probe.__name__] = f'{type(error).__name__}: {error}'
    steps[probe.__name__] = list(said)
found['said'] = steps
found['ran'] = sorted(n for n in ('local', 'url') if os.path.isdir(os.path.join(folder, n)))
print('FOUND ' + json.dumps(found))
"""


@pytest.fixture(scope='module')
def probe(run_python, tmp_path_factory):
    @functools.cache
    def run(off='', force='0'):
        folder = tmp_path_factory.mktemp('probe')
        environment = {
            'GLOO_SOCKET_IFNAME': 'lo',
            'HAT_MM_NO_COMPAT': off,
            'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': force,
        }
        done = run_python('-W', 'ignore', '-c', PROBES, str(folder), **environment)
        line = [line for line in done.stdout.splitlines() if line.startswith('FOUND ')]
        assert line, done.stdout + done.stderr
        return json.loads(line[0].removeprefix('FOUND ')), done.stdout + done.stderr

    return run


def torchvision_lacks_ops() -> bool:
    """Whether the installed torchvision is a build for another device than the installed torch."""
    version = importlib.metadata.version('torchvision') + _torchvision_tag()
    return IS_CPU_TORCH and '+cu' in version


def _torchvision_tag() -> str:
    spec = importlib.util.find_spec('torchvision')
    return (Path(spec.origin).parent / 'version.py').read_text().partition('\n')[0]


def test_the_breakages_are_there_without_the_repairs(probe):
    found, _ = probe(off='1')
    assert set(map(len, found['said'].values())) == {0}
    if torchvision_lacks_ops():
        assert 'torchvision::nms does not exist' in found['torchvision']
    else:
        assert found['torchvision'] is None
    if IS_ONEDL:
        assert found['training_checkpoint'] is None
        assert found['malicious_getattr'] is None
        assert 'local' in found['ran']
    else:
        assert 'Unsupported global' in found['training_checkpoint']
        assert 'pkg_resources' in found['no_pkg_resources']
    assert 'url' in found['ran']
    if not torch.cuda.is_available():
        assert found['process_group'] is not None
        assert 'device_ids' in found['wrapped_model']


def test_the_repairs_cure_them_whatever_the_environment_says(probe):
    found, _ = probe(force='1')
    assert found['ran'] == []
    assert 'it carries code or objects other than weights (posix.mkdir)' in found['malicious_file']
    for name in ('malicious_url', 'malicious_getattr'):
        assert found[name].startswith('UnpicklingError: '), name
    for name in ('torchvision', 'training_checkpoint', 'no_pkg_resources', 'process_group'):
        assert found[name] is None
    if not torch.cuda.is_available():
        assert found['wrapped_model'] is None


def test_a_repair_says_once_that_it_acted(probe):
    found, output = probe(force='1')
    said = found['said']
    names = [name for step in said.values() for name in step]
    assert sorted(names) == sorted(set(names))
    assert said['import'] == ['numpy-in-checkpoints']
    assert said['torchvision'] == ['torchvision-without-ops'] * torchvision_lacks_ops()
    assert {'history-buffer-in-checkpoints', 'configs-of-hat-mm'} <= set(said['toolbox'])
    assert ('pkg-resources' in said['toolbox']) is not IS_ONEDL
    # These changed what others call, and nobody has called it.
    assert not set(said['toolbox']) & {
        'unsafe-loading', 'code-in-checkpoint-configs', 'ddp-and-syncbn-on-cpu',
        'init-dist-without-cuda', 'scope-of-hat-mm-configs', 'models-in-mmpretrain',
    }  # fmt: skip
    assert said['plain_data'] == ['unsafe-loading']
    if not torch.cuda.is_available():
        assert said['process_group'] == ['init-dist-without-cuda']
        assert said['plain_model'] == []
        assert said['wrapped_model'] == ['ddp-and-syncbn-on-cpu']
        assert output.count('SyncBN is BN here') == 1
        assert 'WARNING' in output


# --- switched off ---------------------------------------------------------------------------------

NAMES = [breakage.name for breakage in compat.BREAKAGES]


def test_each_repair_can_be_switched_off_alone(probe):
    found, _ = probe(off=' configs-of-hat-mm,numpy-in-checkpoints, Unsafe-Loading')
    names = {name for step in found['said'].values() for name in step}
    assert not names & {'numpy-in-checkpoints', 'configs-of-hat-mm', 'unsafe-loading'}
    assert 'history-buffer-in-checkpoints' in names
    assert 'url' in found['ran']
    if not IS_ONEDL:
        assert found['plain_data'] is not None
    assert found['no_pkg_resources'] is None
    assert found['torchvision'] is found['process_group'] is None


# Prints for each value of the variable whether `import hat_mm` has repaired anything.
SWITCHES = """
import os, sys, torch
for value in sys.argv[1:]:
    os.environ['HAT_MM_NO_COMPAT'] = value
    old = list(sys.meta_path)
    import hat_mm
    print(sys.meta_path != old)
    sys.meta_path[:] = old
    for name in [name for name in sys.modules if name.startswith('hat_mm')]:
        del sys.modules[name]
assert not {'mmengine', 'mmcv', 'torchvision', 'cv2', 'matplotlib'} & set(sys.modules)
"""


def test_which_values_switch_off_and_that_the_import_is_light(run_python):
    all_off = ['1', 'TRUE', 'yes', 'on', ', '.join(NAMES)]
    on = ['', '0', 'false', 'unsafe-loadin,numpy-in1d']
    done = run_python('-c', SWITCHES, *all_off, *on)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['False'] * len(all_off) + ['True'] * len(on)
    (warning,) = done.stderr.splitlines()
    assert "'unsafe-loadin'" in warning
    assert all(name in warning for name in NAMES)


def test_the_page_lists_every_repair():
    page = (ROOT / 'docs' / 'compat.md').read_text(encoding='utf-8')
    rows = [line.split('`')[1] for line in page.splitlines() if line.startswith('| `')]
    assert rows == NAMES


# --- how the repairs are applied ------------------------------------------------------------------


def test_repairs_reach_modules_that_were_imported_before(run_python, tmp_path):
    script = """
import os, sys, pickle, torch
import mmengine.runner, mmengine.dist, mmengine.model, mmengine.utils, mmengine.config
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import CheckpointLoader
init = MMDistributedDataParallel.__init__
import hat_mm
assert MMDistributedDataParallel.__init__ is not init
sys.modules['pkg_resources'] = None
for module in (mmengine.utils, mmengine.config.config):
    module.get_installed_path('numpy')

class Evil:
    def __reduce__(self):
        return os.mkdir, (sys.argv[1] + '/ran',)

os.environ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'
torch.save({'state_dict': {}, 'meta': Evil()}, sys.argv[1] + '/evil.pth')
try:
    CheckpointLoader.load_checkpoint(sys.argv[1] + '/evil.pth')
except pickle.UnpicklingError:
    print('refused', os.listdir(sys.argv[1]))
"""
    done = run_python('-W', 'ignore', '-c', script, str(tmp_path))
    assert "refused ['evil.pth']\n" in done.stdout, done.stderr


def test_apply_twice_changes_nothing():
    before = MMDistributedDataParallel.__init__, list(sys.meta_path)
    compat.apply()
    assert (MMDistributedDataParallel.__init__, sys.meta_path) == before


def test_names_of_breakages_are_unique():
    assert len(set(NAMES)) == len(NAMES)


def test_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.5.1+cpu')
    with pytest.raises(
        compat.DependencyError, match=r'hat_mm needs torch>=2\.6, but torch 2\.5\.1'
    ):
        compat.require('mmengine')


# --- checkpoints ----------------------------------------------------------------------------------


def saved(content, path) -> str:
    torch.save(content, path)
    return str(path)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_training_checkpoint_survives(tmp_path):
    content = {
        'state_dict': {'weight': torch.ones(2)},
        'message_hub': {'log_scalars': {'loss': HistoryBuffer([1.0, 3.0], [1, 1])}},
        'meta': {
            'best': np.float64(0.5),
            'steps': np.int64(3),
            'classes': np.array(['a', 'b']),
            'args': argparse.Namespace(lr=0.1),
            'slice': slice(0, 2),
        },
    }
    loaded = CheckpointLoader.load_checkpoint(saved(content, tmp_path / 'a.pth'))
    history = loaded['message_hub']['log_scalars']['loss']
    assert history.statistics('mean') == 2.0
    assert history.statistics('current') == 3.0
    assert loaded['meta']['args'] == argparse.Namespace(lr=0.1)
    assert loaded['meta']['best'] == 0.5
    assert loaded['meta']['classes'].tolist() == ['a', 'b']


@pytest.mark.parametrize('package', ['numpy.core', 'numpy._core'])
def test_numpy_names_of_both_major_versions(package, tmp_path):
    buffer = io.BytesIO()
    torch.save({'n': np.float64(2.5)}, buffer, _use_new_zipfile_serialization=False)
    mine = (
        b'numpy._core.multiarray'
        if b'numpy._core' in buffer.getvalue()
        else b'numpy.core.multiarray'
    )
    path = tmp_path / 'numpy.pth'
    path.write_bytes(buffer.getvalue().replace(mine, f'{package}.multiarray'.encode()))
    assert CheckpointLoader.load_checkpoint(str(path)) == {'n': 2.5}


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (HistoryBuffer, '__init__'),
        (HistoryBuffer, '__subclasses__'),
        (HistoryBuffer, 'update'),
        (HistoryBuffer([1.0], [1]), 'mean'),
        (torch.Tensor, 'mean'),
        (slice, '__class__'),
    ],
)
def test_stand_in_answers_nothing_else(owner, name, tmp_path):
    path = saved({'state_dict': {}, 'meta': Call(getattr, owner, name)}, tmp_path / 'a.pth')
    with pytest.raises(pickle.UnpicklingError, match=f'asks for the attribute {name!r}'):
        CheckpointLoader.load_checkpoint(path)


@pytest.mark.parametrize('call', ['mkdir', 'eval', 'exec'])
def test_malicious_file_is_refused_and_never_run(call, tmp_path):
    target = tmp_path / 'ran'
    code = f'__import__("os").mkdir({str(target)!r})'
    calls = {'mkdir': (os.mkdir, str(target)), 'eval': (eval, code), 'exec': (exec, code)}
    path = saved({'state_dict': {}, 'meta': Call(*calls[call])}, tmp_path / 'evil.pth')
    model = nn.Linear(1, 1)
    for load in (CheckpointLoader.load_checkpoint, lambda file: load_checkpoint(model, file)):
        with pytest.raises(
            pickle.UnpicklingError, match=r'evil\.pth was not loaded: it carries code'
        ):
            load(path)
    assert not target.exists()


@pytest.fixture
def schemes(tmp_path, monkeypatch):
    """Puts a checkpoint where each scheme of mmengine finds it, and says under which path."""

    def place(scheme, content):
        cache = tmp_path / 'hub' / 'checkpoints'
        cache.mkdir(parents=True)
        url = 'https://nowhere.invalid/some.pth'
        path = saved(content, tmp_path / 'some.pth')
        saved(content, cache / 'some.pth')  # as if downloaded before
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
        monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
        for table in ('get_torchvision_models', 'get_mmcls_models'):
            monkeypatch.setattr(checkpoint_module, table, lambda: {'some': url})
        models = {'some': url, 'local': 'some.pth'}
        monkeypatch.setattr(checkpoint_module, 'get_external_models', lambda: models)
        backend = types.SimpleNamespace(get=lambda _: Path(path).read_bytes())
        monkeypatch.setattr(checkpoint_module, 'get_file_backend', lambda *_, **__: backend)
        stored = types.SimpleNamespace(name='some.pth', download=lambda to: shutil.copy(path, to))
        cloud = types.SimpleNamespace(modelcloud=types.SimpleNamespace(get=lambda _: stored))
        monkeypatch.setitem(sys.modules, 'pavi', cloud)
        monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
        CheckpointLoader.register_scheme(
            'mine://', lambda name, where: checkpoint_module.load_from_local(path, where)
        )
        return {'local': path, 'https': url}.get(scheme, scheme)

    return place


SCHEMES = (
    'local', 'https', 'pavi://some', 's3://some', 'torchvision://some', 'open-mmlab://some',
    'open-mmlab://local', 'mmcls://some', 'mine://some',
)  # fmt: skip


@pytest.mark.parametrize('scheme', SCHEMES)
def test_every_scheme_refuses_code_whatever_the_environment_says(
    scheme, schemes, tmp_path, monkeypatch
):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    target = tmp_path / 'ran'
    path = schemes(scheme, {'state_dict': {}, 'meta': Call(os.mkdir, str(target))})
    with pytest.raises(pickle.UnpicklingError, match=r'was not loaded: it carries code'):
        CheckpointLoader.load_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize('scheme', SCHEMES)
def test_loading_leaves_the_environment_and_other_threads_alone(
    scheme, schemes, tmp_path, monkeypatch
):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    own = saved({'mine': Path('some')}, tmp_path / 'own.pth')  # no weights
    path = schemes(scheme, {'state_dict': {'backbone.a': torch.ones(2)}})
    before = dict(os.environ)
    inside, finished = threading.Event(), threading.Event()

    def in_the_midst(storage, location):
        inside.set()
        assert finished.wait(60)

    with ThreadPoolExecutor() as pool:
        loading = pool.submit(CheckpointLoader.load_checkpoint, path, in_the_midst)
        try:
            assert inside.wait(60) or loading.result()
            assert dict(os.environ) == before
            assert torch.load(own, weights_only=False) == {'mine': Path('some')}
        finally:
            finished.set()
        assert next(iter(loading.result()['state_dict'].values())).tolist() == [1, 1]
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'hello, I am a text file\n',
        b'(',
        b'\x80\x02K',
        b'PK\x03\x04 damaged',
        bytes(range(99)),
    ],
)
def test_what_is_no_checkpoint_says_so(content, tmp_path):
    path = tmp_path / 'no.pth'
    path.write_bytes(content)
    with pytest.raises(
        pickle.UnpicklingError, match=r'no\.pth was not loaded: it is no checkpoint'
    ):
        CheckpointLoader.load_checkpoint(str(path))


@pytest.mark.parametrize(
    ('text', 'plain'),
    [
        ("a = dict(b=[1, -2.5, None], c=('x', True))\nd = {'e': set()}\n", True),
        ('import os\n', False),
        ("a = __import__('os').getcwd()\n", False),
        ("a = open('x')\n", False),
        ("_base_ = ['/tmp/other.py']\n", False),
        ('a = [x for x in (1, 2)]\n', False),
        ('a = dict(b=lambda: 1)\n', False),
        ("a = f'{1}'\n", False),
        ('a = (', False),
    ],
)
def test_the_config_of_a_checkpoint_is_executed_if_it_is_plain_settings(text, plain):
    # As Runner.resume calls it; what users pass themselves is theirs.
    namespace = {'__name__': 'mmengine.runner.runner', 'Config': Config, 'text': text}
    call = "cfg = Config.fromstring(text, file_format='.py')"
    if plain:
        exec(call, namespace)
        assert namespace['cfg'].a.c == ('x', True)
    else:
        with pytest.raises(pickle.UnpicklingError, match='the config text it carries is code'):
            exec(call, namespace)


def test_a_text_of_the_user_may_be_code():
    assert Config.fromstring('a = sum([1, 2])', file_format='.py').a == 3


# --- modules imported later -----------------------------------------------------------------------


def test_cpu_model_is_wrapped_with_plain_batch_norm(tmp_path):
    if torch.cuda.is_available():
        pytest.skip('this process has a GPU')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
        wrapped = MMDistributedDataParallel(module=model, device_ids=[0], broadcast_buffers=False)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in wrapped.modules())
        assert any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in wrapped.modules())
    finally:
        torch.distributed.destroy_process_group()


def test_installed_paths_are_found_without_pkg_resources():
    from mmengine.utils import get_installed_path, is_installed

    assert (
        Path(get_installed_path('mmengine'))
        == Path(importlib.import_module('mmengine').__file__).parent
    )
    assert is_installed('torch')
    assert not is_installed('no_such_package')
    with pytest.raises(Exception, match='no_such_package'):
        get_installed_path('no_such_package')


def test_configs_of_forks_are_found_by_their_module():
    known = {'numpy': 'numpy', 'yaml': 'PyYAML', 'json': 'no-such-package', 'absent': 'no-package'}
    packages = dict(known)
    [repair] = [b.repair for b in compat.BREAKAGES if b.name == 'configs-of-forks']
    repair(types.SimpleNamespace(MODULE2PACKAGE=packages), acted=print)
    # Only where the module is there and the distribution is not.
    assert packages == {**known, 'json': 'json'}


def test_lvis_is_scored_on_todays_numpy(monkeypatch):
    package, module = types.ModuleType('lvis'), types.ModuleType('lvis.eval')
    module.np = np
    monkeypatch.setitem(sys.modules, 'lvis', package)
    monkeypatch.setitem(sys.modules, 'lvis.eval', module)
    [repair] = [b.repair for b in compat.BREAKAGES if b.name == 'numpy-float']
    told = []
    repair(module, told.append)
    assert module.np.cumsum([1, 2]).astype(module.np.float).dtype == np.float64
    assert hasattr(np, 'float') or told


def test_an_empty_panoptic_prediction_is_a_picture_without_segments(tmp_path):
    visualization, structures = (
        pytest.importorskip(f'mmdet.{n}') for n in ('visualization', 'structures')
    )
    visualizer = visualization.DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=('thing', 'stuff'), palette=[(255, 0, 0), (0, 255, 0)])
    image = np.full((24, 32, 3), 100, np.uint8)
    for label, drawn in ((2, False), (1, True)):  # the class after the last is none
        sample = structures.DetDataSample()
        segments = torch.full((1, 24, 32), label)
        sample.pred_panoptic_seg = PixelData(sem_seg=segments)
        visualizer.add_datasample(
            'a', image, sample, draw_gt=False, out_file=str(tmp_path / 'a.png')
        )
        found = np.array(Image.open(tmp_path / 'a.png'))
        assert (found != 100).any() == drawn


def test_in1d_is_there_for_the_retrieval_metrics():
    importlib.import_module('mmpretrain.evaluation.metrics.retrieval')
    assert np.in1d([1, 2], [2]).tolist() == [False, True]


# --- the run-time check ---------------------------------------------------------------------------


def test_require_returns_the_package():
    assert compat.require('mmengine') is importlib.import_module('mmengine')


def test_missing_toolbox_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    with pytest.raises(compat.DependencyError) as caught:
        compat.require('mmdet')
    message = str(caught.value)
    assert 'mmdet is not installed' in message
    assert 'make setup' in message
    assert "pip install 'hat_mm[det]'" in message


def test_mmcv_without_operators_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    with pytest.raises(compat.DependencyError, match=r'compiled operators of mmcv.*mmcv-lite'):
        compat.require('mmseg')


@pytest.mark.parametrize('name', ['mmdet', 'mmdet.utils'])
def test_a_module_of_a_toolbox_is_as_the_toolbox(name):
    """In a process of its own: mmdet has been imported here."""
    code = f"""
import mmcv
from hat_mm import compat
mmcv.__version__ = '9.9.9'
try:
    compat.require({name!r})
except compat.DependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert f'{name} cannot be imported (MMCV==9.9.9 is used but incompatible' in done.stdout


def test_versions_that_a_toolbox_refuses_are_named(monkeypatch, tmp_path):
    (tmp_path / 'picky_toolbox.py').write_text("assert False, 'MMCV==9 is used but incompatible.'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        compat.DependencyError, match=r'picky_toolbox cannot be imported .MMCV==9 is'
    ):
        compat.require('picky_toolbox')


def test_version_is_exported():
    assert hat_mm.__version__


@pytest.mark.parametrize('kind', ['EpochBasedTrainLoop', 'IterBasedTrainLoop'])
def test_the_best_checkpoint_survives_a_better_one_of_the_same_name(kind, tmp_path):
    from mmengine.hooks import CheckpointHook

    by_epoch = kind == 'EpochBasedTrainLoop'
    # By iterations the epoch is always 0, and so all best files have one name.
    hook = CheckpointHook(save_best='score', rule='greater', by_epoch=True, max_keep_ckpts=1)
    saved = []

    class Runner:
        message_hub = MessageHub.get_instance(f'best{by_epoch}')
        work_dir = str(tmp_path)
        logger = logging.getLogger('best')
        epoch = iter = 0

        def save_checkpoint(self, out_dir, filename, *args, **kwargs):
            saved.append(filename)
            Path(out_dir, filename).write_text(filename)

    runner = Runner()
    hook.before_train(runner)
    for score in (1.0, 2.0):
        runner.epoch += by_epoch
        hook.after_val_epoch(runner, dict(score=score))
    best = f'best_score_epoch_{2 * by_epoch}.pth'
    assert [path.name for path in tmp_path.glob('best*')] == [best]
    assert best in saved
