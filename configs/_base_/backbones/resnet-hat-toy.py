# resnet-toy.py with carrier tokens and windows after each block of the stage of stride 16.
_base_ = ['resnet-toy.py']
backbone = dict(
    plugins=[
        dict(
            cfg=dict(type='hat_mm.HATPlugin', embed_dims=64, window_size=4),
            stages=(False, False, True, False),
            position='after_conv3',
        )
    ]
)
