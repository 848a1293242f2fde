"""The model index: valid, complete, and in agreement with the configs and the official files."""

import functools
import re
import runpy
import shutil
from pathlib import Path

import make_configs
import pytest
import torch
from mmdet.models import ResNet
from mmengine.config import Config
from mmengine.config.utils import _get_cfg_metainfo
from modelindex.load_model_index import load as load_index

import hat_mm
from hat_mm.weights.official import OFFICIAL_FILES
from hat_mm.zoo import metafiles
from hat_mm.zoo.metafiles import AUTHORS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs'
PAPER_FAMILIES = ('fastervit', 'hat_net')  # with weights and figures of their authors
PLUGGED_FAMILIES = ('resnet_hat', 'swin_hat')
FAMILIES = (*PAPER_FAMILIES, *PLUGGED_FAMILIES)


@functools.cache
def entries() -> dict[str, dict]:
    """All entries of the shipped metafiles by name."""
    models = [m for f in FAMILIES for m in metafiles.load(CONFIGS / f / 'metafile.yml')['Models']]
    names = [model['Name'] for model in models]
    assert len(set(names)) == len(names)
    return dict(zip(names, models, strict=True))


def name_of(file) -> str:
    if file.detector is not None:
        return file.detector
    side = '' if file.input_size == 224 else f'-{file.input_size}px'
    return f'{file.backbone}_3rdparty_in1k{side}'


CLASSIFIERS = [file for file in OFFICIAL_FILES if file.detector is None]
[DETECTOR] = [file for file in OFFICIAL_FILES if file.detector is not None]
of_classifiers = pytest.mark.parametrize('file', CLASSIFIERS, ids=lambda file: file.backbone)
of_files = pytest.mark.parametrize('file', OFFICIAL_FILES, ids=lambda file: file.name)


# --- form -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('root', [ROOT, Path(hat_mm.__file__).parent / '.mim'], ids=['root', 'mim'])
def test_modelindex_has_no_complaint(root, capsys):
    index = load_index(str(root / 'model-index.yml'))
    index.build_models_with_collections()
    index.check(silent=False)
    assert capsys.readouterr().out == 'All good!\n'
    assert {model.name for model in index.models} == set(entries())
    hat, hmhsa = (f'https://arxiv.org/abs/{number}' for number in ('2306.06189', '2106.03180'))
    assert {c.name: c.paper['URL'] for c in index.collections} == {
        'FasterViT': hat,
        'HAT-Net': hmhsa,
        'ResNet-HAT': hat,
        'ResNet-H-MHSA': hmhsa,
        'SwinHAT': hat,
    }
    for collection in index.collections:
        assert collection.metadata.data['Architecture']


def test_modelindex_would_complain(tmp_path, capsys):
    """The same check sees a wrong file."""
    shutil.copy(CONFIGS / 'hat_net/metafile.yml', tmp_path)  # without the page beside it
    load_index(str(tmp_path / 'metafile.yml')).check(silent=False)
    assert 'README.md is not a valid file' in capsys.readouterr().out


def test_every_config_has_an_entry_and_every_entry_a_config():
    leaves = {path.stem: path for family in FAMILIES for path in (CONFIGS / family).glob('*.py')}
    assert len(leaves) == 212
    assert set(leaves) <= set(entries())
    for name, entry in entries().items():
        path = ROOT / entry['Config']
        assert path in leaves.values(), name
        assert name == name.lower()  # mim looks for configs in lower case
        assert path.stem == name or 'Weights' in entry
        assert entry['Results'][0]['Task'], name


def test_mmengine_finds_entries():
    package = Path(hat_mm.__file__).parent
    for path in (
        'fastervit/fastervit-0_32xb128_in1k.py',
        'hat_net/retinanet_hat-net-tiny_fpn_1x_coco.py',
        'resnet_hat/mask-rcnn_r50-hmhsa_fpn_1x_coco.py',
    ):
        entry = _get_cfg_metainfo(str(package), path)
        assert entry['Config'] == f'configs/{path}'
        assert (package / '.mim' / entry['Config']).is_file()


# --- the official files ---------------------------------------------------------------------------


@of_files
def test_every_official_file_has_an_entry(file):
    entry = entries()[name_of(file)]
    assert entry['Weights'] == entry['Converted From']['Weights'] == file.url
    facts = entry['Metadata']
    assert facts['Licence'] == file.licence
    assert facts.get('SHA256') == file.sha256
    trained_on = facts['Training Data']
    assert tuple([trained_on] if isinstance(trained_on, str) else trained_on) == file.trained_on
    [result] = entry['Results']
    task = 'Image Classification' if file.detector is None else 'Object Detection'
    assert (result['Task'], result['Dataset']) == (task, file.trained_on[-1])


