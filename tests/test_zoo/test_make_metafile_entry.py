"""Entries of metafiles from real runs of the three toolboxes, and from logs made for a case."""

import importlib
import json
import re
import shutil
from pathlib import Path

import make_metafile_entry
import pytest
import torch
import yaml
from shapes import make_dataset

from hat_mm.engine import cli
from hat_mm.weights import fileio
from hat_mm.zoo import metafiles, publish, runs

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / 'configs/toy'
URL = 'https://example.org/weights/'


# --- real runs ------------------------------------------------------------------------------------


pytestmark = pytest.mark.usefixtures('plain_dumps')


def trained(folder, config, *options):
    """Work dir of one epoch with validation, and the published checkpoint."""
    options = [
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2',
        *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
        *(f'{split}_dataloader.persistent_workers=False' for split in ('train', 'val', 'test')),
        *options,
    ]  # fmt: skip
    config = TOY / f'{config}.py'
    cli.train([str(config), '--work-dir', str(folder), '--cfg-options', *options])
    return folder, publish.publish(folder / 'epoch_1.pth', folder / 'model.pth').path


@pytest.fixture(scope='module')
def detector(tmp_path_factory, toy_options):
    folder = tmp_path_factory.mktemp('detector')
    others = [o for o in toy_options if not o.startswith(('train_cfg.', 'train_dataloader.b'))]
    return trained(folder, 'mask-rcnn_fastervit-tiny_fpn_shapes', *others)


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    make_dataset(folder / 'data', layout='semantic', num_train=4, num_val=2)
    roots = [f'{s}_dataloader.dataset.data_root={folder}/data' for s in ('train', 'val', 'test')]
    return trained(folder / 'run', 'fastervit-tiny_upernet_shapes', *roots)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')
    make_dataset(folder / 'data', layout='classes', num_train=6, num_val=6)
    roots = [
        f'{split}_dataloader.dataset.data_root={folder}/data/{part}'
        for split, part in (('train', 'train'), ('val', 'val'), ('test', 'val'))
    ]
    return trained(folder / 'run', 'fastervit-tiny_shapes', 'val_evaluator.topk=(1,2)', *roots)


RUNS = {
    'detector': (
        'mask-rcnn_fastervit-tiny_fpn_shapes', {'coco/bbox_mAP': 100, 'coco/segm_mAP': 100},
    ),
    'segmentor': ('fastervit-tiny_upernet_shapes', {'mIoU': 1}),
    'classifier': ('fastervit-tiny_shapes', {'accuracy/top1': 1}),
}  # fmt: skip
TASKS = {
    'coco/bbox_mAP': ('Object Detection', 'box AP', 1),
    'coco/segm_mAP': ('Instance Segmentation', 'mask AP', 1),
    'mIoU': ('Semantic Segmentation', 'mIoU', 2),
    'accuracy/top1': ('Image Classification', 'Top 1 Accuracy', 2),
}


def run(capsys, *argv):
    """Exit status, standard output and standard error of the tool."""
    argv = [str(word) for word in argv]
    capsys.readouterr()  # of a training before
    status = cli.run_tool(lambda: make_metafile_entry.main(argv), 'make_metafile_entry.py')
    return status, *capsys.readouterr()


def entry_of(metafile, name):
    [entry] = [model for model in metafiles.load(metafile)['Models'] if model['Name'] == name]
    return entry


