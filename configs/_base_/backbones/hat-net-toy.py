# A HAT-Net smaller than the published ones, without weights to start from.
backbone = dict(
    type='hat_mm.HATNet',
    # At 192 pixels the stages have 48, 24, 12 and 6 tokens a side: whole windows in stage 0,
    # smaller ones at the border of stages 1 and 2, as in images of any size.
    arch=dict(
        embed_dims=(32, 64, 128, 256),
        head_dim=32,
        depths=(1, 1, 3, 1),
        expansions=(4, 4, 4, 4),
        grids=(8, 7, 7, 1),
        ds_ratios=(8, 4, 2, 1),
        kernels=(3, 3, 3, 3),
        drop_path_rate=0.0,
    ),
)
channels = [32, 64, 128, 256]
