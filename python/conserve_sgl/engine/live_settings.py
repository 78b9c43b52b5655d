"""The settings of a server that runs, and their changes through SGLang's `/set_internal_state`."""

from __future__ import annotations

import logging
from collections.abc import Callable

from msgspec.structs import replace

from conserve_sgl.config import ConserveConfig, SloConfig
from conserve_sgl.engine.capabilities import Capabilities
from conserve_sgl.engine.host import SetInternalStateReq, SetInternalStateReqOutput
from conserve_sgl.errors import SettingError
from conserve_sgl.settings import Settings, is_setting

__all__ = ["LiveSettings"]

logger = logging.getLogger(__name__)


class LiveSettings:
    """What `settings.py` says may change, as it is now.

    Args:
        config: what the server starts with.
        capabilities: what it has of its model and flags.

    Attributes:
        config: stays what it was, as do the `capabilities`.
        now: the settings of now.
        slo: their objectives, as the policy takes them.
    """

    def __init__(self, config: ConserveConfig, capabilities: Capabilities) -> None:
        self.config, self.capabilities = config, capabilities
        self.now = Settings(config.slo, batches_held=config.batch.start == "held")
        self.slo = config.slo.objectives()
        self._aim: list[Callable[[SloConfig], None]] = []

    def on_change(self, aim: Callable[[SloConfig], None]) -> None:
        """Have `aim` called with the objectives whenever a setting changes."""
        self._aim.append(aim)

    def change(
        self,
        recv_req: SetInternalStateReq,
        change_theirs: Callable[[SetInternalStateReq], SetInternalStateReqOutput],
    ) -> SetInternalStateReqOutput:
        """Change all that `recv_req` asks for, or nothing.

        Args:
            recv_req: numbers by name, SGLang's own among them.
            change_theirs: SGLang's `set_internal_state`.
        """
        asked = recv_req.server_args
        theirs = {name: number for name, number in asked.items() if not is_setting(name)}
        try:
            settings = self.now.changed_by(
                {name: number for name, number in asked.items() if is_setting(name)}
            )
        except SettingError as e:
            logger.warning("conserve: nothing is changed: %s", e)
            return SetInternalStateReqOutput(updated=False)
        if theirs:
            output = change_theirs(replace(recv_req, server_args=theirs))
            if not output.updated:
                return output
        self._use(settings)
        return SetInternalStateReqOutput(updated=True)

    def _use(self, settings: Settings) -> None:
        if settings == self.now:
            return
        logger.info("conserve: from here on %s", settings)
        self.now, self.slo = settings, settings.slo.objectives()
        for aim in self._aim:
            aim(settings.slo)
