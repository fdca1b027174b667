"""Settings from defaults, files and environment, in that order of rising precedence.

Each source is checked on its own, so that a fault names the file or variable it stands in, and is
then laid over the weaker ones key by key. Flags of a command win over all of these.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from rag_pipeline.config.folders import home_dir
from rag_pipeline.config.schema import Settings
from rag_pipeline.config.sources import (
    FUSION_VARIABLE,
    Origin,
    environment_names,
    files_to_read,
    read_file,
    variable_of,
)
from rag_pipeline.errors import RagPipelineError

_PATHS = frozenset(
    {
        "home",
        "index",
        "store",
        "fusion.store_dir",
        "fusion.passage_file",
        "serve.tenants",
        "serve.api_key_file",
        "serve.admin_api_key_file",
        "tpla_statistics",
    }
)
_NAMED_PATHS = "serve.indexes"
_NAMES_OR_PATHS = frozenset({"model", "embedder"})
_DEFAULT = Origin(kind="default")

ENGINE_KEYS = (
    *("home", "plugin", "fast_start", "cpu_decode", "cpu_kernels"),
    *("tpla", "tpla_statistics"),
)
"""Settings that an engine's processes read from the environment, each from its own variable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSettings:
    """The settings in force, and where each came from.

    Attributes
    ----------
    settings : Settings
        All values.
    origins : Mapping[str, Origin]
        Origin of every dotted key.
    files : tuple of Path
        Files that were read, weakest first.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    files: tuple[Path, ...]

    def values(self) -> dict[str, Any]:
        """Value of every dotted key."""
        return dict(_flat(self.settings.model_dump()))

    def given(self) -> dict[str, Any]:
        """Values that a file or the environment gave, by dotted key."""
        return {k: v for k, v in self.values().items() if self.origins[k].kind != "default"}

    def environment(self) -> dict[str, str]:
        """Variables that carry settings of a file to the engine's processes.

        Only what was given: an engine started without settings sees the environment it always saw.
        """
        given = self.given()
        variables = {variable_of(key): str(given[key]) for key in ENGINE_KEYS if key in given}
        fusion = {
            key.removeprefix("fusion."): value
            for key, value in given.items()
            if key.startswith("fusion.")
        }
        if fusion:
            variables[FUSION_VARIABLE] = json.dumps(fusion, sort_keys=True)
        return variables

    @contextlib.contextmanager
    def exported(self, *, only: frozenset[str] | None = None) -> Iterator[None]:
        """Set :meth:`environment` in this process, and put back what was there.

        Parameters
        ----------
        only : frozenset of str, optional
            Names of the variables to set; all where None.
        """
        chosen = {k: v for k, v in self.environment().items() if only is None or k in only}
        before = {name: os.environ.get(name) for name in chosen}
        os.environ.update(chosen)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def to_json(self) -> dict[str, Any]:
        """JSON of ``config show``: files, and value, origin and variable of every key."""
        return {
            "files": [str(path) for path in self.files],
            "settings": {
                key: {
                    "value": _effective(key, value),
                    "origin": self.origins[key].kind,
                    "where": self.origins[key].where,
                    "variable": variable_of(key),
                }
                for key, value in self.values().items()
            },
        }


def load_settings(
    file: Path | None = None, *, environ: Mapping[str, str] | None = None
) -> ResolvedSettings:
    """Read files and environment.

    Parameters
    ----------
    file : Path, optional
        A file in place of ``rag-pipeline.toml`` in the working folder; ``Path("off")`` for none.
    environ : mapping of str to str, optional
        Environment to read; this process's where None.

    Returns
    -------
    ResolvedSettings
        Every value and its origin.

    Raises
    ------
    RagPipelineError
        A file that is not there or not TOML, an unknown key or variable, a value that is not
        allowed; one line that names the file or variable.
    """
    environ = os.environ if environ is None else environ
    merged: dict[str, Any] = {}
    origins: dict[str, Origin] = dict.fromkeys(all_keys(), _DEFAULT)
    files = files_to_read(file)
    for path in files:
        given = _check(read_file(path), Origin(kind="file", where=str(path)), strict=True)
        for key, value in given.items():
            merged[key] = _beside(path, key, value)
            origins[key] = Origin(kind="file", where=str(path))
    known = {variable_of(key): key for key in origins if not key.startswith("fusion.")}
    for name in environment_names(environ):
        origin = Origin(kind="environment", where=name)
        for key, value in _read_variable(name, environ[name].strip(), known, origin).items():
            merged[key] = str(Path(value).expanduser()) if key in _PATHS and value else value
            origins[key] = origin
    return ResolvedSettings(
        settings=Settings.model_validate(_nested(merged)), origins=origins, files=tuple(files)
    )


def fields_by_key() -> dict[str, FieldInfo]:
    """Every dotted key with its pydantic field, in the order of the schema."""
    fields: dict[str, FieldInfo] = {}
    for name, field in Settings.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            fields |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
        else:
            fields[name] = field
    return fields


def all_keys() -> list[str]:
    """Every dotted key, in the order of the schema."""
    return list(fields_by_key())


def _effective(key: str, value: Any) -> Any:
    """What a value stands for, as people may see it."""
    if key == "fusion.remote":
        from chunk_cache import shown_url

        return shown_url(value)
    return str(home_dir()) if key == "home" and value is None else value


def _read_variable(
    name: str, text: str, known: Mapping[str, str], origin: Origin
) -> dict[str, Any]:
    if name == FUSION_VARIABLE:
        return _check({"fusion": _fusion_json(text)}, origin, strict=True)
    if name not in known:
        hint = _nearest(name, [*known, FUSION_VARIABLE])
        if name.startswith(f"{FUSION_VARIABLE}_"):
            hint = f'fusion is one variable with JSON: {FUSION_VARIABLE}=\'{{"policy": "query"}}\''
        raise RagPipelineError(f"unknown environment variable {name}; {hint}")
    key = known[name]
    value: Any = text
    if get_origin(fields_by_key()[key].annotation) is list:
        value = [part.strip() for part in text.split(",") if part.strip()]
    return _check(_nested({key: value}), origin, strict=False)


def _fusion_json(text: str) -> dict[str, Any]:
    """Read what :meth:`FusionConfig.from_env` accepts."""
    if text.lower() in ("off", "0", "false", "no"):
        return {"enabled": False}
    if text.lower() in ("on", "1", "true", "yes"):
        return {"enabled": True}
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise RagPipelineError(f"{FUSION_VARIABLE} is {text!r}; give on, off, or a JSON object")
    return given


def _check(raw: Mapping[str, Any], origin: Origin, *, strict: bool) -> dict[str, Any]:
    """Validate one source; returns the given values by dotted key."""
    try:
        checked = Settings.model_validate(raw, strict=strict)
    except ValidationError as error:
        raise RagPipelineError(f"{origin.where}: {_one_line(error)}") from None
    return dict(_flat(checked.model_dump(exclude_unset=True)))


def _one_line(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    # An unknown key first: a misspelt one is the likelier cause of all others.
    fault = min(faults, key=lambda f: f["type"] != "extra_forbidden")
    place = [str(part) for part in fault["loc"]]
    key = ".".join(place)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key, all_keys())}{more}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key} is {fault['input']!r}; {message[0].lower()}{message[1:]}{more}"


def _nearest(given: str, allowed: list[str]) -> str:
    """Name the nearest allowed key, and the others of its section."""
    import difflib

    ends: dict[str, list[str]] = {}
    for key in allowed:
        ends.setdefault(key.rpartition(".")[2], []).append(key)
    close = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if not close:
        # The right word in the wrong section, or without one.
        end = difflib.get_close_matches(given.rpartition(".")[2], list(ends), n=1, cutoff=0.6)
        close = ends[end[0]][:1] if end else []
    if close:
        return f"did you mean {close[0]!r}?"
    section = given.rpartition(".")[0]
    inside = [key for key in allowed if key.rpartition(".")[0] == section] or allowed
    return f"allowed are {', '.join(inside)}"


def _beside(file: Path, key: str, value: Any) -> Any:
    """Paths in a file are relative to its folder, not to wherever a command runs."""

    def placed(path: str) -> str:
        return str((file.parent / Path(path).expanduser()).absolute())

    if key == _NAMED_PATHS:
        parts = [word.rpartition("=") for word in value]
        return [f"{name}{equals}{placed(folder)}" for name, equals, folder in parts]
    is_path = key in _PATHS and value
    if not is_path and key in _NAMES_OR_PATHS and value:
        is_path = value.startswith(("./", "../", "~"))
    return placed(value) if is_path else value


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    return nested
