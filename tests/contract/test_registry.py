"""How methods are found, named and refused."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import peftzoo
from peftzoo.contract import Adapter, registry
from peftzoo.errors import UserError

PLUGIN = '''"""A plugin.  y = x W^T"""
from peftzoo.contract import Adapter

class Mine(Adapter):
    name = "{name}"
'''


@pytest.fixture(autouse=True)
def no_extra_methods(monkeypatch):
    monkeypatch.setattr(registry, "_plugin_files", {})


def write(tmp_path, text, file="mine.py"):
    path = tmp_path / file
    path.write_text(text)
    return path


def register(monkeypatch, *points):
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])


def test_names_come_from_the_folder():
    names = registry.methods()
    assert names == sorted(names) and "lora" in names
    assert registry.get("lora").name == "lora"


def test_did_you_mean():
    with pytest.raises(UserError, match='unknown method "lorra": did you mean "lora"'):
        registry.get("lorra")
    with pytest.raises(UserError, match="peftzoo list methods"):
        registry.get("qqqqqq")


@pytest.mark.parametrize("name", ["", "../lora", "lora.py", "peftzoo.methods.lora", "__init__", "LORA", "os"])
def test_odd_names_import_nothing(name):
    with pytest.raises(UserError, match="unknown method"):
        registry.get(name)


def test_plugin_file(tmp_path):
    cls = registry.add_file(write(tmp_path, PLUGIN.format(name="mine")))
    assert registry.get("mine") is cls and "mine" in registry.methods()


def test_plugin_file_with_a_taken_name(tmp_path):
    with pytest.raises(UserError, match='the name "lora" is taken'):
        registry.add_file(write(tmp_path, PLUGIN.format(name="lora")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "this has 0"),
        (PLUGIN.format(name="a") + PLUGIN.format(name="b").replace("Mine", "Other"), "this has 2"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise RuntimeError('boom')", "RuntimeError: boom"),
        (PLUGIN.format(name="mine") + "    def after_stepp(self): pass\n", 'did you mean "after_step"'),
        (PLUGIN.format(name="mine") + "    mergable = False\n", 'did you mean "mergeable"'),
    ],
)
def test_plugin_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        registry.add_file(write(tmp_path, text))
    assert message in str(error.value)
    assert registry._plugin_files == {}


def test_missing_plugin_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        registry.add_file(tmp_path / "nowhere.py")


def test_misspelt_hook_in_python():
    with pytest.raises(TypeError, match='no such hook, did you mean "after_backward"'):
        type("Wrong", (Adapter,), {"after_backwards": lambda self, step, total: None})


def test_own_helpers_are_not_hooks():
    cls = type("Fine", (Adapter,), {"rank_of": 1, "_penaltyy": 2, "pool": lambda self: None})
    assert cls.rank_of == 1


def test_entry_point(monkeypatch, tmp_path):
    (tmp_path / "peftzoo_outside_test.py").write_text(PLUGIN.format(name="outside"))
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, EntryPoint("outside", "peftzoo_outside_test:Mine", "peftzoo.methods"))
    assert "outside" in registry.methods()
    assert registry.get("outside").name == "outside"


def test_entry_point_under_another_name(monkeypatch, tmp_path):
    (tmp_path / "peftzoo_other_test.py").write_text(PLUGIN.format(name="inner"))
    monkeypatch.syspath_prepend(tmp_path)
    register(monkeypatch, EntryPoint("outer", "peftzoo_other_test:Mine", "peftzoo.methods"))
    with pytest.raises(UserError, match='its class is named "inner"'):
        registry.get("outer")


@pytest.mark.parametrize("value", ["no_such_package_anywhere:Thing", "json:NoSuchThing", "json:dumps"])
def test_broken_entry_point(monkeypatch, value):
    register(monkeypatch, EntryPoint("broken", value, "peftzoo.methods"))
    assert registry.get("lora").name == "lora", "a broken package does not disturb the others"
    with pytest.raises(UserError, match='"broken"'):
        registry.get("broken")


def test_entry_points_that_clash(monkeypatch):
    same = [EntryPoint("twice", f"{m}:Thing", "peftzoo.methods") for m in ("one", "two")]
    register(monkeypatch, *same)
    with pytest.raises(UserError, match="comes from two packages"):
        registry.methods()
    register(monkeypatch, EntryPoint("lora", "one:Thing", "peftzoo.methods"))
    with pytest.raises(UserError, match=r'"lora" .* is built in'):
        registry.methods()


def test_public_names_are_the_visible_ones():
    assert dir(peftzoo) == peftzoo.__all__
    for name in peftzoo.__all__:
        assert getattr(peftzoo, name) is not None
    with pytest.raises(AttributeError, match="No peftzoo attribute lora"):
        peftzoo.lora  # noqa: B018


def test_import_is_quick_and_light():
    code = (
        "import sys, time; t = time.perf_counter(); import peftzoo; t = time.perf_counter() - t;"
        "heavy = {'torch', 'transformers', 'pydantic', 'peftzoo.methods'} & set(sys.modules);"
        "assert not heavy, heavy; from peftzoo.contract import registry as r; names = r.methods();"
        "assert 'torch' not in sys.modules and 'peftzoo.methods.lora' not in sys.modules;"
        "assert 'lora' in names; print(t)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert float(out) < 0.5


def test_getting_one_method_imports_no_other():
    code = (
        "import sys; from peftzoo.contract import registry as r; r.get('lora');"
        "print([m for m in sys.modules if m.startswith('peftzoo.methods.') and '._' not in m])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "['peftzoo.methods.lora']"


def test_the_origin_of_a_method(tmp_path, monkeypatch):
    """A file beside those that git tracks is told apart from them; so are packages and single files."""
    import peftzoo.methods

    methods = tmp_path / "methods"
    methods.mkdir()
    write(methods, PLUGIN.format(name="released"), "released.py")
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    own = write(methods, PLUGIN.format(name="my-own"), "my_own.py")
    monkeypatch.setattr(peftzoo.methods, "__path__", [str(methods)])
    monkeypatch.setattr(registry, "_untracked_files", registry._untracked_files.__wrapped__)
    register(monkeypatch, EntryPoint("theirs", "a:B", "peftzoo.methods"))
    file = write(tmp_path, PLUGIN.format(name="mine"))
    registry.add_file(file)
    origins = {name: registry.origin(name) for name in registry.methods()}
    assert origins == {"released": "peftzoo", "my-own": str(own), "mine": str(file), "theirs": "a package"}


def test_the_list_names_methods_that_are_not_part_of_peftzoo(run_cli, tmp_path):
    file = write(tmp_path, PLUGIN.format(name="mine").replace('name = "mine"', 'name = title = "mine"'))
    code, out, err = run_cli(f"list methods --plugin {file}")
    assert code == 0 and err == "" and f"mine is not part of peftzoo: {file}\n" in out
    assert "lora is not part" not in out
