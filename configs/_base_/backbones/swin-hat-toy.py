# swin-toy.py with carrier tokens instead of shifted windows.
_base_ = ['swin-toy.py']
backbone = dict(arch=dict(hat_stages=(0, 1, 2)))
