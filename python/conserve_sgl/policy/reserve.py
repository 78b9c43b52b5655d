"""How much of the KV pool, and of the rows, is kept free for online requests.

The reserve follows the recent demand: what online requests held and asked for at the peak of the
last minutes, less what they hold now, up to a share of the pool that the operator sets.
"""

from __future__ import annotations

from conserve_sgl.policy.step import StepView

__all__ = ["OnlineReserve", "most_offline_rows"]

_HALF_LIFE_S = 120.0
_LEAST_SHARE = 0.02
"""Of the pool, whatever was seen: the next request may come before any other has."""


_ONLINE_ROWS_SHARE = 1 / 8


def most_offline_rows(rows: int) -> int:
    """Of an engine's request rows, those that offline work may hold, at least one.

    Online requests take rows back, but those that are free are there at once.
    """
    return max(rows - max(int(rows * _ONLINE_ROWS_SHARE), 1), 1)


class OnlineReserve:
    """Sizes the reserve; remembers the peak of online demand, which fades by half in two minutes.

    Args:
        at_most: share of the KV pool, 0 to 1.
    """

    def __init__(self, *, at_most: float) -> None:
        self._at_most = at_most
        self._peak_tokens = 0.0
        self._seen_s = 0.0

    def tokens(self, view: StepView) -> int:
        """KV tokens that offline admissions must leave free in the step of `view`."""
        held = view.online_decoding.context_tokens
        held += sum(prompt.resident_tokens for prompt in view.online_prompts)
        wanted = held + sum(prompt.new_tokens for prompt in view.online_prompts)
        self._follow(view.now_s, wanted)
        if not view.online_present and not view.offline_resident:
            # On an empty engine a request larger than what the reserve leaves may run: it would
            # otherwise wait for ever, and nobody is there to be served by the reserve.
            return 0
        reserve = max(self._peak_tokens - held, _LEAST_SHARE * view.total_kv_tokens)
        return int(min(reserve, self._at_most * view.total_kv_tokens))

    def _follow(self, now_s: float, wanted_tokens: float) -> None:
        faded = 0.5 ** (max(now_s - self._seen_s, 0.0) / _HALF_LIFE_S)
        peak = self._peak_tokens * faded
        # Below one token it is gone; this also keeps the empty engine's arithmetic trivial.
        self._peak_tokens = max(float(wanted_tokens), peak if peak >= 1.0 else 0.0)
        self._seen_s = now_s
