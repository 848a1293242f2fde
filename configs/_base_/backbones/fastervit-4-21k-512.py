# FasterViT-4 from ImageNet-21K, tuned on ImageNet-1K at 512 pixels with windows of 32, with the
# authors' weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='4-21k-512',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_4_21k_512_w32.pth.tar',
    ),
)
channels = [196, 392, 784, 1568]