@pytest.mark.parametrize('toolbox', RUNS)
def test_entry_of_a_real_run(toolbox, request, tmp_path, capsys):
    work_dir, weights = request.getfixturevalue(toolbox)
    name, metrics = RUNS[toolbox]
    metafile = tmp_path / 'metafile.yml'
    status, out, err = run(
        capsys, work_dir, weights, metafile, '--url', URL, '--collection', 'FasterViT',
        '--dataset', 'shapes',
    )  # fmt: skip
    assert (status, err) == (0, '')
    entry = entry_of(metafile, name)
    assert entry['In Collection'] == 'FasterViT'
    assert entry['Config'] == f'configs/toy/{name}.py' and (ROOT / entry['Config']).is_file()
    assert entry['Weights'] == f'{URL}{weights.name}'
    metadata = entry['Metadata']
    assert metadata['Training Data'] == 'shapes'
    assert (metadata['Epochs'], metadata['Checkpoint Epoch'], metadata['Batch Size']) == (1, 1, 2)
    assert metadata['Seed'] == 0
    assert metadata['Software']['PyTorch'] == torch.__version__
    for label, module in (('MMEngine', 'mmengine'), ('mmcv', 'mmcv'), ('hat_mm', 'hat_mm')):
        assert metadata['Software'][label] == importlib.import_module(module).__version__
    assert len({'mmdet', 'mmseg', 'mmpretrain'} & set(metadata['Software'])) == 1
    assert metadata['SHA256'] == fileio.sha256(weights)
    [log] = work_dir.glob('*/*.log')
    assert metadata['Date'].replace('-', '/') == log.read_text()[:10]
    if not torch.cuda.is_available():
        assert 'Training Memory (GB)' not in metadata and 'Training Resources' not in metadata
        assert 'note: training memory left out' in out

    [record] = [
        record
        for line in next(work_dir.glob('*/vis_data/2*.json')).read_text().splitlines()
        if 'iter' not in (record := json.loads(line))
    ]
    assert len(entry['Results']) == len(metrics)
    for (key, factor), result in zip(metrics.items(), entry['Results'], strict=True):
        task, metric, decimals = TASKS[key]
        assert result['Task'] == task and result['Dataset'] == 'shapes'
        assert result['Metrics'][metric] == round(record[key] * factor, decimals)

    # What the run had otherwise than the config is said, with both values.
    assert 'note: the run differs from its config: ' in out
    assert 'train_cfg.max_epochs 6 -> 1' in out
    assert 'data_root' not in out
    assert yaml.safe_load(out.partition('\nnote: ')[0]) == entry
    assert is_valid(metafile) == [name]


def is_valid(path):
    """Names of the models; model-index's own checks pass."""
    loaded = importlib.import_module('modelindex.load_model_index').load(str(path))
    assert loaded.check(silent=True) == []
    loaded.build_models_with_collections()
    models = loaded.models
    for model in models:
        assert not model.check_errors, model.name
        assert model.weights is None or model.weights.startswith(('https://', 'file://'))
    return [model.name for model in models]


def test_second_place_accuracy_is_none_of_ours(classifier):
    """top2 is logged, but metafiles know top 1 and top 5 only."""
    run = runs.read_run(*classifier, dataset='shapes')
    assert [list(result['Metrics']) for result in run.results] == [['Top 1 Accuracy']]


def test_the_index_takes_all_of_them(detector, segmentor, classifier, tmp_path, capsys):
    metafile = tmp_path / 'metafile.yml'
    for work_dir, weights in (detector, segmentor, classifier):
        words = (work_dir, weights, metafile, '--url', URL, '--dataset', 'shapes')
        new = ('--collection', 'Toys') if not metafile.exists() else ()
        assert run(capsys, *words, *new)[0] == 0
    assert is_valid(metafile) == [name for name, _ in RUNS.values()]
    index = tmp_path / 'model-index.yml'
    index.write_text('Import:\n  - metafile.yml\n')
    assert is_valid(index) == [name for name, _ in RUNS.values()]


def test_data_set_has_to_be_named(detector, tmp_path, capsys):
    work_dir, weights = detector
    status, _, err = run(capsys, work_dir, weights, tmp_path / 'm.yml', '--url', URL)
    assert status == 1
    assert 'CocoDataset with classes of its own does not tell' in err and '--dataset' in err
    assert not (tmp_path / 'm.yml').exists()


# --- runs made for a case -------------------------------------------------------------------------

