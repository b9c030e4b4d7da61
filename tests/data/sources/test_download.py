"""The download continues where it ended, and gives the published file or a clear line; tried locally."""

import fcntl
import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ict_fast.data.sources import download as download_module
from ict_fast.data.sources.download import CIFAR10_ADDRESS, download_cifar10
from ict_fast.errors import InputError

CONTENT = np.random.default_rng(0).bytes(1_500_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
NAME = "cifar-10-python.tar.gz"


class FileServer(ThreadingHTTPServer):
    """Serves CONTENT at /file, by range if asked; remembers what it was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = CONTENT
        self.knows_ranges = True
        self.says_length = True
        self.breaks_after: int | None = None
        """Bytes of an answer after which the connection is closed."""
        self.ranges: list[str | None] = []
        """The Range header of each request."""
        self.address = f"http://127.0.0.1:{self.server_port}/file"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        if self.path != "/file":
            return self.send_error(404)
        start = 0
        if asked and self.server.knows_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(self.server.content):
                return self.send_error(416)
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        if self.server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.breaks_after])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "*")
    with FileServer() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.shutdown()
        thread.join()


def test_the_official_address_and_checksum_are_the_defaults() -> None:
    assert CIFAR10_ADDRESS == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert download_cifar10.__kwdefaults__ == {
        "address": CIFAR10_ADDRESS,
        "md5": "c58f30108f718f92721af3b95e74349a",
    }


@pytest.mark.parametrize("says_length", [True, False])
def test_a_download_is_the_file_with_progress(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture, says_length: bool
) -> None:
    server.says_length = says_length
    path = download_cifar10(tmp_path / "new/folder", address=server.address, md5=MD5)
    assert path == tmp_path / "new/folder" / NAME
    assert path.read_bytes() == CONTENT
    assert [file.name for file in path.parent.iterdir()] == [NAME]
    lines = capsys.readouterr().err.splitlines()
    total = r" of 1\.5 MB, [\d.]+ MB/s, ETA 0:00:00" if says_length else r" MB, [\d.]+ MB/s"
    assert re.fullmatch(rf"cifar-10-python\.tar\.gz: [\d.]+{total}", lines[-1])


def test_the_same_call_continues_a_connection_that_broke(server: FileServer, tmp_path: Path) -> None:
    server.breaks_after = 600_000
    with pytest.raises(InputError, match=r"ended after 0\.6 of 1\.5 MB; the same command continues"):
        download_cifar10(tmp_path, address=server.address, md5=MD5)
    assert not (tmp_path / NAME).exists()
    with pytest.raises(InputError, match=r"ended after 1\.2 of 1\.5 MB"):
        download_cifar10(tmp_path, address=server.address, md5=MD5)
    server.breaks_after = None
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=600000-", "bytes=1200000-"]
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_a_server_without_ranges_starts_again(server: FileServer, tmp_path: Path) -> None:
    server.knows_ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_put_in_place(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


@pytest.mark.parametrize("part", [b"", b"of another file", CONTENT + b"too long"])
def test_another_file_than_the_published_one_is_refused_and_not_continued(
    server: FileServer, tmp_path: Path, part: bytes
) -> None:
    if not part:
        server.content = b"<html>moved</html>"
    (tmp_path / f"{NAME}.part").write_bytes(part)
    with pytest.raises(InputError, match=rf"gave another file than the published one \(MD5 .* of {MD5}\)"):
        download_cifar10(tmp_path, address=server.address, md5=MD5)
    assert list(tmp_path.iterdir()) == []
    server.content = CONTENT
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT


def test_a_file_that_is_there_is_checked_and_not_downloaded(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(CONTENT)
    download_cifar10(tmp_path, address=server.address, md5=MD5)
    (tmp_path / NAME).write_bytes(b"mine")
    with pytest.raises(InputError, match=rf"{NAME}: is not the published file .* move it away"):
        download_cifar10(tmp_path, address=server.address, md5=MD5)
    assert (tmp_path / NAME).read_bytes() == b"mine"
    assert server.ranges == []


def test_what_the_network_lacks_is_said_in_one_line(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FileServer() as closed:
        nobody = closed.address
    resolve = socket.getaddrinfo

    def offline(host: str, *arguments: object, **options: object) -> object:
        if host == "www.cs.toronto.edu":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    for address, message in (
        (nobody, r"no connection \(Connection refused\); is there a network\?"),
        (CIFAR10_ADDRESS, r"no connection \(Temporary failure in name resolution\); is there a network\?"),
        (f"{server.address}/gone", "the server answers 404"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            download_cifar10(tmp_path, address=address, md5=MD5)
        assert str(caught.value).startswith(address)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_two_downloads_do_not_mix(server: FileServer, tmp_path: Path) -> None:
    with (tmp_path / f"{NAME}.part").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is downloading it"):
            download_cifar10(tmp_path, address=server.address, md5=MD5)
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT  # it died


def test_a_disk_too_small_is_noticed_before_writing(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(InputError, match=r"needs 1\.5 MB and the disk has 1\.0 MB left"):
        download_cifar10(tmp_path, address=server.address, md5=MD5)
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:600_000])  # the rest fits
    assert download_cifar10(tmp_path, address=server.address, md5=MD5).read_bytes() == CONTENT


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match=r"/a/b.*: (File exists|Not a directory)"):
        download_cifar10(tmp_path / "a/b", address="http://127.0.0.1:9/file", md5=MD5)


@pytest.mark.parametrize("name", ["a", NAME, "new.tgz"])
def test_a_file_is_no_place_to_download_into(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(InputError, match=rf"PATH is .*/{name}; with --download it names the folder that"):
        download_cifar10(tmp_path / name, address="http://127.0.0.1:9/file", md5=MD5)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_folders_are_left_only_if_something_has_come_into_them(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="404"):
        download_cifar10(tmp_path / "new/folder", address=f"{server.address}/gone", md5=MD5)
    assert list(tmp_path.iterdir()) == []
    server.breaks_after = 1000
    with pytest.raises(InputError, match="the same command continues"):
        download_cifar10(tmp_path / "new/folder", address=server.address, md5=MD5)
    assert (tmp_path / f"new/folder/{NAME}.part").stat().st_size == 1000
