"""Planted bugs: each is set into a method that is right, and a check must name what is wrong.

A plant changes a part (a mixin in front of the part's class, `planted` runs after its `__init__`), or
attributes and hooks of the adapter. The table says which check finds it and words of the message: the
tensor, the option, the setting.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from peftzoo import conform
from peftzoo.conform import process
from peftzoo.conform.counting import evaluate
from peftzoo.contract import Part, registry
from peftzoo.contract.scaffold import new_method


def planted(method: str, mixin: type | None = None, **changes) -> type:
    """The method with `mixin` in front of its parts' class, and attributes of the adapter replaced."""
    base = registry.get(method)
    if mixin is not None:

        def part(self, site):
            made = base.part(self, site)
            made.__class__ = type(type(made).__name__, (mixin, type(made)), {})
            getattr(made, "planted", lambda: None)()
            return made

        changes["part"] = part
    return type("Planted", (base,), {"__module__": base.__module__, **changes})


def with_option(method: str, name: str, annotation: type, default) -> type:
    """The method with one more option."""
    fields = {"__annotations__": {name: annotation}, name: Field(default, description="does nothing")}
    return planted(method, Config=type("Config", (registry.get(method).Config,), fields))


def first_weight(adapter) -> nn.Parameter:
    return next(iter(adapter.parts.values())).site.module.weight


# -- parts with a fault ---------------------------------------------------------------------------------


class DropsInEval(Part):
    def forward(self, base, x):
        return super().forward(base, F.dropout(x, self.owner.config.dropout, True))


class NeverDrops(Part):
    def planted(self):
        self.dropout = nn.Dropout(0.0)


class Noisy(Part):
    def forward(self, base, *args):
        k, *rest = args[1:]
        return super().forward(base, args[0], k + 0.1 * torch.rand_like(k), *rest)


class IgnoresScale(Part):
    def planted(self):
        self.s = 1.0


class WrongWhereTriangular(Part):
    def delta(self, W):
        return super().delta(W) * (2 if self.owner.config.form == "triu" else 1)


class WrongAtOtherRanks(Part):
    def delta(self, W):
        return super().delta(W) * (1 if self.owner.config.r == 2 else 2)


IMMORTAL: list = []


class StaysForever(Part):
    def planted(self):
        IMMORTAL.append(self)


class HookStays(Part):
    def planted(self):
        IMMORTAL.append(self.forward)


class EditsBaseInEval(Part):
    def forward(self, base, x):
        if not self.training:
            self.site.module.weight.data.mul_(1.001)
        return super().forward(base, x)


class LooksAtBatch(Part):
    def forward(self, base, x):
        y = super().forward(base, x)
        return y + 0.1 * (y.mean(dim=0, keepdim=True) if self.training else 0)


class LooksAtLength(Part):
    def forward(self, base, x):
        return super().forward(base, x) * (1 + 0.01 * x.shape[1])


class CountsSteps(Part):
    calls = 0

    def forward(self, base, x):
        self.calls += self.training
        return super().forward(base, x) * (1 + 0.05 * self.calls)


LAST: dict = {}


class SharesStateByName(Part):
    """What one run leaves under a layer's name, another run on the same base reads."""

    def forward(self, base, x):
        y = super().forward(base, x)
        before = LAST.get(self.site.name, 0.0)
        LAST[self.site.name] = float(y.detach().abs().mean())
        return y * (1 + 0.1 * before)


class SharesTensor(Part):
    """Every handle uses the tensors of the one that was made last."""

    def planted(self):
        LAST[self.site.name] = self.K

    def forward(self, base, *args):
        self.K, own = LAST[self.site.name], self.K
        try:
            return super().forward(base, *args)
        finally:
            self.K = own


class Seeds(Part):
    def forward(self, base, x):
        if self.training:
            torch.manual_seed(0)
        return super().forward(base, x)


class TurnsGradOff(Part):
    def forward(self, base, x):
        y = super().forward(base, x)
        torch.set_grad_enabled(False)
        return y


