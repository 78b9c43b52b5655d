"""The server's configuration: its bounds, its defaults, and the files that are shipped."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import yaml

from conserve_sgl.config import CONFIG_ENV, ConserveConfig
from conserve_sgl.errors import InputError
from conserve_sgl.policy import Rows, StepView
from support.simulated import LinearTimes

CHECKOUT = Path(__file__).resolve().parent.parent
SERVE_FILES = sorted((CHECKOUT / "configs" / "serve").glob("*.yaml"))
DEFAULT_FILE = CHECKOUT / "configs" / "serve" / "default.yaml"

DEFAULTS = ConserveConfig()
SECTIONS = ConserveConfig.__struct_fields__


@pytest.fixture
def load(tmp_path):
    """Loads a configuration of the given text."""

    def load_text(text: str) -> ConserveConfig:
        path = tmp_path / "conserve.yaml"
        path.write_text(text)
        return ConserveConfig.load(path)

    return load_text


def test_an_empty_file_is_all_defaults(load):
    assert load("") == DEFAULTS


def test_a_key_that_is_given_leaves_the_others_at_their_defaults(load):
    config = load("slo:\n  ttft: 99ms\n")
    assert config.slo == msgspec.structs.replace(DEFAULTS.slo, ttft="99ms")
    assert (config.offline, config.memory) == (DEFAULTS.offline, DEFAULTS.memory)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("offline: {queue_requests: 1, retry_after_s: 1}", id="the smallest queue"),
        pytest.param("slo: {ttft: 1x, tpot: 1x}", id="no slack at all"),
        pytest.param("slo: {ttft: 0.5ms, tpot: 12.25ms}", id="parts of milliseconds"),
        pytest.param("slo: {yield_ms: 0.1}", id="a short yield bound"),
        pytest.param("memory: {online_reserve: 0.0}", id="no reserve"),
        pytest.param("memory: {online_reserve: 1.0}", id="all of the pool"),
        pytest.param("memory: {online_reserve: 1}", id="a whole number for a share"),
    ],
)
def test_the_edges_of_the_ranges_are_in(load, text):
    section, given = next(iter(yaml.safe_load(text).items()))
    loaded = msgspec.to_builtins(load(text))[section]
    assert given.items() <= loaded.items()


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        pytest.param(
            "offline: {queue_requests: 0}", "offline.queue_requests", "at least 1", id="queue"
        ),
        pytest.param(
            "offline: {retry_after_s: 0}", "offline.retry_after_s", "at least 1", id="wait"
        ),
        pytest.param("slo: {ttft: 0ms}", "slo", "above 0", id="no time"),
        pytest.param("slo: {tpot: 0.9x}", "slo", "1x or more", id="less than online alone"),
        pytest.param("slo: {tpot: 200}", "slo.tpot", "must be text", id="no unit"),
        pytest.param(
            "slo: {tpot: 2s}",
            "slo",
            "tpot: '2s' is not an objective such as 200ms or 1.25x",
            id="another unit",
        ),
        pytest.param("slo: {yield_ms: 0}", "slo.yield_ms", "above 0", id="no yield bound"),
        pytest.param(
            "memory: {online_reserve: -0.01}",
            "memory.online_reserve",
            "from 0 to 1",
            id="below nothing",
        ),
        pytest.param(
            "memory: {online_reserve: 1.01}", "memory.online_reserve", "from 0 to 1", id="above all"
        ),
        pytest.param(
            "memory: {online_reserve: 25}", "memory.online_reserve", "not 25", id="percent"
        ),
        pytest.param(
            "memory: {online_reserve: .nan}", "memory.online_reserve", "no number", id="no number"
        ),
        pytest.param(
            "memory: {online_reserve: .inf}", "memory.online_reserve", "no number", id="inf"
        ),
        pytest.param(
            "batch: {retention_hours: .inf}", "batch.retention_hours", "no number", id="for ever"
        ),
        pytest.param(
            "batch: {retention_hours: 1.0e+300}",
            "batch.retention_hours",
            "no number",
            id="longer than there is time",
        ),
        pytest.param(
            "batch: {retention_hours: 900000}",
            "batch.retention_hours",
            "above 0 and at most 876600, not 900000",
            id="a hundred years and more",
        ),
        pytest.param(
            "batch: {storage_dir: ''}",
            "batch.storage_dir",
            "must be text that is not empty or null, not an empty text",
            id="the current folder",
        ),
        pytest.param(
            'batch: {storage_dir: "a\\0b"}',
            "batch.storage_dir",
            r"'\x00'",
            id="no name of a folder",
        ),
        pytest.param("batch: {storage_dir: ~/b}", "batch", "the whole path", id="a home folder"),
        pytest.param(
            "batch: {endpoints: [http://a/v1]}",
            "batch",
            "endpoints: give 'http://a/v1' without /v1",
            id="an endpoint with a route",
        ),
        pytest.param(
            "batch: {endpoints: [http://a, http://a]}",
            "batch",
            "endpoints: 'http://a' is given twice",
            id="an endpoint twice",
        ),
        pytest.param(
            "batch: {endpoints: http://a}", "batch.endpoints", "list", id="one endpoint, no list"
        ),
        pytest.param(
            "batch: {discover: 'gateway:80'}",
            "batch",
            "discover: 'gateway:80' is not a base URL",
            id="a gateway that is no URL",
        ),
        pytest.param(
            "batch: {endpoints: [http://a], discover: http://b}",
            "batch",
            "endpoints: servers, or the gateway that has them (discover)",
            id="endpoints and a gateway",
        ),
        pytest.param("offline: {queue: 1}", "offline.queue", "unknown key", id="unknown key"),
        pytest.param("budget: {tokens: 1}", "budget", "unknown key", id="unknown section"),
        pytest.param("offline:", "offline", "not null", id="a section without keys"),
    ],
)
def test_what_is_out_of_range_or_unknown_is_refused(load, text, key, reason):
    with pytest.raises(InputError) as caught:
        load(text)
    assert (caught.value.key, caught.value.line) == (key, 1)
    assert reason in caught.value.reason


@pytest.mark.parametrize("name", SECTIONS)
def test_the_tree_is_frozen_to_its_leaves(name):
    section = getattr(DEFAULTS, name)
    with pytest.raises(AttributeError, match="immutable"):
        setattr(DEFAULTS, name, section)
    for key in section.__struct_fields__:
        with pytest.raises(AttributeError, match="immutable"):
            setattr(section, key, 1)


@pytest.mark.parametrize("path", SERVE_FILES, ids=lambda path: path.name)
def test_every_file_that_is_shipped_loads(path):
    assert isinstance(ConserveConfig.load(path), ConserveConfig)


def test_the_default_file_says_the_defaults():
    assert ConserveConfig.load(DEFAULT_FILE) == DEFAULTS


def test_the_default_file_names_every_key():
    assert yaml.safe_load(DEFAULT_FILE.read_text()) == msgspec.to_builtins(DEFAULTS)


@pytest.mark.parametrize("value", [None, ""], ids=["not set", "empty"])
def test_without_the_variable_there_is_no_configuration(monkeypatch, value):
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    if value is not None:
        monkeypatch.setenv(CONFIG_ENV, value)
    assert ConserveConfig.from_environment() is None


def test_the_variable_names_the_file(monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(DEFAULT_FILE))
    assert ConserveConfig.from_environment() == DEFAULTS


def test_a_variable_that_names_no_file_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "none.yaml"))
    with pytest.raises(InputError, match="cannot be read"):
        ConserveConfig.from_environment()


VIEW = StepView(now_s=100.0, offline_waiting=1, free_rows=8, max_rows=8, chunk_tokens=1024)


@pytest.mark.parametrize(("page_tokens", "smallest"), [(1, 32), (64, 64)])
def test_the_smallest_chunk_of_the_budget_is_worth_a_step_and_at_least_a_page(
    page_tokens, smallest
):
    budget = DEFAULTS.budget(LinearTimes(token=1.0), page_tokens=page_tokens)
    assert budget.plan(VIEW).offline_prefill_tokens == smallest  # a second a token


def test_the_budget_has_what_is_configured(load):
    config = load("slo: {tpot: 200ms}\noffline: {min_share: 0.5}")
    budget = config.budget(LinearTimes(), page_tokens=1)
    assert budget.pace.tpot_s == 0.2
    late = msgspec.structs.replace(
        VIEW, online_decoding=Rows(1, 100), online_due_s=90.0, online_late_s=90.0
    )
    budget.plan(late)
    earned_s = 0.1  # half of the fifth of a second that goes by
    bound_s = budget.plan(msgspec.structs.replace(late, now_s=100.2)).bound_s
    assert bound_s == pytest.approx(0.033 + earned_s)
