"""The checks of a method run once for all tests of what `check` prints."""

from __future__ import annotations

import functools

import pytest

from peftzoo import conform


@pytest.fixture(scope="session", autouse=True)
def checks_run_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conform, "run", functools.cache(conform.run))
        yield
