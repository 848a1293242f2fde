"""Models by name: the shipped index, indexes of users, weights, and mmpretrain's functions."""

import importlib
import logging
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
import yaml
from golden import official_state
from loopback import serving
from mmengine.config import ConfigDict
from mmengine.runner import CheckpointLoader
from torch.utils import deterministic

import hat_mm
from hat_mm import compat
from hat_mm.weights import download
from hat_mm.weights.official import OFFICIAL_FILES
from hat_mm.zoo import models as zoo

ROOT = Path(__file__).resolve().parents[2]
HAT_NET = 'hat-net-tiny_3rdparty_in1k'
MASK_RCNN = 'mask-rcnn_hat-net-tiny_fpn_1x_coco'
DINO = 'dino-4scale_hat-net-tiny_8xb2-12e_coco'
SEMANTIC_FPN = 'hat-net-tiny_fpn_4xb4-80k_ade20k-512x512'


# A HAT-Net that is built in no time; an arch of another type replaces the name of the config's.
def small():
    return dict(
        arch=dict(_delete_=True, embed_dims=(8, 16, 24, 32), head_dim=8, depths=(1, 1, 1, 1))
    )


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch, tmp_path):
    """No index of another test, and a cache of its own."""
    monkeypatch.setattr(zoo, '_registered', {})
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
    monkeypatch.delenv('HAT_MM_WEIGHTS', raising=False)
    monkeypatch.delenv('HAT_MM_MIRRORS', raising=False)


@pytest.fixture
def no_downloads(monkeypatch):
    """Whatever would read or fetch weights fails."""

    def refuse(*arguments, **options):
        raise AssertionError(f'weights were asked for: {arguments}')

    monkeypatch.setattr(download, 'fetch', refuse)
    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', refuse)


# --- names ----------------------------------------------------------------------------------------


def test_all_are_listed():
    names = hat_mm.list_models()
    leaves = {
        path.stem
        for family in ('fastervit', 'hat_net', 'resnet_hat', 'swin_hat')
        for path in (ROOT / f'configs/{family}').glob('*.py')
    }
    assert len(leaves) > 100
    assert leaves <= set(names)
    assert len([name for name in names if '_3rdparty_' in name]) == len(OFFICIAL_FILES)
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    ('pattern', 'exclude', 'task'),
    [
        (None, None, None),
        ('fastervit-0', None, None),
        ('*tiny', None, None),
        ('*tiny', ['mask', '*in1k'], None),
        ('*-4-21k-[23]?4*', ['dino'], 'Object Detection'),
        (None, None, 'Instance Segmentation'),
        (None, ['hat*'], 'Semantic Segmentation'),
        ('no such', None, None),
        (None, None, 'no such'),
        (None, None, 'null'),
    ],
)
def test_lists_as_mmpretrain_does(pattern, exclude, task):
    ours = set(hat_mm.list_models())
    theirs = [n for n in mmpretrain.list_models(pattern, exclude, task) if n in ours]
    assert hat_mm.list_models(pattern, exclude, task) == theirs


def test_every_model_says_what_it_is_for():
    tasks = ('Object Detection', 'Instance Segmentation', 'Semantic Segmentation',
             'Image Classification')  # fmt: skip
    detectors, masks, segmentors, classifiers = (set(hat_mm.list_models(task=t)) for t in tasks)
    assert detectors | segmentors | classifiers == set(hat_mm.list_models())
    assert masks == {name for name in detectors if 'mask' in name}
    assert segmentors == set(hat_mm.list_models('*ade20k'))
    assert classifiers == set(hat_mm.list_models('*in1k'))


def test_a_single_pattern_to_exclude_is_an_error():
    with pytest.raises(TypeError, match=r"must be a list, not 'dino\*'"):
        hat_mm.list_models(exclude_patterns='dino*')


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('mask-rcnn_hat-net-tinny_fpn_1x_coco', f"did you mean '{MASK_RCNN}'"),
        ('fastervit-3', "did you mean 'fastervit-3_32xb128_in1k' or 'fastervit-3_3rdparty_in1k'"),
        ('zzz', r"no model 'zzz'; hat_mm.list_models\(\) lists all \d+$"),
        ('', r"no model ''; hat_mm.list_models"),
    ],
)
def test_unknown_names_suggest_near_ones(name, told):
    with pytest.raises(ValueError, match=told) as caught:
        hat_mm.get_model(name)
    assert len(str(caught.value)) < 400


