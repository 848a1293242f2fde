"""A second HAT-Net, written plainly: loops over windows and heads, border windows cut to size.

Slow on purpose. It shares no code with the package and reads the weights by their *official* names.
There is no padding and no mask in it: a window at the border is a smaller slice.
"""

import math

import torch
import torch.nn.functional as F


class PlainHATNet:
    """Computes the raw stage maps of one HAT-Net from official weights.

    Args:
        state: Official names and tensors.
        depths, grids, ds_ratios: One number for each stage.
        head_dim: Channels of an attention head.
    """

    def __init__(self, state, depths, grids, ds_ratios, head_dim):
        self.state = state
        self.depths, self.grids, self.ds_ratios = depths, grids, ds_ratios
        self.head_dim = head_dim

    def __call__(self, x):
        # Images share nothing: one at a time.
        images = [self._image(image) for image in x]
        return [torch.stack(maps) for maps in zip(*images, strict=True)]

    def _image(self, x):
        x = self._conv(x, 'patch_embed.0', stride=2)
        x = self._silu(self._norm(x, 'patch_embed.1'))
        x = self._conv(x, 'patch_embed.3', stride=2)
        maps = []
        for stage, depth in enumerate(self.depths):
            if stage:
                x = self._conv(x, f'ds{stage + 1}.conv', stride=2)
                x = self._norm(x, f'ds{stage + 1}.norm')
            for k in range(depth):
                name = f'blocks.{stage}.{k}'
                x = x + self._attention(x, f'{name}.attn', stage)
                x = x + self._inverted_residual(x, f'{name}.conv')
            maps.append(x)
        return maps

    def _conv(self, x, name, stride=1, groups=1):
        weight = self.state[f'{name}.weight']
        bias = self.state.get(f'{name}.bias')
        side = weight.shape[-1]
        return F.conv2d(x[None], weight, bias, stride, padding=side // 2, groups=groups)[0]

    def _norm(self, x, name):
        variance = ((x - x.mean()) ** 2).mean()
        x = (x - x.mean()) / torch.sqrt(variance + 1e-6)
        weight, bias = self.state[f'{name}.weight'], self.state[f'{name}.bias']
        return x * weight[:, None, None] + bias[:, None, None]

    def _silu(self, x):
        return x * torch.sigmoid(x)

    def _inverted_residual(self, x, name):
        x = self._silu(self._conv(self._norm(x, f'{name}.conv1.0'), f'{name}.conv1.1'))
        x = self._silu(self._conv(x, f'{name}.conv2.0', groups=len(x)))
        return self._norm(self._conv(x, f'{name}.conv3.0'), f'{name}.conv3.1')

    def _attention(self, x, name, stage):
        channels, height, width = x.shape
        g = self.grids[stage]
        qkv = self._conv(self._norm(x, f'{name}.norm'), f'{name}.qkv')
        q, k, v = qkv[:channels], qkv[channels : 2 * channels], qkv[2 * channels :]
        if g == 1:
            return self._conv(self._attend(q, k, v), f'{name}.proj')
        local = torch.zeros_like(x)
        for top in range(0, height, g):
            for left in range(0, width, g):
                window = (slice(None), slice(top, top + g), slice(left, left + g))
                local[window] = self._attend(q[window], k[window], v[window])
        y = self._norm(x + local, f'{name}.grid_norm')
        r = self.ds_ratios[stage]
        pooled = x.new_zeros(channels, math.ceil(height / r), math.ceil(width / r))
        for i in range(pooled.shape[1]):
            for j in range(pooled.shape[2]):
                cell = y[:, i * r : (i + 1) * r, j * r : (j + 1) * r]
                pooled[:, i, j] = cell.mean((1, 2))
        kv = self._conv(self._norm(pooled, f'{name}.ds_norm'), f'{name}.kv')
        z = self._attend(self._conv(y, f'{name}.q'), kv[:channels], kv[channels:])
        return self._conv(z + y, f'{name}.proj')

    def _attend(self, q, k, v):
        """Attention of the tokens of one map to those of another, head by head."""
        d = self.head_dim
        out = torch.zeros_like(q)
        for start in range(0, len(q), d):
            head = slice(start, start + d)
            queries, keys, values = (part[head].flatten(1).T for part in (q, k, v))
            attended = torch.softmax(queries @ keys.T / math.sqrt(d), -1) @ values
            out[head] = attended.T.reshape(d, *q.shape[1:])
        return out
