"""A second FasterViT, written plainly: loops over windows and axes, formulas as in the paper.

Slow on purpose. It shares no code with the package and reads the weights by their *official* names,
so that padding, window order, carrier order, pooling and positions are checked per axis.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F


class PlainFasterViT:
    """Computes the raw stage maps of one FasterViT from official weights.

    Args:
        state: Official names and tensors.
        depths, num_heads, window_size: One number for each stage.
        carrier_size: Side of the carriers of a window, 0 for none.
        propagate: Whether carriers are added to their tokens at the end of stage 2.
        pad_all: Whether stages 0 and 1 pad their maps, too.
        by_tokens: Whether absolute positions in windows count by the tokens of a window.
        carrier_bias: Attention bias of every pair with a carrier in it.
    """

    def __init__(
        self,
        state,
        depths,
        num_heads,
        window_size,
        carrier_size,
        propagate,
        pad_all=False,
        by_tokens=False,
        carrier_bias=0.0,
    ):
        self.state = state
        self.depths, self.heads, self.windows = depths, num_heads, window_size
        self.c, self.propagate = carrier_size, propagate
        self.pad_all, self.by_tokens = pad_all, by_tokens
        self.carrier_bias = carrier_bias

    def __call__(self, x):
        s = self.state
        x = F.conv2d(x, s['patch_embed.conv_down.0.weight'], stride=2, padding=1)
        x = F.relu(self._bn(x, 'patch_embed.conv_down.1', 1e-4))
        x = F.conv2d(x, s['patch_embed.conv_down.3.weight'], stride=2, padding=1)
        x = F.relu(self._bn(x, 'patch_embed.conv_down.4', 1e-4))
        maps = []
        for stage in range(4):
            if stage:
                x = self._downsample(x, f'levels.{stage - 1}.downsample')
            # Images share nothing: one at a time.
            images = [self._stage(image[None], stage) for image in x]
            x = torch.cat(images)
            maps.append(x)
        return maps

    def _bn(self, x, name, eps):
        s = self.state
        parts = [s[f'{name}.{k}'] for k in ('running_mean', 'running_var', 'weight', 'bias')]
        return F.batch_norm(x, *parts, eps=eps)

    def _ln(self, x, name, eps):
        weight, bias = self.state[f'{name}.weight'], self.state[f'{name}.bias']
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + eps) * weight + bias

    def _linear(self, x, name):
        return x @ self.state[f'{name}.weight'].T + self.state[f'{name}.bias']

    def _downsample(self, x, name):
        x = self._ln(x.permute(0, 2, 3, 1), f'{name}.norm', 1e-6).permute(0, 3, 1, 2)
        return F.conv2d(x, self.state[f'{name}.reduction.0.weight'], stride=2, padding=1)

    def _stage(self, x, stage):
        if stage < 2:
            height, width = x.shape[2:]
            if self.pad_all:
                w = self.windows[stage]
                x = F.pad(x, (0, -width % w, 0, -height % w))
            for k in range(self.depths[stage]):
                x = self._conv_block(x, f'levels.{stage}.blocks.{k}')
            return x[:, :, :height, :width]
        return self._attention_stage(x[0], stage)[None]

    def _conv_block(self, x, name):
        s = self.state
        y = F.conv2d(x, s[f'{name}.conv1.weight'], s[f'{name}.conv1.bias'], padding=1)
        y = F.gelu(self._bn(y, f'{name}.norm1', 1e-5))
        y = F.conv2d(y, s[f'{name}.conv2.weight'], s[f'{name}.conv2.bias'], padding=1)
        return x + self._bn(y, f'{name}.norm2', 1e-5)

    def _attention_stage(self, x, stage):
        channels, height, width = x.shape
        w = self.windows[stage]
        nh, nw = math.ceil(height / w), math.ceil(width / w)
        padded = x.new_zeros(channels, nh * w, nw * w)
        padded[:, :height, :width] = x
        windows = {}
        for i in range(nh):
            for j in range(nw):
                cut = padded[:, i * w : (i + 1) * w, j * w : (j + 1) * w]
                windows[i, j] = cut.reshape(channels, w * w).T
        # One token at (row, column) of the whole carrier grid.
        carriers = None
        if stage == 2 and self.c:
            name = 'levels.2.global_tokenizer.to_global_feature.pos'
            carriers = self._birth(padded, nh, nw, w, self.c, name)
        for k in range(self.depths[stage]):
            last = k == self.depths[stage] - 1
            name = f'levels.{stage}.blocks.{k}'
            windows, carriers = self._block(windows, carriers, name, stage, nh, nw, w, last)
        out = x.new_zeros(channels, nh * w, nw * w)
        for (i, j), tokens in windows.items():
            out[:, i * w : (i + 1) * w, j * w : (j + 1) * w] = tokens.T.reshape(channels, w, w)
        return out[:, :height, :width]

    def _birth(self, padded, nh, nw, w, c, name):
        weight, bias = self.state[f'{name}.weight'], self.state[f'{name}.bias']
        x = F.conv2d(padded[None], weight, bias, padding=1, groups=len(weight))[0]

        def spans(windows):
            cells, length = c * windows, w * windows
            stride = length // cells
            size = length - (cells - 1) * stride
            return [(t * stride, t * stride + size) for t in range(cells)]

        grid = x.new_zeros(c * nh, c * nw, len(weight))
        for r, (top, bottom) in enumerate(spans(nh)):
            for q, (left, right) in enumerate(spans(nw)):
                grid[r, q] = x[:, top:bottom, left:right].mean((1, 2))
        return grid

    def _block(self, windows, carriers, name, stage, nh, nw, w, last):
        c = self.c
        size = w * w if self.by_tokens else w
        embedding = self._absolute(w, w, f'{name}.pos_embed', size)
        windows = {at: tokens + embedding for at, tokens in windows.items()}
        if carriers is None:
            windows = {
                at: self._layer(t, name, '', ('gamma3', 'gamma4'), stage, w, w, 0)
                for at, t in windows.items()
            }
            return windows, None
        rows, cols = c * nh, c * nw
        raster = carriers.reshape(rows * cols, -1)
        raster = raster + self._absolute(rows, cols, f'{name}.hat_pos_embed')
        gammas = ('gamma1', 'gamma2')
        raster = self._layer(raster, name, 'hat_', gammas, stage, rows, cols, 0)
        carriers = raster.reshape(rows, cols, -1).clone()
        gamma1 = self.state.get(f'{name}.gamma1', torch.ones(()))
        for (i, j), tokens in windows.items():
            own = [carriers[i * c + r, j * c + q] for r in range(c) for q in range(c)]
            both = torch.cat([torch.stack(own), tokens])
            both = self._layer(both, name, '', ('gamma3', 'gamma4'), stage, w, w, c * c)
            own, tokens = both[: c * c], both[c * c :].clone()
            for r in range(c):
                for q in range(c):
                    carriers[i * c + r, j * c + q] = own[r * c + q]
            if last and self.propagate:
                for r in range(w):
                    for q in range(w):
                        tokens[r * w + q] += gamma1 * own[r * c // w * c + q * c // w]
            windows[i, j] = tokens
        return windows, carriers

    def _layer(self, x, name, kind, gammas, stage, a, b, prefix):
        first, second = (self.state.get(f'{name}.{g}', torch.ones(())) for g in gammas)
        y = self._ln(x, f'{name}.{kind}norm1', 1e-5)
        bias = self._relative(a, b, f'{name}.{kind}attn.pos_emb_funct')
        x = x + first * self._attention(y, f'{name}.{kind}attn', self.heads[stage], bias, prefix)
        y = self._ln(x, f'{name}.{kind}norm2', 1e-5)
        y = F.gelu(self._linear(y, f'{name}.{kind}mlp.fc1'))
        return x + second * self._linear(y, f'{name}.{kind}mlp.fc2')

    def _attention(self, x, name, heads, bias, prefix):
        channels = x.shape[1]
        size = channels // heads
        qkv = self._linear(x, f'{name}.qkv')
        outputs = []
        for h in range(heads):
            q, k, v = (
                qkv[:, part * channels + h * size : part * channels + (h + 1) * size]
                for part in range(3)
            )
            logits = q @ k.T / math.sqrt(size)
            logits[prefix:, prefix:] += bias[h]
            logits[:prefix] += self.carrier_bias
            logits[prefix:, :prefix] += self.carrier_bias
            outputs.append(torch.softmax(logits, -1) @ v)
        return self._linear(torch.cat(outputs, 1), f'{name}.proj')

    def _mlp(self, coordinates, name):
        s = self.state
        weight = s[f'{name}.cpb_mlp.0.weight']
        x = torch.as_tensor(np.array(coordinates)).to(weight)
        x = x @ weight.T + s[f'{name}.cpb_mlp.0.bias']
        return F.relu(x) @ s[f'{name}.cpb_mlp.2.weight'].T

    def _absolute(self, a, b, name, size=None):
        def coordinate(i, side):
            return (i - side // 2) / (side // 2) if side > 1 else 0.0

        rows, cols = ([coordinate(i, size or n) for i in range(n)] for n in (a, b))
        pairs = [(i, j) for i in rows for j in cols]
        return self._mlp(pairs, name)

    def _relative(self, a, b, name):
        def coordinate(delta, side):
            value = delta / (side - 1) * 8 if side > 1 else 0.0
            return math.copysign(math.log2(abs(value) + 1) / math.log2(8), value)

        offsets = [(di, dj) for di in range(1 - a, a) for dj in range(1 - b, b)]
        values = self._mlp([(coordinate(i, a), coordinate(j, b)) for i, j in offsets], name)
        row_of = {offset: row for row, offset in enumerate(offsets)}
        cells = [(i, j) for i in range(a) for j in range(b)]
        pairs = [[row_of[q[0] - k[0], q[1] - k[1]] for k in cells] for q in cells]
        return (16 * torch.sigmoid(values))[torch.tensor(pairs)].permute(2, 0, 1)
