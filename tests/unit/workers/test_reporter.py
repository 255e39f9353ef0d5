"""Reports fit into one atomic write, whatever the texts in them."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.flights import Pipe
from speedlayer.workers.protocol import (
    REPORT_LIMIT_BYTES,
    Alive,
    BlockKind,
    FailureKind,
    FlushBlocked,
    FlushFailed,
    FlushReport,
    WorkerLog,
    encode_report,
)
from speedlayer.workers.reporter import Reporter, ReportHandler, cut


@given(st.text(max_size=100) | st.text("aé€😀\ud800\0", min_size=400, max_size=3000))
def test_a_text_is_cut_to_its_limit(text: str) -> None:
    short = cut(text)
    whole = text.encode("utf-8", "backslashreplace").decode()
    assert len(short.encode()) <= 1_500
    if len(whole.encode()) <= 1_500:
        assert short == whole
    else:
        assert short.endswith("…") and whole.startswith(short[:-1])


@pytest.mark.parametrize("character", ["a", "é", "€", "😀", "\ud800"])
def test_the_longest_reports_fit(character: str) -> None:
    text = cut(character * 10_000)
    encode_report(FlushBlocked(2**60, "p" * 100, BlockKind.UNAVAILABLE, text, text, "57P03", 9.9, 2**40))
    pipe = Pipe()
    fields = {character * 500 + str(number): character * 500 for number in range(99)}
    Reporter(pipe).log(logging.ERROR, character * 10_000, fields)
    (report,) = pipe.of(WorkerLog)
    assert len(encode_report(report)) <= REPORT_LIMIT_BYTES


def test_more_fenced_parts_than_a_report_can_name_leave_the_fate_to_the_claims() -> None:
    pipe = Pipe()
    Reporter(pipe).send(FlushReport(1, "orders", 0.1, 0.1, 0, 0, 0, 0, list(range(10_000))))
    (report,) = pipe.of(FlushFailed)
    assert report.kind is FailureKind.FATE_UNKNOWN


def test_lines_below_the_level_are_not_sent() -> None:
    pipe = Pipe()
    Reporter(pipe, logging.WARNING).log(logging.INFO, "hello", {})
    assert pipe.reports == []


def test_what_user_code_logs_is_passed_on() -> None:
    pipe = Pipe()
    logger = logging.Logger("user.code")
    logger.addHandler(ReportHandler(Reporter(pipe)))
    logger.warning("rate %s is missing", "EUR")
    assert pipe.reports == [WorkerLog(logging.WARNING, "rate EUR is missing", {"logger": "user.code"})]


def test_a_sign_of_life_names_the_pipelines_whose_records_move() -> None:
    pipe, begun = Pipe(), {"slow": 0, "hung": 7}
    reporter = Reporter(pipe)
    reporter.count_records("slow", lambda: begun["slow"])
    reporter.count_records("hung", lambda: begun["hung"])
    reporter.orders_taken = 3
    reporter.give_sign_of_life()
    begun["slow"] += 1
    reporter.give_sign_of_life()
    reporter.give_sign_of_life()
    assert pipe.of(Alive) == [Alive(3, ["hung"]), Alive(3, ["slow"]), Alive(3, [])]


def test_more_pipelines_than_fit_into_a_sign_of_life_take_turns() -> None:
    pipe = Pipe()
    reporter = Reporter(pipe)
    names = [f"{number:03}-{'n' * 90}" for number in range(100)]
    begun = 0
    for name in names:
        reporter.count_records(name, lambda: begun)
    for begun in range(1, 6):  # noqa: B007
        reporter.give_sign_of_life()
    assert all(len(encode_report(report)) <= REPORT_LIMIT_BYTES for report in pipe.of(Alive))
    assert {name for report in pipe.of(Alive) for name in report.moved} == set(names)
