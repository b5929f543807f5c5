"""Atomic writers: files and directories appear complete or not at all."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from glm_edge.errors import OutputError
from glm_edge.files import CONFIG, MAX_FILE_NAME, shown_path

# Arguments of renameat2: paths relative to the working directory, and exchange of both names.
_AT_FDCWD, _EXCHANGE = -100, 2
_DAY = 86400.0
# Target, process, its start, boot of its machine, a random part, end; see `beside`.
_LITTER = re.compile(
    r"\.(.+)\.([0-9a-f]{1,8})-([0-9a-f]{1,16})-([0-9a-f]{1,6})-[0-9a-f]{4}\.(partial|old|tmp)",
    re.DOTALL,
)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with its keys in insertion order."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file atomically, so that a killed process never leaves a partial file.

    Args:
      path: file path; an existing file is replaced.
      write: function of the path of a temporary file in the same directory.

    Raises:
      OutputError: the path is a link, which would be replaced instead of its target, or the file
        cannot be written.
    """
    check_writable_name(path)
    try:
        refuse_link(path)
        remove_litter(path)
        temporary = beside(path, "tmp")
        try:
            write(temporary)
            _sync_path(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_path(path.parent)
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{shown_path(path)}: cannot be written: {reason}") from error


def write_stream(path: Path, write: Callable[[BinaryIO], Any]) -> int:
    """Write a file atomically through an open stream.

    Args:
      path: file path; an existing file is replaced.
      write: function of a temporary binary file, open for reading and writing.

    Returns:
      Size of the file in bytes.

    Raises:
      OutputError: as in `write_whole`.
    """

    def write_to(temporary: Path) -> None:
        with open(temporary, "x+b") as file:
            write(file)

    write_whole(path, write_to)
    return path.stat().st_size


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Create a temporary directory on the disk of `path`, and remove it at the end."""
    path = path.absolute()
    remove_litter(path)
    scratch = beside(path, "partial")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_writable_name(path: str | os.PathLike) -> Path:
    """Refuse invalid file names and ambiguous paths.

    Args:
      path: path to write.

    Returns:
      The absolute path, with links and `..` of its parents resolved.

    Raises:
      OutputError: the path contains a null character, a character that the system cannot encode, or
        `..` after a directory that does not exist.
    """
    shown = os.fspath(path)
    try:
        if b"\0" in os.fsencode(path):
            raise OutputError(f"{shown!r:.200}: contains a null character; choose another path")
        target = Path(path)
        if ".." in target.parts[-1:]:
            target = Path(os.path.realpath(target))
        parent = target.absolute().parent
        if ".." in parent.parts and not parent.is_dir():
            raise OutputError(
                f"{target}: contains '..' after a directory that does not exist; write the path "
                "without it"
            )
        return Path(os.path.realpath(parent)) / target.name
    except UnicodeEncodeError as error:
        raise OutputError(f"{shown!r:.200}: is not a valid file name here: {error}") from error


def refuse_link(path: Path) -> None:
    """Refuse a link, which a writer would replace instead of its target.

    Args:
      path: path to write.

    Raises:
      OutputError: the path is a link, even a broken one.
    """
    if os.path.islink(path):
        raise OutputError(
            f"{path}: is a link to {os.readlink(path)}; pass that path to write there, or remove "
            "the link"
        )


def beside(path: Path, end: str) -> Path:
    """Build the name of a temporary file or directory from its target and its process.

    Args:
      path: path of the target.
      end: suffix of the name, such as `partial`.

    Returns:
      An unused path in the same directory, which `remove_litter` recognizes.
    """
    pid = os.getpid()
    mark = f"{pid:x}-{_start_of(pid) or 0:x}-{_boot()}-{uuid.uuid4().hex[:4]}"
    return path.with_name(f".{_stem(path.name, len(mark) + len(end) + 3)}.{mark}.{end}")


def remove_litter(path: Path) -> None:
    """Remove temporary files of killed processes, and restore a checkpoint that they moved aside.

    A process is identified by its id, its start and the boot of its machine. Files from another
    boot, or from another machine on a shared disk, are removed after a day.

    Args:
      path: path of the target.
    """
    for entry in _entries(path.parent):
        match = _LITTER.fullmatch(entry.name)
        if match is None or not _is_over(entry, match):
            continue
        # The name of the target, shortened if the complete name would be too long.
        if match[1] != _stem(path.name, len(entry.name) - len(match[1])):
            continue
        old = Path(entry.path)
        if match[5] == "old" and not os.path.lexists(path):
            # Killed between the two renames of `_step_aside`: this is the only checkpoint.
            os.replace(old, path)
        elif entry.is_dir(follow_symlinks=False):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)


def _is_over(entry: os.DirEntry, match: re.Match) -> bool:
    """Test that the process of an entry has ended, as far as this can be determined."""
    pid, start = int(match[2], 16), int(match[3], 16)
    if match[4] == _boot():
        return _start_of(pid) != start
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
    except OSError:
        return False


def moved_aside(path: Path) -> Path | None:
    """Find the checkpoint that a killed process moved aside before replacing it."""
    for entry in _entries(path.parent):
        match = _LITTER.fullmatch(entry.name)
        if match is None or match[5] != "old":
            continue
        if match[1] == _stem(path.name, len(entry.name) - len(match[1])):
            return Path(entry.path)
    return None


def _entries(directory: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    # A name with a null character raises ValueError.
    except (OSError, ValueError):
        return []


def _stem(name: str, room: int) -> str:
    """Shorten a name to a prefix and a digest if it leaves less than `room` bytes."""
    if len(os.fsencode(name)) + room <= MAX_FILE_NAME:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    short = os.fsencode(name)[: MAX_FILE_NAME - room - len(digest) - 1]
    return f"{short.decode(errors='ignore')}~{digest}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:6]
    except OSError:
        return "0"


def _start_of(pid: int) -> int | None:
    """Return the start of a process in ticks since boot, None if it is gone, zero if unknown."""
    try:
        # The name of the program, in parentheses, may contain any character.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return 0


def require_space(out: Path, needed: float) -> None:
    """Check the free space of a disk.

    Args:
      out: path to write, which need not exist.
      needed: required bytes.

    Raises:
      OutputError: fewer bytes are free.
    """
    existing = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room or "
            "choose a directory on another disk"
        )


@contextlib.contextmanager
def new_directory(
    target: str | os.PathLike, overwrite: bool, keep: bool = False, mark: str = CONFIG
) -> Iterator[Path]:
    """Create a temporary directory, which replaces `target` after success.

    An existing directory exchanges its name with the temporary one in one step, so that a complete
    checkpoint exists at any time. Temporary files of killed processes are removed first.

    Args:
      target: directory to create; it may exist if empty. Links are refused.
      overwrite: replaces an existing checkpoint (a directory that contains `mark`).
      keep: uses a fixed name for the temporary directory, so that a later call finds its contents,
        and keeps it after errors. Only one process at a time can use it.
      mark: name of a file in directories that may be replaced.

    Yields:
      The temporary directory. An error removes it unless `keep`, and leaves `target` unchanged.

    Raises:
      OutputError: `target` exists without `overwrite`, its parent cannot be written, or another
        process uses the kept directory.
    """
    target = check_writable_name(target)
    temporary = target.with_name(f".{target.name}.partial") if keep else beside(target, "partial")
    lock = None
    try:
        remove_litter(target)
        _check_directory(target, overwrite, mark)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(exist_ok=keep)
        if keep:
            lock = DirectoryLock(temporary, target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        yield temporary
        _sync(temporary)
        # The target may have been created in the meantime.
        _check_directory(target, overwrite, mark)
        _take_place(temporary, target)
        _sync_path(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if lock is not None:
            lock.release()
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)


class DirectoryLock:
    """An exclusive lock of a directory, which ends with the process."""

    _mine: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, directory: Path, target: Path, again: bool = False) -> None:
        """Lock a directory.

        Args:
          directory: directory to lock.
          target: path for the message.
          again: allows this process to hold the lock already.

        Raises:
          OutputError: another process, or this one without `again`, holds the lock.
        """
        self._file: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        file = os.open(directory, os.O_RDONLY)
        status = os.fstat(file)
        self._key = (status.st_dev, status.st_ino)
        try:
            if again and self._key in self._mine:
                os.close(file)
                return
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(file)
            raise OutputError(
                f"{target}: another run is writing it; wait for that run, or choose another path"
            ) from error
        except OSError:
            # Some network disks do not support locks.
            os.close(file)
            return
        if not directory.is_dir() or not os.path.samestat(os.stat(directory), status):
            os.close(file)
            raise OutputError(f"{target}: another run has just finished it; nothing was written")
        self._mine.add(self._key)
        self._file = file
        # Closes the file if an error prevents the call of `release`.
        self._close = weakref.finalize(self, self._release, file, self._key)

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._close()

    @classmethod
    def _release(cls, file: int, key: tuple[int, int]) -> None:
        cls._mine.discard(key)
        os.close(file)


def check_target(
    path: str | os.PathLike,
    overwrite: bool,
    mark: str | None = CONFIG,
    needed: float = 0,
    strict: bool = False,
) -> None:
    """Check that a file or a directory can be written to a path, before any other work.

    Args:
      path: file or directory to create.
      overwrite: replaces an existing file, or an existing directory that contains `mark`.
      mark: name of a file in directories that may be replaced; None for a file.
      needed: required free bytes. The replaced file or directory does not count as free.
      strict: refuses an existing empty directory, and a directory whose parent does not exist. The
        parent of a file must always exist.

    Raises:
      OutputError: the path exists without `overwrite`, is a link, its parent cannot be written, or
        the disk is too full.
    """
    target = check_writable_name(path)
    try:
        if mark is None:
            _check_file(target, overwrite)
        else:
            if strict and target.is_dir() and not any(target.iterdir()):
                raise OutputError(f"{target}: exists; choose another path, or remove it")
            _check_directory(target, overwrite, mark)
            if strict and not target.parent.is_dir():
                raise OutputError(f"{target}: its directory does not exist; create it first")
            parent = next(parent for parent in target.parents if os.path.lexists(parent))
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                raise OutputError(
                    f"{target}: cannot be written: {parent} is not a directory to write into"
                )
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    require_space(target, needed)


def _check_file(target: Path, overwrite: bool) -> None:
    refuse_link(target)
    if target.is_dir() or (target.exists() and not overwrite):
        raise OutputError(f"{target}: exists; choose another path or pass overwrite=True")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target}: directory {target.parent} is missing or cannot be written")


def _check_directory(target: Path, overwrite: bool, mark: str) -> None:
    refuse_link(target)
    if target.is_dir():
        if not any(target.iterdir()) or (overwrite and (target / mark).is_file()):
            return
        if overwrite:
            kind = "a checkpoint" if mark == CONFIG else "an export"
            raise OutputError(
                f"{target}: is not {kind} (no {mark}), so overwrite=True does not replace it; "
                "remove it or choose another directory"
            )
        raise OutputError(
            f"{target}: exists and is not empty; choose another directory or pass overwrite=True"
        )
    if target.exists():
        raise OutputError(f"{target}: exists and is not a directory; choose another path")


def _sync(directory: Path) -> None:
    for folder, _, names in os.walk(directory, topdown=False):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            _sync_path(path)


def _sync_path(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_place(temporary: Path, target: Path) -> None:
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(temporary, target)
    elif not _exchange(temporary, target):
        _step_aside(temporary, target)
    else:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; return False if the system does not support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _step_aside(temporary: Path, target: Path) -> None:
    """Replace a directory in two steps; `remove_litter` repairs an interruption in between."""
    aside = beside(target, "old")
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def no_directory(path: Path) -> str:
    """Build the error message for a path that is not a checkpoint directory.

    Args:
      path: the path, which may look like a hub repository `owner/name`.

    Returns:
      The message.
    """
    fault = "is a file"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        fault = "does not exist"
    except (OSError, ValueError) as error:
        fault = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    message = (
        f"{shown_path(path)}: {fault}; a checkpoint is a directory with {CONFIG}, or a GGUF file"
    )
    aside = moved_aside(path)
    if aside is not None:
        message += f"; an interrupted save left the old one as {aside.name}"
    if fault == "does not exist" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        message += (
            f"; to download a repository: hf download {path} --local-dir {path.name}, then pass "
            f"{path.name!r}"
        )
    return message