def test_a_name_is_a_str():
    with pytest.raises(TypeError, match='must be a str, not 3'):
        hat_mm.get_model(3)


def test_listing_needs_no_toolbox(run_python):
    """Nothing is read when hat_mm is imported, and yaml alone is needed to list."""
    code = """
import sys
for name in ('mmdet', 'mmseg', 'mmpretrain', 'mmcv', 'mmengine', 'modelindex', 'torchvision'):
    sys.modules[name] = None
import hat_mm
assert 'yaml' not in sys.modules and 'hat_mm.zoo.models' not in sys.modules
print(len(hat_mm.list_models()))
try:
    hat_mm.get_model('hat-net-tiny_3rdparty_in1k')
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = run_python('-c', code)
    count, said = done.stdout.splitlines()
    assert int(count) == len(hat_mm.list_models()), done.stderr
    assert said.startswith('DependencyError mmengine is not installed')


# --- models ---------------------------------------------------------------------------------------


def test_a_detector_without_weights(no_downloads, capfd):
    model = hat_mm.get_model(MASK_RCNN, backbone=small(), neck=dict(in_channels=[8, 16, 24, 32]))
    assert type(model).__name__ == 'MaskRCNN'
    assert not model.training
    assert model._config.model.backbone.init_cfg is None
    assert model.cfg is model._config
    assert model._metainfo.name == MASK_RCNN
    assert model.dataset_meta is model._dataset_meta
    assert len(model._dataset_meta['classes']) == 80
    # As a training starts: mmdet's own initialization of a head has run.
    std = model.roi_head.bbox_head.fc_reg.weight.detach().std()
    assert float(std) == pytest.approx(0.001, rel=0.1)
    out, err = capfd.readouterr()
    assert 'Initialized' not in out + err and 'init_weights' not in out + err


def test_a_segmentor_and_a_classifier(no_downloads):
    model = hat_mm.get_model(
        SEMANTIC_FPN.upper(), backbone=small(), neck=dict(in_channels=[8, 16, 24, 32])
    )
    assert type(model).__name__ == 'EncoderDecoder'
    assert type(model.data_preprocessor).__name__ == 'SegDataPreProcessor'
    assert len(model._dataset_meta['classes']) == 150
    model = hat_mm.get_model(HAT_NET, device='cpu', head=dict(num_classes=7))
    assert model.head.fc.weight.shape == (7, 384)
    assert type(model.data_preprocessor).__name__ == 'ClsDataPreprocessor'
    assert [result.task for result in model._metainfo.results] == ['Image Classification']
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    result = mmpretrain.inference_model(hat_mm.get_model(HAT_NET), picture)
    assert result['pred_class'] in model._dataset_meta['classes']


def test_nothing_of_memory_is_left(no_downloads):
    """mmdet's DINO has parameters that its constructor does not set."""
    was = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # with nan
    try:
        model = hat_mm.get_model(DINO, backbone=small(), neck=dict(in_channels=[16, 24, 32]))
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = was
    assert [n for n, p in model.named_parameters() if not torch.isfinite(p).all()] == []


def test_overrides_are_merged_and_not_kept(no_downloads):
    given = small()
    hat_mm.get_model(SEMANTIC_FPN, backbone=given, neck=dict(in_channels=[8, 16, 24, 32]))
    assert given == small()
    backbone = dict(window_size=14, out_indices=(3,))
    model = hat_mm.get_model('fastervit-0_3rdparty_in1k', backbone=backbone)
    assert backbone == dict(window_size=14, out_indices=(3,))
    assert model.backbone.stages[2].window_size == 14
    again = hat_mm.get_model('fastervit-0_3rdparty_in1k')
    assert 'window_size' not in again._config.model.backbone


@pytest.mark.parametrize(
    ('overrides', 'told'),
    [
        (dict(bakbone=dict(depth=1)), "'bakbone'"),
        (dict(backbone=dict(windw=14)), "'windw'"),
        (dict(pretrain=True), "'pretrain'"),
    ],
)
def test_unknown_overrides_are_named(overrides, told):
    with pytest.raises(TypeError, match=told):
        hat_mm.get_model(HAT_NET, **overrides)


