"""Servers that are not there."""

from __future__ import annotations

from support.fake_sglang import second_server, server

__all__ = ["second_server", "server"]
