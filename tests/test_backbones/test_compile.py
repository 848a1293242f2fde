"""torch.compile with dynamic sizes."""

import random

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


@pytest.mark.slow
@pytest.mark.parametrize('name', ['FasterViT', 'HATNet'])
def test_compiled_training_computes_the_same_and_soon_stops_compiling(name):
    torch._dynamo.reset()
    family = FAMILIES[name]
    arch = family.tiny(**{**family.wide, 'depths': (1, 1, 1, 1), 'drop_path_rate': 0.0})
    backbone = family.backbone(arch).train()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(backbone, dynamic=True, backend=counter)
    dice = random.Random(0)
    last = 0
    for step in range(40):
        # Batches of a detector. Equal sides and single windows would take more graphs.
        size = dice.sample(range(256, 512, 32), 2)
        image = torch.randn(dice.randint(1, 3), 3, *size)
        half = step % 2 == 1
        before = counter.frame_count
        found = gradients(compiled, image, half)
        expected = gradients(backbone, image, half)
        assert (found - expected).norm() <= (5e-2 if half else 1e-4) * expected.norm(), image.shape
        if counter.frame_count > before:
            last = step
            print(f'{name}: graph {counter.frame_count} at step {step}, {tuple(image.shape)}')
    # Of one image and of several, each in float32 and under autocast; the first step takes two.
    assert counter.frame_count <= 6
    assert last < 20


def gradients(backbone, image, half):
    """All gradients of a step as one vector."""
    backbone.zero_grad()
    with torch.autocast('cpu', torch.bfloat16, enabled=half):
        maps = backbone(image)
    sum(x.float().square().mean() for x in maps).backward()
    return torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])
