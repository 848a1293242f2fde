_base_ = [
    '../_base_/recipes/mask2former_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/fastervit-2.py',
]
model = dict(backbone=_base_.backbone, decode_head=dict(in_channels=_base_.channels))
