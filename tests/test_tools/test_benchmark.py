"""The tools that measure backbones: tables with figures in them, one-line errors."""

import json
import re
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import attention as scaling
import candidates
import measuring
import models as benchmark
import pytest
import report
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from test_backbones.archs import FAMILIES

from hat_mm.engine.analysis import count
from hat_mm.engine.cli import UserError, run_tool
from hat_mm.engine.environment import circumstances

ROOT = Path(__file__).resolve().parents[2]
TOYS = {
    'FasterViT': ROOT / 'configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py',
    'HATNet': ROOT / 'configs/toy/mask-rcnn_hat-net-toy_fpn_shapes.py',
}
FASTERVIT = f'hat_mm.FasterViT:arch={FAMILIES["FasterViT"].arch}'.replace(' ', '')
CASCADE = 'cascade-mask-rcnn_fastervit-3_fpn_4conv1fc-giou_ms-crop-3x_coco'
HAT_NET = f'hat_mm.HATNet:arch={FAMILIES["HATNet"].arch}'.replace(' ', '')


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    """Threads that wait for each other on a busy processor make tiny networks ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def table(text):
    """Cells of the Markdown tables in ``text``, without their heads."""
    rows = [line.strip('|').split('|') for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in row] for row in rows[2:]]


# --- measuring.py ---------------------------------------------------------------------------------


def test_turns_and_the_warm_up_that_does_not_count():
    calls = []

    def timer(name):
        calls.append(name)
        return len(calls)

    timers = {name: partial(timer, name) for name in 'ab'}
    seconds, failed = measuring.time_in_turns(timers, rounds=2, warm_up=1)
    assert calls == ['a', 'b'] * 3
    assert seconds == {'a': [3, 5], 'b': [4, 6]}
    assert not failed


def test_what_fails_in_a_round_leaves_the_others():
    seconds = iter([1.0, 2.0])
    timers = {'a': seconds.__next__, 'b': lambda: 3.0}
    seconds, failed = measuring.time_in_turns(timers, rounds=3, warm_up=1)
    assert seconds == {'b': [3.0] * 3}
    assert isinstance(failed['a'], StopIteration)


def test_what_is_reset_comes_first():
    calls = []
    work = measuring.Work(lambda: calls.append('run'), reset=lambda: calls.append('reset'))
    measuring.seconds_of(work, 'cpu')
    assert calls == ['reset', 'run']


def test_what_is_reset_is_not_timed(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock.now)

    def passing(seconds):
        return lambda: setattr(clock, 'now', clock.now + seconds)

    work = measuring.Work(forward=passing(2), reset=passing(100))
    assert measuring.seconds_of(work, 'cpu') == 2


@pytest.mark.parametrize(('seconds', 'runs', 'median'), [([0.3], 1, 0.3), ([0.1, 0.04], 4, 0.04)])
def test_a_turn_of_something_short_has_many_runs(seconds, runs, median, monkeypatch):
    left = [*seconds, *[seconds[-1]] * 9]
    monkeypatch.setattr(measuring, 'seconds_of', lambda work, device: left.pop(0))
    assert measuring.turn(measuring.Work(lambda: None), 'cpu') == median
    assert len(left) == len(seconds) + 9 - runs


@pytest.mark.parametrize('exponent', [0.5, 1, 2])
def test_exponent(exponent):
    xs = [0.25, 1, 2, 8]
    ys = [3 * x**exponent for x in xs]
    assert measuring.fit_exponent(xs, ys) == pytest.approx(exponent)


@pytest.mark.parametrize(
    ('xs', 'ys'), [([1, 2], [1, 2]), ([1, 2, 2], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])]
)
def test_no_exponent_of_too_little(xs, ys):
    assert measuring.fit_exponent(xs, ys) is None


def test_peak_memory_of_a_known_tensor():
    def forward():
        torch.ones(48, 2**20 // 4).sum()
        return torch.ones(8, 2**20 // 4)

    found = measuring.peak_memory(measuring.Work(forward), 'cpu')
    # Of the process's own memory some may be given back meanwhile.
    assert 44 <= found['peak'] / 2**20 < 64
    assert found['held'] is None


def test_memory_held_for_the_backward_pass():
    weight = torch.ones(40, 2**20 // 4, requires_grad=True)

    def forward():
        return (weight.exp() * 2).sum()  # the exponential is kept, its double is not

    def reset():
        weight.grad = None

    found = measuring.peak_memory(measuring.Work(forward, True, reset), 'cpu')
    assert 36 <= found['held'] / 2**20 < 56
    assert found['peak'] / 2**20 >= 76


def test_product_of_matrices():
    product = measuring.product('bf16', 'cpu').forward()
    assert product.shape == (measuring.product_side('bf16', 'cpu'),) * 2
    assert product.dtype == torch.bfloat16


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Starts a program that answers at once and to each request, and ends with a third one."""
    script = tmp_path / 'child.py'
    script.write_text(
        'import json, os, sys\n'
        f'job = json.loads(os.environ[{measuring.JOB!r}])\n'
        'print("a library talks", end="")\n'
        f'answer = "\\n{measuring._RESULT}" + json.dumps(job["answer"])\n'
        'if job["status"]: sys.exit(job["status"])\n'
        'print(answer, flush=True)\n'
        'for _ in range(2):\n'
        '    sys.stdin.readline()\n'
        '    print("and talks", answer, flush=True)\n'
        'sys.stderr.write("had enough\\n")\n'
    )
    monkeypatch.setattr(measuring, 'PROGRAM', script)


