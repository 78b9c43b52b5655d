"""The command `conserve`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from conserve_sgl import __version__, compat
from conserve_sgl.client.bounds import MOST_IN_FLIGHT
from conserve_sgl.config import CONFIG_ENV, ConserveConfig
from conserve_sgl.errors import ConserveError, InputError, ServerError, SettingError

__all__ = ["app", "main"]

_BAD_INPUT, _FAILED = 2, 1
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
# A fresh interpreter: the server is then exactly `CONSERVE_CONFIG=... sglang serve ...`.
_SGLANG_SERVE = [sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"]
_READY_S = 3600.0
_MOST_TIME = 10**9  # in seconds or milliseconds
_DEFAULT_ENDPOINT = "http://127.0.0.1:30000"

app = typer.Typer(
    name="conserve",
    help="Serve online requests and offline work on one SGLang engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help=f"The configuration, YAML. Default: ${CONFIG_ENV}."),
]


def _sendable(key: str | None) -> str | None:
    if key is not None and not key.isprintable():
        raise typer.BadParameter("holds what cannot be sent, such as a line break")
    return key


def _time(number: float | None) -> float | None:
    if number is not None and not 0 < number <= _MOST_TIME:
        raise typer.BadParameter(f"must be above 0 and at most {_MOST_TIME}, not {number:g}")
    return number


ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="CONSERVE_API_KEY",
        callback=_sendable,
        help="Bearer token. Better in the environment.",
    ),
]


def main() -> NoReturn:
    """Run the command line; an error of ours is its text on stderr, and no traceback.

    Exit code 2: bad input, nothing was done. 1: anything else that went wrong.
    """
    try:
        app()
    except ConserveError as e:
        Console(stderr=True, soft_wrap=True).print(f"conserve: {e}", style="red", markup=False)
        sys.exit(_BAD_INPUT if isinstance(e, (InputError, SettingError)) else _FAILED)
    sys.exit(0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"conserve-sgl {__version__}")
        raise typer.Exit


@app.command(context_settings=_PASS_ON)
def serve(context: typer.Context, config: ConfigOption = None) -> None:
    """Start an SGLang server with conserve: conserve serve --config FILE -- SGLANG FLAGS."""
    os.environ[CONFIG_ENV] = str(_checked(config))
    sys.stdout.flush()
    os.execv(sys.executable, [*_SGLANG_SERVE, *context.args])


@app.command(context_settings=_PASS_ON)
def profile(
    context: typer.Context,
    config: ConfigOption = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show what is stored; start nothing.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="A log of steps (CONSERVE_STEP_LOG) to predict; implies --show."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="The picture, PNG. Default: beside the profile.")
    ] = None,
) -> None:
    """Measure how long an engine's steps take: conserve profile --config FILE -- SGLANG FLAGS.

    Starts the server that the flags describe, has it measured anew, stores the profile and stops.
    With --show: the profile in a file, conserve profile --show FILE, or else the newest one of
    the model that the flags name.
    """
    from conserve_sgl.profile import ProfileStore, read_profile
    from conserve_sgl.profile.report import plot_profile, print_check, print_profile
    from conserve_sgl.profile.steps import read_steps

    console, store = Console(), ProfileStore.of_environment()
    steps = None if check is None else read_steps(check)
    if show or steps:
        path = store.find(context.args)
    else:
        with TemporaryDirectory(prefix="conserve-profile-") as folder:
            measured = _measured_in(Path(folder), context.args, _checked(config), console)
            path = store.save(read_profile(measured))
    found = read_profile(path)
    print_profile(console, found, path)
    if steps:
        print_check(console, found, steps)
    picture = plot or path.with_suffix(".png")
    plot_profile(found, picture)
    console.print(f"predicted against measured: {picture}", highlight=False, soft_wrap=True)


@app.command("eval")
def run_eval(
    context: typer.Context,
    job: Annotated[Path, typer.Argument(help="The job, YAML; docs/jobs.md says what it holds.")],
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="A server's base URL, instead of the job's; may be repeated."),
    ] = None,
    discover: Annotated[
        str | None,
        typer.Option(help="Base URL of a gateway of SGLang: send straight to its workers."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder for results, instead of the job's.")
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_IN_FLIGHT, help="Requests at a time, instead of the job's."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many lines of every task.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Throw earlier results in the folder away.")
    ] = False,
    api_key: ApiKeyOption = None,
) -> None:
    """Run an offline job, or go on with it where it stopped.

    Exit code 0: every line is done. 1: some lines failed, or the job
    cannot go on. 2: bad input, nothing was sent. 130: interrupted.
    """
    from conserve_sgl.jobs import run_job

    code = run_job(
        job,
        console=Console(stderr=True),
        endpoints=endpoint,
        discover=discover,
        output=output,
        max_in_flight=max_in_flight,
        limit=limit,
        fresh=fresh,
        api_key=api_key,
        prefers_api_key=_is_typed(context, "api_key"),
    )
    raise typer.Exit(code)


@app.command("run-batch")
def run_batch(
    input: Annotated[
        str,
        typer.Option(
            "--input",
            "-i",
            help="A batch file, JSONL, as for OpenAI's Batch API; a URL, or - for standard input.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="Gets the answers; lines in it are done. A URL gets it by PUT."
        ),
    ],
    error_file: Annotated[
        str | None,
        typer.Option(help="Gets the lines that failed. Default: beside the output, .errors.jsonl."),
    ] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(help="Base URL of a server or gateway; may be repeated."),
    ] = None,
    discover: Annotated[
        str | None,
        typer.Option(help="Base URL of a gateway of SGLang: send straight to its workers."),
    ] = None,
    max_in_flight: Annotated[
        int, typer.Option(min=1, max=MOST_IN_FLIGHT, help="Requests at a time.")
    ] = 64,
    priority: Annotated[
        int,
        typer.Option(help="Sent along for gateways; 1 if low values are the urgent ones there."),
    ] = -1,
    api_key: ApiKeyOption = None,
    request_timeout_s: Annotated[
        float | None, typer.Option(help="Give a request up after so long. Default: never.")
    ] = None,
) -> None:
    """Run a batch file on servers that are there, or go on with it where it stopped.

    Exit code 0: every line is in the output. 1: some lines failed, or it
    cannot go on. 2: bad input, nothing was sent. 130: interrupted.
    """
    from conserve_sgl.batch import run_batch as command
    from conserve_sgl.batch.remote_files import local_copy

    job = command.RunBatch(
        input=input,
        output=output,
        errors=error_file or str(local_copy(output).with_suffix(".errors.jsonl")),
        endpoints=endpoint or ([] if discover else [_DEFAULT_ENDPOINT]),
        discover=discover,
        max_in_flight=max_in_flight,
        priority=priority,
        api_key=api_key,
        request_timeout_s=request_timeout_s,
    )
    raise typer.Exit(command.run_batch(job, console=Console(stderr=True)))


@app.command()
def tune(
    endpoint: Annotated[
        list[str] | None, typer.Option(help="A server's base URL; may be repeated.")
    ] = None,
    offline: Annotated[
        Literal["run", "pause"] | None,
        typer.Option(help="pause: offline requests give up rows and KV and wait; run: they go on."),
    ] = None,
    batches: Annotated[
        Literal["run", "hold"] | None,
        typer.Option(help="hold: nothing more of any batch is sent; run: it is. See batch.start."),
    ] = None,
    ttft: Annotated[
        str | None, typer.Option(help="As slo.ttft of the configuration: 1500ms, 1.25x.")
    ] = None,
    tpot: Annotated[str | None, typer.Option(help="As slo.tpot: 200ms, 1.25x.")] = None,
    yield_ms: Annotated[float | None, typer.Option(callback=_time, help="As slo.yield_ms.")] = None,
    api_key: ApiKeyOption = None,
    admin_api_key: Annotated[
        str | None,
        typer.Option(
            envvar="CONSERVE_ADMIN_API_KEY",
            callback=_sendable,
            help="The one for changes, if the server has two.",
        ),
    ] = None,
) -> None:
    """Change servers while they run, until they restart; without an option, show what holds.

    Exit code 0: all changed. 1: a server could not be changed; those before it are. 2: bad input.
    """
    from conserve_sgl.settings import OfflineWork, batches_number, offline_number, slo_numbers
    from conserve_sgl.tune import tune as tune_servers

    numbers = slo_numbers(ttft=ttft, tpot=tpot, yield_ms=yield_ms)
    if offline is not None:
        numbers |= offline_number(OfflineWork.RUNS if offline == "run" else OfflineWork.PAUSED)
    if batches is not None:
        numbers |= batches_number(held=batches == "hold")
    servers = endpoint or [_DEFAULT_ENDPOINT]
    _check_endpoints(servers, "--endpoint")
    tune_servers(servers, numbers, api_key=api_key, admin_api_key=admin_api_key, console=Console())


@app.command()
def status(
    endpoint: Annotated[
        list[str] | None, typer.Argument(help=f"Servers' base URLs. Default: {_DEFAULT_ENDPOINT}.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look once a second, until Ctrl-C.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for each server and look.")
    ] = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Append every look to this file, with all steps; implies --watch."),
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Show what was recorded in this file; ask no server.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write the steps to this file, for chrome://tracing and Perfetto."),
    ] = None,
    api_key: ApiKeyOption = None,
) -> None:
    """What servers do now, and what bounds offline work: conserve status [URL ...].

    Exit code 0: all answered. 1: one did not. 2: bad input.
    """
    from conserve_sgl.status.command import replay_file, show
    from conserve_sgl.status.command import watch as watch_servers

    if replay is not None:
        if endpoint or watch or record or as_json:
            raise typer.BadParameter("asks no server; it goes with --trace", param_hint="--replay")
        replay_file(replay, trace=trace, console=Console())
        return
    servers = endpoint or [_DEFAULT_ENDPOINT]
    _check_endpoints(servers, "ENDPOINT")
    console = Console()
    if not (watch or record):
        answered = show(servers, api_key=api_key, as_json=as_json, trace=trace, console=console)
    elif trace is not None:
        raise typer.BadParameter("record first, then --replay FILE --trace", param_hint="--trace")
    else:
        answered = watch_servers(
            servers, api_key=api_key, as_json=as_json, record=record, console=console
        )
    raise typer.Exit(0 if answered else _FAILED)


@app.command(context_settings={"allow_extra_args": True})
def bench(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="The benchmark, YAML; docs/benchmarks.md explains it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model, instead of the file's.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The online trace, instead of the file's.")
    ] = None,
    systems: Annotated[
        str, typer.Option(help="Only these systems, names with commas between.")
    ] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help="Instead of the file's.")] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=1, callback=_time, help="Seconds of the stream, instead of the file's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. Default: out/bench/NAME.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what the folder holds already.")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="Draw pictures when all is measured.")] = True,
    time_limit: Annotated[
        float | None,
        typer.Option(min=0, help="Begin no run that would not end within so many seconds."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Set the results in two folders side by side."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write the results of scripts/gpu/run.sh in this folder to --out, .md."),
    ] = None,
    micro: Annotated[
        bool, typer.Option("--micro", help="Time single operations instead, without a server.")
    ] = False,
) -> None:
    """Measure systems side by side: conserve bench FILE [-- SGLANG FLAGS for every server].

    Exit code 0: measured. 1: a server failed; finished runs are kept. 2: bad input. 3: the time
    limit left runs out.
    """
    from conserve_sgl.bench.command import UNFINISHED, compare_folders, run_bench
    from conserve_sgl.bench.micro.operations import micro_table, run_micros

    if micro:
        Console().print(micro_table(run_micros()))
        return
    if compare is not None:
        print(compare_folders(*compare), end="")
        return
    if page is not None:
        if out is None:
            raise typer.BadParameter("give the page's file", param_hint="--out")
        from conserve_sgl.bench.gpu.page import write_page

        write_page(page, out)
        return
    if config is None:
        raise typer.BadParameter("give the benchmark's YAML file", param_hint="CONFIG")
    complete = run_bench(
        config,
        console=Console(stderr=True),
        model=model,
        trace=trace,
        systems=[name for name in systems.split(",") if name],
        repeats=repeats,
        duration_s=duration,
        out=out,
        fresh=fresh,
        time_limit_s=math.inf if time_limit is None else time_limit,
        pictures=pictures,
        flags=context.args,
    )
    raise typer.Exit(0 if complete else UNFINISHED)


@app.command()
def simulate(
    simulation: Annotated[Path, typer.Argument(help="The simulation, YAML; docs/simulate.md.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A configuration of conserve, instead of the file's."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="A device that is shipped, or its .json file, instead of the file's."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The online trace, instead of the file's.")
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(min=1, callback=_time, help="Seconds of the stream, instead of the file's."),
    ] = None,
    systems: Annotated[
        str, typer.Option(help="Only these systems and the baselines, names with commas between.")
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE instead of the file's: slo.tpot=25ms. Repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results. Default: out/simulate/NAME.")
    ] = None,
) -> None:
    """How much offline work fits beside a stream on a GPU: without the GPU, in seconds.

    Runs SGLang's and conserve's schedulers on a fake clock, over measured step times.

    Exit code 0: simulated. 2: bad input.
    """
    from conserve_sgl.simulate.command import run_simulation

    changes = {}
    for text in set_ or []:
        key, given, value = text.partition("=")
        if not given or not key:
            raise typer.BadParameter(f"{text}: give KEY=VALUE", param_hint="--set")
        changes[key] = value
    run_simulation(
        simulation,
        console=Console(stderr=True),
        out=out,
        device=device,
        conserve=config,
        trace=trace,
        duration_s=duration,
        systems=[name for name in systems.split(",") if name],
        changes=changes,
    )


@app.command()
def device(
    steps: Annotated[
        list[Path],
        typer.Argument(help="Logs of steps (CONSERVE_STEP_LOG, CONSERVE_PROFILE_GRID)."),
    ],
    out: Annotated[Path, typer.Option(help="Gets the device, .json.")],
    profile: Annotated[
        Path | None,
        typer.Option(help="The engine's latency profile. Default: the newest that is stored."),
    ] = None,
    kv_bytes: Annotated[
        float | None,
        typer.Option(min=1, help="KV of a token, all layers. Default: the model's configuration."),
    ] = None,
    copy_gb_s: Annotated[
        float, typer.Option(min=0.1, help="Between host and device memory, GB/s.")
    ] = 25.0,
) -> None:
    """Make a device for `conserve simulate` of the steps that a server logged.

    Exit code 0: written. 2: bad input, nothing was written.
    """
    from conserve_sgl.device.make import make_device, write_device
    from conserve_sgl.profile import ProfileStore

    path = profile or ProfileStore.of_environment().find([])
    made = make_device(
        steps, path, name=out.stem, kv_bytes=kv_bytes, copy_bytes_per_s=copy_gb_s * 1e9
    )
    write_device(made, out)
    kinds = f"{len(made.steps)} shapes of {made.model} on {made.gpu}"
    Console().print(f"{out}: {kinds}", soft_wrap=True, highlight=False, markup=False)


@app.command(context_settings=_PASS_ON)
def doctor(context: typer.Context, config: ConfigOption = None) -> None:
    """Check this installation: conserve doctor [--config FILE] [-- SGLANG FLAGS].

    Exit code 0: a server would start. 1: it would not, or not as configured.
    """
    from conserve_sgl.doctor import examine

    path = config or (Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None)
    raise typer.Exit(examine(Console(), config=path, flags=context.args))


def _check_endpoints(urls: list[str], option: str) -> None:
    from conserve_sgl.urls import check_base_url

    try:
        for url in urls:
            check_base_url(url)
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint=option) from e


def _checked(config: Path | None) -> Path:
    """The absolute path of the configuration; it and this SGLang are good for a server."""
    path = _config_path(config)
    ConserveConfig.load(path)
    compat.check_version(compat.sglang_version())
    compat.check_environment(os.environ)
    return path.resolve()


def _measured_in(folder: Path, flags: list[str], config: Path, console: Console) -> Path:
    """Run a server until it is ready, with `folder` as its profiles; the one it measured."""
    from conserve_sgl.bench.systems.progress import PlainProgress
    from conserve_sgl.bench.systems.server import ServerProcess, free_port
    from conserve_sgl.profile import DIR_ENV, ProfileStore

    port, log = free_port(), folder / "server.log"
    server = ServerProcess(
        [*_SGLANG_SERVE, *flags, f"--port={port}"],
        port=port,
        log_path=log,
        env={CONFIG_ENV: str(config), DIR_ENV: str(folder)},
    )
    plain = PlainProgress(console)
    plain.say("Starting the server")
    with server, console.status("Starting the server") as status:

        def on_wait(waited_s: float) -> None:
            status.update(escape(server.log_tail(1)))
            plain.still(f"Starting the server: {waited_s:.0f} s")

        server.wait_healthy(_READY_S, on_wait)
    stored = ProfileStore(folder).paths()
    if not stored:
        raise ServerError(f"the server measured nothing:\n{server.log_tail()}")
    return stored[0]


def _is_typed(context: typer.Context, option: str) -> bool:
    """Whether an option was given on the command line, and not by its environment variable."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _config_path(given: Path | None) -> Path:
    if given is not None:
        return given
    if named := os.environ.get(CONFIG_ENV):
        return Path(named)
    raise typer.BadParameter(f"give --config FILE or set {CONFIG_ENV}", param_hint="--config")


if __name__ == "__main__":
    main()
