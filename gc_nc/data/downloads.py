"""Downloads a file: resumed after an interruption, checked, and never left half-written."""

import hashlib
import os
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from gc_nc.errors import InputError

_CHUNK_BYTES = 1 << 18
# The longest time to connect, and the longest time without a single byte, in seconds.
_TIMEOUT = (20, 60)


def check_sha256(path: Path, sha256: str, *, fix: str) -> None:
    """Checks a file against its expected SHA-256.

    Args:
        path: the path of the file.
        sha256: the expected checksum in hexadecimal.
        fix: what the user can do about a wrong file; ends the error message.

    Raises:
        InputError: the checksums differ.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise InputError(f"{path} has sha256 {found}, expected {sha256}: {fix}")


def download(url: str, path: Path, *, size: int, sha256: str) -> None:
    """Downloads `url` to `path`; a file that already exists and is right is kept.

    The bytes go to `<path>.part`, which a later call resumes. That file is renamed to `path` only
    when its size and checksum are right. On a terminal, a progress bar is shown.

    Args:
        url: the http or https address of the file.
        path: the path to write to; its folder is created.
        size: the expected number of bytes.
        sha256: the expected checksum in hexadecimal.

    Raises:
        InputError: `path` exists with another checksum; the transfer failed (the received
            bytes stay in `<path>.part`); or the received file is wrong (it is deleted).
    """
    if path.exists():
        check_sha256(path, sha256, fix="delete it, then run again to download it")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        _transfer(url, part, size)
    # RequestException is an OSError; other OSErrors, such as a full disk, are not network faults.
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise _network_error(url, _reason(error)) from error
    found = part.stat().st_size
    if found < size:
        raise _network_error(url, f"it ended after {found} of {size} bytes")
    try:
        check_sha256(
            part, sha256, fix=f"deleted; {url} changed or the transfer broke it, try again"
        )
    except InputError:
        part.unlink()
        raise
    os.replace(part, path)


def _transfer(url: str, part: Path, size: int) -> None:
    """Appends the bytes that `part` still lacks, or starts it again if it cannot be resumed."""
    start = part.stat().st_size if part.exists() else 0
    if start == size:
        return
    response = _request(url, start if start < size else 0)
    if response.status_code == requests.codes.requested_range_not_satisfiable:
        response.close()
        response = _request(url, 0)
    with response:
        response.raise_for_status()
        start = _first_byte(response)
        remaining = response.headers.get("Content-Length", "")
        if remaining.isdecimal() and start + int(remaining) != size:
            # It may be an error page with status 200, or another file at this address.
            raise _network_error(url, f"it offers {start + int(remaining)} bytes, not {size}")
        _write(response, part, start, size)


def _request(url: str, start: int) -> requests.Response:
    # Without "identity" a server may serve a .gz as a compressed transfer of its content.
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT)


def _first_byte(response: requests.Response) -> int:
    """The position in the file at which the response's body starts."""
    if response.status_code != requests.codes.partial_content:
        return 0
    content_range = response.headers.get("Content-Range", "")
    first = content_range.removeprefix("bytes ").partition("-")[0]
    if not first.isdecimal():
        raise requests.RequestException(f"unreadable Content-Range {content_range!r}")
    return int(first)


def _write(response: requests.Response, part: Path, start: int, size: int) -> None:
    progress = tqdm(
        total=size, initial=start, desc=part.stem, unit="B", unit_scale=True, disable=None
    )
    with part.open("r+b" if start else "wb") as file, progress:
        file.seek(start)
        # The raw stream is read because requests would decompress an encoded body.
        for chunk in response.raw.stream(_CHUNK_BYTES, decode_content=False):
            file.write(chunk)
            progress.update(len(chunk))
            if file.tell() > size:
                return  # It is too long; the checksum will differ.


def _network_error(url: str, reason: str) -> InputError:
    return InputError(
        f"could not download {url}: {reason}; run again to resume, "
        "or pass a copy you have with --archive=FILE_OR_FOLDER"
    )


def _reason(error: Exception) -> str:
    """The cause without the layers that requests and urllib3 wrap around it."""
    inner = error.args[0] if error.args else error
    return " ".join(str(getattr(inner, "reason", inner)).split())