@pytest.mark.usefixtures('child')
def test_memory_of_fresh_processes():
    job = dict(answer=dict(peak=7, held=None), status=0)
    found = measuring.memory_of(job, processes=2)
    assert found == {'peak': 7, 'held': None, 'peaks': [7, 7]}
    with pytest.raises(UserError, match=r'no message \(status 3\)'):
        measuring.in_fresh_process(job | dict(status=3))


@pytest.mark.usefixtures('child')
def test_a_worker_answers_as_long_as_it_lives():
    with measuring.start(dict(answer=1.5, status=0)) as worker:
        assert [worker.answer(), worker.ask(), worker.ask()] == [1.5] * 3
        with pytest.raises(UserError, match=r'had enough \(status 0\)'):
            worker.ask()
        with pytest.raises(UserError, match=r'had enough \(status 0\)'):
            worker.ask()  # its end of the pipe is closed by now
    assert worker._process.returncode == 0


@pytest.mark.usefixtures('child')
def test_a_worker_ends_with_its_block():
    with measuring.start(dict(answer=1.5, status=0)) as worker:
        worker.answer()
    assert worker._process.returncode == -9


# --- candidates.py --------------------------------------------------------------------------------


def test_candidate_with_arguments_and_flags():
    text = "mmdet.ResNet:depth=50,plugins=[{'cfg': {'type': 'A'}, 'stages': (False, True)}]@bf16+cp"
    candidate = candidates.parse(text)
    assert candidate.name == 'mmdet.ResNet'
    assert candidate.arguments == {
        'depth': 50,
        'plugins': [{'cfg': {'type': 'A'}, 'stages': (False, True)}],
    }
    assert candidate.flags == ('bf16', 'cp')
    assert candidate.precision == 'bf16'
    assert candidate.base == text.removesuffix('@bf16+cp')


@pytest.mark.parametrize(
    ('text', 'label'),
    [
        ('hat_mm.FasterViT:arch=0@deploy+compile', 'FasterViT-0 deploy compile'),
        ('hat_mm.SwinHAT:arch=tiny,hat_stages=()', 'SwinHAT-tiny hat_stages=()'),
        ('swin-t', 'swin-t'),
        ('configs/toy/fastervit-tiny_shapes.py@cp', 'fastervit-tiny_shapes cp'),
    ],
)
def test_labels(text, label):
    assert candidates.parse(text).label == label


