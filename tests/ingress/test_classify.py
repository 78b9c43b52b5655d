"""Every tag by which a request asks for a service class."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.ingress.classify import (
    AskedJob,
    class_from_body,
    class_from_headers,
    job_from_body,
    job_from_headers,
    split_prefix,
)
from conserve_sgl.policy import ServiceClass
from conserve_sgl.policy.job_tag import LONGEST_LEFT_S

ONLINE, OFFLINE = ServiceClass.ONLINE, ServiceClass.OFFLINE
OURS, GATEWAY = b"x-sgl-conserve-class", b"x-smg-priority"


@pytest.mark.parametrize(
    ("path", "left", "prefixed"),
    [
        pytest.param("/offline/generate", "/generate", True, id="a native route"),
        pytest.param(
            "/offline/v1/chat/completions", "/v1/chat/completions", True, id="an OpenAI route"
        ),
        pytest.param("/offline", "/", True, id="the prefix alone is the root"),
        pytest.param("/offline/", "/", True, id="the prefix and a slash is the root"),
        pytest.param("/generate", "/generate", False, id="no prefix"),
        pytest.param("/", "/", False, id="the root"),
        pytest.param("", "", False, id="an empty path"),
        pytest.param("/offlinegenerate", "/offlinegenerate", False, id="the word goes on"),
        pytest.param("/v1/offline/x", "/v1/offline/x", False, id="not at the front"),
        pytest.param("/OFFLINE/generate", "/OFFLINE/generate", False, id="paths have a case"),
        pytest.param("/offline/offline/x", "/offline/x", True, id="one prefix is taken off"),
    ],
)
def test_path_prefix(path, left, prefixed):
    assert split_prefix(path) == (left, prefixed)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param([], None, id="no headers"),
        pytest.param([(b"content-type", b"offline")], None, id="another header"),
        pytest.param([(OURS, b"offline")], OFFLINE, id="ours says offline"),
        pytest.param([(OURS, b"online")], ONLINE, id="ours says online"),
        pytest.param([(OURS, b" Offline ")], OFFLINE, id="ours in any case, with blanks"),
        pytest.param([(GATEWAY, b"bulk")], OFFLINE, id="the gateway says bulk"),
        pytest.param([(GATEWAY, b" BULK ")], OFFLINE, id="bulk in any case, with blanks"),
        pytest.param([(GATEWAY, b"system")], None, id="the gateway says system"),
        pytest.param([(GATEWAY, b"interactive")], None, id="the gateway says interactive"),
        pytest.param([(GATEWAY, b"default")], None, id="the gateway says default"),
        pytest.param([(GATEWAY, b"no-such-class")], None, id="the gateway's classes are its own"),
        pytest.param([(GATEWAY, b"bulk"), (OURS, b"online")], ONLINE, id="ours wins, after"),
        pytest.param([(OURS, b"online"), (GATEWAY, b"bulk")], ONLINE, id="ours wins, before"),
    ],
)
def test_headers(headers, expected):
    assert class_from_headers(headers) is expected


@pytest.mark.parametrize("value", [b"", b"batch", b"off-line", b"offline,online", b"\xff"])
def test_a_class_that_is_none_is_an_error(value):
    with pytest.raises(ValueError, match="must be online or offline"):
        class_from_headers([(OURS, value)])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"service_tier": "flex"}, OFFLINE, id="flex is offline"),
        pytest.param({"service_tier": "default"}, ONLINE, id="default is online"),
        pytest.param({"service_tier": "priority"}, ONLINE, id="priority is online"),
        pytest.param({"service_tier": "auto"}, None, id="auto leaves it to the server"),
        pytest.param({"service_tier": "scale"}, None, id="a tier of somebody else's"),
        pytest.param({"service_tier": "Flex"}, None, id="tiers have a case"),
        pytest.param({"service_tier": None}, None, id="null"),
        pytest.param({"service_tier": 1}, None, id="a number"),
        pytest.param({"service_tier": ["flex"]}, None, id="a list"),
        pytest.param({"service_tier": {"flex": 1}}, None, id="an object"),
        pytest.param({}, None, id="no tier"),
        pytest.param({"text": '"service_tier": "flex"'}, None, id="the words inside a text"),
        pytest.param({"metadata": {"service_tier": "flex"}}, None, id="a tier further inside"),
        pytest.param(["service_tier", "flex"], None, id="a list as the body"),
        pytest.param("service_tier", None, id="a string as the body"),
    ],
)
def test_body(body, expected):
    assert class_from_body(json.dumps(body).encode()) is expected


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"service_tier": "flex"', id="cut off"),
        pytest.param(b'{"service_tier": "flex"} more', id="more behind it"),
        pytest.param(b'"service_tier"=flex', id="a form"),
        pytest.param(b'{"service_tier": "\xff\xfe"}', id="not UTF-8 in the tier"),
        pytest.param(
            b'{"service_tier": "flex", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            id="nested deeper than the parser goes",
        ),
    ],
)
def test_a_body_that_cannot_be_read_asks_for_nothing(body):
    assert class_from_body(body) is None


@pytest.mark.parametrize(
    "rest",
    [b'"temperature": NaN', b'"metadata": {"a": "\\ud800"}', b'"temperature": -Infinity'],
    ids=["no number", "half a surrogate pair", "infinity"],
)
def test_a_body_that_only_sglang_takes_for_json_keeps_its_class(rest):
    assert class_from_body(b'{"service_tier": "flex", ' + rest + b"}") is OFFLINE


def test_the_rest_of_a_body_is_skipped():
    body = {"input_ids": list(range(1000)), "service_tier": "flex", "text": "é" * 100}
    assert class_from_body(json.dumps(body, ensure_ascii=False).encode()) is OFFLINE


@given(body=st.binary(max_size=200))
def test_no_bytes_raise(body):
    assert class_from_body(b'{"service_tier":' + body) in (None, ONLINE, OFFLINE)


# ------------------------------------------------------------------------ the job

JOB, DEADLINE = b"x-sgl-conserve-job", b"x-sgl-conserve-deadline-s"
FAIRNESS, SLO = b"x-gateway-inference-fairness-id", b"x-slo-ttft-ms"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param([], AskedJob(), id="nothing"),
        pytest.param([(JOB, b" nightly ")], AskedJob(job="nightly"), id="a name, with blanks"),
        pytest.param([(JOB, "né".encode())], AskedJob(job="né"), id="a name in UTF-8"),
        pytest.param([(JOB, b"n\xe9")], AskedJob(job="né"), id="a name in Latin-1"),
        pytest.param([(JOB, b"x" * 128)], AskedJob(job="x" * 128), id="the longest name"),
        pytest.param([(DEADLINE, b"3600")], AskedJob(left_s=3600.0), id="a deadline"),
        pytest.param([(DEADLINE, b" 0.5 ")], AskedJob(left_s=0.5), id="half a second"),
        pytest.param([(DEADLINE, b"-2")], AskedJob(left_s=-2.0), id="a deadline that has passed"),
        pytest.param([(FAIRNESS, b"team")], AskedJob(job="team"), id="llm-d's name"),
        pytest.param([(SLO, b"1500")], AskedJob(left_s=1.5), id="llm-d's milliseconds"),
        pytest.param([(FAIRNESS, b"team"), (JOB, b"ours")], AskedJob("ours"), id="ours wins"),
        pytest.param([(DEADLINE, b"1"), (SLO, b"9")], AskedJob(left_s=1.0), id="ours wins, before"),
        pytest.param([(SLO, b"soon")], AskedJob(), id="a gateway's header that says nothing"),
        pytest.param([(SLO, b"nan")], AskedJob(), id="or is no number"),
        pytest.param([(FAIRNESS, b"  ")], AskedJob(), id="or is empty"),
        pytest.param([(FAIRNESS, b"y" * 300)], AskedJob(job="y" * 128), id="or is too long"),
        pytest.param([(FAIRNESS, b"a\x07b")], AskedJob(job="ab"), id="or cannot be printed"),
        pytest.param([(SLO, b"-1e308")], AskedJob(), id="or is further off than anybody means"),
        pytest.param([(DEADLINE, b"1e10")], AskedJob(left_s=1e10), id="the longest deadline"),
    ],
)
def test_the_job_of_the_headers(headers, expected):
    assert job_from_headers(headers) == expected


@pytest.mark.parametrize(
    ("header", "value", "reason"),
    [
        (JOB, b"", "x-sgl-conserve-job: must be a name"),
        (JOB, b"x" * 129, "1 to 128 printable characters"),
        (JOB, b"a\x07b", "printable"),
        (DEADLINE, b"", "x-sgl-conserve-deadline-s: must be a number of seconds"),
        (DEADLINE, b"1h", "not '1h'"),
        (DEADLINE, b"nan", "number"),
        (DEADLINE, b"inf", "number"),
        (DEADLINE, b"1e999", "number"),
        (DEADLINE, b"-1e308", "from -10000000000 to 10000000000, not '-1e308'"),
        (DEADLINE, b"9" * 5000, "number"),
    ],
)
def test_a_job_that_cannot_be_used_is_an_error(header, value, reason):
    with pytest.raises(ValueError, match=reason):
        job_from_headers([(header, value)])


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"conserve_job": "a", "conserve_deadline_s": "60"}, AskedJob("a", 60.0)),
        ({"conserve_job": "a", "other": 1}, AskedJob("a")),
        ({"conserve_deadline_s": 60}, AskedJob(left_s=60.0)),
        ({"conserve_deadline_s": None}, AskedJob()),
        ({"other": "conserve_job"}, AskedJob()),
        ("conserve_job", AskedJob()),
        (None, AskedJob()),
    ],
)
def test_the_job_of_the_body(metadata, expected):
    assert job_from_body(json.dumps({"metadata": metadata}).encode()) == expected


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"conserve_job": ""}, "metadata.conserve_job: must be a name"),
        ({"conserve_job": 7}, "metadata.conserve_job"),
        ({"conserve_deadline_s": "soon"}, "metadata.conserve_deadline_s: must be a number"),
        ({"conserve_deadline_s": [1]}, "metadata.conserve_deadline_s"),
        ({"conserve_deadline_s": 10**400}, "metadata.conserve_deadline_s"),
        ({"conserve_deadline_s": -1e308}, "metadata.conserve_deadline_s: must be a number"),
        ({"conserve_deadline_s": 10**10 + 1}, "metadata.conserve_deadline_s: must be a number"),
        ({"conserve_job": "\ud800"}, "metadata.conserve_job"),
    ],
)
def test_a_job_in_the_body_that_cannot_be_used_is_an_error(metadata, reason):
    with pytest.raises(ValueError, match=reason):
        job_from_body(json.dumps({"metadata": metadata}).encode())


@given(st.binary())
def test_a_body_that_is_no_json_names_no_job(body):
    assert job_from_body(b'"conserve_' + body) == AskedJob()


# What a client may write where a number is meant: every float and integer, and other texts.
NUMBERS = st.floats() | st.integers() | st.integers(10**300, 10**310) | st.booleans()
VALUES = NUMBERS | st.text() | st.none() | st.lists(NUMBERS, max_size=2)


def assert_usable(asked: AskedJob) -> None:
    assert asked.left_s is None or -LONGEST_LEFT_S <= asked.left_s <= LONGEST_LEFT_S
    assert asked.job is None or (0 < len(asked.job) <= 128 and asked.job.isprintable())


def assert_usable_or_refused(read: Callable[[], AskedJob], name: str) -> None:
    """Nothing else may come of it; the refusal names the field, and is no longer than a line."""
    try:
        asked = read()
    except ValueError as e:
        refusal = str(e)
    else:
        assert_usable(asked)
        return
    assert refusal.startswith(f"{name}: must be ")
    assert len(refusal) < 400


def header_bytes(value: object) -> bytes:
    return str(value).encode("utf-8", "replace")


@given(st.sampled_from([JOB, DEADLINE]), VALUES.map(header_bytes))
def test_a_header_of_ours_is_refused_by_its_name_or_within_bounds(header, value):
    assert_usable_or_refused(lambda: job_from_headers([(header, value)]), header.decode())


@given(st.sampled_from([FAIRNESS, SLO]), VALUES.map(header_bytes))
def test_a_header_of_a_gateway_s_is_within_bounds_or_ignored(header, value):
    assert_usable(job_from_headers([(header, value)]))


@given(st.sampled_from(["conserve_job", "conserve_deadline_s"]), VALUES)
def test_metadata_is_refused_by_its_name_or_within_bounds(key, value):
    body = json.dumps({"metadata": {key: value}}).encode()
    assert_usable_or_refused(lambda: job_from_body(body), f"metadata.{key}")
