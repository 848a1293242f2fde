# Mask2Former trains a backbone at a tenth of the rate; mmengine finds it by name, so weight decay
# is also switched off by name. As in the toolboxes' configs with Swin, these are norms and tables
# of positions; layer scales are added.
undecayed = {
    name: dict(lr_mult=0.1, decay_mult=0.0)
    for name in (
        *('backbone.norm', 'stem.norm', 'downsample.norm', 'attn.norm', 'grid_norm', '.ds_norm.'),
        *('.conv.norm', '.norm1.weight', '.norm1.bias', '.norm2.weight', '.norm2.bias'),
        *('relative_position_bias_table', 'attn.gamma'),
    )
}