def test_config_that_a_toolbox_ships():
    text = "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py:bbox_head.num_classes=3,a='b:c'@bf16"
    candidate = candidates.parse(text)
    assert candidate.name == 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    assert candidate.arguments == {'bbox_head.num_classes': 3, 'a': 'b:c'}
    assert candidate.flags == ('bf16',)
    shorter = candidates.parse(text.replace(",a='b:c'@bf16", ''))
    model, *_ = candidates._whole(shorter, (64, 64), 1)
    assert model.bbox_head.num_classes == 3


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('hat_mm.HATNet:arch', "'arch' in 'hat_mm.HATNet:arch' is not KEY=VALUE"),
        ('swin-t@deplyo', "unknown flag 'deplyo' in 'swin-t@deplyo'; choices: deploy, compile"),
        ('swin-t@bf16+fp16', 'exclude each other'),
        ('hat_mm.HATNet@deploy+cp', 'the deploy form cannot be trained'),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        candidates.parse(text)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('HATNet', "'HATNet' has no scope; write for example hat_mm.HATNet"),
        ('swin', 'or one of resnet50, swin-t'),
        ('hat_mm.HATNet:in_channels=1', 'takes no image of 3 channels: HATNet takes images'),
        ('other/model', "'other/model' is neither timm/MODEL nor authors/MODEL"),
        ('configs/none.py', "config 'configs/none.py' does not exist"),
        ('mmdet::a/none.py', "no config 'mmdet::a/none.py' can be had: file "),
        ('other::a/none.py', 'mmengine does not support to load other config'),
        ('swin-t@tf32', 'swin-t@tf32: tf32 needs a GPU, the device is cpu'),
        ('mmdet.ResNet:depth=18@deploy', 'ResNet has no backbone or plugin of hat_mm'),
    ],
)
def test_bad_candidates(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        candidates.prepare(candidates.parse(text), (32, 32), 1, False, 'cpu')


@pytest.mark.parametrize(
    ('text', 'module', 'command'),
    [
        ('timm/resnet18', 'timm', 'pip install --no-deps timm'),
        ('authors/faster_vit_0_any_res', 'fastervit', 'pip install --no-deps fastervit'),
    ],
)
def test_packages_that_are_missing(text, module, command, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f'{module} cannot be imported .*{command}'):
        candidates.prepare(candidates.parse(text), (32, 32), 1, False, 'cpu')


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
        candidates.prepare(candidates.parse(text), (64, 96), 1, False, 'cpu').run()
    assert made == [
        ('faster_vit_0_any_res', dict(resolution=[64, 96], window_size=[7, 7, 12, 6])),
        (
            'swin_tiny_patch4_window7_224',
            dict(features_only=True, img_size=(64, 96), strict_img_size=False),
        ),
        ('convnext_tiny', dict(features_only=True)),
    ]
    with pytest.raises(UserError, match='timm/unknown at 64x96'):
        candidates.prepare(candidates.parse('timm/unknown'), (64, 96), 1, False, 'cpu')


@pytest.mark.parametrize(
    ('name', 'millions'),  # as published, less the 1000 classes
    [
        ('resnet50', 25.6 - 2.05),
        ('swin-t', 28.3 - 0.77),
        ('swin-s', 49.6 - 0.77),
        ('swin-b', 87.8 - 1.03),
        ('convnext-t', 28.6 - 0.77),
        ('convnext-s', 50.2 - 0.77),
        ('convnext-b', 88.6 - 1.03),
    ],
)
def test_peers_are_what_they_are_called(name, millions):
    peer = candidates.build(candidates.parse(name), (32, 64))
    assert sum(p.numel() for p in peer.parameters()) / 1e6 == pytest.approx(millions, abs=0.08)
    with torch.no_grad():
        maps = peer(torch.zeros(1, 3, 32, 64))
    assert [tuple(x.shape[2:]) for x in maps] == [(8, 16), (4, 8), (2, 4), (1, 2)]


@pytest.mark.parametrize('flags', ['', '@cp', '@channels_last', '@bf16'])
def test_training_step_of_a_backbone(flags):
    candidate = candidates.parse(FASTERVIT + flags)
    work = candidates.prepare(candidate, (64, 64), 2, True, 'cpu')
    loss = work.forward()
    assert loss.requires_grad
    assert torch.isfinite(loss)
    work.reset()
    work.run()


@pytest.mark.parametrize('flags', ['@deploy', '@channels_last', '@bf16', '@deploy+bf16'])
def test_flags_keep_the_result(flags):
    results = []
    for text in (FASTERVIT, FASTERVIT + flags):
        torch.manual_seed(0)
        work = candidates.prepare(candidates.parse(text), (64, 64), 1, False, 'cpu')
        results.append(work.forward())
    for plain, other in zip(*results, strict=True):
        assert other.dtype == (torch.bfloat16 if 'bf16' in flags else torch.float32)
        tolerance = 0.1 if 'bf16' in flags else 1e-5
        assert (other.float() - plain).norm() <= tolerance * plain.norm()


def test_flags_reach_the_model(monkeypatch):
    made, compiled = [], []
    build = candidates.build
    monkeypatch.setattr(candidates, 'build', lambda *args: made.append(build(*args)) or made[-1])
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(self))
    config = str(ROOT / 'configs/toy/fastervit-tiny_shapes.py')
    for text, training in (
        (f'{FASTERVIT}@deploy+compile', False),
        (f'{FASTERVIT}@cp', True),
        (f'{config}@compile', False),
    ):
        candidates.prepare(candidates.parse(text), (32, 32), 2, training, 'cpu')
    assert [model.deploy for model in made] == [True, False]
    assert [model.with_cp for model in made] == [False, True]
    assert compiled[0] is made[0]
    assert [type(model).__name__ for model in compiled] == ['FasterViT', 'FasterViT']


