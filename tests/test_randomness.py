"""Keyed random numbers: they depend on their key, and on nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.randomness import digest, generator, keyed_seed, normals, uniforms

PART = st.one_of(st.integers(-(2**63), 2**63), st.text(max_size=8))


@given(st.lists(PART, max_size=4), st.lists(PART, max_size=4))
def test_different_keys_give_different_numbers(a: list[int | str], b: list[int | str]) -> None:
    assert (digest(0, *a) == digest(0, *b)) == (a == b)


def test_a_text_and_a_number_that_look_the_same_are_different_keys() -> None:
    assert digest(0, "1", "2") != digest(0, 1, 2) != digest(0, "1,2") != digest(0, 12)


def test_numbers_are_the_same_on_every_platform() -> None:
    assert digest(7, "scene", 3, size=8).hex() == "dd8a733e938c5bb4"
    assert keyed_seed(7, "scene", 3) == 0x5A2D_C649_9F39_C56E
    np.testing.assert_array_equal(uniforms(2, 7, "scene", 3), [0.22771201014278208, 0.18909091819687673])


def test_integers_of_numpy_are_as_good_as_pythons() -> None:
    assert digest(np.int64(7), np.int32(3)) == digest(7, 3)


def test_uniforms_are_uniform_and_normals_are_normal() -> None:
    u = uniforms(100_000, 1, "u")
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005
    z = normals((100_000,), 1, "z")
    assert z.dtype == np.float32
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


def test_a_generator_does_not_share_its_state() -> None:
    first = generator(1, "a")
    first.random(10)
    assert generator(1, "a").random() == generator(1, "a").random() != first.random()
