"""Plans: the files of a release as sections addressed by hash, and the source of each section."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from glm_edge.errors import UpdateError, require
from glm_edge.files import MAX_FILE_NAME, MAX_JSON_BYTES, parse_json

FORMAT = "glm_edge.update"
VERSION = 1
# Bounds the memory of a device: one section, its base and its object at a time.
MAX_SECTION_BYTES = 4 << 20
# A base may surround its section, because a shorter header moves the bytes of a file.
MAX_BASE_BYTES = MAX_SECTION_BYTES + (1 << 18)
MAX_FILES = 10_000
MAX_SIZE = 1 << 50
MAX_STRIDE = 16
# `copy`: the device has the bytes. `plain`: zstd alone. `patch`: zstd with the base as dictionary.
# `xor`, `subtract`: zstd of the bytewise difference from a base of the same size.
METHODS = ("copy", "plain", "patch", "xor", "subtract")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Base:
    """A byte range of an installed file.

    Attributes:
      path: path of the file in its release.
      begin: offset of the first byte.
      size: count of bytes.
    """

    path: str
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive bytes of a file, and their source.

    Attributes:
      size: count of bytes.
      sha256: hash of the bytes.
      method: one of `METHODS`.
      object_sha256: hash of the download, empty for `copy`.
      object_size: size of the download in bytes.
      stride: bytes per value; `xor` and `subtract` store byte 0 of all values, then byte 1.
      base: old bytes for `patch`, `xor` and `subtract`.
      name: tensor, and piece of it, by which the next release finds its base; may be empty.
    """

    size: int
    sha256: str
    method: str
    object_sha256: str = ""
    object_size: int = 0
    stride: int = 1
    base: Base | None = None
    name: str = ""


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of a release.

    Attributes:
      path: relative path with `/`.
      size: count of bytes.
      sha256: hash of the file.
      sections: its bytes in order.
    """

    path: str
    size: int
    sha256: str
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """The files of a release.

    Attributes:
      release: number of the release.
      base: number of the release that must be installed, None for a complete plan.
      single: the release is one file instead of a directory.
      files: files of the release.
    """

    release: int
    base: int | None
    single: bool
    files: tuple[PlannedFile, ...]

    @property
    def size(self) -> int:
        """Size of the files in bytes."""
        return sum(file.size for file in self.files)

    def sections(self) -> Iterator[tuple[PlannedFile, int, Section]]:
        """Yield each section with its file and its offset."""
        for file in self.files:
            begin = 0
            for section in file.sections:
                yield file, begin, section
                begin += section.size


def pack_plan(plan: Plan) -> bytes:
    """Compress a plan.

    Args:
      plan: plan to write.

    Returns:
      zstd-compressed JSON.

    Raises:
      UpdateError: the plan exceeds a limit of its reader.
    """
    text = json.dumps(plan_fields(plan), separators=(",", ":")).encode()
    parse_plan(text, f"release {plan.release}")
    zstandard = require("zstandard", extra="update")
    return zstandard.ZstdCompressor(level=19, write_content_size=True).compress(text)


def unpack_plan(packed: bytes, where: str) -> Plan:
    """Read a compressed plan, which a hostile server may have written.

    Args:
      packed: result of `pack_plan`.
      where: name for messages.

    Returns:
      The checked plan.

    Raises:
      UpdateError: the bytes are not a plan, or exceed a limit.
    """
    zstandard = require("zstandard", extra="update")
    try:
        if zstandard.frame_content_size(packed) not in range(1, MAX_JSON_BYTES + 1):
            raise UpdateError(f"{where}: must declare at most {MAX_JSON_BYTES} bytes of JSON")
        text = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(packed)
    except zstandard.ZstdError as error:
        raise UpdateError(f"{where}: is not zstd-compressed JSON: {error}") from error
    return parse_plan(text, where)


def plan_fields(plan: Plan) -> dict[str, Any]:
    """Return the JSON fields of a plan, without the defaults of sections."""
    files = [
        {
            "path": file.path,
            "size": file.size,
            "sha256": file.sha256,
            "sections": [_section_fields(section) for section in file.sections],
        }
        for file in plan.files
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "release": plan.release,
        "base": plan.base,
        "single": plan.single,
        "files": files,
    }


def _section_fields(section: Section) -> dict[str, Any]:
    fields: dict[str, Any] = {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    }
    if section.base is not None:
        fields["base"] = [section.base.path, section.base.begin, section.base.size]
    return fields


def parse_plan(text: bytes, where: str) -> Plan:
    """Check the JSON of a plan.

    Args:
      text: UTF-8 JSON.
      where: name for messages.

    Returns:
      The plan, whose paths are inside their directory and whose sizes agree.

    Raises:
      UpdateError: the text is not a plan, or exceeds a limit.
    """
    reader = _Reader(where)
    fields = reader.table(parse_json(text, where, UpdateError), "the plan")
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        raise UpdateError(
            f"{where}: must be a {FORMAT} plan of version {VERSION}; use a newer glm_edge"
        )
    release = reader.integer(fields, "release", 1)
    base = None if fields.get("base") is None else reader.integer(fields, "base", 1)
    single = fields.get("single")
    entries = reader.rows(fields, "files", MAX_FILES)
    files = tuple(reader.file(entry) for entry in entries)
    paths = {file.path for file in files}
    if not files or len(paths) < len(files):
        raise UpdateError(f"{where}: must have files of distinct paths")
    if not isinstance(single, bool) or (single and len(files) != 1):
        raise UpdateError(f"{where}: 'single' must be a boolean, and true for one file only")
    parents = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    if parents & paths:
        raise UpdateError(f"{where}: a path is a file and a directory at once")
    if sum(file.size for file in files) > MAX_SIZE:
        raise UpdateError(f"{where}: the files exceed {MAX_SIZE} bytes")
    if base is None and any(s.base or s.method == "copy" for f in files for s in f.sections):
        raise UpdateError(f"{where}: a complete plan must not need installed bytes")
    return Plan(release, base, single, files)


class _Reader:
    """Checks of the fields of one plan."""

    def __init__(self, where: str) -> None:
        self.where = where

    def table(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UpdateError(f"{self.where}: {name} must be a JSON object")
        return value

    def rows(self, fields: dict[str, Any], name: str, limit: int) -> list[Any]:
        value = fields.get(name)
        if not isinstance(value, list) or len(value) > limit:
            raise UpdateError(f"{self.where}: {name!r} must be a list of at most {limit}")
        return value

    def integer(
        self,
        fields: dict[str, Any],
        name: str,
        least: int,
        most: int = MAX_SIZE,
        default: Any = None,
    ) -> int:
        value = fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise UpdateError(f"{self.where}: {name!r} must be an integer from {least} to {most}")
        return value

    def hash(self, fields: dict[str, Any], name: str) -> str:
        value = fields.get(name)
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            raise UpdateError(f"{self.where}: {name!r} must be 64 hexadecimal digits")
        return value

    def path(self, value: Any) -> str:
        check_relative(value, self.where)
        return value

    def file(self, value: Any) -> PlannedFile:
        fields = self.table(value, "a file")
        path, size = self.path(fields.get("path")), self.integer(fields, "size", 0)
        entries = self.rows(fields, "sections", MAX_JSON_BYTES)
        sections = tuple(self.section(entry) for entry in entries)
        if sum(section.size for section in sections) != size:
            raise UpdateError(f"{self.where}: {path}: the sections do not add up to {size} bytes")
        return PlannedFile(path, size, self.hash(fields, "sha256"), sections)

    def section(self, value: Any) -> Section:
        fields = self.table(value, "a section")
        method, name = fields.get("method"), fields.get("name", "")
        if method not in METHODS or not isinstance(name, str):
            raise UpdateError(f"{self.where}: a section has an unknown method or name")
        size = self.integer(fields, "size", 1, MAX_SECTION_BYTES)
        stride = self.integer(fields, "stride", 1, MAX_STRIDE, 1)
        object_sha256, object_size, base = "", 0, None
        if method != "copy":
            object_sha256 = self.hash(fields, "object_sha256")
            # zstd adds at most a few bytes to what it cannot compress.
            object_size = self.integer(fields, "object_size", 1, 2 * MAX_SECTION_BYTES)
        if method in ("patch", "xor", "subtract"):
            base = self.base(fields.get("base"))
            if method != "patch" and (base.size != size or size % stride):
                raise UpdateError(f"{self.where}: a difference needs a base of its own size")
        elif fields.get("base") is not None:
            raise UpdateError(f"{self.where}: the method {method} has no base")
        sha256 = self.hash(fields, "sha256")
        return Section(size, sha256, method, object_sha256, object_size, stride, base, name)

    def base(self, value: Any) -> Base:
        if not isinstance(value, list) or len(value) != 3:
            raise UpdateError(f"{self.where}: a base must be a path, an offset and a size")
        fields = {"begin": value[1], "size": value[2]}
        begin = self.integer(fields, "begin", 0)
        return Base(self.path(value[0]), begin, self.integer(fields, "size", 1, MAX_BASE_BYTES))


def check_relative(path: Any, where: str) -> Path:
    """Refuse a path that could leave its directory on any system.

    Args:
      path: value from a plan, or name of a file to publish.
      where: name for messages.

    Returns:
      The path.

    Raises:
      UpdateError: the path is not plain text, is absolute, or has a part such as `..`.
    """
    plain = isinstance(path, str) and path.isprintable() and not re.search(r'[\\:*?"<>|]', path)
    parts = path.split("/") if plain else []
    # A trailing dot or space would name another file on Windows.
    sound = all(
        part.strip(". ") and part[-1] not in ". " and len(part.encode()) <= MAX_FILE_NAME
        for part in parts
    )
    if not parts or not sound or len(path) > 1000:
        raise UpdateError(f"{where}: {str(path)[:200]!r} is not a plain relative path")
    return Path(path)
