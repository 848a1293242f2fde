# A Swin Transformer small enough for the toy sets: SwinHAT without a stage with carriers.
backbone = dict(
    type='hat_mm.SwinHAT',
    arch=dict(
        embed_dims=32,
        depths=(2, 2, 2, 2),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        hat_stages=(),
        drop_path_rate=0.0,
    ),
    # The usual standard deviation of 0.02 is for wide layers: with few channels hardly anything
    # would pass from one token to another at the start.
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
channels = [32, 64, 128, 256]
