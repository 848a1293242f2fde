"""Models by name: the shipped index, indexes of users, weights, and mmpretrain's functions."""

import importlib
import importlib.util
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
import yaml
from golden import official_state
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import CheckpointLoader
from torch.utils import deterministic

import hat_mm
from hat_mm import compat
from hat_mm.weights import download
from hat_mm.weights.official import OFFICIAL_FILES
from hat_mm.zoo.models import add_to_mmpretrain

ROOT = Path(__file__).resolve().parents[2]
HAT_NET = 'hat-net-tiny_3rdparty_in1k'
MASK_RCNN = 'mask-rcnn_hat-net-tiny_fpn_1x_coco'
DINO = 'dino-4scale_hat-net-tiny_8xb2-12e_coco'
SEMANTIC_FPN = 'hat-net-tiny_fpn_4xb4-80k_ade20k-512x512'
SHIPPED = {
    *(f'{file.backbone}_3rdparty_in1k' for file in OFFICIAL_FILES if file.input_size == 224),
    *(
        path.stem
        for family in ('fastervit', 'hat_net', 'resnet_hat', 'swin_hat')
        for path in (ROOT / f'configs/{family}').glob('*.py')
    ),
}


# A HAT-Net that is built in no time; an arch of another type replaces the name of the config's.
def small():
    return dict(
        arch=dict(_delete_=True, embed_dims=(8, 16, 24, 32), head_dim=8, depths=(1, 1, 1, 1))
    )


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))
    monkeypatch.delenv('HAT_MM_WEIGHTS', raising=False)


@pytest.fixture
def no_downloads(monkeypatch):
    """Whatever would read or fetch weights fails."""

    def refuse(*arguments, **options):
        raise AssertionError(f'weights were asked for: {arguments}')

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', refuse)
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', refuse)


# --- names ----------------------------------------------------------------------------------------


def test_all_are_listed():
    names = hat_mm.list_models()
    assert len(SHIPPED) > 100
    assert set(names) >= SHIPPED
    official = [name for name in names if '_3rdparty_' in name or '_authors_' in name]
    assert len(official) == len(OFFICIAL_FILES)
    assert names == sorted(set(names))


@pytest.mark.parametrize(
    ('pattern', 'exclude', 'task'),
    [
        (None, None, None),
        ('*tiny', ['mask', '*in1k'], None),
        ('*-4-21k-[23]?4*', ['dino'], 'Object Detection'),
        (None, ['hat*'], 'Semantic Segmentation'),
        (None, None, 'no such'),
    ],
)
def test_lists_as_mmpretrain_does(pattern, exclude, task):
    theirs = mmpretrain.list_models(pattern, exclude, task)
    ours = hat_mm.list_models(pattern, exclude, task)
    assert [n for n in ours if n in SHIPPED] == [n for n in theirs if n in SHIPPED]


def test_every_model_says_what_it_is_for():
    tasks = ('Object Detection', 'Instance Segmentation', 'Panoptic Segmentation',
             'Semantic Segmentation', 'Image Classification')  # fmt: skip
    detectors, masks, panoptic, segmentors, classifiers = (
        SHIPPED & {*hat_mm.list_models(task=task)} for task in tasks
    )
    assert detectors | panoptic | segmentors | classifiers == SHIPPED
    assert panoptic == SHIPPED & {*hat_mm.list_models('*-panoptic')}
    assert masks == {name for name in detectors if 'mask' in name}
    streets = {*hat_mm.list_models('*cityscapes')}
    assert segmentors == SHIPPED & ({*hat_mm.list_models('*ade20k')} | streets)


def test_a_single_pattern_to_exclude_is_an_error():
    with pytest.raises(TypeError, match=r"must be a list, not 'dino\*'"):
        hat_mm.list_models(exclude_patterns='dino*')


@pytest.mark.parametrize(
    ('name', 'told'),
    [
        ('mask-rcnn_hat-net-tinny_fpn_1x_coco', f"did you mean '{MASK_RCNN}'"),
        ('fastervit-3', "did you mean 'fastervit-3_32xb128_in1k' or 'fastervit-3_3rdparty_in1k'"),
        ('zzz', r"no model 'zzz'; hat_mm.list_models\(\) lists all \d+$"),
    ],
)
def test_unknown_names_suggest_near_ones(name, told):
    with pytest.raises(ValueError, match=told):
        hat_mm.get_model(name)


# --- models ---------------------------------------------------------------------------------------


