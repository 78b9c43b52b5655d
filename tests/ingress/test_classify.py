"""Every tag by which a request asks for a service class."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.ingress.classify import class_from_body, class_from_headers, split_prefix
from conserve_sgl.policy import ServiceClass

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


def test_the_rest_of_a_body_is_skipped():
    body = {"input_ids": list(range(1000)), "service_tier": "flex", "text": "é" * 100}
    assert class_from_body(json.dumps(body, ensure_ascii=False).encode()) is OFFLINE


@given(body=st.binary(max_size=200))
def test_no_bytes_raise(body):
    assert class_from_body(b'{"service_tier":' + body) in (None, ONLINE, OFFLINE)