@pytest.mark.parametrize('training', [False, True], ids=['predict', 'train'])
@pytest.mark.parametrize(
    'name',
    [
        'mask-rcnn_fastervit-tiny_fpn_shapes',
        'fastervit-tiny_upernet_shapes',
        'fastervit-tiny_shapes',
    ],
)
def test_configs_predict_and_train(name, training):
    candidate = candidates.parse(str(ROOT / f'configs/toy/{name}.py') + '@cp' * training)
    work = candidates.prepare(candidate, (64, 96), 2, training, 'cpu')
    result = work.forward()
    if training:
        assert result.ndim == 0
        assert torch.isfinite(result)
        result.backward()
    else:
        assert len(result) == 2


def test_complexity():
    parameters, macs = candidates.complexity(FASTERVIT, (64, 64))
    backbone = candidates.build(candidates.parse(FASTERVIT), (64, 64))
    assert parameters == sum(p.numel() for p in backbone.parameters())
    whole = count(backbone, (64, 64)).whole
    assert whole.position > 0
    assert macs == whole.flops - whole.position


def test_what_cannot_be_traced_has_no_flops(monkeypatch):
    class BlackBox(torch.nn.Linear):
        def forward(self, x):
            raise NotImplementedError

    made = SimpleNamespace(create_model=lambda name, **options: BlackBox(2, 3))
    monkeypatch.setitem(sys.modules, 'timm', made)
    assert candidates.complexity('timm/black_box', (64, 64)) == (9, None)


# --- report.py --------------------------------------------------------------------------


def row(candidate, mode='forward', size=(32, 32), **fields):
    return dict(candidate=candidate, mode=mode, size=list(size), batch=1, **fields)


def test_twice_as_fast_is_a_speed_up_of_two():
    rows = [row('swin-t', seconds=[1, 1, 9]), row('resnet50', seconds=[2, 2, 2])]
    assert report.against(rows[0], 'resnet50', rows) == 2
    assert report.against(rows[1], 'swin-t', rows) == 0.5
    assert report.against(rows[0], 'swin-b', rows) is None


def test_half_the_memory_is_half():
    rows = [row('swin-t', 'memory', peak=5), row('resnet50', 'memory', peak=10)]
    assert report.against(rows[0], 'resnet50', rows) == 0.5


