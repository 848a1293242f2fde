"""torch.compile with dynamic sizes."""

import pytest
import torch
import torch._dynamo.testing

from test_backbones.archs import FAMILIES

SIZES = [
    (160, 224),
    (194, 333),
    (224, 160),
    (288, 200),
    (200, 533),
    (256, 192),
    (256, 256),
    (384, 320),
]


DINO = dict(carriers=False, pad_every_stage=True, positions_by_tokens=True)


@pytest.mark.parametrize(
    ('family', 'fields'),
    [
        ('FasterViT', {}),
        ('FasterViT', DINO),
        ('HATNet', {}),
        pytest.param('SwinHAT', {}, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_many_sizes(family, fields):
    torch._dynamo.reset()
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny(**family.wide, **fields)).eval()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(backbone, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in SIZES[:4]:
            image = torch.randn(1, 3, *size)
            for ours, eager in zip(compiled(image), backbone(image), strict=True):
                assert (ours - eager).norm() <= 1e-4 * eager.norm(), size
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize('batch', [1, 2])
# Without SwinHAT, for which the code generator of PyTorch takes more than half an hour.
@pytest.mark.parametrize(
    ('family', 'fields'), [('FasterViT', {}), ('FasterViT', DINO), ('HATNet', {})]
)
def test_one_compile_serves_many_sizes(family, fields, batch):
    torch._dynamo.reset()
    family = FAMILIES[family]
    backbone = family.backbone(family.tiny(**family.wide, **fields)).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend('inductor')
    compiled = torch.compile(backbone, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in SIZES:
            image = torch.randn(batch, 3, *size)
            for ours, eager in zip(compiled(image), backbone(image), strict=True):
                assert (ours - eager).norm() <= 1e-4 * eager.norm(), size
    assert counter.frame_count <= 3
