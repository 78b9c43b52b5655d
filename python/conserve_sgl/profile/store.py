"""The folder of profiles: one JSON file for each engine that was measured.

A profile is the steps themselves, not what was fitted to them; the model is fitted when it is
read, so a better fit needs no new measurement.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import LatencyModel, StepSample

__all__ = ["DIR_ENV", "EngineIdentity", "Profile", "ProfileStore", "model_path", "read_profile"]

DIR_ENV = "CONSERVE_PROFILE_DIR"
"""Environment variable with the folder of profiles, instead of the one in the user's cache."""

FORMAT = 1
"""Raise it when measured steps no longer mean the same; older files are measured again."""


class EngineIdentity(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What step times depend on. A profile serves engines that are equal in all of it.

    Args:
        model: the model's path, as SGLang was given it.
        config_sha256: of the model's configuration, so that an exchanged folder is noticed.
        device: name of the GPU, or of the CPU with its number of threads.
        dtype: of the weights.
        kv_dtype: of the KV cache.
        quantization: SGLang's name of the method, or None.
        tp_size: tensor-parallel ranks.
        attention_backend: of prefill and decode.
        graphs: whether decode and prefill run as CUDA graphs.
        overlap: whether SGLang overlaps scheduling and forward.
        sglang: its version.
        lora_backend: SGLang's name of it, or None without adapters; through it go all steps, those
            without an adapter too.
        drafts: the algorithm of speculative decoding, and the tokens of a row in a step; None
            without it.
    """

    model: str
    config_sha256: str
    device: str
    dtype: str
    kv_dtype: str
    quantization: str | None
    tp_size: int
    attention_backend: str
    graphs: str
    overlap: bool
    sglang: str
    lora_backend: str | None = None
    drafts: str | None = None

    @property
    def file_name(self) -> str:
        """The model's name, to be found, and a digest of everything, to be unique."""
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(self.model).name)[:64] or "model"
        return f"{name}-{digest}.json"


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Steps that were measured, and on what.

    Args:
        identity: the engine.
        measured_at: with its time zone.
        layers: decoder layers of the model.
        samples: the steps.
        format: `FORMAT` of the program that wrote it.
    """

    identity: EngineIdentity
    measured_at: datetime
    layers: int
    samples: tuple[StepSample, ...]
    format: int = FORMAT

    def model(self) -> LatencyModel:
        """The latency model that fits the steps.

        Raises:
            ValueError: there are none, or one took no time.
        """
        return LatencyModel(self.samples, layers=self.layers)


class ProfileStore:
    """Profiles in `folder`, which need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> ProfileStore:
        """`CONSERVE_PROFILE_DIR`, or `conserve/profiles` in the user's cache folder."""
        if given := environment.get(DIR_ENV):
            return cls(Path(given))
        cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return cls(Path(cache) / "conserve" / "profiles")

    def path_of(self, identity: EngineIdentity) -> Path:
        """Where the profile of `identity` is, or would be."""
        return self.folder / identity.file_name

    def load(self, identity: EngineIdentity) -> Profile | None:
        """The profile of `identity`, or None when there is none.

        Raises:
            InputError: the file is there but cannot be used: corrupt, or of another engine.
        """
        path = self.path_of(identity)
        if not path.exists():
            return None
        profile = read_profile(path)
        if profile.identity != identity:
            raise InputError(path, "it was measured on another engine than its name says")
        return profile

    def save(self, profile: Profile) -> Path:
        """Write `profile`, all or nothing, over an earlier one of the same engine.

        Raises:
            OSError: the folder cannot be made or written.
        """
        path = self.path_of(profile.identity)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = msgspec.json.format(msgspec.json.encode(profile), indent=1)
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    def find(self, arguments: Sequence[str]) -> Path:
        """The profile that a person means: a file, or the newest of the model that flags name.

        Args:
            arguments: one path of a file, or flags of SGLang; without `--model-path` among them,
                the newest of all.

        Raises:
            InputError: there is none.
        """
        if len(arguments) == 1 and not arguments[0].startswith("-"):
            return Path(arguments[0])
        model = model_path(arguments)
        for path in self.paths():
            if model is None or read_profile(path).identity.model == model:
                return path
        of_model = f" of {model}" if model else ""
        raise InputError(self.folder, f"holds no profile{of_model}; `conserve profile` makes one")

    def paths(self) -> list[Path]:
        """Every profile's file, the newest first."""
        found = [p for p in self.folder.glob("*.json") if not p.name.startswith(".")]
        return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)


def model_path(flags: Sequence[str]) -> str | None:
    """The model that flags of SGLang name, or None."""
    for i, flag in enumerate(flags):
        name, given, value = flag.partition("=")
        if name in ("--model-path", "--model"):
            return value if given else next(iter(flags[i + 1 :]), None)
    return None


def read_profile(path: Path) -> Profile:
    """The profile at `path`.

    Raises:
        InputError: it cannot be read, is not a profile, or is one of another format.
    """
    try:
        text = path.read_bytes()
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror or e}") from e
    try:
        profile = msgspec.json.decode(text, type=Profile)
        profile.model()
    except ValueError as e:  # msgspec's are ValueErrors too
        raise InputError(path, f"not a profile of this version: {e}") from e
    if profile.format != FORMAT:
        raise InputError(path, f"a profile of format {profile.format}, not {FORMAT}")
    return profile
