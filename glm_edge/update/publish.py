"""Publishes a release: objects by hash, a complete plan, and deltas from earlier releases."""

import difflib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glm_edge.errors import UpdateError
from glm_edge.files import opened, read_bytes
from glm_edge.update.delta import LEVEL, compress, decompress, encode
from glm_edge.update.plan import (
    MAX_BASE_BYTES,
    MAX_SECTION_BYTES,
    Base,
    Plan,
    PlannedFile,
    Section,
    check_relative,
    pack_plan,
    unpack_plan,
)
from glm_edge.update.repository import CHANNEL, Repository
from glm_edge.update.rollout import Channel, channel_json, check_percentage
from glm_edge.update.sections import Span, split
from glm_edge.update.transport import hash_file, object_path
from glm_edge.writers import write_whole

DELTAS = 3
# Old bytes on each side of a moved section, for zstd to search.
_MARGIN = (MAX_BASE_BYTES - MAX_SECTION_BYTES) // 2


@dataclass(frozen=True, slots=True)
class Published:
    """Result of `publish`.

    Attributes:
      release: number of the release.
      bytes: size of its files.
      complete: download in bytes without an installed release.
      deltas: download in bytes by number of the installed release.
    """

    release: int
    bytes: int
    complete: int
    deltas: dict[int, int]


def publish(
    repository: Repository,
    source: str | Path,
    signers: Sequence[Any],
    percentage: float = 100.0,
    deltas: int = DELTAS,
    level: int = LEVEL,
    progress: Callable[[str, int, int], None] | None = None,
) -> Published:
    """Publish a model.

    Args:
      repository: repository.
      source: checkpoint directory, or one file such as a `.tflite` or a `.litertlm`.
      signers: enough keys for targets, snapshot and timestamp.
      percentage: part of the devices that receive it; 100 makes it the stable release.
      deltas: number of earlier releases to write deltas from.
      level: level of zstd, 1 to 22.
      progress: called as `progress("sections", done, total)`.

    Returns:
      Number and sizes of the release.

    Raises:
      UpdateError: the source is empty, has links or unusual names, or keys are missing.
      CheckpointError: a safetensors file is malformed.
      OutputError: the disk is full, or cannot be written.
    """
    check_percentage(percentage)
    if not 1 <= level <= 22:
        raise UpdateError(f"level={level}: must be between 1 and 22")
    with repository.locked():
        return _publish(repository, Path(source), signers, percentage, deltas, level, progress)


def _publish(
    repository: Repository,
    source: Path,
    signers: Sequence[Any],
    percentage: float,
    deltas: int,
    level: int,
    progress: Callable[[str, int, int], None] | None,
) -> Published:
    names = repository.target_names()
    earlier = sorted(
        int(name.removeprefix("releases/").removesuffix(".plan"))
        for name in names
        if name.startswith("releases/")
    )
    release = earlier[-1] + 1 if earlier else 1
    store = _Store(repository, level)
    files = _source_files(source)
    spans = {name: split(path) for name, path in files.items()}
    show = _counter(progress, sum(map(len, spans.values())) * (1 + len(earlier[-deltas:])))
    planned = tuple(
        store.complete_file(name, path, spans[name], show) for name, path in files.items()
    )
    complete = Plan(release, None, source.is_file(), planned)
    targets = {f"releases/{release}.plan": pack_plan(complete)}
    sizes = {}
    for base in earlier[-deltas:] if deltas else []:
        old_name = f"releases/{base}.plan"
        old = unpack_plan(repository.target(old_name), old_name)
        delta = store.delta(old, complete, show)
        packed = targets[f"deltas/{base}-{release}.plan"] = pack_plan(delta)
        sizes[base] = download_bytes(delta) + len(packed)
    before = repository.channel
    channel = Channel(release)
    if percentage < 100:
        channel = Channel(before.stable, release, percentage)
    targets[CHANNEL] = channel_json(channel)
    repository.publish(targets, signers)
    total = download_bytes(complete) + len(targets[f"releases/{release}.plan"])
    return Published(release, complete.size, total, sizes)


def download_bytes(plan: Plan) -> int:
    """Return the size of the distinct objects of a plan."""
    return sum({s.object_sha256: s.object_size for _, _, s in plan.sections()}.values())


def _counter(progress: Callable[[str, int, int], None] | None, total: int) -> Callable[[], None]:
    done = 0

    def show() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("sections", done, total)

    return show


def _source_files(source: Path) -> dict[str, Path]:
    """List the files of a release by relative path."""
    if source.is_file() and not source.is_symlink():
        check_relative(source.name, str(source))
        return {source.name: source}
    files = {}
    for folder, directories, names in os.walk(source):
        links = [name for name in (*directories, *names) if Path(folder, name).is_symlink()]
        if links:
            raise UpdateError(f"{Path(folder, links[0])}: is a link; publish a copy of its target")
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(source).as_posix()
            check_relative(relative, str(source))
            files[relative] = path
    if not files:
        raise UpdateError(f"{source}: is not a file, or a directory with files")
    return dict(sorted(files.items()))