@pytest.mark.parametrize(
    ('settings', 'overrides', 'left'),
    [
        ({'init_cfg': dict(type='Pretrained', checkpoint='x')}, {}, {'init_cfg': None}),
        ({'init_cfg': dict(type='mmengine.PretrainedInit')}, {}, {'init_cfg': None}),
        ({'init_cfg': dict(type='Normal')}, {}, {'init_cfg': dict(type='Normal')}),
        (
            {'init_cfg': [dict(type='Normal'), dict(type='Pretrained')]},
            {},
            {'init_cfg': [dict(type='Normal')]},
        ),
        (
            {'heads': [{'init_cfg': dict(type='Pretrained')}], 'pretrained': 'x'},
            {'heads': [{'init_cfg': {}}]},
            {'heads': [{'init_cfg': None}], 'pretrained': None},
        ),
        (
            {'neck': {'init_cfg': dict(type='Pretrained')}, 'pretrained': None},
            {'neck': {'init_cfg': dict(checkpoint='y')}},
            {'neck': {'init_cfg': dict(type='Pretrained')}, 'pretrained': None},
        ),
    ],
)
def test_what_would_load_weights_goes(settings, overrides, left):
    settings = ConfigDict(settings)
    zoo._drop_weights(settings, overrides)
    assert settings.to_dict() == left


