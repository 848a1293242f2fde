# FasterViT-3 with the authors' ImageNet-1K weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='3',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_3_224_1k.pth.tar',
    ),
)
channels = [128, 256, 512, 1024]
