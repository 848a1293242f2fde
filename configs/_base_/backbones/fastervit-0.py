# FasterViT-0 with the authors' ImageNet-1K weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='0',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_0_224_1k.pth.tar',
    ),
)
channels = [64, 128, 256, 512]
