"""A small disk that can be full: a tmpfs. Runs in the campaign's or the test's process, which needs CAP_SYS_ADMIN.

It is filled by making it no larger than what it holds, which takes no memory, and freed by giving it its size back.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from pathlib import Path

from chaos.rights import is_stale, owned_name, privileged

RIGHT = "CAP_SYS_ADMIN (to mount a tmpfs)"

# Tries to shrink it: what it holds may grow between the look and the mount.
TRIES = 20


class SmallDisk:
    """A tmpfs on ``folder``, of ``size_bytes``, that belongs to ``account``."""

    def __init__(self, folder: Path, size_bytes: int, account: pwd.struct_passwd | None = None) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self._account = account
        self.mounted = False

    def mount(self) -> None:
        remove_stale_mounts()
        self.folder.mkdir(parents=True, exist_ok=True)
        owner = f",uid={self._account.pw_uid},gid={self._account.pw_gid}" if self._account else ""
        options = f"size={self.size_bytes},mode=0700{owner}"
        privileged("mount", "-t", "tmpfs", "-o", options, owned_name("d"), str(self.folder), right=RIGHT)
        self.mounted = True

    def fill(self) -> None:
        """Leave no byte free."""
        for _ in range(TRIES):
            try:
                self._resize(self.used_bytes())
            except AssertionError:
                continue  # it grew meanwhile
            if self.free_bytes() == 0:
                return
        raise AssertionError(f"{self.folder} is written to faster than it can be made small")

    def free(self) -> None:
        """Give it its size back."""
        self._resize(self.size_bytes)

    def used_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def free_bytes(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def unmount(self) -> None:
        if self.mounted:
            privileged("umount", str(self.folder), right=RIGHT)
            self.mounted = False

    def _resize(self, size_bytes: int) -> None:
        privileged("mount", "-o", f"remount,size={max(size_bytes, 4096)}", str(self.folder), right=RIGHT)


def remove_stale_mounts() -> list[str]:
    """Unmount what runs that have ended left behind; returns the folders."""
    removed = []
    for line in Path("/proc/mounts").read_text().splitlines():
        source, folder = line.split()[:2]
        if is_stale(source):
            with contextlib.suppress(AssertionError):  # another run removed it meanwhile; else it is seen by the next
                privileged("umount", "--lazy", folder, right=RIGHT)
                removed.append(folder)
    return removed
