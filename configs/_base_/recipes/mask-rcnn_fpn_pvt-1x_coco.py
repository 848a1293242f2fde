# mask-rcnn_fpn_1x_coco with the schedule of HAT-Net's authors: shorter warm-up, another learning
# rate and weight decay, on all parameters alike.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../schedules/adamw_pvt_1x.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(backbone=dict(_delete_=True))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
