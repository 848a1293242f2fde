_base_ = [
    '../_base_/recipes/mask2former_16xb1-90k_cityscapes-1024x2048.py',
    '../_base_/backbones/hat-net-large.py',
]
model = dict(backbone=_base_.backbone, decode_head=dict(in_channels=_base_.channels))
