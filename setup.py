"""Ships configs, demos, tools and the model index as `hat_mm/.mim`; pyproject.toml has the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SHIPPED = ('configs', 'demo', 'tools', 'model-index.yml')


def ship(package: Path) -> None:
    """Copy what MIM looks for under `.mim` into a package that is being built.

    The originals are copied, not `hat_mm/.mim` of the source tree, which holds links; a program
    without support for links would have unpacked them as text files.
    """
    target = package / '.mim'
    if target.exists():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for source in (ROOT / name for name in SHIPPED):
        if source.is_dir():
            ignored = shutil.ignore_patterns('__pycache__', '*.py[cod]', '.*')
            shutil.copytree(source, target / source.name, ignore=ignored)
        else:
            shutil.copy2(source, target)


class BuildWithMim(build_py):
    """Puts `hat_mm/.mim` into the wheel."""

    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has links to the originals
            ship(Path(self.build_lib, 'hat_mm'))


class SdistWithMim(sdist):
    """Puts `hat_mm/.mim` into the source archive, where `mim search --remote` looks for it."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        ship(Path(base_dir, 'hat_mm'))


setup(cmdclass={'build_py': BuildWithMim, 'sdist': SdistWithMim})
