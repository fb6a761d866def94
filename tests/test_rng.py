"""Random state: what is read is what the libraries say, whatever was drawn in between."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spot_core.errors import ConfigError
from spot_core.snapshot import rng
from spot_core.snapshot.rng import RngState


def numpy_of(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """Comparable."""
    return (state[0], state[1].tolist(), *state[2:])


def read() -> RngState:
    """As it is read before each batch; what Python and numpy say must be the same."""
    state = rng.capture(with_devices=False)
    assert state.python == random.getstate()
    assert numpy_of(state.numpy) == numpy_of(tuple(np.random.get_state(legacy=True)))
    return state


DRAWS = {
    "nothing": lambda: None,
    "uniform": np.random.random_sample,
    "normal": np.random.standard_normal,  # every second one changes no word of the generator
    "many": lambda: np.random.random_sample(2000),
    "seed": lambda: np.random.seed(7),
    "Python's": random.random,
    "Python's normal": lambda: random.gauss(0.0, 1.0),
    "Python's many": lambda: random.randbytes(5000),
    "Python's seed": lambda: random.seed(7),
}


def test_the_words_of_this_interpreters_generator_are_found() -> None:
    """Elsewhere the state is read in full each time, which is slower and as right."""
    assert rng._python._is_known


def test_an_interpreter_that_keeps_its_words_elsewhere_is_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng._GlobalPython, "_OFFSET", object.__basicsize__ - 4)
    elsewhere = rng._GlobalPython()
    assert not elsewhere._is_known
    for _ in range(2):
        random.random()
        assert elsewhere.state() == random.getstate()


@given(st.lists(st.one_of(st.sampled_from(sorted(DRAWS)), st.integers(0, 20))))
def test_a_state_is_read_anew_whenever_it_has_changed(ops: list[str | int]) -> None:
    """A number goes back to the state that was read so many reads ago."""
    before = rng.capture(with_devices=False)
    seen = [read()]
    for op in ops:
        if isinstance(op, int):
            rng.restore(seen[-1 - op % len(seen)])
        else:
            DRAWS[op]()
        seen.append(read())
    rng.restore(before)


def test_another_generator_in_numpys_place_is_read_too() -> None:
    """Also one of the same kind, which may be in the same state. Of another kind it is refused, at the first batch."""
    before = np.random.get_bit_generator()
    read()
    try:
        other = np.random.MT19937()
        other.state = before.state
        np.random.set_bit_generator(other)
        read()
        np.random.random_sample()
        read()
        np.random.set_bit_generator(np.random.PCG64(1))
        with pytest.raises(ConfigError, match="PCG64, and only its usual MT19937"):
            read()
    finally:
        np.random.set_bit_generator(before)
        read()