def test_a_detector_without_weights(no_downloads, capfd):
    model = hat_mm.get_model(MASK_RCNN, backbone=small(), neck=dict(in_channels=[8, 16, 24, 32]))
    assert type(model).__name__ == 'MaskRCNN'
    assert not model.training
    assert model.cfg.model.backbone.init_cfg is None
    assert len(model.dataset_meta['classes']) == 80
    # As a training starts: mmdet's own initialization of a head has run.
    std = model.roi_head.bbox_head.fc_reg.weight.detach().std()
    assert float(std) == pytest.approx(0.001, rel=0.1)
    out, err = capfd.readouterr()
    assert 'Initialized' not in out + err and 'init_weights' not in out + err


def test_a_teacher_is_not_fetched(no_downloads):
    """Also a model whose train() returns nothing."""
    folder = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim/configs'
    cfg = Config.fromfile(folder / 'ld/ld_r18-gflv1-r101_fpn_1x_coco.py')
    cfg.model.teacher_config = str(folder / 'gfl/gfl_r101_fpn_ms-2x_coco.py')
    model = hat_mm.get_model(cfg)
    assert type(model).__name__ == 'KnowledgeDistillationSingleStageDetector'
    assert not model.training


def test_a_segmentor_and_a_classifier(no_downloads):
    model = hat_mm.get_model(
        SEMANTIC_FPN.upper(), backbone=small(), neck=dict(in_channels=[8, 16, 24, 32])
    )
    assert type(model).__name__ == 'EncoderDecoder'
    assert type(model.data_preprocessor).__name__ == 'SegDataPreProcessor'
    assert len(model.dataset_meta['classes']) == 150
    model = hat_mm.get_model(HAT_NET, device='cpu')
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    result = mmpretrain.inference_model(model, picture)
    assert result['pred_class'] in model.dataset_meta['classes']


def test_a_plugged_resnet_fetches_nothing(no_downloads):
    """Its config starts from torchvision's weights."""
    assert type(hat_mm.get_model('mask-rcnn_r50-hat_fpn_1x_coco')).__name__ == 'MaskRCNN'


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
    backbone = small() | dict(out_indices=(3,))
    model = hat_mm.get_model(HAT_NET, backbone=backbone, head=dict(in_channels=32))
    assert backbone == small() | dict(out_indices=(3,))
    assert model.backbone.out_channels == (32,)
    model._metainfo.metadata.data['Epochs'] = 'x'
    again = hat_mm.get_model(HAT_NET)
    assert again.cfg.model.backbone.arch == 'tiny'
    assert 'Epochs' not in again._metainfo.metadata.data


@pytest.mark.parametrize(
    ('overrides', 'told'),
    [
        (dict(bakbone=dict(depth=1)), "'bakbone'"),
        (dict(backbone=dict(windw=14)), "'windw'"),
    ],
)
def test_unknown_overrides_are_named(overrides, told):
    with pytest.raises(TypeError, match=told):
        hat_mm.get_model(HAT_NET, **overrides)


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The folder of HAT_MM_WEIGHTS, with a file as HAT-Net's authors publish."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    torch.save(official_state('hat_net_tiny'), folder / 'HAT-Net_Tiny.pth')
    monkeypatch.setenv('HAT_MM_WEIGHTS', str(folder))
    return folder / 'HAT-Net_Tiny.pth'


def test_the_authors_weights(official):
    model = hat_mm.get_model(HAT_NET, pretrained=True)
    state = torch.load(official, weights_only=True)
    assert torch.equal(model.head.fc.weight, state['classifier.1.weight'])
    assert torch.equal(model.backbone.stem.conv1.weight, state['patch_embed.0.weight'])
    assert not model.training
    for other in (
        hat_mm.get_model(HAT_NET, pretrained=official),
        mmpretrain.get_model(HAT_NET, pretrained=True),
        # As an override, weights of the backbone are loaded, too.
        hat_mm.get_model(SEMANTIC_FPN, backbone=dict(init_cfg=dict(checkpoint=str(official)))),
    ):
        found = other.backbone.state_dict()
        assert all(torch.equal(found[k], v) for k, v in model.backbone.state_dict().items())


def test_a_head_of_ones_own_is_said(official, caplog):
    MMLogger.get_current_instance().addHandler(caplog.handler)  # it keeps its records to itself
    model = hat_mm.get_model(HAT_NET, pretrained=True, head=dict(num_classes=7))
    state = torch.load(official, weights_only=True)
    assert torch.equal(model.backbone.stem.conv1.weight, state['patch_embed.0.weight'])
    assert model.head.fc.weight.shape == (7, 384)
    [said] = [r.getMessage() for r in caplog.records if 'at random' in r.getMessage()]
    assert said.endswith('so at random: head.fc.weight, head.fc.bias')


