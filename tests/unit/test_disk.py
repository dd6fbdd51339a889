"""What a node of the pool finds in its disk's directory."""

import os
from pathlib import Path

import pytest

from baton.errors import ConfigError
from services.kvstore.disk import Disk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def blocks(folder: Path) -> int:
    return len([*folder.glob("*.bucket"), *folder.glob("*.meta")])


def write(folder: Path) -> None:
    (folder / "1-0.bucket").write_bytes(b"KV")
    (folder / "1-0.meta").write_bytes(b"key")


def test_blocks_stay_over_ends_of_the_process_and_of_the_machine_that_were_orderly(folder: Path) -> None:
    first = Disk(str(folder), boot="monday")
    write(folder)
    os.close(first._mark)  # as kill -9 does
    second = Disk(str(folder), boot="monday")
    assert blocks(folder) == 2
    second.close(orderly=True)
    Disk(str(folder), boot="tuesday").close(orderly=True)
    assert blocks(folder) == 2


def test_what_a_crash_of_the_machine_may_have_torn_is_removed(folder: Path) -> None:
    first = Disk(str(folder), boot="monday")
    write(folder)
    first.close(orderly=False)  # the pool was not there to let go of it
    second = Disk(str(folder), boot="tuesday")
    assert blocks(folder) == 0
    write(folder)
    os.close(second._mark)
    Disk(str(folder), boot="tuesday").close(orderly=True)
    assert blocks(folder) == 2, "what was written since stays"


def test_a_directory_is_one_nodes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        Disk("/dev/null/x")
    first = Disk(str(folder))
    with pytest.raises(ConfigError, match="in use by another node"):
        Disk(str(folder))
    first.close(orderly=True)
    Disk(str(folder)).close(orderly=True)


def test_mooncake_is_told_of_no_link_and_no_way_up(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    disk = Disk(str(tmp_path / "elsewhere" / ".." / "link"))
    assert disk.path == str(folder.resolve())
    assert (folder / "baton-disk").is_file()
    disk.close(orderly=True)
