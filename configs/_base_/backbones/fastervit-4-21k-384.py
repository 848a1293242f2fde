# FasterViT-4 from ImageNet-21K, tuned on ImageNet-1K at 384 pixels with windows of 24, with the
# authors' weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='4-21k-384',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_4_21k_384_w24.pth.tar',
    ),
)
channels = [196, 392, 784, 1568]
