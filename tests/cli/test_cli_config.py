"""Trace-time configuration."""

from __future__ import annotations

import threading

import pytest

from jax_deepgemm import config


def test_use_is_nested_and_undone() -> None:
    before = config.get()
    with config.use(num_sms=100):
        with config.use(fallback="reference"):
            assert config.get() == config.Settings(num_sms=100, fallback="reference")
        assert config.get().fallback == "error"
    assert config.get() == before


def test_use_is_undone_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), config.use(num_sms=1):
        raise RuntimeError("inside")
    assert config.get().num_sms is None


def test_use_stays_in_its_thread() -> None:
    seen = []
    with config.use(num_sms=7):
        thread = threading.Thread(target=lambda: seen.append(config.get().num_sms))
        thread.start()
        thread.join()
    assert seen == [None]


def test_update_holds_until_updated_again() -> None:
    try:
        config.update(num_sms=64)
        assert config.get().num_sms == 64
    finally:
        config.update(num_sms=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sms": 0}, "num_sms is 0, need a positive int, or None"),
        ({"num_sms": 8.5}, "num_sms is 8.5, need a positive int, or None"),
        ({"num_sms": "8"}, "num_sms is '8', need a positive int, or None"),
        ({"fallback": "slow"}, "fallback is 'slow', need one of error, reference"),
        ({"sms": 3}, "no setting named sms; there are"),
    ],
)
def test_bad_settings_say_what_is_allowed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.update(**changes)
    with pytest.raises(ValueError, match=message), config.use(**changes):
        pass
