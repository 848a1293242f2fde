"""Counts of parameters and FLOPs: handles, parts, the tool and the published tables."""

import re
from pathlib import Path

import get_flops
import pytest
import torch
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer
from test_backbones.archs import FAMILIES
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hat_mm
from hat_mm.engine.analysis import attention_flops, count, matmul_flops
from hat_mm.engine.cli import run_tool

ROOT = Path(__file__).resolve().parents[2]
PRODUCTS = ('convolution', 'linear', 'attention', 'position')


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def flops(function, *shapes, **handles):
    analyzer = FlopAnalyzer(Call(function), tuple(torch.rand(shape) for shape in shapes))
    return analyzer.set_op_handle(**handles).unsupported_ops_warnings(False).total()


# --- handles --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('shapes', 'options', 'expected'),
    [
        (((1, 1, 4, 8),) * 3, {}, 4 * 4 * (8 + 8)),
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {}, 2 * 3 * 5 * 7 * (8 + 6)),
        (((3, 5, 8), (3, 7, 8), (3, 7, 8)), {}, 3 * 5 * 7 * 16),
        (((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8)), {}, 2 * 3 * 5 * 7 * 16),
        (((1, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)), {}, 4 * 3 * 5 * 7 * 16),
        (((2, 3, 5, 8),) * 3, {'is_causal': True}, 2 * 3 * 5 * 5 * 16),
        (((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)), {'enable_gqa': True}, 2 * 4 * 5 * 5 * 16),
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (1, 3, 5, 7)), {}, 2 * 3 * 5 * 7 * 16),
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7)), {}, 2 * 3 * 5 * 7 * 16),
    ],
)
def test_attention(shapes, options, expected):
    def attend(*tensors):
        return F.scaled_dot_product_attention(*tensors, **options)

    name = 'aten::scaled_dot_product_attention'
    assert flops(attend, *shapes, **{name: attention_flops}) == expected
    assert flops(attend, *shapes) == 0  # why a handle is needed


@pytest.mark.parametrize(
    ('left', 'right', 'expected'),
    [
        ((5, 7), (7, 3), 5 * 7 * 3),
        ((5, 7), (2, 4, 7, 3), 2 * 4 * 5 * 7 * 3),
        ((2, 4, 5, 7), (7, 3), 2 * 4 * 5 * 7 * 3),
        ((2, 1, 5, 7), (1, 4, 7, 3), 2 * 4 * 5 * 7 * 3),
        ((7,), (7,), 7),
        ((5, 7), (7,), 5 * 7),
    ],
)
def test_matmul(left, right, expected):
    assert flops(torch.matmul, left, right, **{'aten::matmul': matmul_flops}) == expected


# --- models ---------------------------------------------------------------------------------------


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)])
        self.head = nn.Linear(4, 10)
        self.unused = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(F.gelu(x).mean((2, 3)))


def test_a_network_by_hand():
    found = count(Tiny(), (10, 6))
    pixels = 5 * 3
    assert found.parts['stem'].flops['convolution'] == pixels * 8 * 27
    assert found.parts['stem'].flops['norm'] == pixels * 8 * 2
    assert found.parts['layers.0'].total == pixels * 8 * 9
    assert found.parts['layers.1'].total == pixels * 8 * 4
    assert found.parts['head'].flops['linear'] == found.parts['head'].total == 40
    assert (found.parts['unused'].parameters, found.parts['unused'].total) == (25, 0)
    assert found.whole.total == pixels * (8 * 27 + 8 * 2 + 8 * 9 + 8 * 4) + 40
    assert found.whole.parameters == 8 * 28 + 16 + 80 + 36 + 50 + 25
    assert found.elements == pixels * 4 * 2  # GELU and mean
    assert not found.unknown


def dispatched(model, shape):
    """Products that reach PyTorch's dispatcher, whatever operator they came from."""
    # The fused kernel of the CPU is an operator that PyTorch's counter does not know.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        model.eval()(torch.zeros(1, 3, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize('shape', [(128, 128), (97, 65)])
