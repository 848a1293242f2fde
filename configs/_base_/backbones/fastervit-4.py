# FasterViT-4 with the authors' ImageNet-1K weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='4',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_4_224_1k.pth.tar',
    ),
)
channels = [196, 392, 784, 1568]