class OneMoreNumber(Part):
    def planted(self):
        self.extra = nn.Parameter(torch.zeros(1))


class NotZeroAtStart(Part):
    def planted(self):
        nn.init.constant_(self.v, 0.1)


class DoublesDelta(Part):
    def delta(self, W):
        return 2 * super().delta(W)


class BuildsWeight(Part):
    def forward(self, base, x):
        return F.linear(x, self.site.weight + self.delta(self.site.weight), self.site.bias)


class SavesNoise(Part):
    def planted(self):
        noise = self.owner.ctx.normal(200, 200, std=1.0, key=f"{self.site.name} noise")
        self.register_buffer("noise", noise)


class DrawsGlobally(Part):
    def planted(self):
        self.A.data.uniform_(-0.1, 0.1)


class HalvesGradient(Part):
    def forward(self, base, x):
        y = super().forward(base, x)
        return (y + y.detach()) / 2


class Widens(Part):
    def forward(self, base, x):
        return super().forward(base, x).float()


class WritesInput(Part):
    def forward(self, base, x):
        y = super().forward(base, x)
        x.data.add_(1e-3)  # past autograd's own guard
        return y


# -- hooks with a fault ---------------------------------------------------------------------------------


def breaks_with_exact(self, q):
    if self.config.cayley == "exact":
        raise RuntimeError("no such transform")
    return registry.get("oft").rotation(self, q)


def keeps_losses(self):
    self.__dict__.setdefault("log", []).append(
        loss := sum(p.square().sum() for p in self.parameters()).detach()
    )
    return 0 * loss


def grows_graph(self):
    self.__dict__["total"] = self.__dict__.get("total", 0.0) + sum(
        p.square().sum() for p in self.parameters()
    )
    return 0.0


def edits_base_late(self, step, total):
    if step == 5:
        first_weight(self).data.mul_(1.01)


def edits_base_on_save(self, *args, **kwargs):
    first_weight(self).data.mul_(1.01)
    return nn.Module.state_dict(self, *args, **kwargs)


def penalty_of_detached(self):
    return 0.1 * sum(p.detach().square().sum() for p in self.parameters())


def momentum_of_its_own(self, step, total):
    kept = self.__dict__.setdefault("momentum", {})
    for name, p in self.named_parameters():
        kept[name] = p.grad = p.grad + 0.9 * kept.get(name, 0)


class ForgetfulSGD(torch.optim.SGD):
    """Its moments are not in its state."""

    def step(self, closure=None):
        self.__dict__.setdefault("moments", {})
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                self.moments[p] = p.grad = p.grad + 0.9 * self.moments.get(p, 0)
        return super().step(closure)


class OwnRate(torch.optim.SGD):
    """Sets the rate at every step, whatever the schedule says."""

    def step(self, closure=None):
        self.param_groups[0]["lr"] = self.defaults["lr"]
        return super().step(closure)


def fixed_rate_of_B(self, params, lr):
    of_B = {id(p.B) for p in self.parts.values()}
    A, B = ([p for p in params if (id(p) in of_B) == b] for b in (False, True))
    return torch.optim.AdamW([{"params": A}, {"params": B, "lr": 1e-3}], lr=lr)


def seeds_numpy(self, sites):
    numpy.random.seed(0)
    return registry.get("miss").prepare(self, sites)


def draws_from_random(self, step, total):
    random.random()


def more_threads(self, sites):
    torch.set_num_threads(torch.get_num_threads() + 1)


def patches_linear(self, step, total):
    original = F.linear
    F.linear = lambda *args, **kwargs: original(*args, **kwargs)


def float64_from_here(self, sites):
    torch.set_default_dtype(torch.float64)


def patches_checks(self, step, total):
    conform.cases.assert_close = lambda *args: None


def writes_base(self, step, total):
    first_weight(self).data.mul_(1.01)


