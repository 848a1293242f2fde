# SwinHAT-B with the ImageNet-1K weights of Swin-B (see WEIGHTS.md); the carriers start at random.
backbone = dict(
    type='hat_mm.SwinHAT',
    arch='base',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth',
    ),
)
channels = [128, 256, 512, 1024]
