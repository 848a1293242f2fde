"""What is checked on a GPU: each function yields figures, with the limits that they must keep.

- parity: golden files in float32 without TF32, and in bf16.
- kernels: which attention kernels ran, in prediction and training.
- ddp: gradients of DistributedDataParallel with one process (nccl, or gloo on a CPU).
- fsdp2: the same for FSDP2, and the peak memory of each.
- checkpointing: gradients and peak memory with with_cp.
- growth: memory over training steps with images of random sizes.
- autocast: a training step in bf16 beside float32, in both memory layouts: FasterViT 0 to 4 and
  4-21k-224 (5 and 6 are only wider), all of HAT-Net and SwinHAT, and a tiny arch of each.
- compile: the same with torch.compile for an arch with few blocks of each family; prediction with
  FasterViT-0 and 4, HAT-Net tiny and large. Compiling all others would take an hour.

With ``quick``, tiny archs and the first golden file will do.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import golden
import measuring
import numpy as np
import torch
from test_backbones.archs import FAMILIES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

import hat_mm
from hat_mm.engine.fsdp2 import shard

Finding = tuple[str, float, float | None]
"""What was found, a figure, and the limit that it must not exceed; None for no limit."""

ARCHS = {
    'FasterViT': ['0', '1', '2', '3', '4', '4-21k-224'],
    'HATNet': ['tiny', 'small', 'medium', 'large'],
    'SwinHAT': ['tiny', 'small', 'base'],
}
COMPILED = {'FasterViT': ['0', '4'], 'HATNet': ['tiny', 'large'], 'SwinHAT': []}
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
# Relative errors. On a CPU, bf16 gives up to 0.013 in prediction, 0.019 in training, and 0.033 for
# gradients; TF32 in place of float32 gives about 1e-3.
FLOAT32, BF16, BF16_TRAINING, BF16_GRADIENTS = 5e-5, 2e-2, 4e-2, 0.1
MIB = 2**20
NO_COMPILER = 'torch.compile does not work here'


class Skip(Exception):
    """A check that cannot be done here, and why."""


# --- what the checks share ------------------------------------------------------------------------


def build(family: str, arch: str | dict, device: str, **arguments: Any) -> nn.Module:
    """A backbone with the same random weights each time, in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        backbone = FAMILIES[family].backbone(arch, drop_path_rate=0.0, **arguments)
    for name, parameter in backbone.named_parameters():
        if 'gamma' in name:  # small published layer scales would hide branches
            nn.init.constant_(parameter, 0.5)
    return backbone.train()


def step(
    model: nn.Module, images: Tensor, bf16: bool = False, forward: Callable | None = None
) -> tuple[list[Tensor], Tensor]:
    """Does a forward and a backward pass; returns the maps, and all gradients as one vector."""
    model.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        maps = (model if forward is None else forward)(images)
    generator = torch.Generator(images.device).manual_seed(0)
    noise = [torch.randn(m.shape, generator=generator, device=m.device) for m in maps]
    sum((m.float() * n).sum() for m, n in zip(maps, noise, strict=True)).backward()
    gradients = [p.grad for p in model.parameters()]
    gradients = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return [m.detach() for m in maps], torch.cat([g.flatten() for g in gradients])


def error(ours: Any, expected: Any) -> float:
    """The largest relative error of tensors; NaN if any is."""
    pairs = zip(ours, expected, strict=True)
    return float(torch.stack([(a.float() - b).norm() / b.norm() for a, b in pairs]).max())