PLANTS = [
    # dropout
    (planted("dora", DropsInEval), "dropout", "dropout=0.5"),
    (planted("vera", NeverDrops), "dropout", "option dropout=0.5 is never applied"),
    (planted("prefix-tuning", Noisy), "dropout", "two passes in eval mode differ"),
    # options
    (with_option("ia3", "beta", float, 0.5), "dead_options", "option beta is dead"),
    (with_option("hra", "warm", bool, False), "dead_options", "option warm is dead"),
    (planted("krona", IgnoresScale), "dead_options", "option scale is dead"),
    (planted("oft", rotation=breaks_with_exact), "option_values", "cayley=exact: RuntimeError: no such"),
    (planted("mora", WrongAtOtherRanks), "option_values", "with r=1: bert"),
    (planted("qr-lora", WrongWhereTriangular), "option_values", "with form=triu: bert"),
    (planted("melora", variants=[{"n": 64}]), "option_values", "n=64 is refused"),
    # memory
    (planted("lora", StaysForever), "collectable", "stays in memory after detach"),
    (planted("vera", HookStays), "collectable", "the adapter stays"),
    (planted("red", penalty=keeps_losses), "steady_memory", "5 of shape ()"),
    (planted("boft", penalty=grows_graph), "steady_memory", "an autograd graph grows"),
    # the base
    (planted("hra", after_step=edits_base_late), "base_untouched", "step 5 of training changed bert"),
    (planted("melora", EditsBaseInEval), "base_untouched", "a pass in eval mode changed bert"),
    (planted("fourierft", state_dict=edits_base_on_save), "base_untouched", "changed bert.encoder.layer.0"),
    (planted("boft", after_step=writes_base), "hooks", "after_step changed bert.encoder.layer.0"),
    (planted("miss", after_step=writes_base), "detach", "attach and detach changed bert.encoder.layer.0"),
    # other rows
    (planted("adalora", LooksAtBatch), "other_rows", "in train mode, logits of row 0 in a batch"),
    (planted("tied-lora", LooksAtLength), "other_rows", "logits of row 0 in a batch"),
    # the penalty
    (planted("adalora", penalty=penalty_of_detached), "gradient_of_tensors", "query.A"),
    (planted("dora-dynamic", penalty=penalty_of_detached), "gradient_of_tensors", "query.A"),
    # resuming
    (planted("vera", after_backward=momentum_of_its_own), "resume", "query.u"),
    (planted("lora-xs", optimizer=lambda self, params, lr: ForgetfulSGD(params, lr)), "resume", "query.R"),
    (planted("randlora", CountsSteps), "resume", "query.lam"),
    # the learning rate
    (planted("ia3", optimizer=lambda self, params, lr: torch.optim.AdamW(params)),
     "learning_rate", "key.l moves in the optimiser"),
    (planted("krona", optimizer=lambda self, params, lr: torch.optim.SGD(params, 0.0)),
     "learning_rate", "moves nothing"),
    (planted("lora-plus", optimizer=fixed_rate_of_B), "learning_rate", "query.B moves"),
    (planted("vera", optimizer=lambda self, params, lr: OwnRate(params, lr)), "schedule", "query.u moves"),
    (planted("full", optimizer=lambda self, params, lr: OwnRate(params, lr)), "schedule", "base.bert"),
    # random states
    (planted("red", Seeds), "random_state", "sets the global random state of torch"),
    (planted("miss", prepare=seeds_numpy), "random_state", "state of numpy"),
    (planted("hra", after_step=draws_from_random), "random_state", "state of random"),
    (planted("lora-mini", DrawsGlobally), "deterministic", "draws from the global random state"),
    # counts
    (planted("lora", count_formula="r * in"), "count_formula", "'r * in' gives"),
    (planted("randlora", OneMoreNumber), "count_formula", "trained are"),
    (planted("wegeft", count_formula="roles: 2 * r * in"), "count_formula", "side=output"),
    (planted("vera", count_formula="__import__('os').getpid()"), "count_formula", "not allowed in a formula"),
    # other runs
    (planted("melora", SharesStateByName), "two_runs", "query.A of run"),
    (planted("prefix-tuning", SharesTensor), "two_runs", "self.K of run"),
    # the process
    (planted("1lora", TurnsGradOff), "process", "changes grad mode: True before"),
    (planted("krona", prepare=more_threads), "process", "attaching changes the number of threads"),
    (planted("loha", prepare=float64_from_here), "process", "attaching changes the default dtype"),
    (planted("mora", after_step=patches_linear), "process", "replaces torch.nn.functional.linear"),
    (planted("red", after_step=patches_checks), "process", "replaces peftzoo.conform.cases.assert_close"),
    # what older checks find, in other methods than LoRA
    (planted("bitfit", title=""), "card", "title is empty"),
    (planted("vera", NotZeroAtStart), "identity", "logits of the fresh adapter"),
    (planted("loha", DoublesDelta), "forward_is_delta", "query: forward against W"),
    (planted("krona", DoublesDelta), "merge", "logits of the merged model"),
    (planted("lora-xs", BuildsWeight), "memory", "query saves (32, 32)"),
    (planted("lorta", SavesNoise), "reload", ".noise"),
    (planted("denselora", OneMoreNumber), "every_gradient", "query.extra"),
    (planted("wegeft", HalvesGradient), "gradient_of_tensors", "gradient of"),
    (planted("unilora", HalvesGradient), "gradient_of_input", "query's input"),
    (planted("quic", HalvesGradient), "gradient_of_delta", "query.P"),
    (planted("1lora", WritesInput), "gradient_of_input", "changes its input x in place"),
    (planted("qr-lora", Widens), "autocast", "dtype"),
    (planted("randlora", CountsSteps), "checkpointing", "gradient of"),
]  # fmt: skip


