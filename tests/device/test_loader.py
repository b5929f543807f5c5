"""Blocks in memory: policies against Belady's bound, references, and times."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_edge.device import loader
from glm_edge.errors import DataError


def hits(policy, capacity, layers=40, tokens=60):
    accesses = loader.layers_in_order(layers, tokens)
    return loader.simulate_loading([1] * layers, accesses, capacity, 1.0, 1.0, policy).hit_rate


@pytest.mark.parametrize("capacity", [10, 30, 39])
def test_loops_defeat_lru_and_not_mru(capacity):
    assert hits("lru", capacity) == 0.0
    assert hits("two_lists", capacity) == 0.0
    assert hits("mru", capacity) == hits("belady", capacity)
    bound = loader.hit_rate_bound(40, capacity)
    assert bound == (capacity - 1) / 39
    assert bound - 0.02 < hits("belady", capacity) <= bound
    # Pinned blocks hit on every token but the first.
    assert hits("pin", capacity) == pytest.approx(59 / 60 * (capacity - 1) / 40)


def test_thresholds_that_evict_the_oldest_miss_although_the_model_fits():
    assert hits("oldest_first", 40) == pytest.approx(0.011, abs=1e-3)
    assert hits("newest_first", 40) == pytest.approx(0.845, abs=1e-3)
    assert hits("lru", 40) == pytest.approx(59 / 60)


def belady_by_search(accesses, capacity):
    """The most hits of any choice of victims, by exhaustive search."""
    states = {frozenset(): 0}
    for block in accesses:
        following = {}
        for cached, count in states.items():
            if block in cached:
                options = [(cached, count + 1)]
            elif len(cached) < capacity:
                options = [(cached | {block}, count)]
            else:
                options = [(cached - {victim} | {block}, count) for victim in cached]
            for option, total in options:
                following[option] = max(following.get(option, 0), total)
        states = following
    return max(states.values())


@settings(max_examples=40)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 4))
def test_belady_is_optimal_and_no_policy_beats_it(accesses, capacity):
    best = belady_by_search(accesses, capacity)
    for policy in ("belady", "lru", "mru", "pin", "two_lists"):
        trace = loader.simulate_loading([1] * 6, accesses, capacity, 1.0, 1.0, policy)
        assert trace.hits <= best
        if policy == "belady":
            assert trace.hits == best


@settings(max_examples=60)
@given(
    st.sampled_from([p for p in loader.POLICIES if p != "belady"]),
    st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40),
)
def test_referenced_blocks_stay_and_memory_is_not_exceeded(policy, steps):
    sizes = [1, 2, 3, 1, 2, 3, 1, 2]
    cache = loader.BlockCache(sizes, 8, policy)
    references = [0] * len(sizes)
    for take, block in steps:
        if take:
            try:
                cache.acquire(block)
            except DataError:
                assert any(references)
                continue
            references[block] += 1
        elif references[block]:
            cache.release(block)
            references[block] -= 1
        assert all(block in cache for block, count in enumerate(references) if count)
        assert cache.used <= 8


def test_reading_ahead_hides_what_computing_takes():
    accesses = loader.layers_in_order(4, 50)
    on_demand = loader.simulate_loading([10] * 4, accesses, 20, 5.0, 10.0, "lru", ahead=False)
    ahead = loader.simulate_loading([10] * 4, accesses, 20, 5.0, 10.0, "lru")
    # Every block is read in 2 s and used in 1 s.
    assert on_demand.seconds == pytest.approx(3.0 * 200)
    assert ahead.seconds == pytest.approx(2.0 * 200 + 1.0)
    assert ahead.loaded_bytes == 2000
    assert ahead.stall_s == pytest.approx(ahead.seconds - 200.0)


def test_times_of_a_token_larger_than_memory():
    # 5.3 GB of 40 layers, DRAM 43 GB/s, flash 3.9 GB/s.
    token_s = [loader.loaded_token_s(5.3e9, gb * 1e9, 3.9e9, 43e9, 40) for gb in (2, 4.8, 5.3)]
    assert 1 / token_s[0] == pytest.approx(1.13, abs=0.01)
    assert 1 / token_s[1] == pytest.approx(5.89, abs=0.01)
    assert 1 / token_s[2] == pytest.approx(8.11, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [0], 1, 1.0, 1.0, "fifo"), "policy 'fifo' is not one of lru"),
        (([5], [0], 4, 1.0, 1.0), "a block of 5 bytes exceeds the memory of 4 bytes"),
        (([0], [0], 4, 1.0, 1.0), "at least one byte"),
        (([1], [], 4, 1.0, 1.0), "there is no access"),
        (([1], [0], 4, 0.0, 1.0), "bandwidths must be above 0"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        loader.simulate_loading(*arguments)


def test_references_are_counted():
    cache = loader.BlockCache([1, 1], 1, "lru")
    cache.acquire(0)
    with pytest.raises(DataError, match="referenced blocks fill the memory"):
        cache.acquire(1)
    cache.release(0)
    with pytest.raises(DataError, match="block 0 is released but not referenced"):
        cache.release(0)
    with pytest.raises(DataError, match="0 of 4 layers fit"):
        loader.hit_rate_bound(4, 0)
