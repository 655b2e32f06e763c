"""Downloads from a server on this machine that can be told to misbehave."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from gc_nc.data import downloads
from gc_nc.errors import InputError

CONTENT = np.random.default_rng(0).bytes(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        requested = self.headers.get("Range")
        server.requested_ranges.append(requested)
        content = server.content
        if server.status != 200:
            self.send_error(server.status)
            return
        start = 0
        if requested and server.with_ranges:
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.content_encoding:
            self.send_header("Content-Encoding", server.content_encoding)
        if server.with_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : start + server.bytes_until_cut])

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    server = http.server.HTTPServer(("127.0.0.1", 0), _Handler)
    server.content = CONTENT
    server.status = 200
    server.with_ranges = True
    server.with_length = True
    server.content_encoding = None
    server.bytes_until_cut = 1 << 30
    server.requested_ranges = []
    server.url = f"http://127.0.0.1:{server.server_port}/set.bin"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "downloads" / "set.bin"


def _download(server, path, sha256=SHA256):
    downloads.download(server.url, path, size=len(CONTENT), sha256=sha256)


def _part(path):
    return path.with_name(path.name + ".part")


def _write_part(path, content):
    path.parent.mkdir()
    _part(path).write_bytes(content)


def _assert_done(path):
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def _assert_one_line(error, *contained):
    message = str(error.value)
    assert "\n" not in message
    for text in contained:
        assert text in message


def test_downloads_the_file(server, path):
    _download(server, path)
    _assert_done(path)
    assert server.requested_ranges == [None]


def test_a_right_file_is_not_downloaded_again(server, path):
    _download(server, path)
    _download(server, path)
    assert len(server.requested_ranges) == 1


def test_a_wrong_file_is_named_and_kept(server, path):
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(InputError) as error:
        _download(server, path)
    found = hashlib.sha256(b"mine").hexdigest()
    _assert_one_line(error, str(path), SHA256, found, "delete it")
    assert path.read_bytes() == b"mine"
    assert server.requested_ranges == []


def test_an_interrupted_transfer_goes_on(server, path):
    server.bytes_until_cut = 300_000
    with pytest.raises(InputError) as error:
        _download(server, path)
    _assert_one_line(error, server.url, "run again", "--archive=")
    assert not path.exists()
    assert _part(path).read_bytes() == CONTENT[:300_000]

    server.bytes_until_cut = 1 << 30
    _download(server, path)
    _assert_done(path)
    assert server.requested_ranges == [None, "bytes=300000-"]


def test_a_transfer_of_unannounced_length_that_ends_early(server, path):
    server.with_length = False
    server.bytes_until_cut = 300_000
    with pytest.raises(InputError, match="300000 of 1000000 bytes"):
        _download(server, path)
    server.bytes_until_cut = 1 << 30
    _download(server, path)
    _assert_done(path)


def test_a_server_without_ranges_starts_again(server, path):
    server.with_ranges = False
    _write_part(path, b"x" * 300_000)
    _download(server, path)
    _assert_done(path)
    assert server.requested_ranges == ["bytes=300000-"]


def test_a_part_longer_than_the_file_starts_again(server, path):
    _write_part(path, CONTENT + b"x")
    _download(server, path)
    _assert_done(path)
    assert server.requested_ranges == [None]


def test_a_refused_range_starts_again(server, path):
    # The server's own file is shorter than the part.
    _write_part(path, CONTENT[:300_000])
    server.content = CONTENT[:200_000]
    with pytest.raises(InputError, match="offers 200000 bytes, not 1000000"):
        _download(server, path)
    assert server.requested_ranges == ["bytes=300000-", None]


def test_a_complete_part_needs_no_server(path):
    _write_part(path, CONTENT)
    downloads.download("http://127.0.0.1:9/x", path, size=len(CONTENT), sha256=SHA256)
    _assert_done(path)


@pytest.mark.parametrize("part", [b"", b"x" * 300_000])
def test_a_wrong_checksum_leaves_nothing(server, path, part):
    if part:
        _write_part(path, part)
    else:
        server.content = CONTENT[:-1] + b"x" if CONTENT[-1:] != b"x" else CONTENT[:-1] + b"y"
    with pytest.raises(InputError) as error:
        _download(server, path)
    found = hashlib.sha256(part + server.content[len(part) :]).hexdigest()
    _assert_one_line(error, path.name, SHA256, found, "deleted")
    assert list(path.parent.iterdir()) == []


def test_too_many_bytes_of_unannounced_length_are_refused(server, path):
    server.with_length = False
    server.content = CONTENT * 2
    with pytest.raises(InputError, match="sha256") as error:
        _download(server, path)
    # It stopped at the first bytes too many.
    assert hashlib.sha256(server.content).hexdigest() not in str(error.value)
    assert list(path.parent.iterdir()) == []


def test_a_page_instead_of_the_file_keeps_the_part(server, path):
    _write_part(path, CONTENT[:300_000])
    server.content = b"<html>Log in</html>"
    server.with_ranges = False
    with pytest.raises(InputError, match="offers 19 bytes"):
        _download(server, path)
    assert _part(path).read_bytes() == CONTENT[:300_000]


def test_a_claimed_content_encoding_is_not_undone(server, path):
    # Some servers name the file's own compression as one of the transfer.
    server.content_encoding = "gzip"
    _download(server, path)
    _assert_done(path)


@pytest.mark.parametrize("status", [404, 503])
def test_an_error_of_the_server(server, path, status):
    server.status = status
    with pytest.raises(InputError) as error:
        _download(server, path)
    _assert_one_line(error, server.url, str(status), "--archive=")


def test_no_server(path):
    with http.server.HTTPServer(("127.0.0.1", 0), _Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/set.bin"
    _write_part(path, CONTENT[:10])
    with pytest.raises(InputError) as error:
        downloads.download(url, path, size=len(CONTENT), sha256=SHA256)
    _assert_one_line(error, url, "refused", "--archive=")
    assert _part(path).read_bytes() == CONTENT[:10]
