# mmseg's Mask2Former, without its ResNet: a leaf adds the backbone and the head's inputs. Drop path
# and weight decay of the backbone are those with Swin, all else is mmseg's.
_base_ = [
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
    '../schedules/mask2former_decay.py',
]
model = dict(backbone=dict(_delete_=True, drop_path_rate=0.3))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.undecayed))
