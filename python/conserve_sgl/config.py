"""The configuration tree: frozen, from one YAML file, units in the names.

`docs/configuration.md` lists every key; a test keeps that page complete.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from conserve_sgl.strict_yaml import load_yaml

__all__ = ["CONFIG_ENV", "BudgetConfig", "ConserveConfig", "MemoryConfig", "OfflineConfig"]

CONFIG_ENV = "CONSERVE_CONFIG"
"""Environment variable with the path of the YAML file; without it the plugin does nothing."""

Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class OfflineConfig(_Section):
    """How much offline work the server takes in.

    Args:
        queue_requests: offline requests held by the server, running ones included; more are
            answered 429.
        retry_after_s: seconds that a 429 asks the client to wait at least.
        no_deadline_share: share of offline service that jobs without a deadline get while jobs
            with one wait.
    """

    queue_requests: Count = 4096
    retry_after_s: Count = 5
    no_deadline_share: Share = 0.1


class BudgetConfig(_Section):
    """How much offline work a step may carry.

    Args:
        step_tokens: prompt and decode tokens of a step; offline prompts get what online leaves.
        resident_rows: offline requests in the engine at a time.
        rows_beside_online: offline requests that decode while an online request is present; the
            others sit out and keep their KV.
    """

    step_tokens: Count = 512
    resident_rows: Count = 64
    rows_beside_online: Natural = 16


class MemoryConfig(_Section):
    """How the KV pool is shared.

    Args:
        online_reserve: share of the KV pool that admitting offline work leaves free.
    """

    online_reserve: Share = 0.25


class ConserveConfig(_Section):
    """The whole of it."""

    offline: OfflineConfig = OfflineConfig()
    budget: BudgetConfig = BudgetConfig()
    memory: MemoryConfig = MemoryConfig()

    @classmethod
    def load(cls, path: Path | str) -> ConserveConfig:
        """Read the file at `path`.

        Raises:
            InputError: naming file, line and key.
        """
        return load_yaml(path, cls)

    @classmethod
    def from_environment(cls) -> ConserveConfig | None:
        """The configuration that `CONSERVE_CONFIG` names, or None when it is not set.

        Raises:
            InputError: it is set, but the file cannot be used.
        """
        path = os.environ.get(CONFIG_ENV)
        return cls.load(path) if path else None