@pytest.mark.parametrize('family', FAMILIES)
def test_no_product_of_a_backbone_counts_as_nothing(family, shape):
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny())
    found = count(backbone, shape)
    assert sum(found.whole.flops[kind] for kind in PRODUCTS) == dispatched(backbone, shape)
    assert not found.unknown
    assert found.whole.total == sum(part.total for part in found.parts.values())
    assert found.whole.parameters == sum(p.parameters for p in found.parts.values())


def test_a_product_without_a_rule_is_reported():
    class Odd(nn.Bilinear):
        def forward(self, x):
            return super().forward(x, x)

    found = count(Odd(8, 8, 2), (4, 8))
    assert found.whole.total == 0
    assert found.unknown == {'aten::bilinear': 1}


def test_positions_by_hand():
    # Map of stage 2: 4x4, one window; of stage 3: 2x2, filled to a window of 4x4.
    backbone = hat_mm.FasterViT(FAMILIES['FasterViT'].tiny())
    found = count(backbone, (64, 64))
    # From two coordinates to 512, and on: embedding of 16 channels, bias of two heads.
    window = 16 * (2 + 16) + 49 * (2 + 2)
    carrier = 4 * (2 + 16) + 9 * (2 + 2)
    assert found.parts['stages.2'].flops['position'] == 512 * 2 * (window + carrier)
    assert found.parts['stages.3'].flops['position'] == 512 * (16 * (2 + 32) + 49 * (2 + 2))
    assert found.whole.flops['position'] == sum(p.flops['position'] for p in found.parts.values())


def test_a_count_leaves_no_trace():
    model = Tiny().train()
    model.stem.eval()
    state = [module.training for module in model.modules()]
    count(model, (8, 8))
    assert [module.training for module in model.modules()] == state
    assert 'forward' not in vars(model)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('shape', [(0, 8), (8, -1), (8,), (8, 8.5), ('a', 8)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match='must be positive ints, not'):
        count(Tiny(), shape)


# --- tool -----------------------------------------------------------------------------------------


def tables(text):
    """Cells of all rows of Markdown tables by the first cell."""
    rows = [line.strip('| ').split('|') for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in row] for row in rows]


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the tool in this process; returns its exit status, standard output and error."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        try:
            status = run_tool(lambda: get_flops.main(list(arguments)), 'get_flops.py')
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run


def parts_of(output):
    """The figures of each part that the tool has printed."""
    names, _, *rows = tables(output)
    return {row[0]: dict(zip(names[1:], map(float, row[1:]), strict=True)) for row in rows}


CLASSIFIER = "_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']\n"


def test_tool_on_a_detector(run_python, tool):
    arguments = ('configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py', '--shape', '60', '64')
    done = run_python('tools/analysis_tools/get_flops.py', *arguments, '--proposals', '200')
    assert done.returncode == 0, done.stderr
    assert 'image of 64×64' in done.stdout  # the divisor of the detector
    parts = parts_of(done.stdout)
    whole = parts.pop('**all**')
    assert set(parts) == {'backbone', 'neck', 'rpn_head', 'roi_head'}
    assert all(part['FLOPs G'] > 0 for part in parts.values())
    for column, value in whole.items():
        assert value == pytest.approx(sum(p[column] for p in parts.values()), abs=3e-3)
    fewer = parts_of(tool(*arguments, '--proposals', '100')[1])
    # Two hidden layers of 256 on 7x7 cells of 64 channels, 3 classes and background, one box;
    # the mask head takes 100 boxes either way.
    box = 64 * 49 * 256 + 256 * 256 + 256 * (4 + 4)
    for part, change in (('roi_head', 100 * box / 1e9), ('backbone', 0)):
        assert parts[part]['FLOPs G'] - fewer[part]['FLOPs G'] == pytest.approx(change, abs=1.1e-3)


def test_tool_on_a_segmentor(tool):
    config = 'configs/hat_net/hat-net-tiny_fpn_4xb4-80k_ade20k-512x512.py'
    status, output, _ = tool(config, '--shape', '64', '64')
    assert status == 0
    parts = parts_of(output)
    assert set(parts) == {'backbone', 'neck', 'decode_head', '**all**'}
    assert all(part['FLOPs G'] > 0 for part in parts.values())
    assert 'image of 64×64' in output


