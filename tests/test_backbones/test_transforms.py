"""A backbone under what PyTorch does to modules: other weights, replicas, threads, no data.

Whatever stands around a forward pass, the result is that of the weights and images at hand.
"""

import copy
import importlib
import threading
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap

from test_backbones.archs import FAMILIES

replicate = importlib.import_module('torch.nn.parallel.replicate')

VARIANTS = {
    'fastervit': ('FasterViT', {}),
    'fastervit-propagate': ('FasterViT', dict(propagate=True, layer_scale=0.5)),
    'hat-net': ('HATNet', {}),
    'swin-hat': ('SwinHAT', {}),
    'swin': ('SwinHAT', dict(hat_stages=())),
}
SIZE = (64, 97)


def build(variant, seed=0):
    name, fields = VARIANTS[variant]
    torch.manual_seed(seed)
    return FAMILIES[name].backbone(FAMILIES[name].tiny(**fields)).eval()


def images(batch=2, size=SIZE, seed=0):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_same(maps, expected, tolerance=1e-5):
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def no_rule_for(variant):
    """Expects the error with which group norm of PyTorch refuses vmap with the channels last."""
    if variant == 'hat-net':
        return pytest.raises(RuntimeError, match='NYI: querying is_contiguous inside of vmap')
    return nullcontext()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@torch.no_grad()
def test_functional_call_uses_the_weights_it_is_given(variant):
    backbone, x = build(variant), images()
    for seed in range(1, 6):
        other = build(variant, seed)
        weights = {name: value.clone() for name, value in other.state_dict().items()}
        assert_same(functional_call(backbone, weights, (x,)), other(x))
        del weights, other  # their memory is used again


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_edits_in_place_show(variant, mode):
    with mode():
        backbone, x = build(variant), images()
        before = backbone(x)
        for parameter in backbone.parameters():
            parameter.add_(0.1 * parameter.sign())
        fresh = build(variant, seed=1)
        fresh.load_state_dict(backbone.state_dict())
        assert_same(backbone(x), fresh(x))
        assert (backbone(x)[3] - before[3]).norm() > 1e-3 * before[3].norm()


@torch.no_grad()
def test_edits_through_data_show(variant):
    # As EMAHook of mmengine writes.
    backbone, x = build(variant), images()
    backbone(x)
    for parameter, other in zip(backbone.parameters(), build(variant, 1).parameters(), strict=True):
        parameter.data.copy_(other.data)
    assert_same(backbone(x), build(variant, 1)(x))


@torch.no_grad()
def test_shallow_copies_are_independent(variant):
    backbone, x = build(variant), images()
    expected = backbone(x)
    copied = copy.copy(backbone)
    copied(images(size=(130, 33)))
    assert_same(copied(x), expected)
    assert_same(backbone(x), expected)


@torch.no_grad()
def test_threads_with_sizes_of_their_own(variant):
    backbone = build(variant)
    sizes = [(64, 97), (33, 130), (96, 96), (20, 64)]
    expected = {size: backbone(images(size=size)) for size in sizes}
    failed = []

    def work(size):
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert_same(backbone(images(size=size)), expected[size])
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@torch.no_grad()
def test_replicas(variant, monkeypatch):
    # DataParallel broadcasts to GPUs; the replicas themselves need none.
    monkeypatch.setattr(
        replicate,
        '_broadcast_coalesced_reshape',
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    x = images()
    backbone = build(variant)
    expected = backbone(x)
    for _ in range(3):
        for replica in replicate.replicate(backbone, [0, 1], detach=True):
            assert_same(replica(x), expected)
        del replica
    assert_same(backbone(x), expected)


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_vmap_over_images(variant):
    backbone, x = build(variant), images(batch=3)
    with torch.no_grad(), no_rule_for(variant):
        mapped = vmap(lambda image: backbone(image[None]))(x)
        for ours, expected in zip(mapped, backbone(x), strict=True):
            assert_same([ours[:, 0]], [expected])


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_vmap_over_weights(variant):
    backbones, x = [build(variant, seed) for seed in range(3)], images()
    weights, buffers = stack_module_state(backbones)
    with torch.no_grad(), no_rule_for(variant):
        call = vmap(lambda w, b: functional_call(backbones[0], (w, b), (x,)))
        stacked = call(weights, buffers)
        for i, backbone in enumerate(backbones):
            assert_same([maps[i] for maps in stacked], backbone(x))


@pytest.mark.parametrize('training', [False, True])
def test_meta_device(variant, training):
    backbone = build(variant).train(training).to('meta')
    maps = backbone(torch.empty(2, 3, *SIZE, device='meta'))
    assert [m.shape for m in maps] == [m.shape for m in build(variant)(images())]
    assert {m.device.type for m in maps} == {'meta'}


def test_fake_tensors(variant):
    backbone = build(variant)
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = backbone(torch.empty(2, 3, *SIZE))
    assert [m.shape for m in maps] == [m.shape for m in backbone(images())]


@torch.no_grad()
def test_the_default_device_is_of_no_importance(variant):
    backbone, x = build(variant), images()
    with torch.device('meta'):
        maps = backbone(x)
    assert_same(maps, backbone(x), 0)


@pytest.mark.parametrize('variant', ['fastervit-propagate', 'hat-net', 'swin-hat'])
def test_export_with_a_dynamic_batch(variant):
    backbone = build(variant)
    batch = torch.export.Dim('batch', min=2, max=64)
    exported = torch.export.export(
        backbone, (images(2, (64, 64)),), dynamic_shapes=({0: batch},), strict=False
    )
    assert_same(exported.module()(images(3, (64, 64))), backbone(images(3, (64, 64))))
