"""How many starts of an image superpeers want to hear of."""

from __future__ import annotations

from superpeer.traces_sampling import Sampling


def test_of_a_crowd_some_are_asked_to_tell_and_fewer_are_taken() -> None:
    sampling = Sampling(8, lambda: 5.0)
    assert [sampling.ask("image") for _ in range(1000)].count(True) == 16
    assert [sampling.take("image") for _ in range(16)] == [True] * 8 + [False] * 8
    assert sampling.ask("another")
    assert sampling.take("another")


def test_when_enough_were_taken_nobody_is_asked_until_the_next_minute() -> None:
    now = 100.0
    sampling = Sampling(2, lambda: now)
    assert sampling.take("image")
    assert sampling.ask("image")
    assert sampling.take("image")
    assert not sampling.ask("image")
    assert not sampling.take("image")
    now += 60
    assert sampling.ask("image")
    assert sampling.take("image")


def test_memory_is_bounded_whatever_is_asked_for() -> None:
    sampling = Sampling(1, lambda: 0.0)
    for number in range(10_000):
        sampling.ask(str(number))
    assert repr(sampling) == "Sampling(4096 images)"