LEAF = 'mask-rcnn_hat-net-tiny_fpn_1x_coco'
STAMP = '20260102_030405'
CONFIG = """
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12)
train_dataloader = dict(batch_size=2, dataset=dict(type='RepeatDataset', dataset=dict(type='CocoDataset')))
val_dataloader = dict(batch_size=1, dataset=dict(type='mmdet.CocoDataset'))
optim_wrapper = dict(accumulative_counts=2)
"""  # noqa: E501
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
        self.log(STAMP, LINES)
        (folder / f'{LEAF}.py').write_text(CONFIG)
        self.publish()

    def log(self, stamp, lines, environment=ENVIRONMENT, config=CONFIG):
        data = self.folder / stamp / 'vis_data'
        data.mkdir(parents=True, exist_ok=True)
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (data / f'{stamp}.json').write_text(text)
        (data / 'config.py').write_text(config)
        (data.parent / f'{stamp}.log').write_text(environment)

    def publish(self, epoch=12, iteration=200, **meta):
        content = dict(
            epoch=epoch, iter=iteration, seed=5, time='20260103_040506',
            experiment_name=f'{LEAF}_{STAMP}', mmengine_version='0.10.7' + 40 * 'a',
        ) | meta  # fmt: skip
        path = self.folder / f'epoch_{epoch}.pth'
        torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': content}, path)
        self.weights = publish.publish(path, self.folder / 'model.pth').path
        return self

    def read(self, **options):
        return runs.read_run(self.folder, self.weights, **options)


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path / 'run')


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
    run = case.publish(epoch=11, iteration=100)
    run = case.read()
    assert run.metadata['Epochs'] == 12 and run.metadata['Checkpoint Epoch'] == 11
    assert run.results[0]['Metrics'] == {'box AP': 10.0}


def test_validations_that_cannot_be_told_apart_are_refused(case):
    """Of a schedule of iterations mmengine numbers them all 0 unless its logger is told."""
    iterations = CONFIG.replace(
        "'EpochBasedTrainLoop', max_epochs=12", "'IterBasedTrainLoop', max_iters=200"
    )
    assert iterations != CONFIG
    lines = [training(50), validation(0, 0.1, 0.1), validation(0), training(200), validation(0)]
    case.log(STAMP, lines, config=iterations)
    case.publish(epoch=0, iteration=100)
    with pytest.raises(ValueError, match=r'which of 2 validations .*log_metric_by_epoch=False'):
        case.read()
    assert case.publish(epoch=0, iteration=200).read().metadata['Iterations'] == 200


def test_another_run_in_the_folder_does_not_finish_this_one(case):
    later = '20260104_040506'
    case.log(STAMP, LINES[:3])
    case.log(later, LINES)
    (case.folder / 'last_checkpoint').write_text('epoch_12.pth')
    case.publish(epoch=11, iteration=100)
    with pytest.raises(ValueError, match='has not reached the end'):
        case.read()
    # One that went on from there does.
    case.log(later, LINES[3:])
    assert case.read().metadata['Epochs'] == 12


def test_a_checkpoint_from_the_midst_of_an_epoch_is_not_measured(case):
    """mmengine counts epochs from 0 there, so 11 is the twelfth."""
    case.publish(epoch=11, iteration=170)
    with pytest.raises(
        ValueError, match=r'no validation of the checkpoint \(step 11.*steps 11, 12'
    ):
        case.read()


def test_an_unfinished_run(case):
    case.log(STAMP, LINES[:3])
    case.publish(epoch=11, iteration=100)
    with pytest.raises(ValueError, match=r'12 epochs; the checkpoint is of 11.*--unfinished'):
        case.read()
    run = case.read(unfinished=True)
    assert run.metadata['Epochs'] == 11
    assert 'the schedule has 12 epochs' in run.notes[0]


@pytest.mark.parametrize('lines', [LINES[:2], [*LINES[:2], {'coco/x': 1, 'step': 5}]])
def test_no_validation(case, lines):
    case.log(STAMP, lines)
    with pytest.raises(ValueError, match='has no validation of the checkpoint'):
        case.read()


