"""Installed releases of a device: their files, and the bytes that an update can reuse."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm_edge.errors import GlmEdgeError, UpdateError
from glm_edge.files import fill, opened, read_bytes
from glm_edge.update.delta import decode
from glm_edge.update.plan import Base, Plan, PlannedFile, Section, pack_plan, unpack_plan
from glm_edge.update.transport import hash_file
from glm_edge.writers import new_directory

PLAN = "plan"
MODEL = "model"
MAX_PLAN_BYTES = 1 << 24


class Installed:
    """The releases under one directory, each with its plan."""

    def __init__(self, directory: Path) -> None:
        """Remember the directory.

        Args:
          directory: parent of the releases, which need not exist.
        """
        self.directory = directory

    def path(self, release: int) -> Path:
        """Return the directory of a release."""
        return self.directory / str(release)

    def plan(self, release: int) -> Plan:
        """Read the plan of a release.

        Args:
          release: number of the release.

        Returns:
          The plan.

        Raises:
          UpdateError: the plan is missing or damaged.
        """
        path = self.path(release) / PLAN
        plan = unpack_plan(read_bytes(path, MAX_PLAN_BYTES, UpdateError), str(path))
        if plan.release != release:
            raise UpdateError(f"{path}: is the plan of release {plan.release}")
        return plan

    def model(self, release: int) -> Path:
        """Return the path of a model: a directory, or a file if the release is one file."""
        plan, folder = self.plan(release), self.path(release) / MODEL
        return folder / plan.files[0].path if plan.single else folder

    def is_intact(self, release: int) -> bool:
        """Test that every file of a release has the bytes of its plan."""
        try:
            folder = self.path(release) / MODEL
            return all(
                hash_file(folder / file.path) == file.sha256 for file in self.plan(release).files
            )
        except GlmEdgeError:
            return False

    def keep_only(self, releases: set[int | None]) -> None:
        """Remove the other releases, also those that an interrupted update built."""
        if not self.directory.is_dir():
            return
        wanted = {str(release) for release in releases}
        for path in self.directory.iterdir():
            if path.name not in wanted:
                shutil.rmtree(path, ignore_errors=True)

    def sections(self, releases: set[int | None]) -> dict[str, tuple[Path, int, int]]:
        """Map the hash of each installed section to its file, offset and size.

        Args:
          releases: numbers of releases; damaged plans and None count as empty.

        Returns:
          Byte ranges, whose content `read_section` still has to verify.
        """
        ranges: dict[str, tuple[Path, int, int]] = {}
        for release in releases - {None}:
            try:
                plan = self.plan(int(release or 0))
            except GlmEdgeError:
                continue
            folder = self.path(plan.release) / MODEL
            for file, begin, section in plan.sections():
                ranges[section.sha256] = (folder / file.path, begin, section.size)
        return ranges

    def build(self, plan: Plan, objects: Path, sections: dict[str, tuple[Path, int, int]]) -> None:
        """Build a release beside the installed ones, and verify it byte for byte.

        Args:
          plan: files of the release.
          objects: directory of verified downloads.
          sections: result of `sections`.

        Raises:
          UpdateError: an object or a base is missing or damaged.
          OutputError: the disk is full, or cannot be written.
        """
        source = _Source(self, plan, objects, sections)
        with new_directory(self.path(plan.release), overwrite=True, mark=PLAN) as folder:
            for file in plan.files:
                path = folder / MODEL / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with open(path, "xb") as out:
                    for content in source.contents(file):
                        digest.update(content)
                        out.write(content)
                if digest.hexdigest() != file.sha256:
                    raise UpdateError(f"{file.path}: the built file has another hash than signed")
            (folder / PLAN).write_bytes(pack_plan(plan))


class _Source:
    """Contents of sections from objects and installed files."""

    def __init__(
        self,
        installed: Installed,
        plan: Plan,
        objects: Path,
        sections: dict[str, tuple[Path, int, int]],
    ) -> None:
        self._objects, self._sections = objects, sections
        self._base = None if plan.base is None else installed.path(plan.base) / MODEL

    def contents(self, file: PlannedFile) -> Iterator[bytes]:
        """Yield the verified bytes of each section."""
        for index, section in enumerate(file.sections):
            where = f"{file.path}: section {index}"
            content = read_section(self._sections, section.sha256, section.size)
            if content is None:
                content = self._decode(section, where)
            if hashlib.sha256(content).hexdigest() != section.sha256:
                raise UpdateError(f"{where}: has another hash than signed; fetch again")
            yield content

    def _decode(self, section: Section, where: str) -> bytes:
        if section.method == "copy":
            raise UpdateError(f"{where}: the installed bytes are missing or damaged; fetch again")
        path = self._objects / section.object_sha256
        packed = read_bytes(path, section.object_size, UpdateError)
        # zstd reads only bytes that were signed, also if the disk has changed them since.
        if hashlib.sha256(packed).hexdigest() != section.object_sha256:
            raise UpdateError(f"{where}: the download is damaged; fetch again")
        base = b""
        if section.base is not None and self._base is not None:
            base = _read_base(self._base, section.base)
        return decode(section.method, packed, base, section.size, section.stride, where)


def read_section(
    sections: dict[str, tuple[Path, int, int]], sha256: str, size: int
) -> bytes | None:
    """Read an installed section.

    Args:
      sections: result of `Installed.sections`.
      sha256: hash of the section.
      size: count of bytes.

    Returns:
      The verified bytes, None if they are not installed, or damaged.
    """
    if sha256 not in sections or sections[sha256][2] != size:
        return None
    path, begin, _ = sections[sha256]
    try:
        content = _read_range(path, begin, size)
    except UpdateError:
        return None
    return content if hashlib.sha256(content).hexdigest() == sha256 else None


def _read_base(folder: Path, base: Base) -> bytes:
    return _read_range(folder / base.path, base.begin, base.size)


def _read_range(path: Path, begin: int, size: int) -> bytes:
    with opened(path, UpdateError) as file:
        target = np.empty(size, np.uint8)
        file.seek(begin)
        fill(file, target, str(path), UpdateError)
        return target.tobytes()