def test_ratios_are_of_the_same_size_and_mode():
    rows = [
        row('swin-t', seconds=[1]),
        row('resnet50', size=(64, 64), seconds=[8]),
        row('resnet50', 'train', seconds=[9]),
        row('resnet50', seconds=[3]),
    ]
    assert report.against(rows[0], 'resnet50', rows) == 3


def test_share_of_the_products():
    figures = dict(seconds=[2.0], product_macs=100, product_seconds=[1.0], macs=50)
    assert report.share_of_products(row('swin-t', **figures)) == 0.25
    assert report.share_of_products(row('swin-t', 'train', **figures)) == 0.75
    assert report.share_of_products(row('swin-t', **figures | {'macs': None})) is None


@pytest.mark.parametrize(
    ('value', 'text'),
    [(0.0012345, '0.00123'), (1.5, '1.50'), (170.4, '170'), (5802, '5802'), (0, '0'), (None, '')],
)
def test_significant_digits(value, text):
    assert report.significant(value, 3) == text


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
        ('timm/convnext_base', 83.8, 52.7),
        ('resnet50', 76.1, None),
        ('mmdet.ResNet:depth=18', None, None),
        ('configs/hat_net/hat-net-tiny_8xb128_in1k.py', 79.8, None),
        (f'configs/fastervit/{CASCADE}.py', None, 52.4),
        ('configs/toy/fastervit-tiny_shapes.py', None, None),
    ],
)  # fmt: skip
def test_published_accuracy(text, top1, box_ap):
    assert report.published(candidates.parse(text)) == dict(top1=top1, box_ap=box_ap)


# --- models.py ---------------------------------------------------------------------------------


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
        benchmark.parse_args(['swin-t', *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['swin-t', 'swin-t'], 'given twice: swin-t'),
        (['hat_mm.HATNet@deploy', '--mode', 'train'], 'no candidate for --mode train'),
        (['swin-t', '--peer', 'swin-s'], "--peer 'swin-s' is no candidate and no index of one"),
        (['swin-t', '--peer', '1'], "--peer '1' is no candidate and no index of one"),
        ([f'{HAT_NET}', 'hat_mm.HATNet:arch=tny'], "unknown arch 'tny'"),
        (['hat_mm.Hatnet'], 'hat_mm.Hatnet is not in the'),
    ],
)
def test_wrong_candidates_are_one_line(words, message, capsys):
    args = benchmark.parse_args(words)
    assert run_tool(lambda: benchmark.measure(args), 'benchmark.py') == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ('words', 'peers'),
    [
        (['swin-t', 'swin-s'], ['swin-s']),
        (['swin-t', 'swin-s', '--peer', '0'], ['swin-t']),
        (['swin-t', 'swin-s', '--peer', '-1', 'swin-t'], ['swin-s', 'swin-t']),
    ],
)
def test_peers(words, peers):
    args = benchmark.parse_args(words)
    assert benchmark.find_peers(args, benchmark.make_plan(args)) == peers


def test_what_a_mode_leaves_out_is_said(capsys):
    words = ['swin-t', 'swin-t@deploy', 'swin-t@cp', '--mode', 'forward', 'train']
    plan = benchmark.make_plan(benchmark.parse_args(words))
    assert [[c.text for c in candidates] for candidates in plan.values()] == [
        ['swin-t', 'swin-t@deploy'],
        ['swin-t', 'swin-t@cp'],
    ]
    assert capsys.readouterr().err.splitlines() == [
        'forward leaves out swin-t@cp (cp is for train and train-memory)',
        'train leaves out swin-t@deploy (deploy is for forward and memory)',
    ]


def test_what_is_measured_without_candidates(monkeypatch):
    args = benchmark.parse_args([])
    for found in (None, 'spec'):
        monkeypatch.setattr(benchmark.importlib.util, 'find_spec', lambda name, found=found: found)
        plan = benchmark.make_plan(args)
        assert list(plan) == list(benchmark.MODES)
        for mode, planned in plan.items():
            texts = [candidate.text for candidate in planned]
            expected = benchmark.PLAN[mode] + [benchmark.AUTHORS] * (found is not None)
            assert texts == expected
        authors = [benchmark.AUTHORS] * (found is not None)
        assert benchmark.find_peers(args, plan) == ['convnext-t', 'swin-t', *authors]


