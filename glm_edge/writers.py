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

# Of renameat2: paths as they are, and exchange of the two names.
_AT_FDCWD, _EXCHANGE = -100, 2
_DAY = 86400.0
# Target, process, its start, boot of its machine, a random part, end; see `beside`.
_LITTER = re.compile(
    r"\.(.+)\.([0-9a-f]{1,8})-([0-9a-f]{1,16})-([0-9a-f]{1,6})-[0-9a-f]{4}\.(partial|old|tmp)",
    re.DOTALL,
)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, keys in the order given."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed.

    Args:
      path: of the file; one that exists is replaced.
      write: called with the path of a temporary file beside it.

    Raises:
      OutputError: the file is a link, which would be replaced and not what it leads to; or it
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
    """Writes a file through an open stream, whole or not at all.

    Args:
      path: of the file; one that exists is replaced.
      write: called with a temporary file beside it, open for reading and writing.

    Returns:
      Bytes of the file.

    Raises:
      OutputError: as `write_whole`.
    """

    def write_to(temporary: Path) -> None:
        with open(temporary, "x+b") as file:
            write(file)

    write_whole(path, write_to)
    return path.stat().st_size


@contextlib.contextmanager
def scratch_beside(path: Path) -> Iterator[Path]:
    """Gives a folder on the disk of `path` that is removed with all its files."""
    path = path.absolute()
    remove_litter(path)
    scratch = beside(path, "partial")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_writable_name(path: str | os.PathLike) -> Path:
    """Refuses names that no file can have, and names that mean two places.

    Args:
      path: to be written.

    Returns:
      The absolute path, with links and `..` of its parents followed as the system follows them.

    Raises:
      OutputError: it holds a null character, a letter that the system cannot encode, or `..` after
        a directory that does not exist.
    """
    shown = os.fspath(path)
    try:
        if b"\0" in os.fsencode(path):
            raise OutputError(f"{shown!r:.200}: holds a null character; name another path")
        target = Path(path)
        if ".." in target.parts[-1:]:
            target = Path(os.path.realpath(target))
        parent = target.absolute().parent
        if ".." in parent.parts and not parent.is_dir():
            raise OutputError(
                f"{target}: holds '..' after a directory that does not exist; name the path "
                "without it"
            )
        return Path(os.path.realpath(parent)) / target.name
    except UnicodeEncodeError as error:
        raise OutputError(f"{shown!r:.200}: is not a valid file name here: {error}") from error


def refuse_link(path: Path) -> None:
    """Refuses a link, which a writer would replace, and not what it leads to.

    Args:
      path: to be written.

    Raises:
      OutputError: it is a link, also one that leads nowhere.
    """
    if os.path.islink(path):
        raise OutputError(
            f"{path}: is a link to {os.readlink(path)}; name that path to write there, or remove "
            "the link"
        )


def beside(path: Path, end: str) -> Path:
    """Names a temporary file or directory after its target and the process that makes it.

    Args:
      path: of the target.
      end: of the name, such as `partial`.

    Returns:
      A path in the same directory that nothing has, for `remove_litter` to know.
    """
    pid = os.getpid()
    mark = f"{pid:x}-{_start_of(pid) or 0:x}-{_boot()}-{uuid.uuid4().hex[:4]}"
    return path.with_name(f".{_stem(path.name, len(mark) + len(end) + 3)}.{mark}.{end}")


def remove_litter(path: Path) -> None:
    """Removes what killed processes left beside a target, and takes back what they moved aside.

    A process is known by its number, its start and the boot of its machine. What one of another
    boot, or of another machine on a shared disk, left is removed after a day.

    Args:
      path: of the target.
    """
    for entry in _entries(path.parent):
        match = _LITTER.fullmatch(entry.name)
        if match is None or not _is_over(entry, match):
            continue
        # The name of the target, which is short where both together are too long.
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
    """Tests if the process that made an entry is gone, as far as can be known."""
    pid, start = int(match[2], 16), int(match[3], 16)
    if match[4] == _boot():
        return _start_of(pid) != start
    try:
        return time.time() - entry.stat(follow_symlinks=False).st_mtime > _DAY
    except OSError:
        return False


def moved_aside(path: Path) -> Path | None:
    """Finds the checkpoint that a killed process moved from a path before it put its own there."""
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
    # A name that holds a null character is a ValueError.
    except (OSError, ValueError):
        return []


