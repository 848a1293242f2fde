"""Entries of metafiles from the logs of training runs."""

import json
import re
import shutil
from pathlib import Path

import make_metafile_entry
import pytest
import torch
from modelindex.load_model_index import load as load_index

from hat_mm.engine import cli
from hat_mm.zoo import metafiles, publish, runs

ROOT = Path(__file__).resolve().parents[2]
URL = 'https://example.org/weights/'
LEAF = 'mask-rcnn_hat-net-tiny_fpn_1x_coco'
STAMP = '20260102_030405'
CONFIG = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
train_dataloader = dict(
    batch_size=2, dataset=dict(type='RepeatDataset', dataset=dict(type='CocoDataset'))
)
val_dataloader = dict(batch_size=1, dataset=dict(type='mmdet.CocoDataset'))
optim_wrapper = dict(accumulative_counts=2)
"""
BY_ITERATION = CONFIG.replace('EpochBasedTrainLoop', 'IterBasedTrainLoop').replace(
    'max_epochs=12', 'max_iters=200'
)
ENVIRONMENT = """2026/01/02 03:04:05 - mmengine - INFO -
------------------------------------------------------------
System environment:
    sys.platform: linux
    CUDA available: True
    GPU 0,1,2,3: NVIDIA A100-SXM4-80GB
    PyTorch: 2.13.0
    PyTorch compiling details: PyTorch built with:
  - GCC 13.3

    MMEngine: 0.10.7

Runtime environment:
    seed: 5
    GPU number: 4
------------------------------------------------------------
    GPU number: 99
"""


def validation(step, box=0.4312, mask=0.3949):
    return {'coco/bbox_mAP': box, 'coco/segm_mAP': mask, 'data_time': 0.1, 'step': step}


def training(iteration, memory=7000):
    return {'lr': 0.1, 'loss': 1.0, 'memory': memory, 'iter': iteration, 'step': iteration}


LINES = [
    training(50), training(100, 8192), validation(11, 0.1, 0.1), training(150), training(200),
    validation(12),
]  # fmt: skip


class Case:
    """A work dir with one log and one published checkpoint."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        self.log(LINES)
        self.publish()

    def log(self, lines, environment=ENVIRONMENT, config=CONFIG):
        data = self.folder / STAMP / 'vis_data'
        data.mkdir(parents=True, exist_ok=True)
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (data / f'{STAMP}.json').write_text(text)
        (data / 'config.py').write_text(config)
        (data.parent / f'{STAMP}.log').write_text(environment)

    def publish(self, epoch=12, iteration=200, stem=LEAF, stamp=STAMP):
        meta = dict(
            epoch=epoch, iter=iteration, seed=5, time='20260103_040506',
            experiment_name=f'{stem}_{stamp}', mmengine_version='0.10.7' + 40 * 'a',
        )  # fmt: skip
        path = self.folder / f'epoch_{epoch}.pth'
        torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': meta}, path)
        self.weights = publish.publish(path, self.folder / 'model.pth').path
        return self

    def read(self, **options):
        return runs.read_run(self.folder, self.weights, **options)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path / 'run')


# --- what a log says ------------------------------------------------------------------------------


