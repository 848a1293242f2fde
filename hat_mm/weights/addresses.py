"""Which addresses files may come from."""

import ipaddress
import re
from urllib.parse import urlsplit

_ALLOWED = 'https, file, and http to this machine'


def shown(url: str) -> str:
    """An address for messages and records: what follows the path may be a key."""
    return re.split('[?#]', url)[0]


def check_address(url: str) -> None:
    """Raises ValueError unless an address is https, file, or http to this machine."""
    if not isinstance(url, str):
        raise TypeError(f'an address must be a string, not {url!r}')
    parts = urlsplit(url)
    scheme = parts.scheme
    if '@' in parts.netloc:
        raise ValueError(f'an address with a user name is not supported: host {parts.hostname!r}')
    if scheme == 'file':
        if parts.netloc not in ('', 'localhost'):
            raise ValueError(f'{url} is on another machine; file:///PATH is on this one')
    elif not parts.hostname or scheme not in ('http', 'https'):
        raise ValueError(
            f'{shown(url)!r} is not downloaded: its scheme is {scheme!r}, allowed are {_ALLOWED}'
        )
    elif scheme == 'http' and not _is_loopback(parts.hostname):
        raise ValueError(
            f"{shown(url)!r} is not downloaded: its scheme is 'http', which anybody on the way "
            f'can alter; allowed are {_ALLOWED}'
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == 'localhost'