def test_iterations(case):
    config = (
        CONFIG.replace(
            "type='EpochBasedTrainLoop', max_epochs=12", "type='IterBasedTrainLoop', max_iters=200"
        )
        + 'default_hooks = dict(logger=dict(log_metric_by_epoch=False))\n'
    )
    lines = [
        training(100),
        validation(100),
        training(200),
        {'mIoU': 43.217, 'aAcc': 80.0, 'step': 200},
    ]
    case.log(STAMP, lines, config=config.replace('mmdet.CocoDataset', 'ADE20KDataset'))
    run = case.publish(epoch=0).read()
    assert run.metadata['Iterations'] == run.metadata['Checkpoint Iteration'] == 200
    assert 'Epochs' not in run.metadata
    assert run.results == [
        {'Task': 'Semantic Segmentation', 'Dataset': 'ADE20K', 'Metrics': {'mIoU': 43.22}}
    ]


def test_accuracies():
    notes = []
    found = runs._results({'accuracy/top1': 79.785, 'accuracy/top5': 94.4}, 'ImageNet-1k', notes)
    assert found[0]['Metrics'] == {'Top 1 Accuracy': 79.78, 'Top 5 Accuracy': 94.4}
    found = runs._results({'mIoU': float('nan'), 'x/bbox_mAP': 0.5}, 'x', notes)
    assert [result['Task'] for result in found] == ['Object Detection']
    assert notes == ['mIoU left out: the log has mIoU=nan']
    with pytest.raises(ValueError, match='several box AP'):
        runs._results({'a/bbox_mAP': 0.5, 'b/bbox_mAP': 0.5}, 'x', notes)
    with pytest.raises(ValueError, match=r'no value of a metric that metafiles know .* but PQ'):
        runs._results({'PQ': 1.0, 'step': 1}, 'x', notes)
    with pytest.raises(
        ValueError, match='no value of a metric'
    ):  # COCO's "there was nothing to find"
        runs._results({'coco/bbox_mAP': -1.0}, 'x', notes)


def test_several_runs(case):
    later = '20260104_050607'
    case.log(later, [training(200), validation(12, 0.9, 0.9)])
    # The checkpoint names its own.
    run = case.read()
    assert run.results[0]['Metrics'] == {'box AP': 43.1} and run.notes == ()
    # One that does not is taken for the newest's, and that is said.
    run = case.publish(experiment_name='').read()
    assert run.results[0]['Metrics'] == {'box AP': 90.0}
    assert run.notes[0].endswith(f'took the newest of 2, {later}')
    with pytest.raises(ValueError, match=f'run of 20250101_000000, but .* {STAMP}, {later}'):
        case.publish(experiment_name='x_20250101_000000').read()


def test_several_configs(case):
    (case.folder / 'other.py').write_text(CONFIG)
    assert case.read().stem == LEAF
    with pytest.raises(ValueError, match=r'several configs \(mask-rcnn.*, other\)'):
        case.publish(experiment_name='').read()


def test_nothing_is_invented(case):
    case.log(STAMP, [validation(12)], environment='')
    run = case.publish(seed=None, mmengine_version=None).read()
    assert set(run.metadata) == {'Training Data', 'Epochs', 'Checkpoint Epoch', 'Date'}
    assert [note.partition(' left out')[0] for note in run.notes] == [
        'batch size', 'training memory', 'training resources',
    ]  # fmt: skip