def test_benchmark_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, 'product_side', lambda precision, device: 64)

    def here(job, work_of, stack):  # processes of their own have a test below
        timer = partial(measuring.seconds_of, work_of(job), 'cpu')
        return timer, timer()

    monkeypatch.setattr(measuring, 'timer_of', here)
    words = [FASTERVIT, f'{FASTERVIT}@deploy', f'{FASTERVIT}@cp', HAT_NET]
    words += ['--size', '32x32', '48x32', '64x64', '--mode', 'forward', 'train']
    words += ['--rounds', '2', '--peer', '0', '--out', str(tmp_path)]
    results = benchmark.measure(benchmark.parse_args(words))
    report.plot(results, tmp_path)
    assert json.loads((tmp_path / 'benchmark.json').read_text()) == results
    of_mode = {
        mode: [r['candidate'] for r in results['rows'] if r['mode'] == mode]
        for mode in ('forward', 'train')
    }
    assert of_mode['forward'] == [FASTERVIT, f'{FASTERVIT}@deploy', HAT_NET] * 3
    assert of_mode['train'] == [FASTERVIT, f'{FASTERVIT}@cp', HAT_NET] * 3
    # A map of one pixel has no batch statistics: FasterViT's fourth at 32x32, one image.
    failed = [r for r in results['rows'] if 'error' in r]
    assert {(r['mode'], *r['size']) for r in failed} == {('train', 32, 32)}
    assert 'Expected more than 1 value per channel' in failed[0]['error']
    for r in results['rows']:
        assert 'error' in r or len(r['seconds']) == len(r['product_seconds']) == 2
    text = (tmp_path / 'benchmark.md').read_text()
    assert text == report.markdown(results)
    first, _, hat_net = table(text)[:3]
    assert first[:3] == ['32×32', '1', f'`{FASTERVIT}`']
    assert first[6] == '1.00'
    assert float(hat_net[6]) == pytest.approx(float(first[3]) / float(hat_net[3]), rel=0.05)
    assert f'torch {torch.__version__}' in text
    assert '## Growth' in text
    assert [path.name for path in sorted(tmp_path.glob('*.png'))] == ['growth_batch1.png']


def test_without_the_product_there_is_no_share_of_it(monkeypatch, capsys):
    def no_product(job, work_of, stack):
        if 'product' in job:
            raise RuntimeError('out of memory')
        return lambda: 1.0, 2.0

    monkeypatch.setattr(measuring, 'timer_of', no_product)
    where = ('forward', (32, 32), 1, 2, 'cpu')
    [row] = benchmark.time_rows([candidates.parse(HAT_NET)], *where)
    assert row['seconds'] == [1.0, 1.0]
    assert report.share_of_products(row | dict(mode='forward', batch=1)) is None
    assert 'product in float32: RuntimeError: out of memory' in capsys.readouterr().err


def test_models_to_compare_have_the_same_weights():
    candidate = candidates.parse(HAT_NET)
    first, second = (candidates.prepare(candidate, (32, 32), 1, False, 'cpu') for _ in range(2))
    for a, b in zip(first.forward(), second.forward(), strict=True):
        assert torch.equal(a, b)


def test_benchmark_in_processes_of_their_own():
    rows = benchmark.time_rows(
        [candidates.parse(f'{FASTERVIT}@deploy'), candidates.parse('mmdet.ResNet:depth=7')],
        *('forward', (64, 64), 1, 2, 'cpu'),
    )
    good, bad = rows
    assert len(good['seconds']) == len(good['product_seconds']) == 2
    assert good['product_macs'] == 2048**3
    assert 'seconds' not in bad
    assert 'depth' in bad['error']


