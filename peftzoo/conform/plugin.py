"""Checks of the plugin itself: its card, its options, what importing it does. No model is needed."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path

from peftzoo.adapters import configure
from peftzoo.conform import process
from peftzoo.conform.cases import Case
from peftzoo.conform.rules import NAMES, check
from peftzoo.contract import adapter
from peftzoo.errors import UserError

MAX_LINES = 160
"""Limit on the length of a plugin's file."""


@check(archs=())
def check_card(case: Case) -> None:
    """The plugin says what it is: title, paper, family, an equation, a file named like the method."""
    cls, file = case.cls, Path(inspect.getsourcefile(case.cls) or "")
    for fact in ("name", "title", "paper", "family"):
        assert getattr(cls, fact).strip(), f"{cls.__name__}.{fact} is empty"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", cls.name), (
        f"name {cls.name!r}: a-z, 0-9 and single hyphens"
    )
    stem = file.stem.replace("_", "-")
    assert cls.name == stem, f'the file is {file.name}, so the name is "{stem}", not "{cls.name}"'
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    assert re.search(r"\S\s+=\s+\S", text), "the docstring of the file has no equation (`y = ...`)"
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{file.name} has {lines} lines, at most {MAX_LINES} are allowed"
    assert cls.lr > 0, f"lr={cls.lr} is not positive"
    _assert_known_failures_exist(cls)


def _assert_known_failures_exist(cls: type) -> None:
    for key, reason in cls.known_failures.items():
        assert key.partition("[")[0] in NAMES, f"known_failures names no check: {key}"
        assert reason.strip(), f"known_failures[{key!r}] gives no reason"


@check(archs=())
def check_defaults(case: Case) -> None:
    """Every option has a default and a description, and survives JSON."""
    cls = case.cls
    assert issubclass(cls.Config, adapter.Config), "Config does not derive from peftzoo.Config"
    assert not cls.described or "description" in cls.Config.model_fields, "described, but no such option"
    for name, field in cls.Config.model_fields.items():
        assert not field.is_required(), f"option {name} has no default"
        assert field.description, f"option {name} has no description"
    for config in (cls.Config(), cls.Config(**cls.tiny)):
        assert cls.Config.model_validate_json(config.model_dump_json()) == config, f"JSON changed {config}"


@check(archs=())
def check_init_only_stores(case: Case) -> None:
    """Making an adapter keeps the options and draws or allocates nothing."""
    config, before = case.cls.Config(**case.cls.tiny), process.random_state()
    instance = case.cls(config)
    assert instance.config is config, "config is not the one that was passed"
    assert not instance.state_dict(), (
        f"__init__ made {next(iter(instance.state_dict()))}; make it in prepare()"
    )
    assert case.cls().config == case.cls.Config(), "without options, the defaults hold"
    assert process.random_state() == before, "__init__ draws random numbers"


@check(archs=())
def check_import(case: Case) -> None:
    """Importing the plugin leaves the random states, torch's functions and settings, and peftzoo alone."""
    name = process.replaced_own_function()
    assert not name, f"a plugin has replaced {name}: the checks may not be changed"
    functions, own = process.torch_functions(), process.own_functions()
    with process.putting_back(functions), process.putting_back_own(own), process.keeping_random_state():
        process.seed_everything(3)
        random_before = process.random_state()
        with process.unusual_settings():
            settings = process.settings()
            _import_again(case.cls)
            now = process.settings()
        random_now = process.random_state()
        for known, current in ((functions, process.torch_functions()), (own, process.own_functions())):
            name = process.first_difference(known, current)
            assert not name, f"importing the file replaces {name}"
    changed = next((n for n, v in settings.items() if now[n] != v), "")
    assert not changed, f"importing the file changes {changed}"
    changed = next((n for n, v in random_before.items() if random_now[n] != v), "")
    assert not changed, f"importing the file changes the random state of {changed}"


def _import_again(cls: type) -> None:
    """Run the plugin's file as a module of another name."""
    spec = importlib.util.spec_from_file_location("peftzoo_import_check", inspect.getsourcefile(cls))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]


@check(archs=())
def check_unknown_key(case: Case) -> None:
    """A misspelt option is refused with the nearest right one."""
    names = list(case.cls.Config.model_fields)
    for wrong in [*(f"{name}x" for name in names if f"{name}x" not in names), "qqzzqq"]:
        try:
            configure(case.cls, {wrong: 1})
        except UserError as error:
            assert wrong in str(error), f"the error does not name {wrong}: {error}"
            assert wrong == "qqzzqq" or wrong[:-1] in str(error), f"no hint at {wrong[:-1]}: {error}"
        else:
            raise AssertionError(f"option {wrong} was accepted")
