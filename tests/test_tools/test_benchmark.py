"""The tools that measure backbones: tables with figures in them, one-line errors."""

import importlib.util
import json
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import attention
import candidates
import measuring
import models as benchmark
import padding_effect
import pytest
import report
import torch
from candidates import Setting, parse
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from test_backbones.archs import FAMILIES
from test_deployment.tiny_models import TwoConvs

import hat_mm
from hat_mm.engine.analysis import count
from hat_mm.engine.cli import UserError
from hat_mm.engine.environment import circumstances

ROOT = Path(__file__).resolve().parents[2]
FASTERVIT = f'hat_mm.FasterViT:arch={FAMILIES["FasterViT"].arch}'.replace(' ', '')
HAT_NET = f'hat_mm.HATNet:arch={FAMILIES["HATNet"].arch}'.replace(' ', '')


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    """Threads that wait for each other on a busy processor make tiny networks ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def program():
    """The module that runs the commands; its name is taken."""
    path = Path(benchmark.__file__).with_name('__main__.py')
    spec = importlib.util.spec_from_file_location('benchmark_program', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words):
    program().main(list(words))


def table(text):
    """Rows of the Markdown tables in ``text``: cells by the name of the column."""
    rows = []
    for block in re.findall(r'(?:^\|.*\n?)+', text, re.M):
        head, _, *lines = [
            [cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()
        ]
        rows += [dict(zip(head, line, strict=True)) for line in lines]
    return rows


def prepare(text, size=(64, 64), batch=1, training=False):
    return candidates.prepare(Setting(text, size, batch, training, 'cpu'))


def test_exported_files(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / 'net.onnx'
    hat_mm.export(TwoConvs().eval(), None, path, check=False)
    maps = prepare(str(path)).forward()
    assert {name: array.shape for name, array in maps.items()} == {
        'stage0': (1, 16, 16, 16),
        'stage1': (1, 32, 8, 8),
    }
    assert candidates.complexity(str(path), (64, 64)) == (None, None)
    for wrong in (dict(batch=2), dict(training=True)):
        with pytest.raises(UserError, match='a file runs forward on one image at a time'):
            prepare(str(path), **wrong)
    hat_mm.export(TwoConvs().eval(), None, path, check=False, static=(32, 64))
    assert prepare(str(path), size=(32, 64)).forward()['stage0'].shape == (1, 16, 8, 16)
    with pytest.raises(UserError, match='is for 32x64'):
        prepare(str(path))
    with pytest.raises(UserError, match='takes no flags'):
        prepare(f'{path}@deploy')


# --- measuring.py ---------------------------------------------------------------------------------


class Here:
    """Stands for a worker, without a process of its own."""

    def __init__(self, device, tuned):
        self.allocator = 'tuned' if tuned else 'default'

    def run(self, function, *arguments):
        return measuring.call(function, *arguments)

    __enter__ = measuring.Worker.__enter__

    def __exit__(self, *error):
        measuring.timers.clear()


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(measuring, 'Worker', Here)
    monkeypatch.setattr(measuring, 'timers', {})


@pytest.mark.usefixtures('one_process')
def test_turns_and_what_fails_leaves_the_others(monkeypatch):
    calls = []

    def turn(name, *_):
        calls.append(name)
        if calls == ['a', 'b', 'c', 'a', 'b']:
            raise ValueError('too large')
        return float(len(calls))

    monkeypatch.setattr(measuring, 'turn', turn)
    jobs = dict.fromkeys('abc', (None, None))
    found, errors = measuring.seconds_of(jobs, rounds=3, device='cpu', tuned=True)
    assert calls == ['a', 'b', 'c', 'a', 'b', 'c', 'a', 'c']
    assert (found['a'], found['c']) == ([1, 4, 7], [3, 6, 8])
    assert errors == {'b': 'ValueError: too large'}


@pytest.mark.usefixtures('one_process')
def test_a_turn_times_the_work_and_not_the_reset():
    work = measuring.Work(lambda: time.sleep(0.1), reset=lambda: time.sleep(0.3))
    assert 0.1 <= measuring.turn('sleep', lambda _: work, None) < 0.25


def test_peak_memory_of_a_known_tensor():
    def forward():
        torch.ones(48, 2**20 // 4).sum()
        return torch.ones(8, 2**20 // 4)

    peak = measuring.peak_memory('cpu', lambda _: measuring.Work(forward), None)
    # Of the process's own memory some may be given back meanwhile.
    assert 44 <= peak / 2**20 < 64


def test_peak_memory_of_a_training_step():
    weight = torch.ones(40, 2**20 // 4, requires_grad=True)

    def forward():
        return (weight.exp() * 2).sum()  # the exponential is kept, and there is a gradient

    def reset():
        weight.grad = None

    work = measuring.Work(forward, training=True, reset=reset)
    assert measuring.peak_memory('cpu', lambda _: work, None) / 2**20 >= 76


def test_processes_of_their_own(monkeypatch):
    for name in ('HAT_MM_NO_MALLOPT', 'GLIBC_TUNABLES', 'LD_PRELOAD'):
        monkeypatch.delenv(name, raising=False)
    with measuring.Worker('cpu', tuned=True) as worker:
        assert worker.allocator in ('tuned', 'not tuned (the C library is not glibc)')
        setting = Setting(HAT_NET, (64, 64), 1, False, 'cpu')
        peak = worker.run(measuring.peak_memory, 'cpu', candidates.prepare, setting)
        assert abs(peak) < 2**28
        assert 0 < worker.run(measuring.turn, 'a', candidates.prepare, setting) < 5
        with pytest.raises(UserError, match=r"^ValueError: invalid literal for int.*'x'"):
            worker.run(int, 'x')
        with pytest.raises(UserError, match='the process was killed: out of memory'):
            worker.run(sys.modules['os']._exit, 1)


# --- candidates.py --------------------------------------------------------------------------------


def test_candidate_with_arguments_and_flags():
    text = "mmdet.ResNet:depth=50,plugins=[{'cfg': {'type': 'A'}, 'stages': (False, True)}]@bf16+cp"
    candidate = parse(text)
    assert candidate.name == 'mmdet.ResNet'
    assert candidate.arguments == {
        'depth': 50,
        'plugins': [{'cfg': {'type': 'A'}, 'stages': (False, True)}],
    }
    assert candidate.flags == ('bf16', 'cp')
    assert candidate.base == text.removesuffix('@bf16+cp')


def test_config_that_a_toolbox_ships():
    text = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py:bbox_head.num_classes=3'
    model, scope = candidates.build(parse(text), (64, 64))
    assert model.bbox_head.num_classes == 3
    assert scope == 'mmdet'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('hat_mm.HATNet:arch', "'arch' in 'hat_mm.HATNet:arch' is not KEY=VALUE"),
        ('swin-t@deplyo', "unknown flag 'deplyo' in 'swin-t@deplyo'; choices: deploy, compile"),
        ('swin-t@bf16+fp16', 'exclude each other'),
        ('hat_mm.HATNet@cp', 'cp is for training'),
        ('HATNet', "'HATNet' has no scope; write for example hat_mm.HATNet"),
        ('hat_mm.HATNet:in_channels=1', 'takes no image of 3 channels: HATNet takes images'),
        ('other/model', "'other/model' is neither timm/MODEL nor authors/MODEL"),
        ('attention/ful', "unknown form 'ful'; choices: carriers, windows"),
        ('configs/none.py', "no config 'configs/none.py' can be had: "),
        ('mmdet::a/none.py', "no config 'mmdet::a/none.py' can be had: "),
        ('mmdet.ResNet:depth=18@deploy', 'ResNet has no backbone or plugin of hat_mm'),
    ],
)
def test_bad_candidates(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(text)


@pytest.mark.parametrize('text', ['timm/resnet18', 'authors/faster_vit_0_any_res'])
def test_packages_that_are_missing(text, monkeypatch):
    module = {'timm': 'timm', 'authors': 'fastervit'}[text.partition('/')[0]]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf'{module} cannot be imported .*: pip install'):
        prepare(text)


def test_models_of_other_packages_are_made_for_the_size(monkeypatch):
    made = []

    def create_model(name, **options):
        if name == 'unknown':
            raise KeyError(name)
        made.append((name, options))
        return torch.nn.Conv2d(3, 4, 3)

    for module in ('timm', 'fastervit'):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(create_model=create_model))
    for text in (
        'authors/faster_vit_0_any_res:window_size=[7,7,12,6]',
        'timm/swin_tiny_patch4_window7_224',
        'timm/convnext_tiny',
    ):
        prepare(text, size=(64, 96)).run()
    sizes = dict(img_size=(64, 96), strict_img_size=False)
    assert made == [
        ('faster_vit_0_any_res', dict(resolution=[64, 96], window_size=[7, 7, 12, 6])),
        ('swin_tiny_patch4_window7_224', dict(features_only=True, **sizes)),
        ('convnext_tiny', dict(features_only=True)),
    ]
    with pytest.raises(UserError, match='timm/unknown at 64x96'):
        prepare('timm/unknown', size=(64, 96))


@pytest.mark.parametrize(
    ('name', 'millions'),  # as published, less the 1000 classes
    [('resnet50', 25.6 - 2.05), ('swin-t', 28.3 - 0.77), ('convnext-t', 28.6 - 0.77)],
)
def test_peers_are_what_they_are_called(name, millions):
    peer, _ = candidates.build(parse(name), (32, 64))
    assert sum(p.numel() for p in peer.parameters()) / 1e6 == pytest.approx(millions, abs=0.08)
    with torch.no_grad():
        maps = peer(torch.zeros(1, 3, 32, 64))
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 16), (4, 8), (2, 4), (1, 2)]


@pytest.mark.parametrize('flags', ['@deploy', '@channels_last', '@bf16'])
def test_flags_keep_the_result(flags):
    plain = prepare(FASTERVIT).forward()
    other = prepare(FASTERVIT + flags).forward()
    tolerance = 0.1 if 'bf16' in flags else 1e-5
    errors = [float((a - b).norm() / a.norm()) for a, b in zip(plain, other, strict=True)]
    assert max(errors) <= tolerance  # weights and images are the same


def test_flags_reach_the_model(monkeypatch):
    made, compiled = [], []
    build = candidates.build
    monkeypatch.setattr(candidates, 'build', lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(self))
    prepare(f'{FASTERVIT}@deploy+compile')
    work = prepare(f'{FASTERVIT}@cp', training=True)
    work.run()
    work.reset()
    (deployed, _), (trained, _) = made
    assert (deployed.deploy, deployed.with_cp) == (True, False)
    assert (trained.deploy, trained.with_cp) == (False, True)
    assert compiled == [deployed]
    assert all(parameter.grad is None for parameter in trained.parameters())


@pytest.mark.parametrize(
    'name',
    [
        'mask-rcnn_fastervit-tiny_fpn_shapes',
        'fastervit-tiny_upernet_shapes',
        'fastervit-tiny_shapes',
    ],
)
def test_configs_predict_and_train(name):
    path = str(ROOT / f'configs/toy/{name}.py')
    assert len(prepare(path, batch=2).forward()) == 2
    loss = prepare(f'{path}@cp', batch=2, training=True).forward()
    assert loss.ndim == 0
    assert torch.isfinite(loss)


def test_complexity(monkeypatch):
    parameters, macs = candidates.complexity(FASTERVIT, (64, 64))
    backbone, _ = candidates.build(parse(FASTERVIT), (64, 64))
    assert parameters == sum(p.numel() for p in backbone.parameters())
    whole = count(backbone, (64, 64)).whole
    assert whole.position > 0
    assert macs == whole.flops - whole.position

    class BlackBox(torch.nn.Linear):
        def forward(self, x):
            raise NotImplementedError

    made = SimpleNamespace(create_model=lambda name, **options: BlackBox(2, 3))
    monkeypatch.setitem(sys.modules, 'timm', made)
    assert candidates.complexity('timm/black_box', (64, 64)) == (9, None)


# --- attention.py ---------------------------------------------------------------------------------


def test_a_window_on_the_whole_map_is_full_attention():
    windows, full = (attention.build(form, 16, 2) for form in ('windows', 'full'))
    full.layer.load_state_dict(windows.blocks[0].window_attn.state_dict())
    x = torch.randn(1, 16, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(full(x), windows(x))


def test_full_attention_without_bias():
    full, fused = (attention.build(form, 16, 2) for form in ('full', 'full-no-bias'))
    fused.layer.load_state_dict(full.layer.state_dict(), strict=False)
    full.layer.attn.bias.forward = lambda grid_size, queries: torch.zeros(2, 30, 30)
    x = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), full(x))


# --- report.py ------------------------------------------------------------------------------------


def row(candidate, mode='forward', size=(32, 32), **fields):
    return dict(candidate=candidate, mode=mode, size=list(size), batch=1, **fields)


def test_ratios_are_of_the_same_size_and_mode():
    rows = [
        row('swin-t', seconds=[1, 1, 9]),
        row('resnet50', size=(64, 64), seconds=[8]),
        row('resnet50', 'train', seconds=[9]),
        row('resnet50', seconds=[2]),
        row('swin-t', 'memory', peaks=[5]),
        row('resnet50', 'memory', peaks=[10]),
    ]
    assert report.against(rows[0], 'resnet50', rows) == 2  # twice as fast
    assert report.against(rows[4], 'resnet50', rows) == 0.5  # half the memory
    assert report.against(rows[0], 'convnext-t', rows) is None


@pytest.mark.parametrize('power', [0.5, 2])
def test_exponent(power):
    points = [(x, 3 * x**power) for x in (0.25, 1, 2, 8)]
    assert report.exponent(points) == pytest.approx(power)
    assert report.exponent(points[:2] * 2) is None
    assert report.exponent([*points, (16, 0)]) is None


@pytest.mark.parametrize(
    ('text', 'top1', 'box_ap'),
    [
        ('hat_mm.FasterViT:arch=2@deploy', 84.2, 52.1),
        ('hat_mm.FasterViT:arch=4', 85.4, 52.9),
        ('hat_mm.FasterViT:arch=4-21k-384', 87.6, None),
        ('hat_mm.HATNet:arch=small', 82.6, None),
        ('authors/faster_vit_0_any_res', 82.1, None),
        ('swin-t', 81.3, 50.4),
        ('swin-t:window_size=12', None, None),
        ('mmdet.ResNet:depth=18', None, None),
    ],
)
def test_published_accuracy(text, top1, box_ap):
    assert report.published(parse(text)) == dict(top1=top1, box_ap=box_ap)


@pytest.mark.parametrize(
    'name', [path.stem for path in sorted((ROOT / 'docs/performance').glob('*.json'))]
)
def test_results_of_the_docs_are_reported_once_more(name, tmp_path):
    shutil.copy(ROOT / f'docs/performance/{name}.json', tmp_path)
    run('report', str(tmp_path / f'{name}.json'))
    files = name.startswith('deployment')
    page = (ROOT / f'docs/{"deployment" if files else "performance/comparison"}.md').read_text()
    rows = table((tmp_path / f'{name}.md').read_text())
    assert rows
    for cells in rows:
        figure = cells.get('median s') or cells['peak MiB']
        digits = f'{float(figure):.3f}' if 'median s' in cells else f'{float(figure):.0f}'
        assert f'| {digits} |' in page
    published = name in ('benchmark', 'deployment-backbone')
    assert (tmp_path / 'accuracy.png').exists() is published
    assert (tmp_path / 'engines.png').exists() is files


def test_cells_of_a_row():
    figures = dict(parameters=31.4e6, macs=10**9)
    rows = [
        row('resnet50@compile', seconds=[0.2, 0.1, 0.3], **figures),
        row('resnet50', seconds=[0.4], **figures),
        row('swin-t', error='ValueError: too small'),
    ]
    results = dict(rows=rows, peers=['resnet50'], rounds=3, processes=1)
    text = report.markdown(results | circumstances('cpu', 'tuned'))
    compiled, _, failed = table(text)
    assert [*compiled.values()][3:] == ['0.2', '0.1–0.3', '5.00', '2.00', '31.4', '1']
    assert (failed['candidate'], failed['median s']) == ('`swin-t`', 'failed')
    assert '- `swin-t`, [32, 32]: ValueError: too small' in text
    assert f'; allocator tuned; Python {sys.version.split()[0]}' in text


# --- the commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--size', '800'], "'800' is not HEIGHTxWIDTH, such as 800x1280"),
        (['--size', '0x32'], "'0x32' is not HEIGHTxWIDTH"),
        (['--rounds', '0'], "'0' is not a positive integer"),
        (['--mode', 'fast'], "invalid choice: 'fast'"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run('models', 'swin-t', *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures('one_process')
@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['hat_mm.HATNet@deploy', '--mode', 'train'], 'deploy is for forward passes'),
        (['swin-t', '--peer', 'swin-s'], "--peer 'swin-s' is no candidate and no index of one"),
        (['swin-t', '--peer', '1'], "--peer '1' is no candidate and no index of one"),
        ([HAT_NET, 'hat_mm.HATNet:arch=tny'], "unknown arch 'tny'"),
        (['hat_mm.Hatnet'], 'hat_mm.Hatnet is not in the'),
    ],
)
def test_what_is_wrong_is_known_before_measuring(words, message, monkeypatch):
    monkeypatch.setattr(measuring, 'turn', lambda *_: pytest.fail('measured'))
    with pytest.raises(UserError, match=re.escape(message)):
        run('models', *words)


@pytest.mark.parametrize('found', [None, 'spec'])
def test_what_is_measured_without_candidates(found, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, 'find_spec', lambda name: found)
    args = SimpleNamespace(candidates=[], mode=None, peer=None)
    plan = benchmark.make_plan(args)
    authors = [benchmark.AUTHORS] * (found is not None)
    assert plan == {mode: [*texts, *authors] for mode, texts in benchmark.PLAN.items()}
    assert benchmark.find_peers(args, plan) == ['convnext-t', 'swin-t', *authors]


@pytest.mark.usefixtures('one_process')
def test_models_from_end_to_end(tmp_path, capsys):
    words = [FASTERVIT, HAT_NET, '--mode', 'forward', 'train']
    words += ['--size', '32x32', '48x32', '64x64', '--rounds', '1', '--peer', '0']
    with pytest.raises(UserError, match='1 of 12 measurements failed'):
        run('models', *words, '--out', str(tmp_path))
    results = json.loads((tmp_path / 'benchmark.json').read_text())
    # A map of one pixel has no batch statistics: FasterViT's fourth at 32x32, one image.
    failed = [r for r in results['rows'] if 'error' in r]
    assert {(r['mode'], *r['size']) for r in failed} == {('train', 32, 32)}
    assert 'Expected more than 1 value per channel' in failed[0]['error']
    assert all('error' in r or len(r['seconds']) == 1 for r in results['rows'])
    text = (tmp_path / 'benchmark.md').read_text()
    assert text in capsys.readouterr().out
    first, hat_net = table(text)[:2]
    assert first['candidate'] == f'`{FASTERVIT}`'
    ratio = float(first['median s']) / float(hat_net['median s'])
    [column] = [name for name in first if name.startswith('speed-up over')]
    assert (first[column], float(hat_net[column])) == ('1.00', pytest.approx(ratio, abs=0.01))
    assert '## Growth' in text
    assert '; allocator tuned; ' in text
    assert [path.name for path in tmp_path.glob('*.png')] == ['growth.png']


@pytest.mark.usefixtures('one_process')
def test_attention_from_end_to_end(tmp_path):
    forms = [f'attention/{form}:dim=16,heads=2' for form in attention.FORMS]
    words = ['--size', '28x28', '--rounds', '1', '--processes', '1', '--allocator', 'default']
    run('attention', *forms, *words, '--out', str(tmp_path))
    results = json.loads((tmp_path / 'benchmark.json').read_text())
    assert [r['mode'] for r in results['rows']] == ['forward'] * 4 + ['memory'] * 4
    assert not [r for r in results['rows'] if 'error' in r]
    assert results['allocator'] == 'default'


def test_the_program(run_python):
    done = run_python('tools/analysis_tools/benchmark', 'models', 'swin-t', '--peer', '1')
    assert done.returncode == 1
    # The last line: torch 2.15 warns before it of a machine without CUDA.
    assert done.stderr.splitlines()[-1].startswith("benchmark: error: --peer '1' is no candidate")
    assert 'Traceback' not in done.stderr


# --- padding_effect.py ----------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['fastervit-tiny', 'hat-net-toy'])
def test_padding_effect(name, shapes, tmp_path, capsys):
    config = str(ROOT / f'configs/toy/mask-rcnn_{name}_fpn_shapes.py')
    register_all_modules()
    model = MODELS.build(Config.fromfile(config).model)
    model.init_weights()
    checkpoint = tmp_path / 'start.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    options = ['--images', '2', '--pad', '0.1', '1']
    options += ['--cfg-options', f'test_dataloader.dataset.data_root={shapes}/']
    padding_effect.main([config, str(checkpoint), *options])
    rows = [[*cells.values()] for cells in table(capsys.readouterr().out)]
    assert [cells[0] for cells in rows] == ['10%', '100%']
    little, much = ([float(cell.rstrip('%')) for cell in cells[1:]] for cells in rows)
    assert all(change > 0 for change in much)
    # HAT-Net's norms see the zeros wherever they are; FasterViT's windows only where they meet.
    assert (much[0] > 1.5 * little[0]) is (name == 'hat-net-toy')


def test_padding_effect_of_no_detector(tmp_path):
    config = tmp_path / 'none.py'
    config.write_text("model = dict(); default_scope = 'mmdet'\n")
    with pytest.raises(UserError, match='is no config of a detector with a backbone'):
        padding_effect.main([str(config), 'none.pth'])
    config.write_text("model = dict(backbone=dict()); default_scope = 'mmdet'\n")
    with pytest.raises(UserError, match=r'there is no checkpoint none\.pth'):
        padding_effect.main([str(config), 'none.pth'])
