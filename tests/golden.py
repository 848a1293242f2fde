"""Golden numbers of the published models: weights by rule, inputs by seed, sampled outputs.

``tests/data/golden`` holds outputs of the authors' released code (FasterViT package 1.0.0, HAT-Net,
DINO with FasterViT) on the CPU, with weights filled by the rule below in place of trained ones; in
float32, those of DINO in float64.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / 'data' / 'golden'

# Golden file, its official names, our arguments.
FASTERVIT = [
    ('fastervit_0_224', 'fastervit_0', dict(arch='0')),
    ('fastervit_0_anyres_256', 'fastervit_0', dict(arch='0')),
    ('fastervit_0_anyres_448', 'fastervit_0', dict(arch='0')),
    ('fastervit_0_anyres_512', 'fastervit_0', dict(arch='0')),
    (
        'fastervit_2_anyres_w7-7-12-6_576',
        'fastervit_2',
        dict(arch='2', window_size=(7, 7, 12, 6)),
    ),
    ('fastervit_3_224', 'fastervit_3', dict(arch='3')),
    ('fastervit_4_224', 'fastervit_4', dict(arch='4')),
    ('fastervit_4_21k_224', 'fastervit_4_21k', dict(arch='4-21k-224')),
]
HAT_NET = [
    ('hat_net_tiny_224', 'tiny'),
    ('hat_net_tiny_448x672', 'tiny'),
    ('hat_net_small_224', 'small'),
    ('hat_net_medium_224', 'medium'),
]


def official_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of every learned tensor of an official checkpoint."""
    return json.loads((FOLDER / f'{name}.keys.json').read_text())


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """The rule's value for the tensor of an official name."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    last = name.rsplit('.', 1)[-1]
    if last.startswith('gamma'):
        value = 0.5 + 0.1 * z
    elif last == 'running_var':
        value = 1 + 0.1 * np.abs(z)
    elif last == 'running_mean':
        value = 0.1 * z
    elif len(shape) > 1:
        value = z / math.sqrt(math.prod(shape[1:]))
    elif last == 'weight':
        value = 1 + 0.1 * z
    else:
        value = 0.1 * z
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def official_state(name: str) -> dict[str, Tensor]:
    """An official checkpoint's state dict, filled by the rule."""
    return {k: fill(k, shape) for k, shape in official_shapes(name).items()}


class Golden:
    """One golden file."""

    def __init__(self, name: str) -> None:
        self._data = np.load(FOLDER / f'{name}.npz')
        self.meta = json.loads(bytes(self._data['meta']))

    def image(self) -> Tensor:
        """The input, (B, 3, H, W)."""
        rng = np.random.default_rng(self.meta['input_seed'])
        return torch.from_numpy(rng.standard_normal(self.meta['input_shape']).astype(np.float32))

    def error(self, output: str, ours: Tensor, columns: list[int] | None = None) -> float:
        """Relative error of ``ours`` against the sampled values of an output.

        If ``ours`` has only some columns (of the last axis), these are given.
        """
        shape = self._data[f'{output}/shape'].tolist()
        value = torch.from_numpy(self._data[f'{output}/value']).double()
        index = torch.from_numpy(self._data[f'{output}/index'].astype(np.int64))
        if columns is not None:
            place = torch.full((shape[-1],), -1).index_put(
                (torch.tensor(columns),), torch.arange(len(columns))
            )
            row, column = index // shape[-1], place[index % shape[-1]]
            shape[-1] = len(columns)
            index = (row * shape[-1] + column)[column >= 0]
            value = value[column >= 0]
        assert shape == [*ours.shape]
        sample = ours.detach().flatten()[index].double()
        return float((value - sample).norm() / value.norm())
