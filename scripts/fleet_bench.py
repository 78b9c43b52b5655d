"""How far one `conserve run-batch` goes over many servers, without an engine or a GPU.

    python scripts/fleet_bench.py --servers 100 --lines 50000

Starts the servers (conserve's HTTP layer before an engine that only waits, `offline.take: spare`,
all in one process), of which `--slow` are five times slower than the others and `--killed` are
killed when a third of the lines are done, and prints what became of the batch: a row for the table
in docs/fleet.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvicorn

from conserve_sgl.ingress.in_hand import InHand
from conserve_sgl.ingress.middleware import ServiceClassMiddleware
from conserve_sgl.ingress.spare import SpareNow, SpareRoom

ROWS = 32
AHEAD = 4
IN_FLIGHT = ROWS + 2 * AHEAD
SLOWER = 5
LINES = "/v1/chat/completions"


class Server:
    """An ASGI application whose engine only waits: each line has one of ROWS rows for `row_s`."""

    def __init__(self, row_s: float) -> None:
        self.row_s = row_s
        self.answered = 0
        self.refused = 0
        self.in_hand = 0
        self.peak = 0
        self._rows = asyncio.Semaphore(ROWS)
        in_hand = InHand()
        room = SpareRoom(self, in_hand)
        self.app = ServiceClassMiddleware(
            self._answer,
            max_offline=4096,
            retry_after_s=1,
            on_refusal=self._count_refusal,
            room=lambda: room,
            in_hand=in_hand,
            take_spare_only=True,
        )

    def latest(self) -> SpareNow:
        return SpareNow(max(ROWS + AHEAD - self.in_hand, 0), time.monotonic())

    def _count_refusal(self) -> None:
        self.refused += 1

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == LINES:
            await receive()
            self.in_hand += 1
            self.peak = max(self.peak, self.in_hand)
            try:
                async with self._rows:
                    await asyncio.sleep(self.row_s)
            finally:
                self.in_hand -= 1
            self.answered += 1
        body = b'{"model_path": "m"}' if scope["method"] == "GET" else ANSWER
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


ANSWER = json.dumps(
    {
        "choices": [{"message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }
).encode()


async def serve(servers: int, slow: int, rate: float) -> None:
    """Serve until standard input ends; a line there kills so many of the last, and counts."""
    row_s = ROWS * servers / rate
    fleet = [Server(row_s * (SLOWER if i < slow else 1)) for i in range(servers)]
    by_port: dict[int, Server] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await by_port[scope["server"][1]].app(scope, receive, send)

    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", backlog=4096)
    sockets = []
    for server in fleet:
        sock = config.bind_socket()
        by_port[sock.getsockname()[1]] = server
        sockets.append(sock)
    uvicorn_server = uvicorn.Server(config)
    serving = asyncio.create_task(uvicorn_server.serve(sockets))
    print(json.dumps(list(by_port)), flush=True)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while order := await reader.readline():
        for i in range(servers - int(order), servers):
            uvicorn_server.servers[i].close()
            for connection in list(uvicorn_server.server_state.connections):
                if connection.server[1] == list(by_port)[i]:
                    connection.transport.abort()
        counts = [(s.answered, s.refused, s.peak) for s in fleet]
        print(json.dumps(counts), flush=True)
    uvicorn_server.should_exit = uvicorn_server.force_exit = True
    await serving


class Fleet:
    """The process of the servers."""

    def __init__(self, args: argparse.Namespace) -> None:
        argv = [sys.executable, __file__, "--serve", "--servers", str(args.servers)]
        argv += ["--slow", str(args.slow), "--rate", str(args.rate)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(argv, text=True, **pipes)
        self.urls = [f"http://127.0.0.1:{port}" for port in json.loads(self._line())]

    def _line(self) -> str:
        return self._process.stdout.readline()

    def count(self, *, kill: int = 0) -> list[list[int]]:
        """Answered, refused and most in hand of each server, once so many are killed."""
        self._process.stdin.write(f"{kill}\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def write_lines(path: Path, lines: int) -> None:
    """A batch of short chats, in twenty tasks that begin alike."""
    with path.open("w") as file:
        for i in range(lines):
            system = {"role": "system", "content": f"task {i % 20} " + "x" * 300}
            body = {"model": "m", "messages": [system, {"role": "user", "content": f"line {i}"}]}
            line = {"custom_id": str(i), "method": "POST", "url": LINES, "body": body}
            file.write(json.dumps(line) + "\n")


def peak_mib(pid: int) -> int:
    """The most memory that the process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024 if "VmHWM:" in status else 0


def measure(args: argparse.Namespace, folder: Path) -> str:
    """Run it once, and say what became of it."""
    servers, lines = args.servers, args.lines
    write_lines(folder / "in.jsonl", lines)
    fleet = Fleet(args)
    argv = [sys.executable, "-m", "conserve_sgl.cli", "run-batch"]
    argv += ["-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl")]
    argv += ["--max-in-flight", str(servers * IN_FLIGHT)]
    argv += [part for url in fleet.urls for part in ("--endpoint", url)]
    run = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory, is_killed = 0, False
    first, most = None, None  # (when, lines done) after the start, and when most are done
    while run.poll() is None:
        time.sleep(0.1)
        memory = max(memory, peak_mib(run.pid))
        done = sum(answered for answered, _, _ in fleet.count())
        if done >= lines // 3 and not is_killed:
            fleet.count(kill=args.killed)
            is_killed = True
        if done and first is None:
            first = time.monotonic(), done
        if done < 0.9 * lines:
            most = time.monotonic(), done
    counts = fleet.count()
    fleet.stop()
    ids = Counter(json.loads(line)["custom_id"] for line in (folder / "out.jsonl").open())
    assert run.returncode == 0, f"conserve run-batch ended with {run.returncode}"
    assert ids == {str(i): 1 for i in range(lines)}, "a line is missing, or there twice"
    rate = (most[1] - first[1]) / (most[0] - first[0])
    served = sum(answered for answered, _, _ in counts)
    refused = sum(refused for _, refused, _ in counts)
    well = [answered for answered, _, _ in counts[args.slow : servers - args.killed]]
    slow = [answered for answered, _, _ in counts[: args.slow]]
    cells = [
        f"{servers}",
        f"{args.slow} slow, {args.killed} killed",
        f"{lines:,}",
        f"{rate:,.0f} of {args.rate:,.0f}",
        f"{100 * refused / (served + refused):.1f} %",
        f"{memory} MiB",
        f"{min(well):,} to {max(well):,}" + (f", {slow[0]:,}" if slow else ""),
        f"{max(peak for _, _, peak in counts)}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the arguments, and do it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--servers", type=int, default=10)
    parser.add_argument("--slow", type=int, default=1)
    parser.add_argument("--killed", type=int, default=1)
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--rate", type=float, default=1000.0, help="lines/s of all, were none slow")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.servers, args.slow, args.rate))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(measure(args, Path(folder)))


if __name__ == "__main__":
    main()
