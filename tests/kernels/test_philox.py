"""The counter generator is Philox4x32-10, in all three spellings."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zotune.kernels.philox import philox_numpy, philox_scalar, philox_torch, words, words32

# Known answers distributed with Random123 (Salmon et al. 2011), philox4x32, 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)


def by_numpy(counters, key):
    lanes = philox_numpy(tuple(np.array([c[i] for c in counters], dtype=np.uint64) for i in range(4)), key)
    return [tuple(int(lane[n]) for lane in lanes) for n in range(len(counters))]


def by_torch(counters, key):
    lanes = philox_torch(tuple(torch.tensor([c[i] for c in counters]) for i in range(4)), key)
    return [tuple(int(lane[n]) for lane in lanes) for n in range(len(counters))]


def by_scalar(counters, key):
    return [philox_scalar(c, key) for c in counters]


@pytest.mark.parametrize("run", [by_numpy, by_torch, by_scalar])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_published_known_answers(run, counter, key, expected):
    assert run([counter], key) == [expected]


@given(st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=5), st.tuples(WORD, WORD))
def test_three_spellings_agree(counters, key):
    """Integers: no tolerance. Covers carries and wrap-around that the known answers may miss."""
    assert by_numpy(counters, key) == by_torch(counters, key) == by_scalar(counters, key)


@given(st.tuples(WORD, WORD), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=20))
def test_words_put_block_and_site_into_the_counter(key, site, blocks):
    """Block in the low two words, site in the high two: distinct (site, block) pairs never share a counter."""
    expected = [philox_scalar((b & 0xFFFFFFFF, b >> 32, site & 0xFFFFFFFF, site >> 32), key) for b in blocks]
    assert [tuple(row) for row in words(key, site, torch.tensor(blocks)).tolist()] == expected


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_words_do_not_depend_on_the_chunk_worked_on(monkeypatch, chunk):
    """The numpy loop works in cache-sized chunks; where they end must not show."""
    blocks = torch.arange(200)
    whole = words((1, 2), 3, blocks)
    monkeypatch.setattr("zotune.kernels.philox._NUMPY_CHUNK", chunk)
    assert torch.equal(words((1, 2), 3, blocks), whole)


def test_a_site_for_each_block(monkeypatch):
    """The words of several sites at once are those of each, also where chunks end inside one."""
    monkeypatch.setattr("zotune.kernels.philox._NUMPY_CHUNK", 7)
    sites = np.array([5, 5, 5, 2**63 + 1, 2**63 + 1, 0, 0, 0, 0, 17], dtype=np.uint64)
    blocks = np.array([0, 1, 2, 2**40, 3, 0, 5, 6, 7, 0], dtype=np.uint64)
    each = [words32((3, 4), int(site), blocks[k : k + 1])[0] for k, site in enumerate(sites)]
    assert np.array_equal(words32((3, 4), sites, blocks), np.stack(each))