def test_there_are_no_other_weights_of_the_authors():
    urls = {file.url for file in OFFICIAL_FILES}
    authors = ('_3rdparty_', '_authors_')
    found = [e['Weights'] for name, e in entries().items() if any(a in name for a in authors)]
    assert sorted(found) == sorted(urls)


@of_classifiers
def test_backbones_load_the_official_file_of_their_arch(file):
    backbone = runpy.run_path(str(CONFIGS / f'_base_/backbones/{file.backbone}.py'))['backbone']
    assert backbone['init_cfg'] == {'type': 'Pretrained', 'checkpoint': file.url}
    assert backbone['type'] == f'hat_mm.{file.family}'
    assert backbone['arch'] == file.arch


def test_the_detector_starts_from_its_file_and_tests_as_its_authors():
    cfg = Config.fromfile(ROOT / entries()[DETECTOR.detector]['Config'])
    assert cfg.load_from == DETECTOR.url
    assert cfg.model.backbone.arch == DETECTOR.arch
    assert cfg.model.backbone.init_cfg is None
    preprocessor = cfg.model.data_preprocessor
    assert (*preprocessor.mean, *preprocessor.std) == (*DETECTOR.mean, *DETECTOR.std)
    assert preprocessor.bgr_to_rgb
    [resize] = [s for s in cfg.test_dataloader.dataset.pipeline if s.type == 'Resize']
    assert (resize.scale, resize.keep_ratio) == ((1333, DETECTOR.input_size), True)
    assert cfg.model.test_cfg == dict(max_per_img=300)
    assert (cfg.model.num_queries, cfg.model.bbox_head.num_classes) == (900, 80)


@of_classifiers
def test_test_images_are_as_the_file_wants_them(file):
    cfg = Config.fromfile(ROOT / entries()[name_of(file)]['Config'])
    assert tuple(cfg.data_preprocessor.mean) == file.mean
    assert tuple(cfg.data_preprocessor.std) == file.std
    assert cfg.data_preprocessor.to_rgb
    resize, *crop = cfg.test_dataloader.dataset.pipeline[1:-1]
    # HAT-Net's crop is not published: the custom of the field.
    resized = int(file.input_size / (file.crop or 0.875))
    assert (resize.scale, resize.interpolation) == (resized, 'bicubic')
    if file.squash:
        assert (resize.type, resize.get('keep_ratio', False)) == ('Resize', False)
    else:
        assert (resize.type, resize.edge) == ('ResizeEdge', 'short')
    cropped = [(step.type, step.crop_size) for step in crop]
    whole = file.squash and resized == file.input_size
    assert cropped == ([] if whole else [('CenterCrop', file.input_size)])


def test_the_page_about_weights_agrees():
    rows = [line.split('|')[1:-1] for line in (ROOT / 'WEIGHTS.md').read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows if row and '](https' in row[0]]
    assert rows == [
        [
            f'[{file.name}]({file.url})',
            f'`{file.detector or file.backbone}`',
            ', then '.join(file.trained_on),
            str(file.input_size),
            ('not published' if file.crop is None else str(file.crop)) + ', squashed' * file.squash,
            file.licence,
            file.sha256 or 'not known',
        ]
        for file in CLASSIFIERS
    ] + [
        [
            f'[{DETECTOR.name}]({DETECTOR.url})',
            f'`{DETECTOR.detector}`',
            ', then '.join(DETECTOR.trained_on),
            '800, the other at most 1333',
            'none',
            DETECTOR.licence,
            DETECTOR.sha256 or 'not known',
        ]
    ]


# --- figures --------------------------------------------------------------------------------------

