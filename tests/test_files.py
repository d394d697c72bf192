"""Files take their place once they are whole, and touch nothing of the user's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nicheclip.files import replaced_file, replaced_folder, write_json


def fill(folder: Path, content: str) -> None:
    with replaced_folder(folder) as unfinished:
        (unfinished / "file").write_text(content)


def test_a_folder_is_replaced_when_it_is_whole(tmp_path):
    fill(tmp_path / "model", "first")
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "model") as unfinished:
        (unfinished / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "model" / "file").read_text() == "first"
    fill(tmp_path / "model", "second")
    assert (tmp_path / "model" / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.tmp", "model.old", ".model.tmp"])
def test_a_users_own_folder_beside_it_stays(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    fill(tmp_path / "model", "first")
    fill(tmp_path / "model", "second")
    assert (tmp_path / name / "mine").is_file()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "model").symlink_to("large_disk")
    fill(tmp_path / "model", "first")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "large_disk" / "file").read_text() == "first"
    (tmp_path / "link.json").symlink_to(tmp_path / "large_disk" / "file")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "large_disk" / "file").read_text() == "[\n  1\n]\n"


def test_files_get_the_usual_permissions(tmp_path):
    with replaced_folder(tmp_path / "model") as unfinished:
        (unfinished / "deep").mkdir()
        os.close(os.open(unfinished / "deep" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
    (tmp_path / "usual").touch()
    weights = tmp_path / "model" / "deep" / "weights"
    assert weights.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), replaced_file(tmp_path / "table") as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
