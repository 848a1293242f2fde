"""The check that the documentation's site loads nothing from other hosts."""

import check_site
import pytest


@pytest.mark.parametrize(
    'text',
    [
        '<script src="https://a.example/b.js"></script>',
        '<link rel="stylesheet" href="//a.example/b.css">',
        "<img alt='x' src='https://a.example/b.png'>",
        '<img srcset="https://a.example/b.png 2x">',
        '@font-face { src: url(https://a.example/b.woff2) }',
        '@import "https://a.example/b.css";',
    ],
)
def test_what_a_browser_would_load(text):
    assert len(check_site.foreign(text)) == 1
    assert 'a.example' in check_site.foreign(text)[0]


@pytest.mark.parametrize(
    'text',
    [
        '<a href="https://arxiv.org/abs/2306.06189">paper</a>',
        '<script src="_static/a.js"></script>',
        '<link rel="canonical" href="https://a.example/page.html">',
        'url(data:image/svg+xml;base64,AAAA)',
    ],
)
def test_what_it_would_not(text):
    assert check_site.foreign(text) == []


def test_a_site(tmp_path, capsys):
    (tmp_path / 'index.html').write_text('<img src="https://a.example/b.png">')
    assert check_site.main([str(tmp_path)]) == 1
    assert 'index.html: loads https://a.example/b.png' in capsys.readouterr().out
    (tmp_path / 'index.html').write_text('<p>fine</p>')
    for name in ('search.html', 'searchindex.js'):
        (tmp_path / name).write_text('')
    assert check_site.main([str(tmp_path)]) == 0