class _Store:
    """Objects of a repository, written once per content."""

    def __init__(self, repository: Repository, level: int) -> None:
        self._directory, self._level = repository.directory, level
        # Neighbouring sections need the same old bytes.
        self.raw = functools.lru_cache(maxsize=8)(self._raw)

    def put(self, packed: bytes) -> str:
        """Store an object; return its hash."""
        sha256 = hashlib.sha256(packed).hexdigest()
        path = self._directory / object_path(sha256)
        # An existing object may be damaged, and every device would refuse it.
        if not path.is_file() or hash_file(path) != sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda temporary: temporary.write_bytes(packed))
        return sha256

    def _raw(self, section: Section) -> bytes:
        """Read the bytes of a section of a complete plan."""
        path = self._directory / object_path(section.object_sha256)
        packed = read_bytes(path, section.object_size, UpdateError)
        content = decompress(packed, section.size, str(path))
        if hashlib.sha256(content).hexdigest() != section.sha256:
            raise UpdateError(f"{path}: is damaged; restore the repository's objects")
        return content

    def complete_file(
        self, name: str, path: Path, spans: list[Span], show: Callable[[], None]
    ) -> PlannedFile:
        """Store the sections of a file by themselves."""
        sections, digest = [], hashlib.sha256()
        with opened(path, UpdateError) as file:
            for span in spans:
                content = file.read(span.size)
                if len(content) < span.size:
                    raise UpdateError(f"{path}: was truncated while it was read")
                digest.update(content)
                packed = compress(content, level=self._level)
                sections.append(
                    Section(
                        size=span.size,
                        sha256=hashlib.sha256(content).hexdigest(),
                        method="plain",
                        object_sha256=self.put(packed),
                        object_size=len(packed),
                        stride=span.stride,
                        name=span.name,
                    )
                )
                show()
        size = sum(span.size for span in spans)
        return PlannedFile(name, size, digest.hexdigest(), tuple(sections))

    def delta(self, old: Plan, new: Plan, show: Callable[[], None]) -> Plan:
        """Describe a release by an earlier one."""
        installed = {section.sha256 for _, _, section in old.sections()}
        old_files = {file.path: file for file in old.files}
        files = []
        for file in new.files:
            # A renamed single file is still the same model.
            before = old.files[0] if old.single and new.single else old_files.get(file.path)
            bases = _bases(before, file) if before else [None] * len(file.sections)
            sections = []
            for section, base in zip(file.sections, bases, strict=True):
                show()
                if section.sha256 in installed:
                    sections.append(Section(section.size, section.sha256, "copy"))
                else:
                    sections.append(self._smallest(section, base, before))
            files.append(replace(file, sections=tuple(sections)))
        return Plan(new.release, old.release, new.single, tuple(files))

    def _smallest(self, section: Section, base: Base | None, old: PlannedFile | None) -> Section:
        plain = replace(section, name="", stride=1)
        if base is None or old is None:
            return plain
        encoded = encode(self.raw(section), self._range(old, base), section.stride, self._level)
        method, packed = min(encoded.items(), key=lambda item: len(item[1]))
        if len(packed) >= plain.object_size:
            return plain
        return replace(
            section,
            name="",
            method=method,
            stride=1 if method == "patch" else section.stride,
            object_sha256=self.put(packed),
            object_size=len(packed),
            base=base,
        )

    def _range(self, file: PlannedFile, base: Base) -> bytes:
        parts, begin = [], 0
        for section in file.sections:
            end = begin + section.size
            if end > base.begin and begin < base.begin + base.size:
                low = max(base.begin - begin, 0)
                parts.append(self.raw(section)[low : base.begin + base.size - begin])
            begin = end
        return b"".join(parts)


def _bases(old: PlannedFile, new: PlannedFile) -> list[Base | None]:
    """Choose the old bytes for each section: those of its name, else those between equal ones."""
    offsets, begin = {}, 0
    for section in old.sections:
        if section.name:
            offsets[section.name] = (begin, section.size)
        begin += section.size
    if offsets:
        named = [offsets.get(section.name) for section in new.sections]
        return [None if pair is None else Base(old.path, *pair) for pair in named]
    return list(_aligned(old, new))


def _aligned(old: PlannedFile, new: PlannedFile) -> Iterator[Base | None]:
    old_ends, new_ends = _offsets(old), _offsets(new)
    before, after = ([section.sha256 for section in file.sections] for file in (old, new))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for _, old_low, old_high, new_low, new_high in matcher.get_opcodes():
        low, high = old_ends[old_low], old_ends[old_high]
        same_size = high - low == new_ends[new_high] - new_ends[new_low]
        for index in range(new_low, new_high):
            begin = low + new_ends[index] - new_ends[new_low]
            end = begin + new.sections[index].size
            if not same_size:
                begin, end = max(begin - _MARGIN, low), min(end + _MARGIN, high)
            yield Base(old.path, begin, end - begin) if begin < end else None


def _offsets(file: PlannedFile) -> list[int]:
    offsets = [0]
    for section in file.sections:
        offsets.append(offsets[-1] + section.size)
    return offsets
