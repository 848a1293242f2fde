# SwinHAT-T with the ImageNet-1K weights of Swin-T (see WEIGHTS.md); the carriers start at random.
backbone = dict(
    type='hat_mm.SwinHAT',
    arch='tiny',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',
    ),
)
channels = [96, 192, 384, 768]
