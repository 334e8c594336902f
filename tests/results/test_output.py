from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from loclin.errors import OutputError
from loclin.results.files import check_writable, write_text


def test_writes_whole_files_and_leaves_nothing_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "old")
    write_text(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "x"


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "x")
    reader.join()
    assert read == ["x"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def interrupted(*_: object) -> None:
        raise fault

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(OutputError if fault is OSError else fault):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path, "it is a directory"),
        (tmp_path / "none" / "page.html", "there is no directory"),
        (tmp_path / "file" / "page.html", "is not a directory"),
    ):
        for refuse in (check_writable, lambda p: write_text(p, "x")):
            with pytest.raises(OutputError, match=said) as caught:
                refuse(path)
            assert "\n" not in str(caught.value)


def test_refuses_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "page.html")


def test_accepts_a_new_file_and_an_old_one(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.html")
    (tmp_path / "old.html").write_text("")
    check_writable(str(tmp_path / "old.html"))