def test_what_is_missing(case, tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        runs.read_run(tmp_path / 'none', case.weights)
    with pytest.raises(FileNotFoundError, match='has no log of a training'):
        runs.read_run(tmp_path, case.weights)
    with pytest.raises(ValueError, match='is no published file'):
        runs.read_run(case.folder, case.folder / 'epoch_12.pth')
    with pytest.raises(ValueError, match='at which epoch'):
        case.publish(epoch='12').read()
    (case.folder / f'{LEAF}.py').unlink()
    with pytest.raises(FileNotFoundError, match='has no config'):
        case.publish().read()


def test_half_a_line_of_a_killed_process(case):
    path = case.folder / STAMP / 'vis_data' / f'{STAMP}.json'
    path.write_text(path.read_text() + '{"lr": 0.1, "los')
    assert case.read().results
    path.write_text('{"lr"\n' + path.read_text())
    with pytest.raises(ValueError, match='line 1 is no JSON'):
        case.read()


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
    def add(*words, url=URL, path=metafile):
        return run(capsys, case.folder, case.weights, path, '--url', url, *words)

    return add


def test_an_entry_that_exists_is_completed(add, case, metafile):
    status, out, err = add()
    assert (status, err) == (0, '')
    entry = entry_of(metafile, LEAF)
    assert entry['Metadata']['Assumed Settings'] == 'some' and entry['Metadata']['FLOPs'] == 1
    assert entry['Metadata']['Batch Size'] == 16
    assert 'note: Batch Size was 8 in the metafile and is 16 now' in out
    assert entry['Results'] == [
        {
            'Task': 'Object Detection',
            'Dataset': 'COCO',
            'Metrics': {'box AP': 43.1, 'box AP (authors)': 43.3},
        },
        {'Task': 'Object Detection', 'Dataset': 'Other', 'Metrics': {'box AP': 1.0}},
        {'Task': 'Instance Segmentation', 'Dataset': 'COCO', 'Metrics': {'mask AP': 39.5}},
    ]
    data = metafiles.load(metafile)
    assert [model['Name'] for model in data['Models']] == ['other', LEAF]
    assert data['Models'][0] == OTHER
    assert metafile.read_text().startswith('# Do not edit.\n')


def test_weights_are_replaced_by_force_only(add, case, metafile):
    assert add()[0] == 0
    before = metafile.read_text()
    status, _, err = add()
    assert status == 1 and f'{LEAF} in {metafile} has weights already; --force' in err
    assert metafile.read_text() == before
    # Of the run that is replaced nothing stays.
    case.log(STAMP, [{'coco/bbox_mAP': 0.5, 'step': 12}], environment='')
    case.publish(seed=None)
    assert add('--force')[0] == 0
    entry = entry_of(metafile, LEAF)
    assert entry['Results'] == [
        {
            'Task': 'Object Detection',
            'Dataset': 'COCO',
            'Metrics': {'box AP': 50.0, 'box AP (authors)': 43.3},
        }
    ]
    assert 'Training Memory (GB)' not in entry['Metadata'] and 'Seed' not in entry['Metadata']
    assert entry['Weights'] == f'{URL}{case.weights.name}'


def test_in_our_own_metafiles(add, tmp_path):
    """Every leaf has an entry there."""
    for family in ('hat_net', 'fastervit'):
        shutil.copy(ROOT / f'configs/{family}/metafile.yml', tmp_path / f'{family}.yml')
    path = tmp_path / 'hat_net.yml'
    before = metafiles.load(path)
    assert add(path=path)[0] == 0
    after = metafiles.load(path)
    assert after['Collections'] == before['Collections']
    changed = [b['Name'] for a, b in zip(before['Models'], after['Models'], strict=True) if a != b]
    assert changed == [LEAF]
    entry = entry_of(path, LEAF)
    assert entry['Metadata']['Published Settings'] and entry['Weights']
    (tmp_path / 'README.md').write_text('x')  # to which the collection refers
    assert LEAF in is_valid(path)


def test_names_configs_and_addresses(add, case, metafile):
    config = str(TOY / 'fastervit-tiny_shapes.py')
    status, *_ = add(
        '--name', 'new', '--collection', 'HAT-Net', '--config', config,
        url='file:///srv/weights',
    )  # fmt: skip
    assert status == 0
    entry = entry_of(metafile, 'new')
    assert entry['Config'] == 'configs/toy/fastervit-tiny_shapes.py'
    assert entry['Weights'] == f'file:///srv/weights/{case.weights.name}'
    assert metafiles.load(metafile)['Models'][:2] == [OTHER, EXISTING]


@pytest.mark.parametrize(
    ('words', 'told'),
    [
        (['--name', 'new'], 'HAT-Net, FasterViT'),
        (['--collection', 'HATNet'], "no collection 'HATNet', did you mean 'HAT-Net'?"),
        (['--collection', 'zzz'], "no collection 'zzz' It has: HAT-Net, FasterViT"),
        (['--name', 'new', '--collection', 'HAT-Net', '--config', 'x.py'], 'is no config below'),
        (['--url', 'ftp://example.org'], "its scheme is 'ftp'"),
        (['--url', 'http://example.org'], "its scheme is 'http'"),
        (['--url', 'https:///x'], 'allowed are https'),
        (['--url', 'x'], "its scheme is ''"),
        (['--url', 'https://example.org/a b'], 'without ? and # and spaces'),
        (['--name', '../x'], 'is no name of a model'),
        (['--config', 'configs/none.py'], "'configs/none.py' does not exist"),
        (['--url', 'https://example.org/?key=1'], 'without ? and # and spaces'),
        (['--config', 'configs/../x.py'], 'leads out of configs/'),
        (['--url', 'https://me:secret@example.org'], 'with a user name is not supported'),
    ],
)
def test_what_is_refused(add, metafile, words, told):
    before = metafile.read_text()
    status, _, err = add(*words)
    assert status == 1 and told in err
    assert metafile.read_text() == before


def test_new_metafiles(add, tmp_path):
    new = tmp_path / 'new.yml'
    status, _, err = add(path=new)
    assert status == 1 and '--collection names the one to start' in err and not new.exists()
    assert add('--collection', 'Mine', path=new)[0] == 0
    assert metafiles.load(new)['Collections'] == [{'Name': 'Mine'}]
    assert is_valid(new) == [LEAF]
    status, _, err = add('--collection', 'Mine', path=tmp_path / 'none/new.yml')
    assert status == 1 and 'does not exist' in err


def test_a_config_of_unknown_name(add, case, metafile):
    (case.folder / f'{LEAF}.py').rename(case.folder / 'mine.py')
    case.publish(experiment_name=f'mine_{STAMP}')
    status, _, err = add('--collection', 'HAT-Net')
    assert status == 1 and 'no config named mine.py is known' in err
    own = case.folder / 'configs/own/mine.py'
    own.parent.mkdir(parents=True)
    own.write_text(CONFIG)
    assert add('--collection', 'HAT-Net', '--config', own)[0] == 0
    assert entry_of(metafile, 'mine')['Config'] == 'configs/own/mine.py'


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('Models: [3]', 'an entry of Models has no Name: 3'),
        ('Models: [{Config: x}]', 'has no Name'),
        ('Models: [{Name: x, Results: results.yml}]', "Results of 'x' must stand in the file"),
        ('Models: []\nCollections: [{README: x}]', 'an entry of Collections has no Name'),
        ('Models: []\nCollections:', '--collection has to choose one of .* there is none'),
        ('Models: 3', 'it has no list of Models'),
        ('[', 'is no YAML'),
    ],
)
def test_odd_metafiles(add, metafile, text, told):
    metafile.write_text(text)
    status, _, err = add()
    assert status == 1 and re.search(told, err), err
    assert metafile.read_text() == text


