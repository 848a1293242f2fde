# cascade-mask-rcnn_fpn_4conv1fc-giou_ms-crop-3x_coco with the drop path and the weight decay of
# mmdet's Mask R-CNN with Swin.
_base_ = [
    './cascade-mask-rcnn_fpn_4conv1fc-giou_ms-crop-3x_coco.py',
    '../schedules/swin_decay.py',
]
model = dict(backbone=dict(drop_path_rate=0.2))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.undecayed))