# Beside the metafiles themselves, from the papers: a wrong figure would have to be wrong twice.
IMAGENET = """
fastervit-0          82.1 95.9
fastervit-1          83.2 96.5
fastervit-2          84.2 96.8
fastervit-3          84.9 97.2
fastervit-4          85.4 97.3
fastervit-5          85.6 97.4
fastervit-6          85.8 97.4
fastervit-4-21k-224  86.6 97.8
fastervit-4-21k-384  87.6 98.3
fastervit-4-21k-512  87.8 98.4
fastervit-4-21k-768  87.9 98.5
hat-net-tiny         79.8 -
hat-net-small        82.6 -
hat-net-medium       84.0 -
hat-net-large        84.2 -
"""
BOX = 'box AP, box AP50, box AP75'
BOX_AND_MASK = f'{BOX}, mask AP, mask AP50, mask AP75'
OTHERS = {
    'cascade-mask-rcnn_{}_fpn_4conv1fc-giou_ms-crop-3x_coco': (BOX_AND_MASK, """
fastervit-2 52.1 - 56.6 45.4 68.4 49.0
fastervit-3 52.4 71.1 56.7 45.4 68.7 49.3
fastervit-4 52.9 71.6 57.7 45.8 69.1 49.8
"""),
    '{}_upernet_8xb2-160k_ade20k-512x512': ('mIoU, mIoU(ms+flip)', """
fastervit-2 47.2 48.4
fastervit-3 48.7 49.7
fastervit-4 49.1 50.3
"""),
    'dino-4scale_{}_authors_coco': ('box AP', 'fastervit-4-21k-224 55.16'),
    'retinanet_{}_fpn_1x_coco': (BOX, """
hat-net-tiny 42.5 63.3 45.8
hat-net-small 44.8 65.8 48.1
hat-net-medium 45.9 66.9 49.2
hat-net-large 46.3 67.2 49.6
"""),
    'mask-rcnn_{}_fpn_1x_coco': (BOX_AND_MASK, """
hat-net-tiny 43.1 65.4 47.4 39.7 62.5 42.4
hat-net-small 45.2 67.6 49.9 41.6 64.6 44.7
hat-net-medium 47.0 69.0 51.5 42.7 66.0 46.0
hat-net-large 47.4 69.3 52.1 43.1 66.5 46.6
"""),
    '{}_fpn_4xb4-80k_ade20k-512x512': ('mIoU', """
hat-net-tiny 43.6
hat-net-small 46.6
hat-net-medium 49.3
hat-net-large 49.5
"""),
}  # fmt: skip


def parsed(table: str, metrics: str) -> dict[str, dict[str, float]]:
    rows = [line.split() for line in table.strip().splitlines()]
    return {
        name: {
            f'{metric} (authors)': float(figure)
            for metric, figure in zip(metrics.split(', '), figures, strict=True)
            if figure != '-'
        }
        for name, *figures in rows
    }


def test_the_authors_figures_and_no_others():
    expected = {}
    for backbone, figures in parsed(IMAGENET, 'Top 1 Accuracy, Top 5 Accuracy').items():
        [file] = [file for file in CLASSIFIERS if file.backbone == backbone]
        expected[name_of(file)] = figures
    for name, (metrics, table) in OTHERS.items():
        expected |= {name.format(b): figures for b, figures in parsed(table, metrics).items()}
    found = {}
    for name, entry in entries().items():
        metrics = [(r['Task'], *m) for r in entry['Results'] for m in r['Metrics'].items()]
        authors = {metric: figure for _, metric, figure in metrics if metric.endswith(AUTHORS)}
        if authors:
            found[name] = authors
        for task, metric, _ in metrics:
            assert task == {
                'box': 'Object Detection', 'mask': 'Instance Segmentation',
                'mIoU': 'Semantic Segmentation', 'Top': 'Image Classification',
            }[re.match('[A-Za-z]+', metric)[0]]  # fmt: skip
    assert found == expected


@of_classifiers
def test_parameters_and_flops_are_those_measured(file):
    facts = entries()[name_of(file)]['Metadata']
    with torch.device('meta'):
        backbone = getattr(hat_mm, file.family)(file.arch, out_indices=(3,))
    head = (backbone.out_channels[-1] + 1) * 1000
    assert facts['Parameters'] == sum(p.numel() for p in backbone.parameters()) + head
    text = (ROOT / 'docs/complexity/published.md').read_text()
    side = file.input_size
    [row] = re.findall(rf'^\| {file.backbone} \| {side}×{side} \| (.*)', text, re.MULTILINE)
    millions, _, giga, *_ = row.split(' | ')
    assert f'{facts["Parameters"] / 1e6:.2f}' == millions
    assert f'{facts["FLOPs"] / 1e9:.2f}' == giga