def test_memory_from_end_to_end(tmp_path):
    words = [FASTERVIT, '--size', '512x512', '--mode', 'memory', 'train-memory']
    words += ['--processes', '1', '--out', str(tmp_path)]
    results = benchmark.measure(benchmark.parse_args(words))
    forward, train = results['rows']
    # The map of stage 0, and more of them for the gradient.
    stage = 128 * 128 * 4 * 4
    assert stage < forward['peak'] < train['peak']
    assert stage < train['held'] < train['peak']
    (cells, *_) = table((tmp_path / 'benchmark.md').read_text())
    assert cells[3] == f'{forward["peak"] / 2**20:.0f}'
    assert report.plot(results, tmp_path) == []


def test_cells_of_a_row():
    figures = dict(seconds=[0.2, 0.1, 0.3], first_seconds=60.2, parameters=31.4e6, macs=10**9)
    figures |= dict(product_macs=10**9, product_seconds=[0.1], batch=8)
    rows = [
        row('resnet50@compile', size=(800, 1280)) | figures,
        row('resnet50', size=(800, 1280), seconds=[0.4]) | figures | {'seconds': [0.4]},
        row('swin-t', size=(800, 1280)) | dict(batch=8, error='ValueError: too small'),
    ]
    results = dict(rows=rows, peers=['resnet50'], rounds=3, processes=1, command='python x')
    text = report.markdown(results | circumstances('cpu'))
    compiled, plain, failed = table(text)
    assert compiled[3:] == ['0.2000', '0.100–0.300', '40.0', '2.00', '31.4', '1.00', '400%', '60']
    assert plain[3:] == ['0.4000', '0.400–0.400', '20.0', '1.00', '31.4', '1.00', '200%', '']
    assert failed[2:4] == ['`swin-t`', 'failed']
    assert '- `swin-t`, [800, 1280]: ValueError: too small' in text


def test_plot_of_accuracy(tmp_path):
    rows = [
        row('hat_mm.FasterViT:arch=0', seconds=[1.0]),
        row('hat_mm.FasterViT:arch=0@deploy', seconds=[0.5]),
        row('resnet50', seconds=[2.0]),
    ]
    paths = report.plot(dict(rows=rows, peers=['resnet50']), tmp_path)
    assert [path.name for path in paths] == ['accuracy_32x32_batch1.png']
    assert paths[0].read_bytes().startswith(b'\x89PNG')


# --- attention.py -------------------------------------------------------------------------


def test_a_window_on_the_whole_map_is_full_attention():
    windows, full = (scaling.build(form, 16, 2) for form in ('windows', 'full'))
    full.layer.load_state_dict(windows.blocks[0].window_attn.state_dict())
    x = torch.randn(1, 16, 7, 7)
    with torch.no_grad():
        torch.testing.assert_close(full(x), windows(x))


def test_full_attention_without_bias():
    full, fused = (scaling.build(form, 16, 2) for form in ('full', 'full-no-bias'))
    fused.layer.load_state_dict(full.layer.state_dict(), strict=False)
    full.layer.attn.bias.forward = lambda grid_size, queries: torch.zeros(2, 30, 30)
    x = torch.randn(1, 16, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), full(x))


def test_attention_scaling(tmp_path, monkeypatch):
    # Processes of their own have a test below.
    def memory_here(job, processes):
        return scaling.memory_of_job(job) | {'peaks': []}

    def timer_here(job, work_of, stack):
        timer = partial(measuring.seconds_of, work_of(job), 'cpu')
        return timer, timer()

    monkeypatch.setattr(scaling.measuring, 'memory_of', memory_here)
    monkeypatch.setattr(scaling.measuring, 'timer_of', timer_here)
    words = ['--size', '7x7', '14x14', '15x28', '--dim', '16', '--heads', '2', '--rounds', '1']
    args = scaling.parse_args([*words, '--out', str(tmp_path)])
    results = scaling.measure(args)
    forms = [(r['form'], r['size'][0]) for r in results['rows']]
    for form in scaling.FORMS:
        assert [side for found, side in forms if found == form] == [7, 14, 15]
    assert not [r for r in results['rows'] if 'error' in r]
    scaling.save(results, tmp_path)
    assert json.loads((tmp_path / 'attention_scaling.json').read_text()) == results
    rows = table((tmp_path / 'attention_scaling.md').read_text())
    assert rows[3][0] == 'exponent'
    assert (tmp_path / 'attention_scaling.png').exists()


