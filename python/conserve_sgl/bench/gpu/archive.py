"""Results as files to carry: an archive of each folder, packed anew whenever it changed."""

from __future__ import annotations

import lzma
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from conserve_sgl.errors import InputError

__all__ = ["KERNELS", "LIMIT_BYTES", "Packer", "unpack"]

LIMIT_BYTES = 16 * 2**20
"""Of one archive."""

KERNELS = "cache-"
"""How the name of an archive of compiled kernels begins: those belong to a kit, not to results."""

_SUFFIX = ".tar.xz"
_PRESET = 1  # a machine is held meanwhile
_GROWING = (".log", ".jsonl")
_LEFT_OUT = ("requests.jsonl",)  # directly in a folder: all of it is in the runs', too


class Packer:
    """Keeps an archive in `to` of every folder, in the background.

    Args:
        to: gets NAME.tar.xz.
        folders: what there is to pack, by the name of its archive; looked at in every call.
    """

    def __init__(self, to: Path, folders: Callable[[], dict[str, Path]]) -> None:
        self._to, self._folders = to, folders
        self._packed: dict[str, dict[Path, tuple[int, int]]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self.left_out: dict[str, list[str]] = {}
        self.faults: dict[str, str] = {}

    def poke(self) -> None:
        """Pack what changed, unless that is being done. A file that only grows is no change:
        packing takes a core, and something may be measured beside it."""
        if self._running is None or self._running.done():
            self._running = self._thread.submit(self._pack_changed, _GROWING)

    def close(self) -> None:
        """Pack what changed, and wait for it."""
        self._thread.submit(self._pack_changed).result()
        self._thread.shutdown()

    def _pack_changed(self, ignored: tuple[str, ...] = ()) -> None:
        for name, folder in self._folders().items():
            try:
                self._pack_if_changed(name, folder, ignored)
            except OSError as e:  # a file went, or was cut, meanwhile: the next call packs it
                self.faults[name] = str(e)
            else:
                self.faults.pop(name, None)

    def _pack_if_changed(self, name: str, folder: Path, ignored: tuple[str, ...]) -> None:
        files = list(_files(folder))
        sizes = {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
        before = self._packed.get(name, {})
        changed = {path for path, _ in sizes.items() ^ before.items() if path.suffix not in ignored}
        if changed:
            self.left_out[name] = _pack(self._to / f"{name}{_SUFFIX}", folder, files)
            self._packed[name] = sizes


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in _LEFT_OUT:
            yield path


def _pack(archive: Path, folder: Path, files: list[Path]) -> list[str]:
    """Write `archive`; what had to stay out of it, the largest first, for it to be small enough."""
    by_size = sorted(files, key=lambda path: path.stat().st_size)
    out: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        partial = Path(scratch, archive.name)
        while True:
            with tarfile.open(partial, "w:xz", preset=_PRESET) as tar:
                for path in by_size:
                    tar.add(path, path.relative_to(folder.parent), recursive=False)
            if partial.stat().st_size <= LIMIT_BYTES:
                break
            out.append(by_size.pop().relative_to(folder).as_posix())
        archive.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial, archive)
    return out


def unpack(archives: Path, into: Path) -> list[str]:
    """Unpack every archive of results in a folder; their names.

    Raises:
        InputError: there is none, or one that cannot be read.
    """
    found = sorted(archives.glob(f"*{_SUFFIX}"))
    found = [path for path in found if not path.name.startswith(KERNELS)]
    if not found:
        raise InputError(archives, f"holds no *{_SUFFIX}")
    for path in found:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(into, filter="data")
        except (OSError, EOFError, lzma.LZMAError, tarfile.TarError) as e:
            raise InputError(path, f"cannot be unpacked: {e}") from e
    return [path.name.removesuffix(_SUFFIX) for path in found]
