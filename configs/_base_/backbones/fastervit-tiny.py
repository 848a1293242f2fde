# A FasterViT small enough to learn the toy shapes on a CPU, without weights to start from.
backbone = dict(
    type='hat_mm.FasterViT',
    # At 192 pixels stage 2 has 12 tokens a side: three windows, which see each other through
    # their carriers.
    arch=dict(
        embed_dims=32,
        stem_dims=32,
        depths=(1, 1, 3, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
        carrier_size=2,
        carriers=(2,),
        drop_path_rate=0.0,
    ),
)
channels = [32, 64, 128, 256]
