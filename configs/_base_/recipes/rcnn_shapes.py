# What the toy R-CNNs share: small parts, data and schedule, to learn the shapes on a CPU within
# minutes.
_base_ = [
    './rcnn_parts.py',
    '../datasets/shapes_instance.py',
    '../schedules/adamw_shapes.py',
    'mmdet::_base_/default_runtime.py',
]
num_classes = len(_base_.metainfo.classes)
bbox_head = dict(num_classes=num_classes)
mask_head = dict(num_classes=num_classes)
proposals = dict(nms_pre=300, max_per_img=100)
auto_scale_lr = dict(enable=False, base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(interval=1, max_keep_ckpts=2),
    visualization=dict(score_thr=0.5),
)
randomness = dict(seed=0)
