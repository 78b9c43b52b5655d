"""The way of the status over SGLang's own channels: an id on the question, bytes in the answer."""

from __future__ import annotations

import inspect
import warnings

import msgspec
import pytest

from conserve_sgl.status.ask import Answer, Ask

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from sglang.srt.managers import io_struct, tokenizer_control_mixin
    from sglang.srt.managers.utils import is_health_check_generate_req


@pytest.mark.parametrize("ask", [Ask(), Ask(since=7, most=None), Ask(since=None, most=9)])
def test_what_is_asked_for_reaches_the_scheduler(ask):
    sent = io_struct.GetInternalStateReq(rid=ask.to_rid())
    got = io_struct.msgpack_decode(io_struct.msgpack_encode(sent))
    assert Ask.of_rid(got.rid) == ask
    assert not is_health_check_generate_req(got)
    assert Ask.of_rid(io_struct.GetInternalStateReq().rid) is None


def test_the_answer_comes_back():
    answer = Answer(b'{"version": 1}', 5, bytes(range(256)), 0.5)
    sent = io_struct.GetInternalStateReqOutput(internal_state=msgspec.structs.asdict(answer))
    got = io_struct.msgpack_decode(io_struct.msgpack_encode(sent))
    assert msgspec.convert(got.internal_state, Answer) == answer


def test_questions_wait_for_each_other():
    """Two at a time would get each other's answers."""
    specs = {name: rest for name, *rest in tokenizer_control_mixin._COMMUNICATOR_SPECS}
    assert specs["get_internal_state"] == [io_struct.GetInternalStateReqOutput]  # queueing
    source = inspect.getsource(tokenizer_control_mixin.TokenizerControlMixin.get_internal_state)
    assert "auto_create_handle_loop()" in source
    assert "get_internal_state_communicator(req)" in source
