# FasterViT-2 with the authors' ImageNet-1K weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='2',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_2_224_1k.pth.tar',
    ),
)
channels = [96, 192, 384, 768]