def test_what_a_log_of_gpus_says(case):
    run = case.read()
    assert run.stem == LEAF and run.notes == ()
    assert run.metadata == {
        'Training Data': 'COCO',
        'Epochs': 12,
        'Checkpoint Epoch': 12,
        'Batch Size': 16,  # 4 processes, 2 images, 2 forward passes a step
        'Training Memory (GB)': 8.0,
        'Training Resources': '4x NVIDIA A100-SXM4-80GB GPUs',
        'Date': '2026-01-03',
        'Software': {'PyTorch': '2.13.0', 'MMEngine': '0.10.7'},
        'Seed': 5,
    }
    assert run.results == [
        {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': {'box AP': 43.1}},
        {'Task': 'Instance Segmentation', 'Dataset': 'COCO', 'Metrics': {'mask AP': 39.5}},
    ]


def test_the_published_epoch_is_measured_not_the_last(case):
    run = case.publish(epoch=11, iteration=100).read()
    assert run.metadata['Epochs'] == 12 and run.metadata['Checkpoint Epoch'] == 11
    assert run.results[0]['Metrics'] == {'box AP': 10.0}


@pytest.mark.parametrize(
    ('lines', 'epoch', 'iteration', 'config'),
    [
        (LINES[:2], 12, 200, CONFIG),
        ([*LINES[:2], validation(5)], 12, 200, CONFIG),
        # From the midst of the twelfth epoch: mmengine counts from 0 there.
        (LINES, 11, 170, CONFIG),
        # Of a schedule of iterations mmengine numbers them all 0 unless its logger is told.
        ([training(50), validation(0), validation(0), training(200)], 0, 100, BY_ITERATION),
    ],
)
def test_without_its_own_validation_there_is_no_entry(case, lines, epoch, iteration, config):
    case.log(lines, config=config)
    with pytest.raises(ValueError, match='must have one validation of the checkpoint'):
        case.publish(epoch, iteration).read()


def test_an_unfinished_run(case):
    case.log(LINES[:3])
    case.publish(epoch=11, iteration=100)
    with pytest.raises(ValueError, match=r'12 epochs; the checkpoint is of 11.*--unfinished'):
        case.read()
    run = case.read(unfinished=True)
    assert run.metadata['Epochs'] == 11
    assert 'the schedule has 12 epochs' in run.notes[0]
    # Where validations are numbered by iterations, these are no epochs.
    config = CONFIG + 'default_hooks = dict(logger=dict(log_metric_by_epoch=False))\n'
    case.log([training(100), validation(100)], config=config)
    with pytest.raises(ValueError, match='12 epochs; the checkpoint is of 11'):
        case.read()


def test_iterations(case):
    config = BY_ITERATION.replace('mmdet.CocoDataset', 'ADE20KDataset')
    config += 'default_hooks = dict(logger=dict(log_metric_by_epoch=False))\n'
    measured = {'mIoU': 43.217, 'aAcc': 80.0, 'coco/bbox_mAP': -1.0, 'step': 200}
    case.log([training(100), validation(100), training(200), measured], config=config)
    run = case.publish(epoch=0).read()
    assert run.metadata['Iterations'] == run.metadata['Checkpoint Iteration'] == 200
    assert 'Epochs' not in run.metadata
    # -1 is COCO's word for nothing to find.
    assert run.results == [
        {'Task': 'Semantic Segmentation', 'Dataset': 'ADE20K', 'Metrics': {'mIoU': 43.22}}
    ]
    case.log([training(200), {'a/mIoU': 1.0, 'b/mIoU': 2.0, 'step': 200}], config=config)
    with pytest.raises(ValueError, match='has several mIoU, b/mIoU is one of them'):
        case.read()
    case.log([training(200), {'PQ': 1.0, 'step': 200}], config=config)
    with pytest.raises(ValueError, match=r'no value of a metric that metafiles know .* but PQ'):
        case.read()


def test_nothing_is_invented(case):
    case.log([validation(12)], environment='')
    run = case.read()
    left_out = ['Batch Size', 'Training Memory (GB)', 'Training Resources']
    assert not {*left_out} & {*run.metadata}
    assert [note.partition(' left out')[0] for note in run.notes] == left_out


def test_what_is_missing(case):
    with pytest.raises(ValueError, match='is no published file'):
        runs.read_run(case.folder, case.folder / 'epoch_12.pth')
    with pytest.raises(FileNotFoundError, match=r'run of 20250101_000000, of which .* has no log'):
        case.publish(stamp='20250101_000000').read()
    with pytest.raises(ValueError, match='has no experiment_name'):
        case.publish(stamp='').read()


# --- metafiles ------------------------------------------------------------------------------------

EXISTING = {
    'Name': LEAF,
    'In Collection': 'HAT-Net',
    'Config': f'configs/hat_net/{LEAF}.py',
    'Metadata': {'Epochs': 12, 'Batch Size': 8, 'Assumed Settings': 'some', 'FLOPs': 1},
    'Results': [
        {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': {'box AP (authors)': 43.3}},
        {'Task': 'Object Detection', 'Dataset': 'Other', 'Metrics': {'box AP': 1.0}},
    ],
}
OTHER = {'Name': 'other', 'In Collection': 'HAT-Net', 'Metadata': {'Date': '2020-01-01'}}


def entry_of(metafile, name):
    [entry] = [model for model in metafiles.load(metafile)['Models'] if model['Name'] == name]
    return entry


@pytest.fixture
def metafile(tmp_path):
    path = tmp_path / 'metafile.yml'
    data = {
        'Collections': [{'Name': 'HAT-Net'}, {'Name': 'FasterViT'}],
        'Models': [OTHER, EXISTING],
    }
    path.write_text(metafiles.text(data, 'Do not edit.'))
    return path


@pytest.fixture
def add(case, metafile, capsys):
    """Runs the tool; returns its exit status, standard output and standard error."""

    def add(*words, url=URL, path=metafile):
        argv = [str(word) for word in (case.folder, case.weights, path, '--url', url, *words)]
        status = cli.run_tool(lambda: make_metafile_entry.main(argv), 'make_metafile_entry.py')
        return status, *capsys.readouterr()

    return add


def test_an_entry_that_exists_is_completed(add, metafile):
    status, out, err = add()
    assert (status, err) == (0, '')
    # What the run had otherwise than the config is said, with both values.
    assert 'note: not as in the config: optim_wrapper.accumulative_counts None -> 2\n' in out
    entry = entry_of(metafile, LEAF)
    assert entry['Metadata']['Assumed Settings'] == 'some' and entry['Metadata']['FLOPs'] == 1
    assert entry['Metadata']['Batch Size'] == 16
    metrics = {'box AP': 43.1, 'box AP (authors)': 43.3}
    assert entry['Results'] == [
        {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': metrics},
        {'Task': 'Object Detection', 'Dataset': 'Other', 'Metrics': {'box AP': 1.0}},
        {'Task': 'Instance Segmentation', 'Dataset': 'COCO', 'Metrics': {'mask AP': 39.5}},
    ]
    assert metafiles.load(metafile)['Models'] == [OTHER, entry]
    assert metafile.read_text().startswith('# Do not edit.\n')


def test_weights_are_replaced_by_force_only(add, case, metafile):
    assert add()[0] == 0
    before = metafile.read_text()
    status, _, err = add()
    assert status == 1 and f'{LEAF} in {metafile} has weights already; --force' in err
    assert metafile.read_text() == before
    # Of the run that is replaced nothing stays.
    case.log([{'coco/bbox_mAP': 0.5, 'step': 12}], environment='')
    assert add('--force')[0] == 0
    entry = entry_of(metafile, LEAF)
    metrics = {'box AP': 50.0, 'box AP (authors)': 43.3}
    assert entry['Results'] == [{'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': metrics}]
    assert 'Training Memory (GB)' not in entry['Metadata']
    assert entry['Weights'] == f'{URL}{case.weights.name}'


def test_in_our_own_metafiles(add, tmp_path):
    """Every leaf has an entry there."""
    path = tmp_path / 'hat_net.yml'
    shutil.copy(ROOT / 'configs/hat_net/metafile.yml', path)
    (tmp_path / 'README.md').write_text('x')  # to which the collection refers
    before = metafiles.load(path)
    assert add(path=path)[0] == 0
    after = metafiles.load(path)
    assert after['Collections'] == before['Collections']
    changed = [b['Name'] for a, b in zip(before['Models'], after['Models'], strict=True) if a != b]
    assert changed == [LEAF]
    assert entry_of(path, LEAF)['Metadata']['Published Settings']
    assert load_index(str(path)).check(silent=True) == []


def test_a_model_and_a_metafile_of_ones_own(add, case, tmp_path):
    new = tmp_path / 'new.yml'
    case.publish(stem='mine')
    status, _, err = add(path=new)
    assert status == 1 and '--collection has to name one' in err and not new.exists()
    status, _, err = add('--collection', 'Mine', path=new)
    assert status == 1 and 'there is no config mine.py: say --config' in err and not new.exists()
    own = tmp_path / 'configs/own/config.py'
    own.parent.mkdir(parents=True)
    own.write_text(CONFIG)
    words = ('--collection', 'Mine', '--config', own, '--name', 'new')
    status, out, _ = add(*words, url='file:///srv/weights', path=new)
    assert status == 0 and 'note:' not in out
    assert metafiles.load(new)['Collections'] == [{'Name': 'Mine'}]
    entry = entry_of(new, 'new')
    assert entry['Config'] == 'configs/own/config.py'
    assert entry['Weights'] == f'file:///srv/weights/{case.weights.name}'


@pytest.mark.parametrize(
    ('words', 'told'),
    [
        (['--name', 'new'], 'HAT-Net, FasterViT'),
        (['--collection', 'HATNet'], "not 'HATNet': HAT-Net, FasterViT"),
        (['--url', 'ftp://example.org'], "'ftp://example.org' is not allowed"),
        (['--config', 'configs/none.py'], 'no config configs/none.py'),
    ],
)
def test_what_is_refused(add, metafile, words, told):
    before = metafile.read_text()
    status, _, err = add(*words)
    assert status == 1 and told in err
    assert metafile.read_text() == before


def test_a_full_disk_leaves_the_metafile_as_it_was(add, metafile, monkeypatch):
    before = metafile.read_text()

    def write_half(path, text, **_):
        path.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_text', write_half)
    status, _, err = add('--collection', 'FasterViT', '--name', 'new')
    assert status == 1 and 'No space left on device' in err
    assert metafile.read_text() == before


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('Models: [3]', 'an entry of Models has no Name: 3'),
        ('Models: []\nCollections:', 'it has none'),
        ('Models: 3', 'it has no list of Models'),
        ('[', 'is no YAML'),
    ],
)
def test_odd_metafiles(add, metafile, text, told):
    metafile.write_text(text)
    status, _, err = add()
    assert status == 1 and re.search(told, err), err
    assert metafile.read_text() == text


def test_a_changed_file_is_refused(add, case):
    case.weights.write_bytes(case.weights.read_bytes() + b' ')
    status, _, err = add()
    assert status == 1 and 'is no published file' in err
