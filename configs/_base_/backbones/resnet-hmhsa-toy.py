# resnet-toy.py with HAT-Net's attention after each block of the stage of stride 16.
_base_ = ['resnet-toy.py']
backbone = dict(
    plugins=[
        dict(
            cfg=dict(type='hat_mm.HMHSAPlugin', embed_dims=64, grid=4, ds_ratio=2),
            stages=(False, False, True, False),
            position='after_conv3',
        )
    ]
)
