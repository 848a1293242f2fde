# What HAT-Net's authors publish of their training on ImageNet-1K, 8 GPUs with 128 images each.
_base_ = ['./in1k.py', '../schedules/adamw_cosine-300e.py']
model = dict(neck=dict(_delete_=True, type='hat_mm.DropoutPooling', drop_rate=0.2))