def slope(values: list[int]) -> float:
    """Growth per step by least squares, without the first third."""
    rest = values[len(values) // 3 :]
    return float(np.polyfit(range(len(rest)), rest, 1)[0])


# --- checks: each yields its findings -------------------------------------------------------------


def parity(device: str, quick: bool) -> Iterator[Finding]:
    cases = [(file, names, hat_mm.FasterViT, kw) for file, names, kw in golden.FASTERVIT]
    cases += [(f, f'hat_net_{a}', hat_mm.HATNet, dict(arch=a)) for f, a in golden.HAT_NET]
    cases.sort(key=lambda case: len(golden.official_shapes(case[1])))  # the largest last
    for file, names, kind, arguments in cases[: 1 if quick else None]:
        with torch.device(device):
            backbone = kind(**arguments, out_norm_cfg=None).eval()
        backbone.load_state_dict(golden.official_state(names))
        numbers = golden.Golden(file)
        for bf16, limit in ((False, FLOAT32), (True, BF16)):
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
                maps = backbone(numbers.image().to(device))
            errors = [numbers.error(f'stage{i}', m.cpu()) for i, m in enumerate(maps)]
            yield f'{file} in {"bf16" if bf16 else "float32"}', float(np.max(errors)), limit


def kernels(device: str, quick: bool) -> Iterator[Finding]:
    for family, archs in ARCHS.items():
        arch = FAMILIES[family].tiny() if quick else archs[0]
        backbone = build(family, arch, device)
        for training in (False, True):
            backbone.train(training)
            with (
                profile(activities=[ProfilerActivity.CPU]) as seen,
                torch.autocast(device, torch.bfloat16),
                torch.set_grad_enabled(training),
            ):
                for size in ((64, 64),) if quick else ((224, 224), (250, 330)):
                    backbone(torch.randn(2, 3, *size, device=device))
            prefix = 'aten::_scaled_dot_product_'
            ran = Counter(e.name[len(prefix) :] for e in seen.events() if e.name.startswith(prefix))
            text = ', '.join(f'{name} ×{count}' for name, count in ran.items())
            mode = f'{family} in {"training" if training else "prediction"}'
            yield f'{mode}: {text or "none"}', ran.total(), None
            if device == 'cuda' and not quick:
                # On a CPU the fused kernel has no gradient for the bias; the heads of tiny archs
                # are too narrow for those of a GPU.
                yield f'{mode}: calls that are not fused', ran['attention_math'], 0


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """A group of this process alone."""
    for library in ('NCCL', 'GLOO'):  # there may be no network
        os.environ.setdefault(f'{library}_SOCKET_IFNAME', 'lo')
    with tempfile.TemporaryDirectory() as folder:
        backend = 'nccl' if device == 'cuda' else 'gloo'
        store = f'file://{folder}/store'
        torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def ddp(device: str, quick: bool) -> Iterator[Finding]:
    with process_group(device):
        for family, archs in ARCHS.items():
            model = build(family, FAMILIES[family].tiny() if quick else archs[0], device)
            images = torch.randn(2, 3, 96, 160, device=device)
            _, expected = step(copy.deepcopy(model), images)
            _, gradients = step(model, images, forward=nn.parallel.DistributedDataParallel(model))
            yield f'{family}: gradients', error([gradients], [expected]), 1e-4
            odd = sum(p.grad.stride() != p.stride() for p in model.parameters())
            yield f'{family}: gradients in another layout than their parameter', odd, 0


def fsdp2(device: str, quick: bool) -> Iterator[Finding]:
    with process_group(device):
        mesh = init_device_mesh(device, (1,))
        for family, archs in ARCHS.items():
            arch = FAMILIES[family].tiny() if quick else archs[-1]
            images = torch.randn(2, 3, 96, 160, device=device)
            gradients, peaks = [], []
            for sharded in (False, True):
                model = build(family, arch, device)
                if sharded:
                    shard(model, mesh, min_params=1000 if quick else 1_000_000)
                if device == 'cuda':
                    torch.cuda.reset_peak_memory_stats()
                gradients.append(step(model, images)[1].cpu())
                if device == 'cuda':
                    peaks.append(torch.cuda.max_memory_allocated() / MIB)
                del model
            yield f'{family}: gradients', error(gradients[1:], gradients[:1]), 1e-4
            if peaks:
                yield f'{family}: {peaks[1]:.0f} MiB, unsharded {peaks[0]:.0f}', peaks[1], None


def checkpointing(device: str, quick: bool) -> Iterator[Finding]:
    for family, archs in ARCHS.items():
        arch = FAMILIES[family].tiny() if quick else archs[0]
        images = torch.randn(2 if quick else 16, 3, 224, 160, device=device)
        gradients, peaks = [], []
        for with_cp in (False, True):
            model = build(family, arch, device, with_cp=with_cp)
            gradients.append(step(model, images)[1])
            if device == 'cuda':
                model.zero_grad()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                step(model, images, bf16=True)
                peaks.append((torch.cuda.max_memory_allocated() - before) / MIB)
        yield f'{family}: gradients', error(gradients[1:], gradients[:1]), 1e-4
        if peaks:
            yield f'{family}: {peaks[1]:.0f} of {peaks[0]:.0f} MiB', peaks[1], None
            yield f'{family}: part of the peak memory', peaks[1] / peaks[0], 0.9


def growth(device: str, quick: bool) -> Iterator[Finding]:
    for family, archs in ARCHS.items():
        model = build(family, FAMILIES[family].tiny() if quick else archs[0], device)
        largest, used, reserved = 128 if quick else 384, [], []
        for i in range(18 if quick else 60):
            size = [largest if i == 0 else random.randrange(48, largest) for _ in range(2)]
            step(model, torch.randn(2, 3, *size, device=device), bf16=True)
            model.zero_grad()
            if device == 'cuda':
                used.append(torch.cuda.memory_allocated())
                reserved.append(torch.cuda.max_memory_reserved())
            else:
                measuring.return_free_memory()
                used.append(measuring.resident('VmRSS'))
        limit = 1024 if device == 'cuda' else MIB // 2  # a resident set is not that exact
        yield f'{family}: bytes per step', slope(used), limit
        if reserved:
            grown = reserved[-1] / reserved[len(reserved) // 3] - 1
            yield f'{family}: reserved memory, growth after a third of the steps', grown, 0.25


def autocast(device: str, quick: bool, family: str) -> Iterator[Finding]:
    yield from _training(device, family, _few_blocks(family), (100, 150))
    for arch in [] if quick else ARCHS[family]:
        yield from _training(device, family, arch, (224, 224))


def _few_blocks(family: str) -> dict[str, Any]:
    """An arch with a block a stage, and so many channels that bf16 averages out."""
    return FAMILIES[family].tiny(**{**FAMILIES[family].wide, 'depths': (1, 1, 1, 1)})


def _training(
    device: str,
    family: str,
    arch: str | dict,
    size: tuple[int, int],
    wrap: Callable = lambda model: model,
    layouts: tuple[str, ...] = tuple(LAYOUTS),
) -> Iterator[Finding]:
    """Compares steps of a wrapped model in bf16 with the plain one in float32."""
    images = torch.randn(2, 3, *size, device=device)
    model = build(family, arch, device)
    maps, gradients = step(model, images)
    for layout in layouts:
        model.to(memory_format=LAYOUTS[layout])
        images = images.contiguous(memory_format=LAYOUTS[layout])
        ours, ours_gradients = step(model, images, bf16=True, forward=wrap(model))
        name = f'{family} {arch if isinstance(arch, str) else "with few blocks"}, {layout}'
        yield f'{name}: maps', error(ours, maps), BF16_TRAINING
        yield f'{name}: gradients', error([ours_gradients], [gradients]), BF16_GRADIENTS


def compiled(device: str, quick: bool, family: str) -> Iterator[Finding]:
    def wrap(function: Callable) -> Callable:
        torch._dynamo.reset()  # nothing is to become dynamic because of what ran before
        return torch.compile(function, backend='aot_eager' if quick else 'inductor')

    try:
        wrap(torch.sin)(torch.randn(8, device=device))
    except Exception as failure:  # of any kind; a C compiler can be missing, for example
        raise Skip(f'{NO_COMPILER}: {line(failure)}') from failure
    layouts = ('channels_last',) if quick else tuple(LAYOUTS)
    yield from _training(device, family, _few_blocks(family), (64, 96), wrap, layouts)
    for arch in [] if quick else COMPILED[family]:
        model = build(family, arch, device).eval()
        images = torch.randn(2, 3, 224, 224, device=device)
        with torch.inference_mode():
            maps = model(images)
            with torch.autocast(device, torch.bfloat16):
                yield f'{family} {arch}: maps', error(wrap(model)(images), maps), BF16_TRAINING


def line(failure: BaseException) -> str:
    return f'{type(failure).__name__}: {" ".join(str(failure).split())}'[:240]


@dataclass(frozen=True)
class Check:
    """A check: its function, the share of all the time that it may take, and its last argument."""

    name: str
    function: Callable[..., Iterator[Finding]]
    share: float = 0.2
    arguments: tuple[str, ...] = ()


CHECKS = [Check('parity', parity, 0.3)]
CHECKS += [Check(f.__name__, f) for f in (kernels, ddp, fsdp2, checkpointing, growth)]
CHECKS += [Check(f'autocast {family}', autocast, 0.2, (family,)) for family in FAMILIES]
CHECKS += [Check(f'compile {family}', compiled, 0.35, (family,)) for family in FAMILIES]
QUICK = [check for check in CHECKS if check.name not in ('compile HATNet', 'compile SwinHAT')]
