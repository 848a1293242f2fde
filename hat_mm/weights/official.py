"""The files that the networks' authors publish."""

import re
from dataclasses import dataclass

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class OfficialFile:
    """A file that a network's authors publish, and the images that its network expects.

    Attributes:
        backbone: Name of the backbone in configs, such as ``'fastervit-0'``.
        arch: ``arch`` of the class that the file fits.
        url: Where the authors publish it; ends with the file's name.
        licence: Its licence.
        input_size: Side of the images in pixels; of a detector's, the shorter side.
        crop: Fraction of the resized image's side that is cropped for a test; None if it is not
            published.
        squash: Whether images are resized to a square, whatever their proportions.
        trained_on: Datasets, in order of training.
        detector: Name of the detector's config that the whole file fills; None for a classifier.
        sha256: Checksum of the file; None if it is not known.
        mean: Mean of each channel, RGB, 0 to 255.
        std: Standard deviation of each channel.
    """

    backbone: str
    arch: str
    url: str
    licence: str
    input_size: int
    crop: float | None
    squash: bool = False
    trained_on: tuple[str, ...] = ('ImageNet-1k',)
    detector: str | None = None
    sha256: str | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.url.rpartition('/')[2]

    @property
    def family(self) -> str:
        """Class of the backbone."""
        return 'FasterViT' if self.backbone.startswith('fastervit') else 'HATNet'


_FASTERVIT_URL = 'https://huggingface.co/ahatamiz/FasterViT/resolve/main/'
_HAT_NET_URL = 'https://github.com/yun-liu/HAT-Net/releases/download/v2.0/'
_NON_COMMERCIAL = 'NVIDIA Source Code License-NC'
_NONE_STATED = 'none is stated'
_BOTH = ('ImageNet-21k', 'ImageNet-1k')


def _fastervit(arch: str, crop: float) -> OfficialFile:
    url = f'{_FASTERVIT_URL}fastervit_{arch}_224_1k.pth.tar'
    return OfficialFile(f'fastervit-{arch}', arch, url, _NON_COMMERCIAL, 224, crop)


def _fastervit_21k(side: int, window: int, crop: float) -> OfficialFile:
    arch = f'4-21k-{side}'
    url = f'{_FASTERVIT_URL}fastervit_4_21k_{side}_w{window}.pth.tar'
    return OfficialFile(
        f'fastervit-{arch}', arch, url, _NON_COMMERCIAL, side, crop, squash=True, trained_on=_BOTH
    )


def _hat_net(arch: str) -> OfficialFile:
    url = f'{_HAT_NET_URL}HAT-Net_{arch.capitalize()}.pth'
    return OfficialFile(f'hat-net-{arch}', arch, url, _NONE_STATED, 224, crop=None)


OFFICIAL_FILES = (
    _fastervit('0', crop=0.875),
    *(_fastervit(arch, crop=1.0) for arch in '123456'),
    _fastervit_21k(224, window=14, crop=0.95),
    _fastervit_21k(384, window=24, crop=1.0),
    _fastervit_21k(512, window=32, crop=1.0),
    _fastervit_21k(768, window=48, crop=0.93),
    *(_hat_net(arch) for arch in ('tiny', 'small', 'medium', 'large')),
    OfficialFile(
        'fastervit-4-21k-224',
        '4-21k-224-dino',
        f'{_FASTERVIT_URL}DINO_4scale_faster_vit_4_21k_224_ms_coco.pth',
        _NON_COMMERCIAL,
        input_size=800,
        crop=None,
        trained_on=(*_BOTH, 'COCO'),
        detector='dino-4scale_fastervit-4-21k-224_authors_coco',
    ),
)
# Prefixes of the URLs of all of them.
OFFICIAL_PREFIXES = (_FASTERVIT_URL, _HAT_NET_URL)


def official_file(name_or_url: str) -> OfficialFile | None:
    """Finds an official file by its name or URL; a query is ignored."""
    wanted = re.split('[?#]', name_or_url)[0]
    return next((file for file in OFFICIAL_FILES if wanted in (file.name, file.url)), None)
