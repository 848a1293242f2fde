# FasterViT-4, trained on ImageNet-21K and tuned on ImageNet-1K at 768 pixels, windows of 48, with the
# authors' weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='4-21k-768',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_4_21k_768_w48.pth.tar',
    ),
)
channels = [196, 392, 784, 1568]