@pytest.mark.parametrize('name', make_configs.TABLE['parameters'])
def test_parameters_of_backbones_without_a_head_are_counted(name):
    backbone = runpy.run_path(str(CONFIGS / f'_base_/backbones/{name}.py'))['backbone']
    with torch.device('meta'):
        if name.startswith('r50'):
            network, plain = ResNet(50, **backbone), ResNet(50)
        else:
            network, plain = (hat_mm.SwinHAT(backbone['arch'], hat_stages=s) for s in (None, ()))
    count, fewer = (sum(p.numel() for p in part.parameters()) for part in (network, plain))
    assert make_configs.TABLE['parameters'][name] == count
    page = (CONFIGS / make_configs.FOLDERS[name] / 'README.md').read_text()
    for number in (count, fewer):
        assert re.search(rf'\b{re.escape(f"{number / 1e6:.1f}")}\b', page.partition('```')[0])
    [row] = [
        line
        for line in (ROOT / 'docs/models.md').read_text().splitlines()
        if line.startswith(f'| `{name}` |')
    ]
    assert row.strip('| ').split(' | ')[1] == f'{count / 1e6:.1f}'


# --- what was measured stays ----------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of all that the generator reads and writes."""
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs/models.md', tmp_path / 'docs')
    shutil.copytree(CONFIGS, tmp_path / 'configs')
    monkeypatch.setattr(make_configs, 'CONFIGS', tmp_path / 'configs')
    return tmp_path


LEAF = 'mask-rcnn_hat-net-tiny_fpn_1x_coco'
URL = 'https://example.org/weights/mask-rcnn_hat-net-tiny-0123abcd.pth'


def measured(data):
    """What tools/misc/make_metafile_entry.py adds to an entry."""
    entry = next(model for model in data['Models'] if model['Name'] == LEAF)
    entry['Metadata'] |= {
        'Epochs': 11, 'Batch Size': 8, 'Training Memory (GB)': 5.1, 'Date': '2026-11-20',
        'Software': {'PyTorch': '2.13.0'}, 'SHA256': 'ab' * 32,
    }  # fmt: skip
    del entry['Metadata']['Training Data']
    boxes, masks = entry['Results']
    boxes['Metrics'] = {'box AP': 42.7, **boxes['Metrics']}
    masks['Metrics'] = {**masks['Metrics'], 'mask AP': 39.3}
    entry['Weights'] = URL
    entry['Training Log'] = 'https://example.org/log.json'
    return entry


def test_measurements_stay_and_get_into_the_pages(copied, capsys):
    path = copied / 'configs/hat_net/metafile.yml'
    data = metafiles.load(path)
    entry = measured(data)
    path.write_text(metafiles.text(data))
    assert make_configs.main(['--check']) == 1  # the pages lack it
    assert make_configs.main([]) == 0
    after = metafiles.load(path)
    assert after == data
    found = next(model for model in after['Models'] if model['Name'] == LEAF)
    assert found == entry
    page = (copied / 'configs/hat_net/README.md').read_text()
    [row] = [line for line in page.splitlines() if line.startswith(f'| [{LEAF}]')]
    assert row.split(' | ')[1:] == [
        '43.1', '65.4', '47.4', '39.7', '62.5', '42.4', '42.7', '39.3', f'[file]({URL}) |',
    ]  # fmt: skip
    front = (copied / 'docs/models.md').read_text()
    config = f'../configs/hat_net/{LEAF}.py'
    assert f' | [43.1 / 39.7]({config}), **[42.7 / 39.3]({URL})** | ' in front
    assert make_configs.main(['--check']) == 0
    assert '0 files differ' in capsys.readouterr().out


def test_what_the_table_does_not_know_stays(copied):
    path = copied / 'configs/fastervit/metafile.yml'
    data = metafiles.load(path)
    own = {
        'Name': 'fastervit-0_mine',
        'In Collection': 'FasterViT',
        'Config': 'configs/mine.py',
        'Results': {'Task': 'Pose', 'Dataset': 'mine', 'Metrics': {'PCK': 1.5}},
    }
    data['Models'].insert(3, own)
    data['Collections'][0]['Code'] = {'URL': 'https://example.org/code'}
    data['Collections'].append({'Name': 'Mine'})
    official = next(m for m in data['Models'] if m['Name'] == 'fastervit-0_3rdparty_in1k')
    official['Results'][0]['Metrics']['Top 1 Accuracy'] = 82.05
    path.write_text(metafiles.text(data))
    assert make_configs.main([]) == 0
    after = metafiles.load(path)
    assert after['Collections'] == data['Collections']
    assert after['Models'][-1] == own
    [same] = [m for m in after['Models'] if m['Name'] == official['Name']]
    metrics = same['Results'][0]['Metrics']
    assert metrics == official['Results'][0]['Metrics']
    page = (copied / 'configs/fastervit/README.md').read_text()
    assert '| [fastervit-0_mine](../../configs/mine.py) | 1.5 |' in page
    assert '| 82.1 | 95.9 | 82.05 | [file]' in page
    assert make_configs.main(['--check']) == 0


