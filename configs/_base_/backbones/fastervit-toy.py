# fastervit-tiny.py to see the whole of an image from a random start: at the end of its blocks the
# carriers are added to their tokens, as in FasterViT-3 to -6, and weights start as in swin-toy.py.
_base_ = ['fastervit-tiny.py']
backbone = dict(
    arch=dict(propagate=True),
    init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
)
