"""The command `conserve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from conserve_sgl import __version__, compat
from conserve_sgl.config import CONFIG_ENV, ConserveConfig
from conserve_sgl.errors import ConserveError

__all__ = ["app", "main"]

_BAD_INPUT = 2
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

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


def main() -> NoReturn:
    """Run the command line; an error of ours is one line on stderr and exit code 2."""
    try:
        app()
    except ConserveError as e:
        Console(stderr=True, soft_wrap=True).print(f"conserve: {e}", style="red", markup=False)
        sys.exit(_BAD_INPUT)
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
    path = _config_path(config)
    ConserveConfig.load(path)
    compat.check_version(compat.sglang_version())
    compat.check_environment(os.environ)
    os.environ[CONFIG_ENV] = str(path.resolve())
    # A fresh interpreter: the server is then exactly `CONSERVE_CONFIG=... sglang serve ...`.
    sglang = [sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"]
    sys.stdout.flush()
    os.execv(sys.executable, [*sglang, *context.args])


@app.command(context_settings=_PASS_ON)
def doctor(context: typer.Context, config: ConfigOption = None) -> None:
    """Check this installation: conserve doctor [--config FILE] [-- SGLANG FLAGS].

    Exit code 0: a server would start. 1: it would not, or not as configured.
    """
    from conserve_sgl.doctor import examine

    path = config or (Path(os.environ[CONFIG_ENV]) if os.environ.get(CONFIG_ENV) else None)
    raise typer.Exit(examine(Console(), config=path, flags=context.args))


def _config_path(given: Path | None) -> Path:
    if given is not None:
        return given
    if named := os.environ.get(CONFIG_ENV):
        return Path(named)
    raise typer.BadParameter(f"give --config FILE or set {CONFIG_ENV}", param_hint="--config")


if __name__ == "__main__":
    main()
