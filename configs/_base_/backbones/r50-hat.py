# For a ResNet-50 of mmdet: carrier tokens and window attention in each block of its third stage
# (stride 16). At the start they change nothing.
backbone = dict(
    plugins=[
        dict(
            cfg=dict(type='hat_mm.HATPlugin'),
            stages=(False, False, True, False),
            position='after_conv3',
        )
    ]
)
