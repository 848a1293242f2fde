# mmpretrain's image classifier, to learn which shape an image shows on a CPU within minutes: a leaf
# adds the backbone and the head's inputs.
_base_ = [
    'mmpretrain::_base_/models/resnet50.py',
    '../datasets/shapes_classes.py',
    '../schedules/adamw_shapes.py',
    'mmpretrain::_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_delete_=True, out_indices=(3,)),
    head=dict(num_classes=len(_base_.metainfo.classes), topk=(1,)),
)
optim_wrapper = dict(optimizer=dict(lr=4e-4))
auto_scale_lr = dict(enable=False, base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=64),
    checkpoint=dict(interval=1, max_keep_ckpts=2),
    visualization=dict(interval=1),
)
randomness = dict(seed=0)
