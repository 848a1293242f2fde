"""MIM's commands on an installed wheel, and ``hat_mm::`` in the configs of users."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from loopback import serving
from mmengine.config import Config
from mmengine.hub import get_config
from shapes import make_dataset
from test_packaging import build, copy_sources

from hat_mm.weights import fileio
from hat_mm.zoo import metafiles

ROOT = Path(__file__).resolve().parent.parent
TOY = 'mask-rcnn_hat-net-toy_fpn_shapes'
WEIGHTS = 'hat-net-toy.pth'

needs_mim = pytest.mark.skipif(
    any(d.name.startswith('onedl-') for d in importlib.metadata.distributions() if d.name),
    reason='openmim needs pkg_resources, which setuptools 84 of this stack does not have; '
    'onedl-mim looks for hat_mm in its dist-info folder',
)


# --- a wheel in an environment of its own ---------------------------------------------------------


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """The URL of a folder with one small checkpoint, on this machine."""
    folder = tmp_path_factory.mktemp('served')
    torch.save({'state_dict': {'weight': torch.arange(6.0)}}, folder / WEIGHTS)

    with serving(folder) as address:
        yield f'{address}/{WEIGHTS}', folder / WEIGHTS


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, server):
    """A wheel of the project, whose model index also has a toy model with weights."""
    folder = tmp_path_factory.mktemp('wheel')
    source = copy_sources(folder / 'source')
    index = source / 'model-index.yml'
    imported = yaml.safe_load(index.read_text())['Import']
    index.write_text(yaml.safe_dump({'Import': [*imported, 'configs/toy/metafile.yml']}))
    entry = {
        'Name': TOY,
        'In Collection': 'Toy',
        'Config': f'configs/toy/{TOY}.py',
        'Metadata': {'Training Data': 'shapes', 'Epochs': 1},
        'Results': [
            {
                'Task': 'Object Detection',
                'Dataset': 'shapes',
                'Metrics': {'box AP': 12.5, 'box AP (authors)': 40.0},
            }
        ],
        'Weights': server[0],
    }
    metafile = {'Collections': [{'Name': 'Toy'}], 'Models': [entry]}
    (source / 'configs' / 'toy' / 'metafile.yml').write_text(yaml.safe_dump(metafile))
    return build('wheel', source, folder / 'wheel')


@pytest.fixture(scope='module')
def run(tmp_path_factory, wheel) -> Callable[..., subprocess.CompletedProcess]:
    """Runs Python where the wheel is installed and nothing of the checkout is found.

    All but hat_mm is borrowed from the environment of the tests. Its editable install, a file that
    is read in its own environment alone, has no say there.
    """
    folder = tmp_path_factory.mktemp('clean')
    venv.create(folder / 'env')
    python = folder / 'env' / 'bin' / 'python'
    (site,) = (folder / 'env').glob('lib/python3*/site-packages')
    borrowed = [path for path in sys.path if path.endswith('site-packages')]
    # Python 3.12 has no distutils, which mmengine needs; setuptools finds its own by such a file.
    shim = 'import _distutils_hack; _distutils_hack.add_shim()'
    (site / 'borrowed.pth').write_text('\n'.join([*borrowed, shim]))
    environment = {**os.environ, 'HOME': str(folder), 'NO_PROXY': '*', 'PYTHONWARNINGS': 'ignore'}
    environment.pop('PYTHONPATH', None)

    def run(*arguments: object, cwd: Path = folder) -> subprocess.CompletedProcess:
        return subprocess.run(
            [python, *map(str, arguments)],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )

    options = ('--no-deps', '--no-index', '--ignore-installed', '--no-compile')
    done = run('-m', 'pip', 'install', *options, wheel)
    assert done.returncode == 0, done.stderr
    done = run('-c', 'import hat_mm; print(hat_mm.__file__)')
    assert Path(done.stdout.strip()).is_relative_to(site), done.stdout + done.stderr
    return run


@pytest.fixture(scope='module')
def mim(run) -> Callable[..., str]:
    """Runs a command of mim and returns what it printed."""

    def mim(*arguments: object, **options: Path) -> str:
        done = run('-m', 'mim', *arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return mim


def found_by(search: str) -> list[str]:
    return re.findall(r'config id: (\S+)', search)


# --- mim ------------------------------------------------------------------------------------------


@needs_mim
def test_search_by_config(mim):
    name = 'mask-rcnn_fastervit-0_fpn_1x_coco'
    found = mim('search', 'hat_mm', '--config', name, '--display-width', 200)
    assert found_by(found) == [name]
    assert re.search(rf'^config +configs/fastervit/{name}\.py$', found, re.MULTILINE)
    assert re.search(r'^training_data +coco$', found, re.MULTILINE)


@needs_mim
def test_search_by_model_and_dataset_with_chosen_fields(mim):
    arguments = ('--model', 'HAT-Net', '--dataset', 'ImageNet-1k', '--field', 'epochs')
    found = mim('search', 'hat_mm', *arguments)
    assert found_by(found) == [
        f'hat-net-{arch}_8xb128_in1k' for arch in ('tiny', 'small', 'medium', 'large')
    ]
    lines = [line for line in found.splitlines() if line and line[0] not in '-c']
    assert lines == ['epochs  300'] * 4


@needs_mim
def test_search_by_metric(mim):
    found = found_by(mim('search', 'hat_mm', '--condition', 'box_ap>12'))
    assert TOY in found
    assert 'mask-rcnn_hat-net-tiny_fpn_1x_coco' in found  # by what the authors report
    assert TOY not in found_by(mim('search', 'hat_mm', '--condition', 'box_ap>50'))


@needs_mim
def test_search_finds_every_model_of_the_index(mim):
    expected = {TOY}
    for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        expected |= {model['Name'] for model in metafiles.load(ROOT / path)['Models']}
    assert {*found_by(mim('search', 'hat_mm'))} == expected


@needs_mim
def test_download_fetches_the_weights_and_writes_the_config(mim, server, tmp_path):
    said = mim('download', 'hat_mm', '--config', TOY, '--dest', tmp_path)
    assert f'Successfully downloaded {WEIGHTS}' in said
    assert (tmp_path / WEIGHTS).read_bytes() == server[1].read_bytes()
    written = Config.fromfile(tmp_path / f'{TOY}.py')
    assert written.to_dict() == Config.fromfile(ROOT / 'configs' / 'toy' / f'{TOY}.py').to_dict()


OPTIONS = (
    '--cfg-options',
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=2',
    'model.test_cfg.rcnn.max_per_img=5',
    *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
    *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
)


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    """A folder with the toy set where the toy configs look for it."""
    folder = tmp_path_factory.mktemp('work')
    make_dataset(folder / 'data' / 'shapes', num_train=2, num_val=1)
    return folder


@pytest.fixture(scope='module')
def checkpoint(mim, work_dir):
    """What `mim train` leaves, given the name of a config alone."""
    command = ('train', 'hat_mm', f'{TOY}.py', '--gpus', 0, '--work-dir', 'toy')
    said = mim(*command, *OPTIONS, cwd=work_dir)
    assert 'Training finished successfully' in said
    return work_dir / 'toy' / 'epoch_1.pth'


@needs_mim
def test_train_by_the_name_of_a_config(checkpoint):
    weights = fileio.read(checkpoint)['state_dict']
    assert any(name.startswith('backbone.stages.0.') for name in weights)


@needs_mim
@pytest.mark.parametrize('config', [f'{TOY}.py', pytest.param('mine.py', marks=pytest.mark.slow)])
def test_test(mim, work_dir, checkpoint, config):
    (work_dir / 'mine.py').write_text(f"_base_ = 'hat_mm::toy/{TOY}.py'\n")
    command = ('test', 'hat_mm', config, '--checkpoint', checkpoint, '--gpus', 0)
    folder = work_dir / f'test-{config}'
    said = mim(*command, '--work-dir', folder, *OPTIONS, cwd=work_dir)
    assert 'Testing finished successfully' in said
    (metrics,) = folder.glob('*/*.json')
    assert 'coco/segm_mAP' in json.loads(metrics.read_text())


@needs_mim
@pytest.mark.slow
def test_two_processes_of_the_pytorch_launcher(mim, work_dir):
    launch = ('--launcher', 'pytorch', '--gpus', 2)
    arguments = ('train', 'hat_mm', f'{TOY}.py', *launch, '--work-dir', 'two')
    said = mim(*arguments, *OPTIONS, 'train_dataloader.batch_size=1', cwd=work_dir)
    assert 'Training finished successfully' in said
    assert (work_dir / 'two' / 'epoch_1.pth').is_file()


@needs_mim
def test_tools_of_the_package_run(mim):
    said = mim('run', 'hat_mm', 'get_flops', 'hat_mm.HATNet:arch=tiny', '--shape', 32, 32)
    assert re.search(r'^\| \*\*all\*\* \| [\d.]+ \|', said, re.MULTILINE)


def test_programs_of_the_package_run_without_mim(run, tmp_path):
    small = ('--num-train', 1, '--num-val', 1)
    done = run('-m', 'hat_mm', 'demo/shapes.py', *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'data' / 'shapes' / 'annotations' / 'train.json').is_file()
    done = run('-m', 'hat_mm', 'tools/analysis_tools/benchmark', 'models', '--help', cwd=tmp_path)
    assert 'usage: benchmark models' in done.stdout, done.stderr
    done = run('-m', 'hat_mm', 'tools/none.py', cwd=tmp_path)
    assert "'tools/none.py' is no file" in done.stderr


# --- hat_mm:: in configs --------------------------------------------------------------------------

SWAP = """
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'hat_mm::_base_/backbones/fastervit-0.py']
model = dict(
    backbone=dict(_delete_=True, **_base_.backbone), neck=dict(in_channels=_base_.channels)
)
"""
# Prints what a config of a user's says, and from where its base came.
READ = """
import sys
{first}
from mmengine.config import Config
config = Config.fromfile(sys.argv[1])
import hat_mm
model = config.model
print(model._scope_, model.backbone.type, model.neck.in_channels[-1], hat_mm.__file__, sep='|')
"""


@pytest.fixture
def swap(tmp_path):
    (tmp_path / 'swap.py').write_text(SWAP)
    (tmp_path / 'read.py').write_text(READ.format(first='import hat_mm'))
    (tmp_path / 'plain.py').write_text(READ.format(first=''))
    return tmp_path


def check(done: subprocess.CompletedProcess, package: Path) -> None:
    assert done.returncode == 0, done.stderr
    *model, found = done.stdout.strip().split('|')
    assert model == ['mmdet', 'hat_mm.FasterViT', '512']
    assert Path(found).is_relative_to(package)


def test_bases_resolve_from_a_wheel(run, swap):
    done = run('read.py', 'swap.py', cwd=swap)
    package = Path(run('-c', 'import sys; print(sys.prefix)').stdout.strip())
    check(done, package)


def test_bases_resolve_for_programs_that_do_not_import_hat_mm(run, swap):
    package = Path(run('-c', 'import sys; print(sys.prefix)').stdout.strip())
    check(run('-m', 'hat_mm', 'plain.py', 'swap.py', cwd=swap), package)
    done = run('plain.py', 'swap.py', cwd=swap)
    assert 'mmengine does not support to load hat_mm config' in done.stderr


@pytest.mark.parametrize('path', [None, str(ROOT)], ids=['installed', 'PYTHONPATH'])
def test_bases_resolve_from_a_checkout(swap, path):
    environment = {**os.environ, 'PYTHONPATH': path or ''}
    done = subprocess.run(
        [sys.executable, 'read.py', 'swap.py'],
        cwd=swap,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    check(done, ROOT)


LEAVES = (
    'fastervit/cascade-mask-rcnn_fastervit-2_fpn_4conv1fc-giou_ms-crop-3x_coco.py',
    'fastervit/fastervit-4-21k-384_32xb32_in1k-384px.py',
    'hat_net/dino-4scale_hat-net-tiny_8xb2-12e_coco.py',
    'hat_net/hat-net-small_8xb128_in1k.py',
    'hat_net/hat-net-small_upernet_8xb2-160k_ade20k-512x512.py',
)


@pytest.mark.parametrize('leaf', LEAVES)
def test_a_base_means_what_its_file_says(leaf, tmp_path):
    """Above all, no class of a toolbox is sought among hat_mm's."""
    expected = Config.fromfile(ROOT / 'configs' / leaf).to_dict()
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = 'hat_mm::{leaf}'\n")
    assert Config.fromfile(path).to_dict() == expected
    assert get_config(f'hat_mm::{leaf}').to_dict() == expected


def test_a_base_that_is_not_there_is_named(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'hat_mm::fastervit/fastervit-7.py'\n")
    with pytest.raises(FileNotFoundError, match=r'fastervit-7\.py'):
        Config.fromfile(path)
