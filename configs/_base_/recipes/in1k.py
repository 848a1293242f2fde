# mmpretrain's classifier for ImageNet-1K, without its Swin: a leaf adds the backbone, the images of
# its size and crop, and the head's inputs.
_base_ = [
    'mmpretrain::_base_/models/swin_transformer/tiny_224.py',
    'mmpretrain::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True, out_indices=(3,)),
    head=dict(init_cfg=dict(_delete_=True, type='TruncNormal', layer='Linear', std=0.02)),
    init_cfg=None,
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
