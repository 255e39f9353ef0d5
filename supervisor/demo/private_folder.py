"""A private folder for the embedded servers, and the account that may own it (demo process).

PostgreSQL refuses to run as root, so under root its server runs as an unprivileged account. Nothing outside of the
folder changes for that: no account is added, and no mode of a folder above is opened.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from speedlayer.supervisor.errors import ConfigurationError

# `nobody` first: it owns no files, so a server that runs under it can reach nothing that is not public.
PREFERRED_ACCOUNTS = ("nobody", "daemon")


@dataclass(frozen=True)
class Account:
    """An unprivileged account to run a server as, when the demo itself runs as root."""

    name: str
    uid: int
    gid: int


def unprivileged_account() -> Optional[Account]:
    """Return the account to run a server as: None for the user's own, unless that is root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in reversed(pwd.getpwall()) if entry.pw_uid != 0}
    for name in (*PREFERRED_ACCOUNTS, *known):
        if name in known:
            return Account(name, known[name].pw_uid, known[name].pw_gid)
    raise ConfigurationError(
        "PostgreSQL does not run as root, and this machine has no other account; run the demo as an ordinary user, or "
        "name a server with --dsn"
    )


@contextlib.contextmanager
def private_folder(account: Optional[Account]) -> Iterator[Path]:
    """Make a folder of mode 0700 that belongs to the account, and remove it with all that is in it."""
    folder = Path(tempfile.mkdtemp(prefix="speedlayer-demo-", dir=_base_for(account)))
    try:
        if account is not None:
            os.chown(folder, account.uid, account.gid)
        yield folder
    finally:
        shutil.rmtree(folder)


def _base_for(account: Optional[Account]) -> str:
    """Choose a folder for temporary files in which programs may run, and into which the account can go."""
    candidates = list(dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")))
    for base in candidates:
        if os.path.isdir(base) and _runs_programs(base) and (account is None or _can_enter(account, Path(base))):
            return base
    raise ConfigurationError(
        f"none of {', '.join(candidates)} can hold the embedded PostgreSQL (each is mounted noexec or closed to other "
        "accounts); name another folder with TMPDIR, or a server with --dsn"
    )


def _runs_programs(base: str) -> bool:
    return not os.statvfs(base).f_flag & os.ST_NOEXEC


def _can_enter(account: Account, base: Path) -> bool:
    """Tell whether the account may go through this folder and all those above it."""
    for folder in (base.resolve(), *base.resolve().parents):
        status = folder.stat()
        if status.st_uid == account.uid:
            needed = stat.S_IXUSR
        elif status.st_gid == account.gid:
            needed = stat.S_IXGRP
        else:
            needed = stat.S_IXOTH
        if not status.st_mode & needed:
            return False
    return True
