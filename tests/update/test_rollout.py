"""Rollout to a simulated fleet, and the channel's commands."""

import pytest

from glm_edge.errors import UpdateError
from glm_edge.update import Channel, Repository, in_rollout, publish
from glm_edge.update.rollout import channel_from_json, channel_json
from tests.update.conftest import contents, update

FLEET = [f"device-{index}" for index in range(10_000)]


def test_a_fleet_follows_the_percentage():
    """The part is right, and a device that has the candidate keeps it when the part grows."""
    before: set[str] = set()
    for percentage in (0, 0.5, 1, 5, 10, 25, 50, 99, 100):
        channel = Channel(stable=1, candidate=2, percentage=percentage)
        chosen = {device for device in FLEET if channel.release_of(device) == 2}
        # Four standard deviations of a binomial draw.
        tolerance = 4 * (len(FLEET) * percentage / 100 * (1 - percentage / 100)) ** 0.5
        assert abs(len(chosen) - len(FLEET) * percentage / 100) <= tolerance
        assert before <= chosen
        before = chosen
    assert all(Channel(stable=1).release_of(device) == 1 for device in FLEET)


def test_releases_begin_with_different_devices():
    first, second = ({d for d in FLEET if in_rollout(d, release, 10)} for release in (2, 3))
    assert len(first & second) == pytest.approx(len(FLEET) / 100, abs=40)


def test_a_canary_grows_and_becomes_stable(first):
    publish(first.repository, first.folder / "model2", first.signers, percentage=50, level=1)
    inside = next(device for device in FLEET if in_rollout(device, 2, 50))
    outside = next(device for device in FLEET if not in_rollout(device, 2, 50))
    early, late = (first.device(name, device=name) for name in (inside, outside))
    assert contents(update(early)) == first.model(2)
    assert contents(update(late)) == first.model(1)
    with pytest.raises(UpdateError, match="use halt"):
        first.repository.promote(10, first.signers)
    assert first.repository.promote(100, first.signers) == Channel(stable=2)
    assert contents(update(late)) == first.model(2)
    with pytest.raises(UpdateError, match="no candidate"):
        first.repository.halt(first.signers)


def test_halt_returns_devices_to_the_stable_release(first):
    publish(first.repository, first.folder / "model2", first.signers, percentage=99.99, level=1)
    client = first.device(device="device-1")
    assert contents(update(client)) == first.model(2)
    assert first.repository.halt(first.signers) == Channel(stable=1)
    fetched = client.fetch()
    # The previous release is still installed.
    assert (fetched.release, fetched.downloaded) == (1, 0)
    assert contents(client.apply()) == first.model(1)
    # The next number is new, so that devices that skipped release 2 receive it.
    result = publish(first.repository, first.folder / "model2", first.signers, level=1)
    assert result.release == 3


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_a_killed_publisher_leaves_the_old_release_on_offer(first, monkeypatch, role):
    write = Repository._write_signed

    def killed(self, metadata, written, signers):
        if written == role:
            raise KeyboardInterrupt
        write(self, metadata, written, signers)

    monkeypatch.setattr(Repository, "_write_signed", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(first.repository, first.folder / "model2", first.signers, level=1)
    monkeypatch.undo()
    assert first.device().fetch().status == "current"
    publish(first.repository, first.folder / "model2", first.signers, level=1)
    assert contents(update(first.device())) == first.model(2)


@pytest.mark.parametrize("percentage", [-1, 100.1, float("nan"), True, "5", None])
def test_other_percentages_are_refused(percentage):
    with pytest.raises(UpdateError, match="between 0 and 100"):
        channel_from_json(
            channel_json(Channel(1, 2, percentage)).replace(b"NaN", b"1e999"), "channel"
        )


def test_channels_round_trip():
    channel = Channel(stable=3, candidate=4, percentage=2.5)
    assert channel_from_json(channel_json(channel), "channel") == channel
