"""Updates of a device: fetch a signed release, build it beside the old one, switch in one step."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_edge.errors import GlmEdgeError, UpdateError
from glm_edge.files import read_bytes
from glm_edge.update.disk import disk_errors
from glm_edge.update.health import report
from glm_edge.update.installed import MAX_PLAN_BYTES, Installed, read_section
from glm_edge.update.plan import Plan, pack_plan, unpack_plan
from glm_edge.update.rollout import channel_from_json
from glm_edge.update.state import STATE, State, read_state, write_state
from glm_edge.update.transport import HttpTransport, Transport, download
from glm_edge.update.trust import Trust
from glm_edge.writers import DirectoryLock, require_space, write_whole

ROOT = "root.json"
PENDING = "pending"
OBJECTS = "objects"
MAX_ROOT_BYTES = 1 << 20
# A clock may be corrected by this much without looking like an attack.
CLOCK_TOLERANCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Result of `Client.fetch`.

    Attributes:
      status: `ready` (call `apply`), `current`, `none` (no release for this device), or `skipped`
        (the release on offer has failed here).
      release: number of the release on offer, or None.
      downloaded: bytes of models that came over the network.
    """

    status: str
    release: int | None
    downloaded: int = 0


class Client:
    """A device with an installed model.

    The device has a complete model at any time: `apply` builds the new release in a directory
    beside the old one, verifies every byte, and then replaces one small file that names the current
    release. A process that is killed, or a disk that is full, leaves the old release in use.
    """

    def __init__(
        self,
        directory: str | Path,
        source: str | Transport,
        root: bytes | None = None,
        device: str | None = None,
        report_url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the directory of a device, or create it.

        Args:
          directory: directory of the device.
          source: address of the repository, or a transport.
          root: root metadata that came with the device; required for a new directory, and ignored
            later.
          device: id of the device; None keeps the stored one, or draws a random one.
          report_url: address for health reports, or None.
          clock: time in seconds since 1970.

        Raises:
          UpdateError: the root is missing, or the stored state is malformed.
          OutputError: the directory cannot be written.
        """
        self.directory = Path(directory)
        self._transport = HttpTransport(source) if isinstance(source, str) else source
        self._installed = Installed(self.directory / "releases")
        self._objects = self.directory / OBJECTS
        self._report_url, self._clock = report_url, clock
        with self._locked():
            path = self.directory / ROOT
            if not path.exists():
                if root is None:
                    raise UpdateError(f"{path}: does not exist; pass root= of the repository")
                write_whole(path, lambda temporary: temporary.write_bytes(root))
            state = read_state(self.directory, device)
            # The id of a new device is random, so it must last from the first call.
            if not (self.directory / STATE).exists() or state != self.state:
                write_state(self.directory, state)

    @property
    def state(self) -> State:
        """The stored state of the device."""
        return read_state(self.directory, None)

    def current(self) -> Path | None:
        """Return the installed model: a directory, a file, or None before the first release."""
        release = self.state.current
        return None if release is None else self._installed.model(release)

    def fetch(self) -> Fetched:
        """Download the release for this device.

        An interrupted download continues. The installed model is not touched.

        Returns:
          The status, and the number of the release.

        Raises:
          UpdateError: the metadata is not trusted, the clock was set back, or the server does not
            send the signed bytes.
          OutputError: the disk is full, or cannot be written.
        """
        with self._locked():
            state = self._tidied()
            now = self._clock()
            # Expired metadata would look valid, so a server could freeze the device in the past.
            if now < state.clock - CLOCK_TOLERANCE_S:
                raise UpdateError(
                    f"{self.directory}: the clock is {state.clock - now:.0f} s behind the last "
                    "update; set the clock"
                )
            root = read_bytes(self.directory / ROOT, MAX_ROOT_BYTES, UpdateError)
            trust = Trust(self.directory / "metadata", root, self._transport)
            trust.refresh()
            state = dataclasses.replace(state, clock=now)
            write_state(self.directory, state)
            release = channel_from_json(
                _required(trust, "channel.json"), "channel.json"
            ).release_of(state.device)
            if release is None or release == state.current or release in state.skipped:
                (self.directory / PENDING).unlink(missing_ok=True)
                if release is None:
                    return Fetched("none", None)
                return Fetched("current" if release == state.current else "skipped", release)
            plan = self._plan(trust, state, release)
            downloaded = self._download(plan, state)
            packed = pack_plan(plan)
            write_whole(self.directory / PENDING, lambda path: path.write_bytes(packed))
            return Fetched("ready", release, downloaded)

    def apply(self, check: Callable[[Path], None] | None = None) -> Path:
        """Build the fetched release, verify it, and make it the current one.

        Args:
          check: function of the model's path, called before the switch. If it raises a
            `GlmEdgeError`, the release is skipped and reported as unhealthy.

        Returns:
          The path of the model.

        Raises:
          UpdateError: nothing was fetched, an object or the installed model is damaged, or the
            check failed.
          OutputError: the disk is full, or cannot be written.
        """
        with self._locked():
            state, path = self._tidied(), self.directory / PENDING
            if not path.exists():
                raise UpdateError(f"{self.directory}: nothing to apply; fetch an update first")
            plan = unpack_plan(read_bytes(path, MAX_PLAN_BYTES, UpdateError), str(path))
            # An earlier call may have been killed after the switch.
            if plan.release != state.current:
                if not self._installed.is_intact(plan.release):
                    require_space(self._installed.path(plan.release), plan.size)
                    self._installed.build(plan, self._objects, self._sections(state))
                self._check(check, plan.release, state)
                state = dataclasses.replace(state, current=plan.release, previous=state.current)
                # The switch: everything before it leaves the old model, everything after the new.
                write_state(self.directory, state)
            path.unlink()
            shutil.rmtree(self._objects, ignore_errors=True)
            self._tidied()
            self._report(state, plan.release, True, "applied")
            return self._installed.model(plan.release)

    def rollback(self, reason: str) -> Path:
        """Return to the previous release, and skip the current one from then on.

        Args:
          reason: reason for the health report.

        Returns:
          The path of the previous model.

        Raises:
          UpdateError: there is no previous release, or it is damaged.
          OutputError: the directory cannot be written.
        """
        with self._locked():
            state = self._tidied()
            if state.current is None or state.previous is None:
                raise UpdateError(f"{self.directory}: has no previous release")
            if not self._installed.is_intact(state.previous):
                raise UpdateError(
                    f"{self.directory}: the previous release {state.previous} is damaged"
                )
            after = dataclasses.replace(
                state,
                current=state.previous,
                previous=None,
                skipped=(*state.skipped, state.current),
            )
            write_state(self.directory, after)
            (self.directory / PENDING).unlink(missing_ok=True)
            self._tidied()
            self._report(after, state.current, False, reason)
            return self._installed.model(state.previous)

    def _check(self, check: Callable[[Path], None] | None, release: int, state: State) -> None:
        """Call the check of a built release; skip the release if it fails."""
        if check is None:
            return
        try:
            check(self._installed.model(release))
        except GlmEdgeError as error:
            skipped = (*state.skipped, release)
            write_state(self.directory, dataclasses.replace(state, skipped=skipped))
            (self.directory / PENDING).unlink()
            self._tidied()
            self._report(state, release, False, str(error))
            raise UpdateError(f"release {release}: failed its check: {error}") from error

    def _plan(self, trust: Trust, state: State, release: int) -> Plan:
        """Fetch the plan of a delta from an intact release, else the complete plan."""
        for base in (state.current, state.previous):
            if base is None:
                continue
            name = f"deltas/{base}-{release}.plan"
            packed = trust.target(name)
            if packed is not None and self._installed.is_intact(base):
                return _checked(unpack_plan(packed, name), name, release, base)
        name = f"releases/{release}.plan"
        return _checked(unpack_plan(_required(trust, name), name), name, release, None)

    def _download(self, plan: Plan, state: State) -> int:
        """Download the objects of the sections that are not installed; return the bytes."""
        installed, sizes = self._sections(state), {}
        for _, _, section in plan.sections():
            if section.object_sha256 in sizes or section.method == "copy":
                continue
            if read_section(installed, section.sha256, section.size) is None:
                sizes[section.object_sha256] = section.object_size
        self._objects.mkdir(parents=True, exist_ok=True)
        present = 0
        for path in self._objects.iterdir():
            if path.name.removesuffix(".part") in sizes:
                present += path.stat().st_size
            else:
                path.unlink()
        require_space(self._objects / "object", max(0, sum(sizes.values()) - present) + plan.size)
        return sum(
            download(self._transport, sha256, size, self._objects) for sha256, size in sizes.items()
        )

    def _sections(self, state: State) -> dict[str, tuple[Path, int, int]]:
        return self._installed.sections({state.current, state.previous})

    def _tidied(self) -> State:
        """Read the state, and remove releases that it does not name."""
        state = self.state
        self._installed.keep_only({state.current, state.previous})
        return state

    def _report(self, state: State, release: int, healthy: bool, reason: str) -> None:
        fields = {
            "device": state.device,
            "release": release,
            "healthy": healthy,
            "reason": reason,
            "time": self._clock(),
        }
        report(self.directory, fields, self._report_url)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with disk_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(self.directory, self.directory)
            try:
                yield
            finally:
                lock.release()


def _required(trust: Trust, name: str) -> bytes:
    content = trust.target(name)
    if content is None:
        raise UpdateError(f"{name}: the signed metadata does not list it; publish a release")
    return content


def _checked(plan: Plan, name: str, release: int, base: int | None) -> Plan:
    if plan.release != release or plan.base != base:
        raise UpdateError(f"{name}: is a plan from {plan.base} to {plan.release}")
    return plan
