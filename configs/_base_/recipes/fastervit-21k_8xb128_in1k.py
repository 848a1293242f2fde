# Fine-tuning of weights from ImageNet-21K on ImageNet-1K, 8 GPUs with 128 images each.
_base_ = ['./in1k.py', '../schedules/adamw_cosine-30e.py']
