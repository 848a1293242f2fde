# mmdet's Mask2Former for panoptic segmentation, without its ResNet: a leaf adds the backbone and
# the head's inputs. Drop path and weight decay of the backbone are those with Swin, all else is
# mmdet's.
_base_ = [
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    '../schedules/mask2former_decay.py',
]
model = dict(backbone=dict(_delete_=True, drop_path_rate=0.3))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.undecayed))
