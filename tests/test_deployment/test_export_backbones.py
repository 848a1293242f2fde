"""Backbones alone through PyTorch's exporters: every family and every published arch."""

import onnxruntime
import pytest
import torch
from test_backbones.archs import FAMILIES

import hat_mm
from hat_mm_runtime import Model

pytestmark = pytest.mark.slow

SIZES = [(1, 1), (37, 911), (224, 224), (333, 500), (800, 1216)]
PUBLISHED = {
    **{f'fastervit-{i}': (hat_mm.FasterViT, i) for i in range(7)},
    'fastervit-4-21k-224': (hat_mm.FasterViT, '4-21k-224'),
    **{f'hat-net-{size}': (hat_mm.HATNet, size) for size in ('tiny', 'small', 'medium', 'large')},
    'swin-hat-tiny': (hat_mm.SwinHAT, 'tiny'),
}
TINY = {name: (family.backbone, family.arch) for name, family in FAMILIES.items()}


def build(case):
    kind, arch = {**TINY, **PUBLISHED}[case]
    torch.manual_seed(0)
    model = kind(arch).eval().requires_grad_(False)
    for parameter in model.parameters():
        # As trained. The TorchScript exporter makes invalid graphs of norms with equal weights.
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def assert_as_exact(run, model, sizes=SIZES, batch=1):
    """Errors against float64 of at most four times those of PyTorch in float32."""
    torch.manual_seed(0)
    for size in sizes:
        x = torch.randn(batch, 3, *size)
        ours, float32 = run(x), model(x)
        exact = model.double()(x.double())
        model.float()
        for i, (a, b, c) in enumerate(zip(ours, float32, exact, strict=True)):
            scale = c.abs().max()
            error, usual = ((torch.as_tensor(y) - c).abs().max() / scale for y in (a, b))
            # Where PyTorch happens to be exact, four roundings.
            assert error <= 4 * max(usual, 2**-23), f'{size}, map {i}: {error} against {usual}'


@pytest.mark.parametrize('case', [*TINY, *PUBLISHED])
@torch.no_grad()
def test_onnx(case, tmp_path):
    model = build(case)
    # Images of three sizes are compared there, too.
    path = hat_mm.export(model, None, tmp_path / 'model.onnx')
    file = Model(path)
    assert_as_exact(lambda x: file.run(x.numpy()).values(), model)
    assert_as_exact(lambda x: file.run(x.numpy()).values(), model, [(97, 211)], batch=3)


@pytest.mark.parametrize('case', [*TINY, 'fastervit-0', 'hat-net-tiny'])
@torch.no_grad()
def test_torch_export(case):
    model = build(case)
    program = torch.export.export(
        model,
        (torch.rand(1, 3, 333, 500),),
        dynamic_shapes=({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    assert_as_exact(program.module(), model, [(333, 500), (256, 512), (800, 1216)])


@pytest.mark.parametrize('case', [*TINY, 'fastervit-0', 'hat-net-tiny'])
@pytest.mark.filterwarnings('ignore')
@torch.no_grad()
def test_torchscript_exporter(case, tmp_path):
    model = build(case)
    axes = {'input': {0: 'batch', 2: 'height', 3: 'width'}}
    torch.onnx.export(
        model,
        (torch.rand(2, 3, 333, 500),),
        tmp_path / 'model.onnx',
        dynamo=False,
        input_names=['input'],
        dynamic_axes=axes,
        opset_version=20,
    )
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    assert_as_exact(lambda x: session.run(None, {'input': x.numpy()}), model)