def test_the_tables_own_fields_are_restored(copied):
    path = copied / 'configs/hat_net/metafile.yml'
    before = path.read_text()
    data = metafiles.load(path)
    leaf, official = data['Models'][0], data['Models'][-1]
    leaf['Metadata'] |= {'Epochs': 3, 'Published Settings': 'x'}  # it has no weights
    official['Weights'] = 'https://example.org/other.pth'
    official['Metadata']['Licence'] = 'free'
    data['Models'].pop(5)
    path.write_text(metafiles.text(data))
    assert make_configs.main(['--check']) == 1
    assert make_configs.main([]) == 0
    assert path.read_text() == before


def test_two_models_of_one_name_are_an_error(copied):
    path = copied / 'configs/hat_net/metafile.yml'
    data = metafiles.load(path)
    data['Models'].append(dict(data['Models'][0]))
    path.write_text(metafiles.text(data))
    with pytest.raises(SystemExit, match='several models of one name'):
        make_configs.main([])


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', PAPER_FAMILIES)
def test_the_page_of_a_paper(family):
    """Citation, licence and the mark of the authors' figures; nothing measured is invented."""
    page = (CONFIGS / family / 'README.md').read_text()
    [bibtex] = re.findall(r'^```bibtex\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    assert bibtex in (ROOT / 'docs/models.md').read_text()
    assert 'WEIGHTS.md' in page
    results = page.partition('<!-- results')[2].partition('<!-- end of results')[0]
    tables = re.findall(r'(?:^\|.*\n)+', results, re.MULTILINE)
    assert len(tables) == 4
    for table in tables:
        (_, *head), _, *rows = [
            [cell.strip() for cell in line.split('|')[1:-1]] for line in table.splitlines()
        ]
        assert head[-1] == 'weights'
        assert any(column.endswith(AUTHORS) for column in head)
        for first, *cells in rows:
            entry = entries()[re.match(r'\[([^\]]+)\]', first)[1]]
            metrics = {k: v for r in entry['Results'] for k, v in r['Metrics'].items()}
            shown = dict(zip(head, cells, strict=True))
            weights = shown.pop('weights')
            assert weights == (f'[file]({entry["Weights"]})' if 'Weights' in entry else '')
            for key, unit, decimals in (('parameters, M', 1e6, 1), ('FLOPs, G', 1e9, 2)):
                if key in shown:
                    fact = entry['Metadata']['Parameters' if unit == 1e6 else 'FLOPs']
                    assert shown.pop(key) == f'{fact / unit:.{decimals}f}'
            assert shown == {column: str(metrics.get(column, '')) for column in shown}
            assert metrics.keys() <= shown.keys()


@pytest.mark.parametrize('family', PLUGGED_FAMILIES)
def test_the_page_of_what_no_paper_describes(family):
    """Papers, citations and licence; no figure where nobody reports one."""
    page = (CONFIGS / family / 'README.md').read_text()
    papers = [c['Paper'] for c in metafiles.load(CONFIGS / family / 'metafile.yml')['Collections']]
    [bibtex] = re.findall(r'^```bibtex\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    for paper in papers:
        assert paper['URL'] in page
        assert f'title={{{paper["Title"]}}}' in bibtex
    assert 'WEIGHTS.md' in page
    results = page.partition('<!-- results')[2].partition('<!-- end of results')[0]
    trained = [e for e in entries().values() if f'/{family}/' in e['Config'] and 'Weights' in e]
    assert ('No model has been trained' in results) == (trained == [])


def test_a_model_that_was_trained_replaces_the_note(copied):
    path = copied / 'configs/swin_hat/metafile.yml'
    data = metafiles.load(path)
    entry = data['Models'][0]
    boxes, masks = entry['Results']
    boxes['Metrics'], masks['Metrics'] = {'box AP': 43.5}, {'mask AP': 39.9}
    entry['Weights'] = URL
    path.write_text(metafiles.text(data))
    assert make_configs.main([]) == 0
    assert metafiles.load(path) == data
    page = (copied / 'configs/swin_hat/README.md').read_text()
    assert 'No model has been trained' not in page
    assert f'| 43.5 | 39.9 | [file]({URL}) |' in page
    front = (copied / 'docs/models.md').read_text()
    assert f'**[43.5 / 39.9]({URL})**' in front
    assert make_configs.main(['--check']) == 0
