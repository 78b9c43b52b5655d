"""A profile of a real engine: it is taken once, is sane, and leaves nothing behind."""

from __future__ import annotations

import pytest

from conserve_sgl.policy.latency import StepKind, StepWork
from conserve_sgl.profile import Profile, ProfileStore, read_profile

pytestmark = pytest.mark.engine


@pytest.fixture
def server(plain_server):
    return plain_server


@pytest.fixture
def profile(server, plain_profiles) -> Profile:  # noqa: ARG001  the server writes it
    (path,) = ProfileStore(plain_profiles).paths()
    return read_profile(path)


def test_a_first_start_measures_once(server, profile):
    assert server.state()["profiles_measured"] == 1
    assert server.state()["profiles_rejected"] == 0
    assert {s.work.kind for s in profile.samples} == set(StepKind)
    assert len(profile.samples) > 50


def test_the_profile_says_what_it_was_measured_on(profile, tiny_llama):
    identity = profile.identity
    assert identity.model == str(tiny_llama)
    assert (identity.dtype, identity.kv_dtype) == ("float32", "float32")
    assert (identity.tp_size, identity.overlap) == (1, True)
    assert "threads" in identity.device
    assert profile.layers == 4


def test_the_model_is_sane(profile):
    model = profile.model()
    for kind in StepKind:
        assert model.errors(kind).steps > 0
    long, short = StepWork.of([(128, 2000)]), StepWork.of([(16, 0)])
    assert 0 < model.predict_s(short) < model.predict_s(long) < 10


def test_the_engine_is_balanced_and_answers_after_it(server):
    server.assert_idle_and_balanced()
    assert server.generate("the quick brown fox", sampling_params={"max_new_tokens": 8})["text"]
    server.assert_idle_and_balanced()


def test_the_model_learns_from_the_steps_that_are_served(server):
    before = server.state()["latency"]["errors"]["decode"]
    server.generate_all(
        [f"{i} bottles of milk" for i in range(4)], sampling_params={"max_new_tokens": 64}
    )
    after = server.state()["latency"]["errors"]["decode"]
    assert after != before


def test_nothing_of_the_profile_can_be_matched_by_a_request(server):
    server.http.post("/flush_cache", params={"timeout": 30}).raise_for_status()
    answer = server.generate("a prompt that nobody has sent before")
    assert answer["meta_info"]["cached_tokens"] == 0
