"""A server on this machine, for tests that fetch files."""

import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class _Handler(http.server.SimpleHTTPRequestHandler):
    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:
        data = source.read()
        # Of a file with such a name the connection ends too early.
        outputfile.write(data[: len(data) // 2] if 'cut' in self.path else data)

    def log_request(self, *_: object) -> None:
        self.server.requests.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path, requests: list[str] | None = None) -> Iterator[str]:
    """Serves the files of a folder; yields its address without a slash at the end.

    Args:
        folder: The folder.
        requests: Gets the path of each request.
    """
    handler = functools.partial(_Handler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        server.requests = [] if requests is None else requests
        thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()
            thread.join()
