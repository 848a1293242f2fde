"""Which URLs files may come from."""

from urllib.parse import urlsplit

_THIS_MACHINE = ('localhost', '127.0.0.1', '::1')


def shown(url: str) -> str:
    """The URL for messages and records: what follows the path may be a key."""
    return url.partition('?')[0].partition('#')[0]


def check_address(url: str) -> None:
    """Checks that a URL is https, file, or http to this machine.

    Raises:
        ValueError: It is not.
        TypeError: It is no string.
    """
    if not isinstance(url, str):
        raise TypeError(f'an address must be a string, not {url!r}')
    parts = urlsplit(url)
    host = parts.hostname or ''
    allowed = {
        'https': host != '',
        'http': host in _THIS_MACHINE,
        'file': host in ('', 'localhost'),
    }
    if not allowed.get(parts.scheme, False):
        raise ValueError(
            f'{shown(url)!r} is not allowed as an address: it must be https://…, file:///… on this '
            'machine, or http://… to this machine'
        )
    if '@' in parts.netloc:
        raise ValueError(f'an address with a user name is not supported: host {host!r}')