def test_links_and_modes_of_metafiles_stay(add, metafile, tmp_path):
    metafile.chmod(0o600)
    link = tmp_path / 'link.yml'
    link.symlink_to(metafile)
    assert add('--collection', 'HAT-Net', path=link)[0] == 0
    assert link.is_symlink() and metafile.stat().st_mode & 0o777 == 0o600
    assert entry_of(metafile, LEAF)['Weights']


def test_what_the_metafile_said_before_is_told(add, metafile):
    before = metafiles.load(metafile)
    result = {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': {'box AP': 1.0}}
    [entry] = [model for model in before['Models'] if model['Name'] == LEAF]
    entry['Results'] = [result]
    metafiles.dump(before, metafile)
    assert 'note: box AP on COCO was 1.0 in the metafile and is 43.1 now' in add()[1]


def test_a_changed_file_is_refused(add, case):
    case.weights.write_bytes(case.weights.read_bytes() + b' ')
    status, _, err = add()
    assert status == 1 and 'is no published file' in err


def test_a_name_that_no_address_can_end_with(add, case):
    case.weights = case.weights.rename(case.weights.with_name(f'my {case.weights.name}'))
    assert 'cannot end an address' in add()[2]


def test_no_metafile(add, tmp_path):
    path = tmp_path / 'x.yml'
    path.write_text('a: [')
    assert 'is no YAML' in add(path=path)[2]
    path.write_text('a: 1')
    assert 'has no list of Models' in add(path=path)[2]
