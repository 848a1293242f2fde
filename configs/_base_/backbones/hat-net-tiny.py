# HAT-Net-Tiny with the authors' ImageNet-1K weights (no licence is stated: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.HATNet',
    arch='tiny',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/yun-liu/HAT-Net/releases/download/v2.0/HAT-Net_Tiny.pth',
    ),
)
channels = [48, 96, 240, 384]