def plant_id(cls: type, check: str, told: str) -> str:
    """Method, what is changed -> check: words of its message."""
    cells = [c.cell_contents for c in getattr(vars(cls).get("part"), "__closure__", None) or ()]
    mixins = [c.__name__ for c in cells if isinstance(c, type) and issubclass(c, Part)]
    changed = [n for n in vars(cls) if n not in ("__module__", "__doc__", "part")]
    return f"{cls.name}, {mixins[0] if mixins else changed[0]} -> {check}: {told}"


@pytest.fixture
def left_as_it_was():
    """What a plant does to the process is undone."""
    functions, own, settings = process.torch_functions(), process.own_functions(), process.settings()
    with process.putting_back(functions), process.putting_back_own(own), process.keeping_random_state():
        yield
    process.restore(settings)
    IMMORTAL.clear()
    LAST.clear()


@pytest.mark.parametrize(("cls", "check", "told"), [pytest.param(*p, id=plant_id(*p)) for p in PLANTS])
def test_plant_is_found(cls, check, told, left_as_it_was) -> None:
    function = {c.name: c for c in conform.checks()}[f"check_{check}"]
    result = conform.run_one(cls, function, "bert" if function.archs else conform.ANY)
    assert result.outcome == "failed", f"{result.outcome}: {result.reason}"
    assert told in result.reason
    assert f"methods/{cls.name.replace('-', '_')}.py:" in result.place


def test_the_plants_are_many_and_everywhere() -> None:
    assert len({cls.name for cls, _, _ in PLANTS}) >= 20
    kinds = "dropout dead_options option_values steady_memory collectable base_untouched other_rows resume"
    kinds += " gradient_of_tensors learning_rate schedule random_state count_formula two_runs process"
    for check in kinds.split():
        assert sum(c == check for _, c, _ in PLANTS) >= 2, check


# -- what importing a file does -------------------------------------------------------------------------

IMPORTS = {
    "torch.set_num_threads(3)": "the number of threads",
    "torch.set_default_dtype(torch.float64)": "the default dtype",
    "torch.set_grad_enabled(False)": "grad mode",
    "torch.manual_seed(0)": "the random state of torch",
    "import random; random.seed(0)": "the random state of random",
    "F.dropout = lambda x, *args, **kwargs: x": "torch.nn.functional.dropout",
    "from peftzoo.conform import cases; cases.assert_close = lambda *args: None": "cases.assert_close",
    "from peftzoo.conform import cases; cases.assert_close = print": "conform.cases.assert_close",
    "from peftzoo.adapters import Attached; Attached.merge = lambda self: self.model": "Attached.merge",
}


