"""The private folder: where the embedded servers live, and as whom."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from speedlayer.supervisor.demo import private_folder as module
from speedlayer.supervisor.demo.private_folder import Account, private_folder, unprivileged_account
from speedlayer.supervisor.errors import ConfigurationError


def test_an_ordinary_user_is_the_servers_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unprivileged_account() is None


def test_root_hands_the_server_to_an_account_that_is_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    account = unprivileged_account()
    assert account is not None
    assert account.uid != 0


def test_without_any_other_account_root_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module.pwd, "getpwall", list)
    with pytest.raises(ConfigurationError, match=r"ordinary user.*--dsn"):
        unprivileged_account()


def test_the_folder_is_closed_to_others_and_gone_at_the_end() -> None:
    with private_folder(None) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


def test_a_temporary_folder_that_the_account_cannot_enter_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "tmp").mkdir(mode=0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(closed / "tmp"))
    stranger = Account("stranger", os.getuid() + 54_321, os.getgid() + 54_321)
    assert module._base_for(stranger) in ("/tmp", "/var/tmp")
    assert module._base_for(None) == str(closed / "tmp")


def test_where_no_program_may_run_the_user_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_runs_programs", lambda base: False)
    with pytest.raises(ConfigurationError, match=r"noexec.*TMPDIR"):
        module._base_for(None)
