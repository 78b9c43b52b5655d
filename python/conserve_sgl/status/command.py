"""`conserve status`: look at servers, once or for as long as somebody watches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import msgspec
from rich.console import Console
from rich.live import Live

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.interrupt import Interrupt, Stopped, pause
from conserve_sgl.errors import InputError
from conserve_sgl.json_lines import json_line
from conserve_sgl.status.ask import Ask
from conserve_sgl.status.fetch import Seen, look_at_all
from conserve_sgl.status.recording import Recorder, read_recording
from conserve_sgl.status.replay import replay
from conserve_sgl.status.screen import whole_screen
from conserve_sgl.status.trace import chrome_trace

__all__ = ["replay_file", "show", "watch"]

EVERY_S = 1.0
_STRIP_STEPS = 1000
"""Steps that the screen sums up; of a fast engine, the last ten seconds or so."""


def show(
    endpoints: Sequence[str],
    *,
    api_key: str | None,
    as_json: bool,
    trace: Path | None,
    console: Console,
) -> bool:
    """Look once.

    Args:
        endpoints: base URLs.
        api_key: as the servers' own, or None.
        as_json: a line of JSON for each server instead of a screen.
        trace: gets the steps that they keep, as a Chrome trace; or None.
        console: shows it.

    Returns:
        Whether all of them answered.

    Raises:
        InputError: `trace` cannot be written.
    """
    steps = Ask(since=None, most=None if trace else 0 if as_json else _STRIP_STEPS)
    seen = asyncio.run(look_at_all(endpoints, dict.fromkeys(endpoints, steps), api_key=api_key))
    if trace is not None:
        write_trace(trace, seen)
    _print(seen, console, as_json=as_json)
    return _all_answered(seen)


def watch(
    endpoints: Sequence[str],
    *,
    api_key: str | None,
    as_json: bool,
    record: Path | None,
    console: Console,
    rounds: int | None = None,
) -> bool:
    """Look once a second until Ctrl-C or SIGTERM.

    Args:
        endpoints, api_key, as_json, console: as for `show`.
        record: gets every look, with all steps since the one before; or None.
        rounds: looks so often and ends; None never does by itself.

    Returns:
        Whether all of them answered the last time.

    Raises:
        InputError: `record` cannot be used.
        JobError: the disk did not take a line.
    """
    recorder = None if record is None else Recorder(record)
    try:
        return asyncio.run(_watch(endpoints, api_key, as_json, recorder, console, rounds))
    finally:
        if recorder is not None:
            recorder.close()


async def _watch(
    endpoints: Sequence[str],
    api_key: str | None,
    as_json: bool,
    recorder: Recorder | None,
    console: Console,
    rounds: int | None,
) -> bool:
    clock, last = Clock(), list[Seen]()
    interrupt = Interrupt(0.0, lambda _text: None)
    live = (
        Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    )

    async def looks() -> None:
        nonlocal last
        for number in count(1):
            last = await _one_round(endpoints, api_key, recorder)
            if live is not None:
                live.update(whole_screen(last), refresh=True)
            else:
                _print(last, console, as_json=as_json)
            if number == rounds:
                return
            await pause(EVERY_S, interrupt.stopping, clock)

    async def ticks() -> None:
        await asyncio.Event().wait()

    async def until_stopped() -> None:
        try:
            await looks()
        except Stopped:
            return

    if live is not None:
        live.start()
    try:
        await interrupt.run([until_stopped()], ticks())
    finally:
        if live is not None:
            live.stop()
    return _all_answered(last)


async def _one_round(
    endpoints: Sequence[str], api_key: str | None, recorder: Recorder | None
) -> list[Seen]:
    if recorder is None:
        asks = dict.fromkeys(endpoints, Ask(since=None, most=_STRIP_STEPS))
        return await look_at_all(endpoints, asks, api_key=api_key)
    asks = {url: recorder.which(url) for url in endpoints}
    seen = await look_at_all(endpoints, asks, api_key=api_key)
    new = [one.endpoint for one in seen if recorder.restarted(one)]
    for url in new:
        recorder.restart(url)
    again = {url: recorder.which(url) for url in new}
    whole = {one.endpoint: one for one in await look_at_all(new, again, api_key=api_key)}
    return [recorder.append(whole.get(one.endpoint, one)) for one in seen]


def replay_file(path: Path, *, trace: Path | None, console: Console) -> None:
    """Show a recording.

    Args:
        path: the recording.
        trace: gets its steps as a Chrome trace; or None.
        console: shows it.

    Raises:
        InputError: it is none, or `trace` cannot be written.
    """
    if trace is not None:
        write_trace(trace, list(read_recording(path)))
    replay(path, console)


def write_trace(path: Path, seen: Sequence[Seen]) -> None:
    """Write the steps of `seen` as a Chrome trace.

    Raises:
        InputError: it cannot be written, or there are no steps.
    """
    if not any(one.snapshot and one.snapshot.steps for one in seen):
        raise InputError(path, "there is no step to write; servers keep them with status.enabled")
    try:
        path.write_bytes(msgspec.json.encode(chrome_trace(seen)))
    except OSError as e:
        raise InputError(path, f"cannot be written: {e.strerror or e}") from e


def _print(seen: Sequence[Seen], console: Console, *, as_json: bool) -> None:
    if not as_json:
        console.print(whole_screen(seen), highlight=False, soft_wrap=False)
        return
    for one in seen:
        line = json_line(one).decode().rstrip("\n")
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _all_answered(seen: Sequence[Seen]) -> bool:
    return all(one.is_ != "down" for one in seen)