def test_a_missing_toolbox_is_named(monkeypatch):
    monkeypatch.setattr(compat, '_has_module', lambda name: name not in ('mmdet', 'mmdet._ext'))
    with pytest.raises(compat.DependencyError, match=r'mmdet is not installed: run `make setup`'):
        hat_mm.get_model(MASK_RCNN)
    config = importlib.import_module('mmengine').Config
    error = ModuleNotFoundError('mmdet is not installed, please install mmdet manually')
    monkeypatch.setattr(config, 'fromfile', lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(compat.DependencyError, match=r'mmdet is not installed: run `make setup`'):
        hat_mm.get_model(MASK_RCNN)


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The folder of HAT_MM_WEIGHTS, with a file as HAT-Net's authors publish."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    torch.save(official_state('hat_net_tiny'), folder / 'HAT-Net_Tiny.pth')
    monkeypatch.setenv('HAT_MM_WEIGHTS', str(folder))
    return folder / 'HAT-Net_Tiny.pth'


def test_the_authors_weights(official, monkeypatch):
    asked = []
    fetch = download.fetch
    monkeypatch.setattr(
        download, 'fetch', lambda *a, **options: asked.append((a, options)) or fetch(*a, **options)
    )
    model = hat_mm.get_model(HAT_NET, pretrained=True)
    [file] = [file for file in OFFICIAL_FILES if file.backbone == 'hat-net-tiny']
    assert asked == [((file.url, None), {})]  # fetch knows the table by itself
    state = torch.load(official, weights_only=True)
    assert torch.equal(model.head.fc.weight, state['classifier.1.weight'])
    assert torch.equal(model.head.fc.bias, state['classifier.1.bias'])
    assert torch.equal(model.backbone.stem.conv1.weight, state['patch_embed.0.weight'])
    assert not model.training
    path = hat_mm.get_model(HAT_NET, pretrained=official)
    for name, tensor in model.state_dict().items():
        assert torch.equal(path.state_dict()[name], tensor), name


def test_a_head_of_ones_own_is_said(official, caplog):
    # mmengine's logger keeps its records to itself.
    logger = importlib.import_module('mmengine.logging').MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    model = hat_mm.get_model(HAT_NET, pretrained=True, head=dict(num_classes=7))
    state = torch.load(official, weights_only=True)
    assert torch.equal(model.backbone.stem.conv1.weight, state['patch_embed.0.weight'])
    assert model.head.fc.weight.shape == (7, 384)
    [said] = [r.getMessage() for r in caplog.records if 'at random' in r.getMessage()]
    assert said.endswith('so at random: head.fc.weight, head.fc.bias')


def test_weights_that_do_not_fit_are_an_error(official, tmp_path):
    with pytest.raises(ValueError, match="does not fit arch 'small'"):
        hat_mm.get_model('hat-net-small_3rdparty_in1k', pretrained=official)
    model = hat_mm.get_model(HAT_NET)
    state = model.state_dict()
    cases = {
        'missing': ({k: v for k, v in state.items() if k != 'head.fc.bias'}, r'head\.fc\.bias'),
        'unexpected': (state | {'head.mine': torch.zeros(1)}, r'head\.mine'),
        'mismatched': (state | {'head.fc.bias': torch.zeros(3)}, r'head\.fc\.bias'),
    }
    for name, (wrong, told) in cases.items():
        path = tmp_path / f'{name}.pth'
        torch.save({'state_dict': wrong, 'meta': {}}, path)
        with pytest.raises(ValueError, match=f"{name}.pth does not fill.*'{HAT_NET}'.*{told}"):
            hat_mm.get_model(HAT_NET, pretrained=str(path))
    other = {
        name.replace('backbone', 'body').replace('head', 'hat'): v for name, v in state.items()
    }
    torch.save({'state_dict': other}, tmp_path / 'other.pth')
    with pytest.raises(ValueError):
        hat_mm.get_model(HAT_NET, pretrained=tmp_path / 'other.pth', head=dict(num_classes=7))


def test_nothing_filled_is_an_error_with_overrides_too(tmp_path):
    """In a model that has no backbone of ours, which would look for itself."""
    model = torch.nn.Linear(2, 2)
    torch.save({'state_dict': {'other': torch.zeros(1)}}, tmp_path / 'x.pth')
    info = zoo._models()[HAT_NET]
    with pytest.raises(ValueError, match=r'x\.pth does not fill the model'):
        zoo._load(model, tmp_path / 'x.pth', info, frozenset({'weight', 'bias'}))


@pytest.mark.parametrize('inference', [True, False])
def test_weights_of_another_model_are_an_error_with_overrides_too(official, tmp_path, inference):
    """Batch norms write to their counters themselves, which does not count as filled."""
    torch.save(hat_mm.get_model(HAT_NET).state_dict(), tmp_path / 'hat_net.pth')
    torch.save({'head.fc.bias': torch.zeros(7)}, tmp_path / 'head.pth')
    for file, told in (('hat_net.pth', 'no FasterViT checkpoint'), ('head.pth', 'does not fill')):
        with torch.inference_mode(inference), pytest.raises(ValueError, match=told):
            hat_mm.get_model(
                'fastervit-0_3rdparty_in1k',
                pretrained=tmp_path / file,
                head=dict(num_classes=7),
            )
    # A backbone alone is not what a segmentor has besides.
    with pytest.raises(ValueError, match=r'where nothing is overridden: it lacks neck\.'):
        hat_mm.get_model(
            'hat-net-tiny_fpn_4xb4-80k_ade20k-512x512',
            pretrained=tmp_path / 'hat_net.pth',
            decode_head=dict(num_classes=7),
        )


def test_what_is_changed_of_a_model_does_not_change_the_index():
    hat_mm.get_model(HAT_NET)._metainfo.metadata['SHA256'] = 'x'
    assert 'SHA256' not in hat_mm.get_model(HAT_NET)._metainfo.metadata


def test_models_in_threads():
    """mmengine's default scope is one for all threads."""
    names = [HAT_NET, MASK_RCNN, 'hat-net-tiny_fpn_4xb4-80k_ade20k-512x512'] * 2
    logger = importlib.import_module('mmengine.logging').MMLogger.get_current_instance()
    level = logger.level
    with ThreadPoolExecutor(6) as pool:
        models = list(pool.map(hat_mm.get_model, names))
    assert [type(model).__name__ for model in models[:3]] == [
        'ImageClassifier', 'MaskRCNN', 'EncoderDecoder',
    ]  # fmt: skip
    assert logger.level == level


def test_no_weights_yet():
    with pytest.raises(ValueError, match=f"no weights of '{MASK_RCNN}' yet; .*: '{HAT_NET}'$"):
        hat_mm.get_model(MASK_RCNN, pretrained=True)


def test_other_errors_of_weights(tmp_path):
    with pytest.raises(TypeError, match='pretrained must be a bool, an address or a path, not 1'):
        hat_mm.get_model(HAT_NET, pretrained=1)
    with pytest.raises(FileNotFoundError, match=r"weights 'no\.pth' do not exist"):
        hat_mm.get_model(HAT_NET, pretrained='no.pth')
    with pytest.raises(ValueError, match='ftp'):
        hat_mm.get_model(HAT_NET, pretrained='ftp://example.org/x.pth')


# --- indexes of users -----------------------------------------------------------------------------


@pytest.fixture(params=['file', 'http'])
def address(request, tmp_path):
    """A folder and an address of it."""
    folder = tmp_path / 'served'
    folder.mkdir()
    if request.param == 'file':
        yield folder, folder.as_uri()
        return

    with serving(folder) as address:
        yield folder, address


def write_index(folder: Path, models: list, name: str = 'metafile.yml') -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({'Collections': [{'Name': 'Mine'}], 'Models': models}))
    return path


