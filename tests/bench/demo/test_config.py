from __future__ import annotations

from pathlib import Path

import pytest

from conserve_sgl.bench.demo.config import DemoConfig, fill
from conserve_sgl.errors import InputError
from conserve_sgl.strict_yaml import load_yaml


@pytest.fixture
def demo_yaml(checkout: Path) -> Path:
    return checkout / "configs" / "bench" / "demo.yaml"


def test_the_shipped_demo_has_bursts_within_what_two_cores_can_serve(demo_yaml: Path) -> None:
    config = load_yaml(demo_yaml, DemoConfig)

    arrivals = config.online.arrivals.draw(config.online.duration_s, config.seed)

    assert 20 <= len(arrivals) <= 60
    assert sum(arrival.output_tokens for arrival in arrivals) / config.online.duration_s < 12
    assert sum(arrival.prompt_tokens for arrival in arrivals) / config.online.duration_s < 100


@pytest.mark.parametrize(
    ("was", "becomes", "key"),
    [
        ("ttft_ms: 1500", "ttft: 1500", "slo.ttft"),
        ("kind: on_off", "kind: sometimes", "online.arrivals"),
        ("mean_on_s: 8", "mean_on_s: -8", "online.arrivals.mean_on_s"),
        ('"{url}"', '"{uri}"', "offline"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    demo_yaml: Path, tmp_path: Path, was: str, becomes: str, key: str
) -> None:
    text = demo_yaml.read_text()
    assert was in text
    path = tmp_path / "demo.yaml"
    path.write_text(text.replace(was, becomes))

    with pytest.raises(InputError) as refused:
        load_yaml(path, DemoConfig)

    assert refused.value.key.startswith(key)


def test_fill_replaces_names_and_leaves_other_braces() -> None:
    assert fill('{"a": "{port}"}', {"port": "80"}) == '{"a": "80"}'


def test_the_stock_demo_differs_in_its_server_alone(demo_yaml: Path) -> None:
    ours = load_yaml(demo_yaml, DemoConfig)
    stock = load_yaml(demo_yaml.with_name("demo-stock-priority.yaml"), DemoConfig)
    assert (stock.seed, stock.slo, stock.online) == (ours.seed, ours.slo, ours.online)
    assert stock.offline == ours.offline
    assert "--enable-priority-scheduling" in stock.server.command
    assert "conserve_sgl.cli" not in stock.server.command
