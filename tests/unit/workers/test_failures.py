"""What each SQLSTATE of the failure table leads to."""

from __future__ import annotations

import psycopg2
import pytest

from speedlayer.workers.errors import SinkMisconfigured, SinkUnavailable
from speedlayer.workers.sinks.postgres.failures import Verdict, explain_connect, message_of, verdict_of

UNAVAILABLE = "08000 08003 08006 08P01 57P01 57P02 57P03 57014 53000 53100 53200 53300 53400 58000 58030"
READ_ONLY_OR_IDLE = "25006 25P03 25P04"
CONTENDED = "40P01 40001 40002 55P03"
DATA = "22001 22003 22P02 22021 22P05 23502 23503 23505 23514 23P01 44000 P0001 21000 54000 54001"
MISCONFIGURED = "42P01 42703 42804 42883 28000 28P01 3D000 3F000"
UNEXPLAINED = "XX000 XX001 0A000 38000 39000 2F002 HV000 54011 55000 25P02"


@pytest.mark.parametrize(
    ("verdict", "sqlstate"),
    [
        (verdict, sqlstate)
        for verdict, states in (
            (Verdict.UNAVAILABLE, UNAVAILABLE),
            (Verdict.UNAVAILABLE, READ_ONLY_OR_IDLE),
            (Verdict.CONTENDED, CONTENDED),
            (Verdict.DATA, DATA),
            (Verdict.MISCONFIGURED, MISCONFIGURED),
            (Verdict.SUSPECT, "42501"),
            (Verdict.UNEXPLAINED, UNEXPLAINED),
        )
        for sqlstate in states.split()
    ],
)
def test_the_sqlstate_decides(verdict: Verdict, sqlstate: str) -> None:
    assert verdict_of(sqlstate) is verdict


def test_an_error_without_an_sqlstate_explains_nothing() -> None:
    assert verdict_of(None) is Verdict.UNEXPLAINED


@pytest.mark.parametrize(
    ("text", "sqlstate"),
    [
        ('FATAL:  password authentication failed for user "app"', "28P01"),
        ('FATAL:  database "nowhere" does not exist', "3D000"),
        ('FATAL:  role "nobody" does not exist', "28000"),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', "28000"),
        ('FATAL:  permission denied for database "orders"', "42501"),
    ],
)
def test_a_wrong_dsn_is_somebodys_to_mend(text: str, sqlstate: str) -> None:
    failure = explain_connect(psycopg2.OperationalError(text), "db")
    assert isinstance(failure, SinkMisconfigured)
    assert failure.sqlstate == sqlstate
    assert failure.remedy


@pytest.mark.parametrize(
    "text",
    [
        "connection refused",
        "FATAL:  the database system is starting up",
        "FATAL:  sorry, too many clients already",
        "timeout expired",
        'could not translate host name "db" to address: Temporary failure in name resolution',
        "FATAL:  la base de données « x » n'existe pas",
    ],
)
def test_any_other_failure_to_connect_is_waited_out(text: str) -> None:
    assert isinstance(explain_connect(psycopg2.OperationalError(text), "db"), SinkUnavailable)


def test_a_client_side_message_is_one_line() -> None:
    assert message_of(psycopg2.OperationalError("server closed\n\tthe connection\n")) == "server closed the connection"
    refused = "Connection refused\n\tIs the server running on that host?\n"
    assert message_of(psycopg2.OperationalError(refused)) == "Connection refused. Is the server running on that host?"
