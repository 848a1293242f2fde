# FasterViT-1 with the authors' ImageNet-1K weights (non-commercial licence: see WEIGHTS.md).
backbone = dict(
    type='hat_mm.FasterViT',
    arch='1',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://huggingface.co/ahatamiz/FasterViT/resolve/main/fastervit_1_224_1k.pth.tar',
    ),
)
channels = [80, 160, 320, 640]