def test_tool_on_a_classifier(tool, tmp_path):
    config = tmp_path / 'resnet18.py'
    config.write_text(CLASSIFIER)
    parts = parts_of(tool(str(config))[1])
    assert set(parts) == {'backbone', 'neck', 'head', '**all**'}
    # What the literature says of ResNet-18: 11.69 M parameters, 1.81 G MACs.
    whole = parts['**all**']
    assert whole['params M'] == pytest.approx(11.69, abs=0.01)
    assert whole['convolution G'] + whole['linear G'] == pytest.approx(1.814, abs=0.002)


def test_tool_on_a_backbone(tool):
    _, output, _ = tool('hat_mm.HATNet:arch=tiny,out_indices=(3,)', '--shape', '64', '96')
    parts = parts_of(output)
    found = count(hat_mm.HATNet('tiny', out_indices=(3,)), (64, 96))
    assert parts['**all**']['FLOPs G'] == round(found.whole.total / 1e9, 3)
    assert parts['stages.2']['params M'] == round(found.parts['stages.2'].parameters / 1e6, 3)
    assert f'torch {torch.__version__}' in output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give a model or --published'),
        (['hat_mm.HATNet', '--published'], 'give a model or --published'),
        (['hat_mm.HATNet', '--shape', '0', '8'], '--shape and --proposals must be at least 1'),
        (['configs/none.py'], "'configs/none.py' is no config file"),
        (['HATNet'], "'HATNet' is no config file, and no backbone such as hat_mm.FasterViT:arch=0"),
        (['hat_mm.HATNet:arch=tny'], "unknown arch 'tny'"),
        (['hat_mm.HATNet', '--cfg-options', 'a=1'], '--cfg-options are for configs'),
        (['configs/_base_/backbones/hat-net-tiny.py'], 'is no config of a model of mmdet'),
    ],
)
def test_bad_arguments_are_one_line(tool, arguments, message):
    status, _, error = tool(*arguments)
    assert status in (1, 2)
    assert message in error.splitlines()[-1]


# --- the published tables -------------------------------------------------------------------------

DOCS = (ROOT / 'docs/complexity.md').read_text()
IMAGENET = {
    row[0]: row
    for title in ('FasterViT, ImageNet', 'HAT-Net, ImageNet')
    for row in tables(re.search(rf'### {title}\n(.*?)(?=\n#|\Z)', DOCS, re.DOTALL)[1])[1:]
}  # fmt: skip
NAMES = {'FasterViT': 'FasterViT', 'HAT-Net': 'HATNet'}


def test_every_arch_is_in_the_tables():
    for family, kind in NAMES.items():
        assert {f'{family}-{arch}' for arch in FAMILIES[kind].backbone.archs} <= set(IMAGENET)


@pytest.mark.parametrize('name', [name for name in IMAGENET if not name.startswith('---')])
def test_parameters_of_the_tables(name):
    family = next(family for family in NAMES if name.startswith(family))
    with torch.device('meta'):
        backbone = FAMILIES[NAMES[family]].backbone(
            name.removeprefix(f'{family}-'), out_indices=(3,)
        )
    parameters = sum(p.numel() for p in backbone.parameters())
    parameters += 1000 * (backbone.out_channels[-1] + 1)
    assert IMAGENET[name][2] == f'{parameters / 1e6:.2f}'


@pytest.mark.parametrize('name', ['FasterViT-0', 'HAT-Net-tiny'])
def test_flops_of_the_tables(name):
    family = next(family for family in NAMES if name.startswith(family))
    backbone = FAMILIES[NAMES[family]].backbone(name.removeprefix(f'{family}-'), out_indices=(3,))
    found = count(backbone, (224, 224)).whole
    whole = found.total + 1000 * backbone.out_channels[-1]
    cells = [whole, found.flops['attention'], found.flops['position']]
    assert IMAGENET[name][4:7] == [f'{n / 1e9:.2f}' for n in cells]