TOY = dict(Name='Mine_Shapes', Config='configs/toy/fastervit-tiny_shapes.py')


def test_an_index_of_ones_own_from_file_to_model(address, tmp_path):
    folder, url = address
    index = write_index(tmp_path, [dict(TOY, Weights=f'{url}/mine.pth', Metadata=dict(Epochs=1))])
    hat_mm.register_model_index(index, config_prefix=ROOT)
    assert hat_mm.list_models('mine*') == ['mine_shapes']
    assert hat_mm.list_models('mine*', task='null') == ['mine_shapes']
    trained = hat_mm.get_model('Mine_Shapes')
    meta = {'dataset_meta': {'classes': ['round', 'square', 'pointed']}}
    torch.save({'state_dict': trained.state_dict(), 'meta': meta}, folder / 'mine.pth')
    model = hat_mm.get_model('mine_shapes', pretrained=True)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model._dataset_meta == meta['dataset_meta']
    assert model._metainfo.metadata == {'Epochs': 1}


def test_a_recorded_checksum_counts(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'x.pth')
    weights = (tmp_path / 'x.pth').as_uri()
    index = write_index(tmp_path, [dict(TOY, Weights=weights, Metadata=dict(SHA256='ab' * 32))])
    hat_mm.register_model_index(index, config_prefix=ROOT)
    with pytest.raises(download.DownloadError, match='sha256'):
        hat_mm.get_model('mine_shapes', pretrained=True)


def test_imports_and_configs_beside_the_index(tmp_path, monkeypatch):
    (tmp_path / 'zoo').mkdir()
    (tmp_path / 'mine.py').write_text(f"_base_ = '{ROOT}/{TOY['Config']}'\n")
    write_index(tmp_path / 'zoo', [dict(Name='a', Config='mine.py')])
    (tmp_path / 'index.yml').write_text('Import:\n- zoo/metafile.yml\n')
    monkeypatch.chdir(tmp_path)
    hat_mm.register_model_index('index.yml')
    monkeypatch.chdir('/')
    assert type(hat_mm.get_model('a').backbone) is hat_mm.FasterViT


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('Models: [', 'is no YAML'),
        ('- 1', 'is no model index'),
        ('Collections: []', 'is no model index'),
        ('Models: {}', 'is no model index'),
        ('Models: 3', 'Models must be a list'),
        ('Import: x.yml', 'Import must be a list'),
        ('Models: [{Config: a.py}]', 'a model has no Name'),
        ('Models: [{Name: a}]', "model 'a': .*None is no path"),
        ('Models: [{Name: a, Config: /etc/a.py}]', "model 'a': .*relative path"),
        ('Models: [{Name: a, Config: ../a.py}]', "model 'a': .*relative path"),
        ('Models: [{Name: a, Config: configs/../../a.py}]', "model 'a': .*relative path"),
        ("Models: [{Name: a, Config: 'x\\..\\..\\a.py'}]", "model 'a': .*relative path"),
        ('Models: [{Name: a, Config: "C:/a.py"}]', "model 'a': .*relative path"),
        ('Models: [{Name: a, Config: a.py}]', r"config of 'a' does not exist: .*/a\.py; config_p"),
        ('Models: [{Name: a, Config: a.py, Weights: [1]}]', 'an address must be a string'),
        ('Models: [{Name: a, Config: a.py, Results: [{Task: t}]}]', "Results lack 'Dataset'"),
        ('Models: [{Name: a, Config: a.py}, {Name: A, Config: a.py}]', "several models .* 'A'"),
        ('Import: [../x.yml]', 'relative path'),
        ('Import: [/x.yml]', 'relative path'),
        ('Import: [3]', '3 is no path'),
        (f'Models: [{{Name: b, Config: b.py}}, {{Name: {HAT_NET}, Config: b.py}}]', 'is taken by'),
    ],
)
def test_wrong_indexes_add_nothing(text, told, tmp_path):
    (tmp_path / 'index.yml').write_text(text)
    (tmp_path / 'b.py').write_text('model = dict()\n')
    with pytest.raises(ValueError, match=told):
        hat_mm.register_model_index(tmp_path / 'index.yml')
    assert zoo._registered == {}