def test_weights_that_do_not_fit_are_an_error(official, tmp_path):
    with pytest.raises(ValueError, match="does not fit arch 'small'"):
        hat_mm.get_model('hat-net-small_3rdparty_in1k', pretrained=official)
    state = hat_mm.get_model(HAT_NET).state_dict()
    cases = {
        'missing': {k: v for k, v in state.items() if k != 'head.fc.bias'},
        'unexpected': state | {'head.mine': torch.zeros(1)},
        'mismatched': state | {'head.fc.bias': torch.zeros(3)},
    }
    for name, wrong in cases.items():
        path = tmp_path / f'{name}.pth'
        torch.save({'state_dict': wrong, 'meta': {}}, path)
        with pytest.raises(ValueError, match=rf"(?s){name}.pth does not fill.*'{HAT_NET}'.*head\."):
            hat_mm.get_model(HAT_NET, pretrained=str(path))


@pytest.mark.parametrize('inference', [True, False])
def test_weights_of_another_model_are_an_error_with_overrides_too(tmp_path, inference):
    torch.save(hat_mm.get_model(HAT_NET).state_dict(), tmp_path / 'hat_net.pth')
    torch.save({'head.fc.bias': torch.zeros(7)}, tmp_path / 'head.pth')
    for file, told in (('hat_net.pth', 'no FasterViT checkpoint'), ('head.pth', 'does not fill')):
        with torch.inference_mode(inference), pytest.raises(ValueError, match=told):
            hat_mm.get_model(
                'fastervit-0_3rdparty_in1k', pretrained=tmp_path / file, head=dict(num_classes=7)
            )


def test_other_errors_of_weights(tmp_path):
    with pytest.raises(ValueError, match=f"no weights of '{MASK_RCNN}' yet; .*{HAT_NET}"):
        hat_mm.get_model(MASK_RCNN, pretrained=True)
    with pytest.raises(FileNotFoundError, match=r'no\.pth'):
        hat_mm.get_model(HAT_NET, pretrained='no.pth')
    with pytest.raises(
        TypeError, match='pretrained must be True, False, a URL or a path, not None'
    ):
        hat_mm.get_model(HAT_NET, pretrained=None)


def test_a_missing_toolbox_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    with pytest.raises(compat.DependencyError, match='mmdet is not installed'):
        hat_mm.get_model(MASK_RCNN)


# --- indexes of users -----------------------------------------------------------------------------


def write_index(folder: Path, models: list, name: str = 'metafile.yml') -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({'Collections': [{'Name': 'Mine'}], 'Models': models}))
    return path


TOY = 'configs/toy/fastervit-tiny_shapes.py'


def test_an_index_of_ones_own(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'x.pth')
    model = dict(
        Name='Mine_Shapes', Config=TOY, Weights=(tmp_path / 'x.pth').as_uri(),
        Metadata=dict(SHA256='ab' * 32),
    )  # fmt: skip
    index = write_index(tmp_path, [model])
    hat_mm.register_model_index(index, config_prefix=ROOT)
    assert hat_mm.list_models('mine_s*') == ['mine_shapes']
    assert hat_mm.list_models('mine_s*', task='null') == ['mine_shapes']
    # The recorded checksum counts.
    with pytest.raises(download.DownloadError, match='sha256'):
        hat_mm.get_model('mine_shapes', pretrained=True)
    with pytest.raises(ValueError, match=r"'Mine_Shapes' is taken by .*metafile\.yml"):
        hat_mm.register_model_index(index, config_prefix=ROOT)


def test_imports_and_configs_beside_the_index(tmp_path, monkeypatch):
    (tmp_path / 'mine.py').write_text(f"_base_ = '{ROOT}/{TOY}'\n")
    (tmp_path / 'none.py').write_text("model = dict(type='X')\n")
    models = [dict(Name='imported', Config='mine.py'), dict(Name='no-scope', Config='none.py')]
    (tmp_path / 'zoo').mkdir()
    write_index(tmp_path / 'zoo', models)
    (tmp_path / 'index.yml').write_text('Import:\n- zoo/metafile.yml\n')
    monkeypatch.chdir(tmp_path)
    hat_mm.register_model_index('index.yml')
    monkeypatch.chdir('/')
    assert type(hat_mm.get_model('imported').backbone) is hat_mm.FasterViT
    with pytest.raises(ValueError, match="'no-scope' has no default_scope"):
        hat_mm.get_model('no-scope')


