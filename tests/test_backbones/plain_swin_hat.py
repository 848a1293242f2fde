"""A second SwinHAT, written plainly on the parts of the plain FasterViT: loops over windows.

Slow on purpose. Shifted windows are cut at their place in the map, without rolling and masks: a
token attends to those of its window that were its neighbours before.
"""

import math
import re

import torch
import torch.nn.functional as F

from test_backbones.plain_fastervit import PlainFasterViT


class PlainSwinHAT(PlainFasterViT):
    """Computes the raw stage maps of one SwinHAT.

    Args:
        state: Swin's official names and tensors.
        own: The backbone's names and tensors, of which the carriers' are taken.
        spec: Its arch.
    """

    def __init__(self, state, own, spec):
        rename = (
            (r'^stages\.', 'layers.'),
            (r'\.carrier_attn\.(attn|pos_embed|norm|mlp)', r'.hat_\1'),
            (r'_attn\.bias\.fc', '_attn.pos_emb_funct.cpb_mlp.fc'),
            (r'_pos_embed\.fc', '_pos_embed.cpb_mlp.fc'),
            (r'cpb_mlp\.fc1', 'cpb_mlp.0'),
            (r'cpb_mlp\.fc2', 'cpb_mlp.2'),
        )
        carriers = {}
        for name, value in own.items():
            if '.carrier_attn.' in name or '.tokenizer.' in name:
                for pattern, replacement in rename:
                    name = re.sub(pattern, replacement, name)
                carriers[name] = value
        super().__init__({**state, **carriers}, spec.depths, spec.num_heads, spec.window_size, 0, 0)
        self.spec = spec

    def __call__(self, x):
        s = self.state
        x = self._padded(x, 4)
        x = F.conv2d(x, s['patch_embed.proj.weight'], s['patch_embed.proj.bias'], stride=4)
        x = self._ln(x.permute(0, 2, 3, 1), 'patch_embed.norm', 1e-5).permute(0, 3, 1, 2)
        maps = []
        for stage in range(4):
            if stage:
                x = self._merge(x, f'layers.{stage - 1}.downsample')
            x = torch.cat([self._stage(image[None], stage) for image in x])
            maps.append(x)
        return maps

    def _padded(self, x, side):
        *first, height, width = x.shape
        out = x.new_zeros(*first, math.ceil(height / side) * side, math.ceil(width / side) * side)
        out[..., :height, :width] = x
        return out

    def _merge(self, x, name):
        x = self._padded(x, 2).permute(0, 2, 3, 1)
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        x = self._ln(torch.cat(parts, -1), f'{name}.norm', 1e-5)
        return (x @ self.state[f'{name}.reduction.weight'].T).permute(0, 3, 1, 2)

    def _stage(self, x, stage):
        x, w = x[0], self.windows[stage]
        nh, nw = (math.ceil(side / w) for side in x.shape[1:])
        c = self.spec.carrier_size[stage] if stage in self.spec.hat_stages else 0
        carriers = None
        if c:
            tokenizer = f'layers.{stage}.tokenizer.conv'
            carriers = self._birth(self._padded(x, w), nh, nw, w, c, tokenizer)
        x = x.permute(1, 2, 0)
        for k in range(self.depths[stage]):
            name = f'layers.{stage}.blocks.{k}'
            if c and k % 2:
                rows, cols = c * nh, c * nw
                raster = carriers.reshape(rows * cols, -1)
                raster = raster + self._absolute(rows, cols, f'{name}.hat_pos_embed')
                raster = self._layer(raster, name, 'hat_', ('', ''), stage, rows, cols, 0)
                carriers = raster.reshape(rows, cols, -1)
            shift = w // 2 if k % 2 and not c and min(x.shape[:2]) != w else 0
            x, carriers = self._swin_block(x, carriers, name, stage, w, c, shift)
        return x.permute(2, 0, 1)[None]

    def _swin_block(self, x, carriers, name, stage, w, c, shift):
        height, width, channels = x.shape
        normed = self._ln(x, f'{name}.norm1', 1e-5).permute(2, 0, 1)
        normed = self._padded(normed, w).permute(1, 2, 0)
        rows, cols = normed.shape[:2]
        change = x.new_zeros(rows, cols, channels)
        bias = self._table(w, f'{name}.attn.relative_position_bias_table')
        if carriers is not None:
            normed_carriers = self._ln(carriers, f'{name}.norm1', 1e-5)
            carrier_change = torch.zeros_like(carriers)
        # Windows start at `shift`; the last ones end where the map does, and what is before the
        # first ones is cut as if it came behind the last.
        tops, lefts = range(shift, rows + shift, w), range(shift, cols + shift, w)
        for i, top in enumerate(tops):
            for j, left in enumerate(lefts):
                cells = [(r, q) for r in range(top, top + w) for q in range(left, left + w)]
                groups = {}
                for at, (r, q) in enumerate(cells):
                    groups.setdefault((r >= rows, q >= cols), []).append(at)
                for group in groups.values():
                    at = [(cells[n][0] % rows, cells[n][1] % cols) for n in group]
                    tokens = [normed[r, q] for r, q in at]
                    mine = [(i * c + r, j * c + q) for r in range(c) for q in range(c)]
                    tokens = [normed_carriers[r, q] for r, q in mine] + tokens
                    some = bias[:, group][:, :, group]
                    out = self._attention(
                        torch.stack(tokens), f'{name}.attn', self.heads[stage], some, c * c
                    )
                    for (r, q), value in zip(mine, out[: c * c], strict=True):
                        carrier_change[r, q] = value
                    for (r, q), value in zip(at, out[c * c :], strict=True):
                        change[r, q] = value
        x = self._mlp_after(x + change[:height, :width], name)
        if carriers is None:
            return x, None
        return x, self._mlp_after(carriers + carrier_change, name)

    def _mlp_after(self, x, name):
        y = F.gelu(self._linear(self._ln(x, f'{name}.norm2', 1e-5), f'{name}.mlp.fc1'))
        return x + self._linear(y, f'{name}.mlp.fc2')

    def _table(self, w, name):
        """(heads, w * w, w * w) from a row for each offset, query minus key."""
        cells = [(i, j) for i in range(w) for j in range(w)]
        pairs = [
            [(q[0] - k[0] + w - 1) * (2 * w - 1) + q[1] - k[1] + w - 1 for k in cells]
            for q in cells
        ]
        return self.state[name][torch.tensor(pairs)].permute(2, 0, 1)