def _stem(name: str, room: int) -> str:
    """Shortens a name to a prefix and a digest where it and `room` more letters are too long."""
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
    """Returns the start of a process in ticks since boot, None if it is gone, zero if unknown."""
    try:
        # The name of the program, in brackets, may hold anything.
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
    """Refuses to begin where a disk is too full.

    Args:
      out: to be written; it need not exist.
      needed: bytes.

    Raises:
      OutputError: fewer bytes are free.
    """
    existing = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"{out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room or name "
            "a directory on another disk"
        )


@contextlib.contextmanager
def new_directory(
    target: str | os.PathLike, overwrite: bool, keep: bool = False, mark: str = CONFIG
) -> Iterator[Path]:
    """Gives a temporary directory beside `target` that takes its place when all went well.

    Where one is replaced, the two exchange their names in one step, so that a checkpoint is there
    at every moment. What killed processes left beside `target` is removed first.

    Args:
      target: directory to create; an empty one may exist. A link is refused.
      overwrite: replaces an existing checkpoint (a directory that holds `mark`).
      keep: the temporary directory has a name that a later call finds again, with what an earlier
        one left in it, and survives errors. One process at a time may use it.
      mark: name of a file that a directory holds that may be replaced.

    Yields:
      The temporary directory. After an error it is removed, unless kept, and `target` is as it was.

    Raises:
      OutputError: `target` exists and may not be replaced, its parent cannot be written, or another
        process writes what is kept.
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
        # It may have come into being meanwhile.
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
    """A directory that no other process may lock; the lock ends with the process."""

    _mine: ClassVar[set[tuple[int, int]]] = set()

    def __init__(self, directory: Path, target: Path, again: bool = False) -> None:
        """Locks a directory.

        Args:
          directory: to lock.
          target: named in the message.
          again: this process may hold the lock already.

        Raises:
          OutputError: another process, or this one, holds the lock.
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
                f"{target}: another run is writing it; wait for that one, or name another path"
            ) from error
        except OSError:
            # A disk without locks, such as some network disks.
            os.close(file)
            return
        if not directory.is_dir() or not os.path.samestat(os.stat(directory), status):
            os.close(file)
            raise OutputError(f"{target}: another run has just finished it; nothing was written")
        self._mine.add(self._key)
        self._file = file
        # Closes the file where an error keeps `release` from being called.
        self._close = weakref.finalize(self, self._release, file, self._key)

    def release(self) -> None:
        """Lets other processes lock the directory."""
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
    """Refuses a path that cannot take a file or a directory, before any work is done.

    Args:
      path: of the file or of the directory to create.
      overwrite: replaces an existing file, or an existing directory that contains `mark`.
      mark: name of a file in every directory that may be replaced; None for a file.
      needed: bytes that the disk must have free; what is replaced is removed last.
      strict: refuses a directory that exists and is empty, and one whose parent does not exist. A
        file's directory must always exist.

    Raises:
      OutputError: the path exists and may not be replaced, is a link, its parent cannot be written,
        or the disk is too full.
    """
    target = check_writable_name(path)
    try:
        if mark is None:
            _check_file(target, overwrite)
        else:
            if strict and target.is_dir() and not any(target.iterdir()):
                raise OutputError(f"{target}: exists; name another path, or remove it")
            _check_directory(target, overwrite, mark)
            if strict and not target.parent.is_dir():
                raise OutputError(f"{target}: its directory does not exist; make it first")
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
        raise OutputError(f"{target}: exists; name another path or pass overwrite=True")
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
                f"{target}: is not {kind} (no {mark}), so overwrite=True leaves it alone; "
                "remove it or name another directory"
            )
        raise OutputError(
            f"{target}: exists and is not empty; name another directory or pass overwrite=True"
        )
    if target.exists():
        raise OutputError(f"{target}: exists and is not a directory; name another path")


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
    """Exchanges two names in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0


def _step_aside(temporary: Path, target: Path) -> None:
    """Replaces a full directory in two steps; `remove_litter` mends what a kill between leaves."""
    aside = beside(target, "old")
    os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def no_directory(path: Path) -> str:
    """Returns the message about a path that is not a checkpoint directory.

    Args:
      path: it may look like `owner/name`, as repositories of a model hub are called.
    """
    fault = "is a file"
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        fault = "does not exist"
    except (OSError, ValueError) as error:
        fault = f"cannot be opened ({getattr(error, 'strerror', None) or error})"
    message = f"{shown_path(path)}: {fault}; a checkpoint is a directory with {CONFIG}"
    aside = moved_aside(path)
    if aside is not None:
        message += f"; an interrupted save left the old one as {aside.name}"
    if fault == "does not exist" and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        message += (
            f"; to download a repository: hf download {path} --local-dir {path.name}, then give "
            f"{path.name!r}"
        )
    return message
