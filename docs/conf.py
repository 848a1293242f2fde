"""Sphinx builds the site from the Markdown of this folder: `make docs`.

The same pages are read in the repository, so links go from file to file there. Here, files outside
of this folder that are pages become pages of the site, other files are downloads, and a link to a
folder becomes plain text.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import hat_mm

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Pages from elsewhere, written to docs/_pages when the site is built.
ELSEWHERE = {
    ROOT / 'CHANGELOG.md': 'changelog',
    ROOT / 'CONTRIBUTING.md': 'contributing',
    ROOT / 'WEIGHTS.md': 'weights',
    ROOT / 'DATA.md': 'data',
    ROOT / 'configs/README.md': 'configs',
    ROOT / 'configs/fastervit/README.md': 'fastervit',
    ROOT / 'configs/hat_net/README.md': 'hat_net',
    ROOT / 'configs/resnet_hat/README.md': 'resnet_hat',
    ROOT / 'configs/swin_hat/README.md': 'swin_hat',
}
# The words of a link may hold brackets.
LINK = (
    r'\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]'
    r'\((?P<target>(?!https?:|mailto:)[^)#\s]+)(?P<anchor>#[^)]*)?\)'
)

project = 'hat_mm'
author = 'the authors of hat_mm'
release = hat_mm.__version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 4
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings say what the types mean
# Read the Docs cannot compile mmcv; what imports a toolbox is then not described in full.
autodoc_mock_imports = [
    name
    for name in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    if importlib.util.find_spec(name) is None
]
html_theme = 'furo'
html_title = f'hat_mm {release}'
html_show_sourcelink = False
html_theme_options = {'navigation_with_keys': True}


def to_site(text: str, source: Path, page: Path) -> str:
    """Turns the links of a file of the repository into those of a page of the site."""

    def change(match: re.Match) -> str:
        words, target, anchor = match['words'], match['target'], match['anchor'] or ''
        path = Path(os.path.normpath(source.parent / target))
        if path == ROOT / 'README.md':
            return f'[{words}](/index.md)'
        if path in ELSEWHERE:
            return f'[{words}](/_pages/{ELSEWHERE[path]}.md{anchor})'
        if path.is_dir():
            return words
        return f'[{words}]({os.path.relpath(path, page.parent)}{anchor})'

    return re.sub(LINK, change, text)


def bring_pages(app: object) -> None:
    """Writes the pages from elsewhere, where they have changed."""
    for source, name in ELSEWHERE.items():
        page = DOCS / '_pages' / f'{name}.md'
        text = to_site(source.read_text(encoding='utf-8'), source, page)
        page.parent.mkdir(exist_ok=True)
        if not page.exists() or page.read_text(encoding='utf-8') != text:
            page.write_text(text, encoding='utf-8')


def fix_links(app: object, name: str, content: list[str]) -> None:
    """Does the same for the pages of this folder."""
    page = DOCS / f'{name}.md'
    if not name.startswith('_pages/'):
        content[0] = to_site(content[0], page, page)


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect('builder-inited', bring_pages)
    app.connect('source-read', fix_links)