def test_names_are_taken_once(tmp_path):
    index = write_index(tmp_path, [TOY])
    hat_mm.register_model_index(index, config_prefix=ROOT)
    with pytest.raises(ValueError, match=r"'Mine_Shapes' is taken by .*metafile\.yml"):
        hat_mm.register_model_index(index, config_prefix=ROOT)
    with pytest.raises(FileNotFoundError):
        hat_mm.register_model_index(tmp_path / 'no.yml')


def test_a_config_without_a_toolbox(tmp_path):
    (tmp_path / 'mine.py').write_text("model = dict(type='X')\n")
    hat_mm.register_model_index(write_index(tmp_path, [dict(Name='a', Config='mine.py')]))
    with pytest.raises(ValueError, match="'a' has no default_scope"):
        hat_mm.get_model('a')


# --- mmpretrain's functions -----------------------------------------------------------------------


def test_mmpretrain_knows_all_names():
    theirs = mmpretrain.list_models()
    assert set(hat_mm.list_models()) < set(theirs)
    assert 'resnet50_8xb32_in1k' in theirs
    assert [n for n in theirs if n.startswith('fastervit-0_3rd')] == ['fastervit-0_3rdparty_in1k']


@pytest.mark.parametrize('first', ['hat_mm', 'mmpretrain.apis.model'])
def test_mmpretrain_learns_them_in_either_order(first, run_python):
    code = f"""
import importlib
importlib.import_module({first!r})
import hat_mm
import mmpretrain.apis.model as model
print(model.ModelHub.has('{HAT_NET}'))
"""
    done = run_python('-c', code)
    assert done.stdout.split()[-1:] == ['True'], done.stderr


def test_without_repairs_mmpretrain_is_left_alone(run_python):
    code = f"""
import hat_mm, sys
import mmpretrain.apis.model as model
print(model.ModelHub.has('{HAT_NET}'))
"""
    done = run_python('-c', code, HAT_MM_NO_COMPAT='1')
    # Where torchvision needs the repair, mmpretrain cannot be imported.
    assert done.stdout.split()[-1:] != ['True']


def test_trouble_with_the_index_does_not_stop_mmpretrain(caplog):
    def fails(*_, **__):
        raise ValueError('name conflict')

    module = types.SimpleNamespace(ModelHub=types.SimpleNamespace(register_model_index=fails))
    with caplog.at_level(logging.WARNING):
        zoo.add_to_mmpretrain(module)
    assert 'does not know the models of hat_mm: name conflict' in caplog.text


@pytest.mark.parametrize(
    ('name', 'kind', 'channels'),
    [
        (MASK_RCNN, 'MaskRCNN', [8, 16, 24, 32]),
        (DINO, 'DINO', [16, 24, 32]),
        (SEMANTIC_FPN, 'EncoderDecoder', [8, 16, 24, 32]),
    ],
)
def test_mmpretrain_builds_models_of_other_toolboxes(name, kind, channels):
    model = mmpretrain.get_model(name, backbone=small(), neck=dict(in_channels=channels))
    assert type(model).__name__ == kind
    assert type(model.backbone) is hat_mm.HATNet


def test_mmpretrain_loads_the_authors_weights(official):
    model = mmpretrain.get_model(HAT_NET, pretrained=True)
    state = torch.load(official, weights_only=True)
    assert torch.equal(model.head.fc.weight, state['classifier.1.weight'])
    assert torch.equal(model.backbone.stem.conv1.weight, state['patch_embed.0.weight'])
