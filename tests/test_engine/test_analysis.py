"""Counts of parameters and FLOPs: by hand, by part, the tool and the published tables."""

import re
from pathlib import Path

import get_flops
import pytest
import torch
import torch.nn.functional as F
from test_backbones.archs import FAMILIES
from torch import nn

import hat_mm
from hat_mm.engine.analysis import count
from hat_mm.engine.cli import run_tool

ROOT = Path(__file__).resolve().parents[2]


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
        # Not by a call, as some heads of mmdet.
        return self.head.forward(F.gelu(x).mean((2, 3))) + self.head(x.mean((2, 3)))


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_a_network_by_hand(device):
    found = count(Tiny().to(device), (10, 6))
    pixels = 5 * 3
    assert found.parts['stem'].flops == pixels * 8 * 27
    assert found.parts['layers.0'].flops == pixels * 8 * 9
    assert found.parts['layers.1'].flops == pixels * 8 * 4
    assert found.parts['head'].flops == 40
    assert (found.parts['unused'].parameters, found.parts['unused'].flops) == (25, 0)
    assert found.whole.flops == pixels * (8 * 27 + 8 * 9 + 8 * 4) + 2 * 40
    assert found.whole.parameters == 8 * 28 + 16 + 80 + 36 + 50 + 25


class Attend(nn.Module):
    def __init__(self, shapes, options):
        super().__init__()
        self.tensors = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        self.options = options

    def forward(self, _):
        return F.scaled_dot_product_attention(*self.tensors, **self.options)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize(
    ('shapes', 'options', 'expected'),
    [
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)), {}, 2 * 3 * 5 * 7 * (8 + 6)),
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), {}, 2 * 3 * 5 * 7 * 16),
        (((3, 5, 8), (3, 7, 8), (3, 7, 8)), {}, 3 * 5 * 7 * 16),
        (((1, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)), {}, 4 * 3 * 5 * 7 * 16),
        (((2, 3, 5, 8),) * 3, {'is_causal': True}, 2 * 3 * 5 * 5 * 16),
        (((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), (2, 1, 1, 7)), {}, 2 * 3 * 5 * 7 * 16),
    ],
)
def test_attention(shapes, options, expected, device):
    found = count(Attend(shapes, options).to(device), (1, 1)).whole
    assert found.attention == found.flops == expected


@pytest.mark.parametrize('device', ['cpu', 'meta'])
@pytest.mark.parametrize('family', FAMILIES)
def test_the_parts_of_a_backbone_are_the_whole(family, device):
    family = FAMILIES[family]
    found = count(family.backbone(family.tiny()).to(device), (97, 65))
    assert found.whole.attention > 0
    for field in ('parameters', 'flops', 'attention', 'position'):
        total = sum(getattr(part, field) for part in found.parts.values())
        assert getattr(found.whole, field) == total


def test_positions_by_hand():
    # Map of stage 2: 4x4, one window; of stage 3: 2x2, filled to a window of 4x4.
    found = count(hat_mm.FasterViT(FAMILIES['FasterViT'].tiny()), (64, 64))
    # From two coordinates to 512, and on: embedding of 16 channels, bias of two heads.
    window = 16 * (2 + 16) + 49 * (2 + 2)
    carrier = 4 * (2 + 16) + 9 * (2 + 2)
    assert found.parts['stages.2'].position == 512 * 2 * (window + carrier)
    assert found.parts['stages.3'].position == 512 * (16 * (2 + 32) + 49 * (2 + 2))


@pytest.mark.parametrize('shape', [(0, 8), (8,), (8, 8.5)])
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


def test_tool_on_a_detector(tool):
    arguments = ('configs/toy/mask-rcnn_fastervit-tiny_fpn_shapes.py', '--shape', '60', '64')
    status, output, _ = tool(*arguments, '--proposals', '200')
    assert status == 0
    assert 'image of 64×64' in output  # the divisor of the detector
    assert f'torch {torch.__version__}' in output
    parts = parts_of(output)
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
    parts = parts_of(tool(config, '--shape', '64', '64')[1])
    assert set(parts) == {'backbone', 'neck', 'decode_head', '**all**'}
    assert all(part['FLOPs G'] > 0 for part in parts.values())


def test_tool_on_a_classifier(tool, tmp_path):
    config = tmp_path / 'resnet18.py'
    config.write_text("_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']\n")
    parts = parts_of(tool(str(config), '--cfg-options', 'model.head.num_classes=10')[1])
    assert set(parts) == {'backbone', 'head', '**all**'}
    assert parts['head']['params M'] == 0.005
    # What the literature says of ResNet-18: 11.69 M parameters, 1.814 G MACs, with 1000 classes.
    assert parts['backbone']['params M'] == pytest.approx(11.69 - 0.513, abs=0.01)
    assert parts['backbone']['FLOPs G'] == pytest.approx(1.814, abs=0.002)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'give a model or --published'),
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

DOCS = (ROOT / 'docs/complexity/published.md').read_text()


@pytest.mark.parametrize(
    ('name', 'backbone'),
    [('fastervit-0', 'hat_mm.FasterViT:arch=0'), ('hat-net-tiny', 'hat_mm.HATNet:arch=tiny')],
)
def test_figures_of_the_tables(tool, name, backbone):
    [row] = [row for row in tables(DOCS) if row[:2] == [name, '224×224']]
    found = parts_of(tool(f'{backbone},out_indices=(3,)')[1])['**all**']
    head = {'fastervit-0': 512, 'hat-net-tiny': 384}[name] * 1000 / 1e9
    assert float(row[4]) == pytest.approx(found['FLOPs G'] + head, abs=0.0051)
    assert float(row[5]) == pytest.approx(found['attention G'], abs=0.0051)
    assert float(row[6]) == pytest.approx(found['position G'], abs=0.0051)


@pytest.mark.parametrize('title', get_flops.PUBLISHED)
def test_a_table_has_a_row_for_each_published_model(title):
    section = DOCS.partition(f'## {title}\n\n')[2].partition('\n\n')[0]
    expected = []
    for config, (height, width), *_ in get_flops.PUBLISHED[title]:
        assert (get_flops.CONFIGS / config).is_file()
        name = re.search('(fastervit|hat-net)-[^_]+', config)[0]
        expected.append([name, f'{height}×{width}'])
    _, _, *lines = section.splitlines()  # below the head
    assert [row[:2] for row in tables('\n'.join(lines))] == expected
    assert len(lines) == len(expected)  # nothing else is in between
