_base_ = [
    '../_base_/recipes/fastervit-21k_in1k.py',
    '../_base_/datasets/imagenet_768-squash.py',
    '../_base_/backbones/fastervit-4-21k-768.py',
]
model = dict(backbone=_base_.backbone, head=dict(in_channels=_base_.channels[-1]))
