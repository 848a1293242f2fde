# For a ResNet-50 of mmdet: HAT-Net's attention in each block of its third stage (stride 16). At the
# start it changes nothing.
backbone = dict(
    plugins=[
        dict(
            cfg=dict(type='hat_mm.HMHSAPlugin'),
            stages=(False, False, True, False),
            position='after_conv3',
        )
    ]
)
