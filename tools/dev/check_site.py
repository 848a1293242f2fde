"""Checks that the built site loads nothing from another host, and that its search is there."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

# What a browser loads by itself: not links that a reader may follow.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|audio|video)\b[^>]*?\bsrc=["']?(?P<src>(?:https?:)?//[^"'\s>]+)
    |<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*?\bhref=["']?(?P<link>(?:https?:)?//[^"'\s>]+)
    |\b(?:srcset|poster|data)=["'](?P<media>(?:https?:)?//[^"'\s>]+)
    |url\(\s*["']?(?P<url>(?:https?:)?//[^"')]+)
    |@import\s+["'](?P<imported>(?:https?:)?//[^"']+)""",
    re.VERBOSE | re.IGNORECASE,
)


def foreign(text: str) -> list[str]:
    """Addresses on other hosts that a browser would load for a page or a style sheet."""
    return [match[match.lastgroup or 0] for match in LOADED.finditer(text)]


def main(argv: list[str] | None = None) -> int:
    """Prints what is wrong; returns 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='the built site')
    folder = parser.parse_args(argv).folder
    files = [path for path in sorted(folder.rglob('*')) if path.suffix in ('.html', '.css')]
    wrong = [
        f'{path}: loads {address}'
        for path in files
        for address in foreign(path.read_text(encoding='utf-8'))
    ]
    wrong += [f'{folder / name}: missing' for name in ('search.html', 'searchindex.js')
              if not (folder / name).is_file()]  # fmt: skip
    print('\n'.join(wrong) or f'{len(files)} pages and style sheets load nothing from other hosts')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
