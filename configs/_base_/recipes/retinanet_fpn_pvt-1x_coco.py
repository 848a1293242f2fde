# retinanet_fpn_1x_coco with the schedule of HAT-Net's authors: shorter warm-up, another weight
# decay, on all parameters alike.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../schedules/adamw_pvt_1x.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(backbone=dict(_delete_=True, out_indices=(1, 2, 3)), neck=dict(start_level=0))
