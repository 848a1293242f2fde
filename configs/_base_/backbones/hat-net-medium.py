# HAT-Net-Medium with the authors' ImageNet-1K weights (no licence is stated: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.HATNet',
    arch='medium',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Medium.pth',
    ),
)
channels = [64, 128, 320, 512]
