"""Files in 8 bits: what is quantized, what is not, and that the results stay."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import openvino
import pytest
import torch
from export import main
from mmengine.config import Config
from mmpretrain.datasets import CustomDataset
from test_deployment.tiny_models import TwoConvs

import hat_mm
from hat_mm.engine.cli import UserError
from hat_mm.engine.quantization import find_pictures
from hat_mm_runtime import Model

SIZE = (96, 128)


class Net(TwoConvs):
    """With a branch for positions, which is to stay in float, and a product of two maps."""

    def __init__(self):
        super().__init__()
        self.pos_embed = torch.nn.Conv2d(32, 32, 1)
        self.conv3 = torch.nn.Conv2d(32, 32, 1)

    def forward(self, x):
        first, second = super().forward(x)
        tokens = self.conv3(second) + self.pos_embed(second)
        return first, tokens @ tokens.transpose(2, 3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('pictures')
    (path / 'more').mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        picture = cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path / ('more' if i == 0 else '.') / f'{i}.png'), picture)
    (path / 'notes.txt').write_text('no picture')
    return path


@pytest.fixture(scope='module')
def files(folder, tmp_path_factory):
    """The same network in float and int8, for both engines."""
    torch.manual_seed(0)
    net = Net().eval()
    out = tmp_path_factory.mktemp('files')
    options = dict(precision='int8', calibration=folder, samples=4)
    return {
        'fp32': hat_mm.export(net, None, out / 'float.onnx'),
        'onnx': hat_mm.export(net, None, out / 'int8.onnx', **options),
        'openvino': hat_mm.export(net, None, out / 'int8.xml', **options),
    }


@pytest.fixture(scope='module')
def picture(folder):
    image = cv2.imread(str(folder / '1.png'))[..., ::-1].astype(np.float32)
    mean, std = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])
    return ((image - mean) / std).transpose(2, 0, 1)[None]


@pytest.mark.parametrize('engine', ['onnx', 'openvino'])
def test_results_are_close_but_not_equal(files, picture, engine):
    exact, rough = (Model(files[name]).run(picture) for name in ('fp32', engine))
    error = np.linalg.norm(rough['stage1'] - exact['stage1']) / np.linalg.norm(exact['stage1'])
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize('engine', ['onnx', 'openvino'])
def test_what_stays_in_float_is_in_the_file(files, engine):
    meta = Model(files[engine]).meta
    assert meta['precision'] == 'int8'
    assert meta['samples'] == 4
    # The first layer and positions.
    assert meta['float'] == ['model.conv1', 'model.pos_embed']
    assert 'float' not in Model(files['fp32']).meta


def test_what_is_quantized_by_onnxruntime(files):
    graph = onnx.load(files['onnx']).graph
    made_by = {output: node for node in graph.node for output in node.output}
    quantized = {
        node.name.rpartition('/')[0]: node.input[1] in made_by
        and made_by[node.input[1]].op_type == 'DequantizeLinear'
        for node in graph.node
        if node.op_type in ('Conv', 'MatMul')
    }
    assert quantized == {
        'model.conv1': False,
        'model.conv2': True,
        'model.conv3': True,
        'model.pos_embed': False,
        'model': True,
    }


def test_int8_has_only_standard_operators(files):
    assert {item.domain for item in onnx.load(files['onnx']).opset_import} == {''}


def test_nncf_reports_nothing():
    """pytest would switch it off as well."""
    code = (
        'from hat_mm.engine.quantization import require_nncf\n'
        'require_nncf()\n'
        'from nncf.telemetry import wrapper\n'
        'print(type(wrapper.telemetry).__name__)'
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith('PYTEST')}
    environment.pop('NNCF_CI', None)
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines()[-1:] == ['MagicMock'], done.stderr


def test_what_is_quantized_by_nncf(files):
    model = openvino.Core().read_model(files['openvino'])
    weights = {}
    for node in model.get_ops():
        if node.get_type_name() == 'Convolution':
            source = node.input_value(1).get_node()
            weights[node.get_friendly_name().partition('/')[0]] = source.get_type_name()
    assert weights['model.conv1'] == weights['model.pos_embed'] == 'Constant'
    assert 'Constant' not in (weights['model.conv2'], weights['model.conv3'])


def test_pictures_of_a_folder(folder, tmp_path):
    found = find_pictures(folder, None, 3)
    assert [path.name for path in found] == ['1.png', '2.png', '4.png']
    (folder / 'folder.png').mkdir(exist_ok=True)
    assert len(find_pictures(str(folder), None, 64)) == 5
    with pytest.raises(UserError, match="neither a folder nor 'dataset'"):
        find_pictures(folder / '1.png', None, 3)
    with pytest.raises(UserError, match='has no pictures'):
        find_pictures(tmp_path, None, 3)
    (tmp_path / 'a.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match=r"calibration with .*a\.png' cannot be read"):
        hat_mm.export(TwoConvs(), None, tmp_path / 'a.onnx', precision='int8', calibration=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['a.png']
    with pytest.raises(UserError, match='needs a config with a train_dataloader'):
        find_pictures('dataset', None, 3)


def test_pictures_of_a_config(folder, monkeypatch):
    dataset = dict(type='CustomDataset', data_prefix=str(folder), with_label=False)
    wrapped = dict(type='RepeatDataset', times=2, dataset=dataset)
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=wrapped)))
    assert len(find_pictures('dataset', cfg, 64)) == 5
    assert len(find_pictures('dataset', cfg, 2)) == 2
    with monkeypatch.context() as patch:
        patch.setattr(CustomDataset, 'get_data_info', lambda *args: dict(img=0))
        with pytest.raises(UserError, match='not in files of their own'):
            find_pictures('dataset', cfg, 2)
    dataset['data_prefix'] = 'no/such/folder'
    cfg = Config(dict(default_scope='mmpretrain', train_dataloader=dict(dataset=dataset)))
    with pytest.raises(UserError, match=r'training images cannot be had .*no/such/folder'):
        find_pictures('dataset', cfg, 2)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['a.onnx', '--precision', 'bf16'], "precision='bf16' is for OpenVINO, so for .xml"),
        (['a.onnx', '--precision', 'int8', '--samples', '0'], 'samples=0 must be at least 1'),
        (['a.onnx', '--precision', 'int8', '--calibration', 'no'], "'no' is neither a folder nor"),
        (['a.xml', '--precision', 'int8'], "calibration='dataset' needs a config"),
    ],
)
def test_bad_command_lines(tmp_path, options, message):
    torch.save(hat_mm.FasterViT().state_dict(), tmp_path / '0.pth')
    options = [str(tmp_path / options[0]), *options[1:]]
    with pytest.raises(UserError, match=message):
        main(['hat_mm.FasterViT:arch=0', str(tmp_path / '0.pth'), *options])
    assert [path.name for path in tmp_path.iterdir()] == ['0.pth']


def test_bfloat16_is_asked_of_openvino(tmp_path, monkeypatch):
    torch.manual_seed(0)
    path = hat_mm.export(TwoConvs().eval(), None, tmp_path / 'a.xml', precision='bf16')
    asked = []
    compile_model = openvino.Core.compile_model
    monkeypatch.setattr(
        openvino.Core,
        'compile_model',
        lambda *args, **kwargs: asked.append(args[3]) or compile_model(*args, **kwargs),
    )
    assert Model(path).meta['precision'] == 'bf16'
    assert asked[0]['INFERENCE_PRECISION_HINT'] == 'bf16'
    assert Path(path).with_suffix('.bin').stat().st_size < 3 * sum(
        parameter.numel() for parameter in TwoConvs().parameters()
    )
