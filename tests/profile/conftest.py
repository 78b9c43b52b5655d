from __future__ import annotations

from datetime import UTC, datetime

import pytest

from conserve_sgl.profile import Profile
from support.profiles import IDENTITY, steps


@pytest.fixture
def profile() -> Profile:
    return Profile(
        identity=IDENTITY,
        measured_at=datetime(2026, 11, 24, 21, 0, tzinfo=UTC),
        layers=16,
        samples=tuple(steps()),
    )
