# upernet_8xb2-160k_ade20k-512x512 with the drop path and the weight decay of mmseg's UPerNet with
# Swin.
_base_ = ['./upernet_8xb2-160k_ade20k-512x512.py', '../schedules/swin_decay.py']
model = dict(backbone=dict(drop_path_rate=0.3))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.undecayed))
