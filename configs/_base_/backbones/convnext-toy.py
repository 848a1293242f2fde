# A ConvNeXt as small as the other toy backbones.
backbone = dict(
    type='mmpretrain.ConvNeXt',
    arch=dict(depths=(2, 2, 6, 2), channels=[32, 64, 128, 256]),
    out_indices=(0, 1, 2, 3),
    gap_before_final_norm=False,
)
channels = [32, 64, 128, 256]
