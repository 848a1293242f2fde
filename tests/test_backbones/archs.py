"""Tiny archs, and their tensors under official names."""

import re

import hat_mm

_OFFICIAL = (
    (r'^stem\.conv(\d)', lambda m: f'patch_embed.conv_down.{3 * int(m[1]) - 3}'),
    (r'^stem\.norm(\d)', lambda m: f'patch_embed.conv_down.{3 * int(m[1]) - 2}'),
    (
        r'^stages\.(\d)\.downsample\.conv',
        lambda m: f'levels.{int(m[1]) - 1}.downsample.reduction.0',
    ),
    (r'^stages\.(\d)\.downsample', lambda m: f'levels.{int(m[1]) - 1}.downsample'),
    (r'^stages', 'levels'),
    (r'^norm3', 'norm'),
    (r'tokenizer\.conv', 'global_tokenizer.to_global_feature.pos'),
    (r'carrier\.(gamma\d)', r'\1'),
    (r'window\.gamma1', 'gamma3'),
    (r'window\.gamma2', 'gamma4'),
    (r'carrier\.', 'hat_'),
    (r'window\.', ''),
    (r'attn\.bias\.fc1', 'attn.pos_emb_funct.cpb_mlp.0'),
    (r'attn\.bias\.fc2', 'attn.pos_emb_funct.cpb_mlp.2'),
    (r'pos_embed\.fc1', 'pos_embed.cpb_mlp.0'),
    (r'pos_embed\.fc2', 'pos_embed.cpb_mlp.2'),
)


def tiny(**fields):
    """A FasterViT arch that computes in milliseconds."""
    arch = dict(
        embed_dims=4, stem_dims=4, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4
    )
    return {**arch, **fields}


def official_tiny(arch):
    """Names and shapes that an official checkpoint of a dict arch would have."""
    backbone = hat_mm.FasterViT(arch, out_indices=(3,))
    shapes = {}
    for name, tensor in backbone.state_dict().items():
        if 'num_batches_tracked' in name:
            continue
        for pattern, replacement in _OFFICIAL:
            name = re.sub(pattern, replacement, name)
        shapes[name] = tuple(tensor.shape)
    shapes['head.weight'] = (10, backbone.out_channels[-1])
    shapes['head.bias'] = (10,)
    return shapes