def test_what_is_not_used_in_an_index_may_be_missing(tmp_path):
    """As in the toolboxes' own metafiles."""
    result = dict(Task='Image Classification', Dataset='shapes', Metrics=None)
    model = dict(Name='sparse', Config=TOY, README='configs/sparse/README.md', Results=result)
    hat_mm.register_model_index(write_index(tmp_path, [model]), config_prefix=ROOT)
    assert hat_mm.list_models('sparse', task='Image Classification') == ['sparse']


NEWER_STYLE = """
from mmengine.model import PretrainedInit
from mmpretrain.datasets import ImageNet
from mmpretrain.models import ImageClassifier, LinearNeck, ResNet
default_scope = 'mmpretrain'
url = dict(type=PretrainedInit, checkpoint='torchvision://resnet18')
model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet, depth=18, init_cfg=url),
    neck=[dict(type=LinearNeck, in_channels=512, out_channels=8, init_cfg=url)],
)
test_dataloader = dict(dataset=dict(type=ImageNet))
"""


def test_configs_that_import_classes(no_downloads, tmp_path):
    (tmp_path / 'newer.py').write_text(NEWER_STYLE)
    hat_mm.register_model_index(write_index(tmp_path, [dict(Name='newer', Config='newer.py')]))
    model = hat_mm.get_model('newer')
    assert len(model.dataset_meta['classes']) == 1000


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('Models: [', 'is no model index'),
        ('- 1', 'is no model index'),
        ('Collections: []', 'lists no Models'),
        ('Models: 3', 'is no model index'),
        ('Models: [{Config: a.py}]', "Field 'Name' cannot be empty"),
        ('Models: [{Name: a}]', "'a' has no Config"),
        ('Models: [{Name: a, Config: a.py}]', r"config of 'a' does not exist: .*/a\.py; config_p"),
        ('Models: [{Name: a, Config: a.py}, {Name: A, Config: a.py}]', "several models .* 'A'"),
        ('Models: [{Name: 1, Config: b.py}]', '1 in 1 must be a string'),
        ('Models: [{Name: a, Config: [b.py]}]', "in 'a' must be a string"),
        ('Models: [{Name: a, Config: b.py, Weights: w.pth}]', 'is not allowed as an address'),
        ('Import: [x.yml]', r'x\.yml. does not exist'),
        (f'Models: [{{Name: a, Config: b.py}}, {{Name: {HAT_NET}, Config: b.py}}]', 'is taken by'),
    ],
)
def test_wrong_indexes_add_nothing(text, told, tmp_path):
    (tmp_path / 'index.yml').write_text(text)
    (tmp_path / 'b.py').write_text('model = dict()\n')
    with pytest.raises(ValueError, match=told):
        hat_mm.register_model_index(tmp_path / 'index.yml')
    assert 'a' not in hat_mm.list_models()


# --- mmpretrain's functions -----------------------------------------------------------------------


def test_mmpretrain_learns_them_when_it_comes_first(run_python):
    code = f"""
import importlib
importlib.import_module('mmpretrain.apis.model')
import hat_mm
import mmpretrain.apis.model as model
print(model.ModelHub.has('{HAT_NET}'))
"""
    done = run_python('-c', code)
    assert done.stdout.split()[-1:] == ['True'], done.stderr


def test_trouble_with_the_index_does_not_stop_mmpretrain(caplog):
    with caplog.at_level(logging.WARNING):
        # A second time, which is a conflict of names.
        add_to_mmpretrain(importlib.import_module('mmpretrain.apis.model'))
    assert 'does not know the models of hat_mm' in caplog.text


@pytest.mark.parametrize(
    ('name', 'kind'), [(MASK_RCNN, 'MaskRCNN'), (SEMANTIC_FPN, 'EncoderDecoder')]
)
def test_mmpretrain_builds_models_of_other_toolboxes(name, kind):
    model = mmpretrain.get_model(name, backbone=small(), neck=dict(in_channels=[8, 16, 24, 32]))
    assert type(model).__name__ == kind
    assert type(model.backbone) is hat_mm.HATNet


def test_models_of_several_toolboxes_in_threads():
    """mmengine's default scope is one for all threads."""
    with ThreadPoolExecutor(4) as pool:
        models = pool.map(
            lambda name: hat_mm.get_model(name, backbone=small()), [HAT_NET, SEMANTIC_FPN] * 4
        )
        names = [type(model).__name__ for model in models]
    assert names == ['ImageClassifier', 'EncoderDecoder'] * 4
