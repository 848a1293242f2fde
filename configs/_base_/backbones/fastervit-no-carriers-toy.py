# fastervit-toy.py with windows that see nothing of each other in stage 2.
_base_ = ['fastervit-toy.py']
backbone = dict(arch=dict(carriers=False, propagate=False))