def test_what_fails_is_named(tmp_path, monkeypatch):
    def fail(job, *_):
        raise UserError(f'no {job["form"]}')

    monkeypatch.setattr(scaling.measuring, 'memory_of', fail)
    results = scaling.measure(scaling.parse_args(['--size', '7x7', '--out', str(tmp_path)]))
    assert [r['error'] for r in results['rows']] == [
        f'UserError: no {form}' for form in scaling.FORMS
    ]
    assert '- full, [7, 7]: UserError: no full' in scaling.markdown(results)


def test_attention_scaling_in_processes_of_their_own():
    job = dict(form='full-no-bias', size=(28, 28), dim=16, heads=2, device='cpu', dtype='float32')
    found = measuring.in_fresh_process(job | {'mode': 'memory'})
    assert found['peak'] >= 4 * 28 * 28 * 16 * 4  # the hidden layer of the MLP
    with ExitStack() as stack:
        job['mode'] = 'forward'
        timer, first = measuring.timer_of(job, scaling.work_of, stack)
        assert 0 < timer() < first + 5


# --- padding_effect.py ----------------------------------------------------------------------------


@pytest.mark.parametrize('family', TOYS)
def test_padding_effect(family, run_python, shapes, tmp_path):
    register_all_modules()
    model = MODELS.build(Config.fromfile(str(TOYS[family])).model)
    model.init_weights()
    checkpoint = tmp_path / 'start.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    done = run_python(
        *('tools/analysis_tools/padding_effect.py', str(TOYS[family]), str(checkpoint)),
        *('--images', '2', '--pad', '0.1', '1'),
        *('--cfg-options', f'test_dataloader.dataset.data_root={shapes}/'),
    )
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert [row[0] for row in rows] == ['10%', '100%']
    little, much = ([float(cell.rstrip('%')) for cell in row[1:]] for row in rows)
    assert all(change > 0 for change in much)
    # HAT-Net's norms see the zeros wherever they are; FasterViT's windows only where they meet.
    assert (much[0] > 1.5 * little[0]) is (family == 'HATNet')


def test_padding_effect_of_no_detector_is_one_line(run_python, tmp_path):
    config = tmp_path / 'none.py'
    config.write_text('model = dict()\n')
    done = run_python('tools/analysis_tools/padding_effect.py', str(config), 'none.pth')
    assert done.returncode == 1
    assert re.search('has no model.backbone', done.stderr.splitlines()[-1])


# --- the program ----------------------------------------------------------------------------------

PROGRAM = 'tools/analysis_tools/benchmark'


@pytest.mark.parametrize('command', [benchmark, scaling], ids=['models', 'attention'])
def test_a_folder_that_cannot_be_written_is_known_before_measuring(command, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setattr(command, 'measure', lambda args: pytest.fail('measured'))
    with pytest.raises(UserError, match='cannot write to --out'):
        command.main(['--out', str(tmp_path / 'file' / 'folder')])


@pytest.mark.parametrize('command', ['models', 'attention', 'report'])
def test_commands_say_how(command, run_python):
    assert f'{command}  ' in run_python(PROGRAM, '--help').stdout
    assert f'usage: benchmark {command} ' in run_python(PROGRAM, command, '--help').stdout


def test_an_earlier_result_is_reported_once_more(tmp_path, run_python):
    results = dict(rows=[row('resnet50', 'memory', peak=2**20, held=None)], peers=[])
    results |= dict(rounds=1, processes=1) | circumstances('cpu')
    (tmp_path / 'benchmark.json').write_text(json.dumps(results))
    done = run_python(PROGRAM, 'report', str(tmp_path / 'benchmark.json'))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'benchmark.md').read_text() == report.markdown(results)


def test_errors_are_one_line(run_python):
    done = run_python(PROGRAM, 'models', 'swin-t@deplyo')
    assert done.returncode == 1
    assert done.stderr.startswith("benchmark: error: unknown flag 'deplyo'")
    assert done.stderr.count('\n') == 1
