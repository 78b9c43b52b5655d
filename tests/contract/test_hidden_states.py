"""Hidden states of a request that gave way, through SGLang's own code that gathers them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def gathered(mode: Any, prefills: list[tuple[int, list[int]]]) -> list[Any]:
    """What a request gathers over prefills of so many tokens, with so much answered before each."""
    import torch
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

    from conserve_sgl.engine.hidden_states import _Processor

    processor = _Processor.__new__(_Processor)
    req = SimpleNamespace(hidden_states=[], output_ids=[], return_hidden_states=mode)
    for tokens, answered in prefills:
        req.output_ids = answered
        offset = processor._append_prefill_hidden_states(
            req=req,
            logits_output=SimpleNamespace(hidden_states=torch.arange(2.0 * tokens).reshape(-1, 2)),
            hidden_state_offset=0,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            extend_input_len=tokens,
        )
        assert offset == tokens
    return req.hidden_states


def test_a_prompt_has_a_list_of_vectors_and_a_token_of_the_answer_one():
    assert gathered(True, [(3, [])]) == [[[0, 1], [2, 3], [4, 5]]]
    # It gave way after two tokens and computes the last three anew.
    assert gathered(True, [(2, []), (3, [7, 8])]) == [[[0, 1], [2, 3]], [4, 5]]
    # A row that decodes in the step of a prompt.
    assert gathered(True, [(2, []), (1, [7])]) == [[[0, 1], [2, 3]], [0, 1]]


def test_of_the_last_token_alone_there_is_one():
    assert gathered("last", [(3, [])]) == [[4, 5]]
    assert gathered("last", [(3, []), (2, [7])]) == [[2, 3]]


@pytest.mark.parametrize("prefills", [[(3, [])], [(3, []), (2, [7])]])
def test_where_none_are_asked_for_there_are_none(prefills):
    assert gathered(False, prefills) == []
