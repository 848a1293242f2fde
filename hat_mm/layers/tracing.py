"""Computations that need another form in tracing, above all by ``torch.compile``, and why.

Only these functions ask whether a graph is being recorded. Otherwise each is plain PyTorch.
"""

import torch
from torch import Tensor


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """Crops a channels-last map (B, H', W', C) to its top left (B, height, width, C).

    The strides of a slice depend on whether anything was cut off; ``torch.compile`` would make a
    graph for each case, and a program of ``torch.export`` would accept only one.
    """
    if not torch.compiler.is_compiling():
        return x[:, :height, :width]
    for axis, size in ((1, height), (2, width)):
        x = x.index_select(axis, torch.arange(size, device=x.device))
    return x


def chunks(length: int, at_once: int) -> list[slice]:
    """Cuts an axis into chunks of ``at_once`` entries, or of one if that is less than one.

    A graph is recorded with a single chunk, because the number of chunks would fix the image size.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or at_once >= length:
        return [slice(None)]
    at_once = max(at_once, 1)
    return [slice(i, i + at_once) for i in range(0, length, at_once)]


def needs_border_mask(height: int, width: int, window_size: int) -> bool:
    """Tells whether a map ends inside its last windows.

    A graph gets the same answer for all sizes; ``torch.compile`` would make one for each answer.
    """
    # In this order, because evaluating a remainder makes the graph depend on it.
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recorded or height % window_size != 0 or width % window_size != 0


def any_batch(batch: int) -> int:
    """The length of a first axis for a reshape.

    PyTorch's TorchScript exporter would turn it into a constant.
    """
    return -1 if torch.jit.is_tracing() else batch


def contiguous_input(x: Tensor, wanted: bool) -> Tensor:
    """Makes the input of a convolution of stride 2 contiguous, if wanted or compiling.

    In channels last, torch 2.13's inductor fails on some symbolic sizes ("ValueRangeError: Invalid
    ranges"). It fuses the copy into the norm before.
    """
    if torch.compiler.is_compiling():
        return x.clone(memory_format=torch.contiguous_format)
    return x.contiguous() if wanted else x


def contiguous_gradient(x: Tensor) -> Tensor:
    """Returns a contiguous map, whose gradient is made contiguous as well.

    Compilers choose layouts themselves. The flat view, which does it otherwise, is an error in
    AOTAutograd's backward graph, because that expects another layout of a layer norm's gradient.
    """
    return x if torch.compiler.is_compiling() else x.flatten().view_as(x)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm with one group on a map (B, C, H, W).

    ``torch.compile`` decomposes PyTorch's norm by flattening the map, and the index expressions of
    a flattened map of symbolic size take it many minutes.
    """
    if torch.compiler.is_dynamo_compiling():
        y = x.float()
        variance, mean = torch.var_mean(y, (1, 2, 3), correction=0, keepdim=True)
        scale = weight[:, None, None] * torch.rsqrt(variance + eps)
        return ((y - mean) * scale + bias[:, None, None]).type_as(x)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        # Axis by axis, because onnxruntime adds up millions of numbers one after the other.
        x = x - x.mean(3, True).mean(2, True).mean(1, True)
        variance = x.square().mean(3, True).mean(2, True).mean(1, True)
        return x * (weight.view(-1, 1, 1) * torch.rsqrt(variance + eps)) + bias.view(-1, 1, 1)
    # Not through nn.functional, which refuses a map of a single number.
    return torch.group_norm(x, 1, weight, bias, eps)
