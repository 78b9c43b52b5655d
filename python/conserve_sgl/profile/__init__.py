"""Latency profiles: which steps are measured, how, where they are kept, and how a person looks at
them.
"""

from conserve_sgl.profile.store import (
    DIR_ENV,
    EngineIdentity,
    Profile,
    ProfileStore,
    read_profile,
)

__all__ = ["DIR_ENV", "EngineIdentity", "Profile", "ProfileStore", "read_profile"]