@pytest.mark.parametrize(("line", "told"), IMPORTS.items())
def test_import_plant_is_found(line, told, tmp_path, left_as_it_was, monkeypatch) -> None:
    monkeypatch.setattr(
        "peftzoo.adapters.Attached.merge", vars(sys.modules["peftzoo.adapters"].Attached)["merge"]
    )
    file = new_method("plant-gate", tmp_path)
    file.write_text(file.read_text() + f"\n{line}\n")
    check = {c.name: c for c in conform.checks()}["check_import"]
    result = conform.run_one(loaded(file), check, conform.ANY)
    assert result.outcome == "failed" and told in result.reason, result.reason
    assert "plant_gate.py:" in result.place


def loaded(file: Path) -> type:
    spec = importlib.util.spec_from_file_location("plant_gate", file)
    module = sys.modules["plant_gate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlantGate


def test_a_plugin_that_replaces_a_check_is_refused(tmp_path, run_cli, left_as_it_was, monkeypatch) -> None:
    file = new_method("plant-gate", tmp_path)
    line = "from peftzoo.conform import cases; cases.assert_close = print"
    file.write_text(file.read_text() + f"\n{line}\n")
    monkeypatch.setattr(registry, "_plugin_files", {})
    code, _, err = run_cli(f"check plant-gate --plugin {file}")
    assert code == 2 and "replaces peftzoo.conform.cases.assert_close" in err


# -- formulas and messages ------------------------------------------------------------------------------


@pytest.mark.parametrize(("formula", "value"), [
    ("r * (in + out)", 8 * 50), ("ceil(r / 3)", 3), ("r if tied else -r", -8), ("d or min(in, out)", 20),
    ("2 ** r // 3 % 7", 256 // 3 % 7), ("divisor(in)", 5), ("not tied and kind == 'a'", True),
])  # fmt: skip
def test_formulas(formula, value) -> None:
    names = {"r": 8, "in": 30, "out": 20, "tied": False, "d": None, "kind": "a"}
    assert evaluate(formula, names) == value


@pytest.mark.parametrize(
    "formula", ["r.real", "[r]", "open('x')", "lambda: 1", "2 ** 99", "r +", "q", "max(*r)", ""]
)
def test_what_is_no_formula(formula) -> None:
    with pytest.raises((ValueError, TypeError)):
        evaluate(formula, {"r": 8})


def test_check_tells_the_place_once_and_the_way_out(tmp_path, run_cli, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_plugin_files", {})
    file = new_method("plant-gate", tmp_path)
    text = file.read_text().replace("return base(x) + h", "return base(x) + 2 * h")
    file.write_text(text)
    checks = [(c, a) for c, a in conform.plan() if c.name in ("check_forward_is_delta", "check_card")]
    monkeypatch.setattr(conform, "run", lambda m: [conform.run_one(registry.get(m), c, a) for c, a in checks])
    code, out, err = run_cli(f"check plant-gate --plugin {file} -v")
    told = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert code == 1 and all("plant_gate.py:" in line and "forward against W" in line for line in told)
    assert 1 <= len(told) <= 3 and "Traceback" in err
    assert out.splitlines()[-1].startswith("Not all checks hold for plant-gate: 1 failed")
    assert "known_failures" in out.splitlines()[-2]


def test_check_lists_what_each_check_proves(run_cli) -> None:
    code, out, _ = run_cli("check --list")
    assert code == 0 and all(c.name in out and c.proves in out for c in conform.checks())


def test_check_needs_a_method(run_cli) -> None:
    code, _, err = run_cli("check")
    assert code == 2 and "peftzoo check lora" in err
