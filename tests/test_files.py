"""A file is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open

from wamrl.files import atomic_path, write_json, write_tensors, write_text


@contextmanager
def limited(size: int) -> Iterator[None]:
    """A real limit on the bytes of a file, which stands in for a disk that is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_json_come_back_and_parents_are_made(tmp_path):
    write_text(tmp_path / "a" / "b.txt", "grüße\n")
    write_json(tmp_path / "a" / "c.json", {"x": [1, 2.5, None]})
    assert (tmp_path / "a" / "b.txt").read_text(encoding="utf-8") == "grüße\n"
    assert json.loads((tmp_path / "a" / "c.json").read_text()) == {"x": [1, 2.5, None]}
    assert names(tmp_path / "a") == ["b.txt", "c.json"]


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="half"), atomic_path(path) as temporary:
        temporary.write_text("new, but ha")
        raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"deep": [float("-inf")]}])
def test_json_refuses_what_json_does_not_have(tmp_path, value):
    path = tmp_path / "result.json"
    write_json(path, {"ok": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": value})
    assert json.loads(path.read_text()) == {"ok": 1}


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.txt"
    write_text(path, "old")
    code = (
        "import os, sys\n"
        "from wamrl.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('new, but ha')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"


def test_the_temporary_path_keeps_the_suffix_and_the_folder(tmp_path):
    with atomic_path(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")
    assert (tmp_path / "clip.mp4").read_bytes() == b"x"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_tensors_come_back_and_a_full_disk_is_told_by_its_errno(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.arange(3)}, metadata={"a": "b"})
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("x").tolist() == [0, 1, 2] and file.metadata() == {"a": "b"}
    with pytest.raises(OSError) as stopped, limited(1000):
        write_tensors(path, {"x": torch.zeros(1000)})
    assert stopped.value.errno == errno.EFBIG and str(path) in str(stopped.value)
    assert names(tmp_path) == ["x.safetensors"] and path.stat().st_size < 1000
