"""Profiles on disk: found again, never mistaken, never half written."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import StepSample, StepWork
from conserve_sgl.profile import EngineIdentity, Profile, ProfileStore
from conserve_sgl.profile.store import read_profile
from support.profiles import IDENTITY

OTHER = {
    "model": "some/Model-2B",
    "config_sha256": "cd" * 32,
    "device": "NVIDIA H200",
    "dtype": "float16",
    "kv_dtype": "fp8_e4m3",
    "quantization": "fp8",
    "tp_size": 2,
    "attention_backend": "flashinfer",
    "graphs": "prefill disabled, decode disabled",
    "overlap": False,
    "sglang": "0.5.24",
    "lora_backend": "csgmv",
    "drafts": "NGRAM 5",
}
PROFILE = Profile(
    identity=IDENTITY,
    measured_at=datetime(2026, 11, 24, 21, 0, tzinfo=UTC),
    layers=16,
    samples=(
        StepSample(StepWork.of([(100, 20)]), 0.01),
        StepSample(StepWork.of((), [100, 200]), 0.005),
    ),
)


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "profiles")


def test_a_profile_is_found_again(store):
    assert store.load(IDENTITY) is None
    path = store.save(PROFILE)
    assert path == store.path_of(IDENTITY)
    assert store.load(IDENTITY) == PROFILE
    assert store.load(IDENTITY).model().layers == 16


@pytest.mark.parametrize("field", EngineIdentity.__struct_fields__)
def test_an_engine_that_differs_in_anything_has_no_profile(store, field):
    store.save(PROFILE)
    other = msgspec.structs.replace(IDENTITY, **{field: OTHER[field]})
    assert store.load(other) is None


def test_a_profile_of_before_there_were_adapters_and_drafts_is_one_without(store):
    new = {"lora_backend", "drafts"}
    before = {f: getattr(IDENTITY, f) for f in IDENTITY.__struct_fields__ if f not in new}
    assert msgspec.json.decode(msgspec.json.encode(IDENTITY)) == before
    store.save(PROFILE)
    assert store.load(IDENTITY) == PROFILE


def test_a_file_of_another_engine_under_this_name_is_refused(store):
    store.folder.mkdir()
    foreign = msgspec.structs.replace(
        PROFILE, identity=msgspec.structs.replace(IDENTITY, tp_size=2)
    )
    store.path_of(IDENTITY).write_bytes(msgspec.json.encode(foreign))
    with pytest.raises(InputError, match="another engine"):
        store.load(IDENTITY)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: text[:0], "not a profile"),
        (lambda text: text[: len(text) // 2], "not a profile"),
        (lambda text: text.replace(b"0.01", b"-0.01"), "positive time"),
        (lambda text: text.replace(b'"layers"', b'"layer"'), "layer"),
        (lambda text: text.replace(b'"format": 1', b'"format": 99'), "format 99"),
        (lambda text: b"\xff\xfe" + text, "not a profile"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_its_name(store, change, why):
    path = store.save(PROFILE)
    changed = change(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(InputError, match=why) as caught:
        store.load(IDENTITY)
    assert caught.value.path == path


def test_a_file_that_cannot_be_read_is_refused(store):
    store.path_of(IDENTITY).mkdir(parents=True)
    with pytest.raises(InputError, match="cannot be read"):
        store.load(IDENTITY)


def test_a_write_that_fails_leaves_the_earlier_profile_and_nothing_else(store, monkeypatch):
    path = store.save(PROFILE)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("conserve_sgl.profile.store.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        store.save(msgspec.structs.replace(PROFILE, layers=99))
    assert list(store.folder.iterdir()) == [path]
    assert store.load(IDENTITY) == PROFILE


def test_file_names_are_safe_whatever_the_model_is_called():
    odd = msgspec.structs.replace(IDENTITY, model="../../we ird/na:me\n/")
    assert "/" not in odd.file_name
    assert odd.file_name.endswith(".json")
    assert len(msgspec.structs.replace(IDENTITY, model="x" * 500).file_name) < 100


def test_paths_lists_profiles_the_newest_first(store):
    assert store.paths() == []
    old = store.save(PROFILE)
    new = store.save(
        msgspec.structs.replace(PROFILE, identity=msgspec.structs.replace(IDENTITY, tp_size=2))
    )
    import os

    os.utime(old, (1, 1))
    (store.folder / "notes.txt").write_text("not a profile")
    assert store.paths() == [new, old]


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"CONSERVE_PROFILE_DIR": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/conserve/profiles"),
        ({}, str(Path.home() / ".cache" / "conserve" / "profiles")),
    ],
)
def test_where_profiles_are_kept(environment, folder):
    assert ProfileStore.of_environment(environment).folder == Path(folder)


def test_a_profile_is_readable_json_with_its_time(store):
    path = store.save(PROFILE)
    assert read_profile(path).measured_at == PROFILE.measured_at
    assert b'"measured_at": "2026-11-24T21:00:00Z"' in path.read_bytes()


class TestFind:
    @pytest.fixture
    def other(self, store) -> Path:
        """A newer profile, of another model."""
        first = store.save(PROFILE)
        os.utime(first, (1, 1))
        identity = msgspec.structs.replace(IDENTITY, model="some/Model-2B")
        return store.save(msgspec.structs.replace(PROFILE, identity=identity))

    def test_a_file_is_taken_as_it_is(self, store):
        assert store.find(["some/where.json"]) == Path("some/where.json")

    def test_without_a_model_it_is_the_newest(self, store, other):
        assert store.find([]) == other
        assert store.find(["--dtype=bfloat16"]) == other

    @pytest.mark.parametrize(
        "flags",
        [
            ["--port=1", "--model-path=some/Model-1B"],
            ["--model-path", "some/Model-1B", "--port=1"],
            ["--model", "some/Model-1B"],
        ],
    )
    def test_with_a_model_it_is_that_model_s(self, store, other, flags):
        assert store.find(flags) == store.path_of(IDENTITY) != other

    @pytest.mark.parametrize(
        ("flags", "why"),
        [(["--model-path=none/such"], "no profile of none/such"), ([], "no profile;")],
    )
    def test_nothing_found_is_an_error(self, tmp_path, flags, why):
        with pytest.raises(InputError, match=why):
            ProfileStore(tmp_path / "empty").find(flags)
