"""Run a command on a disk too small for it, then again with room: prints one JSON line with both outcomes.

A small tmpfs in a mount namespace of its own needs no real root where user namespaces are allowed. Where they are
not, a limit on the size of files stands in: the kernel then refuses a write in the same place.

Usage: python -m tests.helpers.small_disk SOURCE MOUNT_POINT ROOM_BYTES[:FILE_BYTES] COMMAND...
"""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT = 0x20000, 0x10000000, 32
MS_PRIVATE, MS_REC = 1 << 18, 1 << 14


class SmallDisk:
    """A tmpfs that only this process and its children see."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.real = self._own_namespace()

    def _own_namespace(self) -> bool:
        user, group = os.geteuid(), os.getegid()
        if self.libc.unshare(CLONE_NEWNS) != 0:
            if self.libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
                return False
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        return self.libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) == 0

    def mount(self, size: int, flags: int = 0) -> bool:
        options = f"size={size}".encode()
        return self.libc.mount(b"tmpfs", str(self.place).encode(), b"tmpfs", flags, options) == 0


def outcome(command: Sequence[str], file_limit: int | None = None) -> dict[str, object]:
    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    return {"status": done.returncode, "err": done.stderr}


def main(source: Path, place: Path, room: int, file_limit: int, command: Sequence[str]) -> None:
    place.mkdir()
    disk = SmallDisk(place)
    size = sum(path.stat().st_blocks * 512 + 4096 for path in source.rglob("*"))
    small = disk.real and disk.mount(size + room)
    shutil.copytree(source, place, dirs_exist_ok=True)
    first = outcome(command, None if small else file_limit)
    if small:
        assert disk.mount(size + 2**30, MS_REMOUNT)
    second = outcome(command)
    shutil.copytree(place, place.with_name("result"))
    print(json.dumps({"tmpfs": small, "first": first, "second": second}))


if __name__ == "__main__":
    room, _, file_limit = sys.argv[3].partition(":")
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(room), int(file_limit or room), sys.argv[4:])
