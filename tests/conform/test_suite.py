"""Every method against every check on every architecture, and the checks against methods with a fault."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peftzoo import conform
from peftzoo.contract import registry
from peftzoo.methods.lora import LoRA, LoRAPart


def _cases(name):
    for check, arch in conform.plan():
        slow = [pytest.mark.slow] if check.slow else []
        yield pytest.param(name, check, arch, id=f"{name}-{arch}-{check.name[6:]}", marks=slow)


@pytest.mark.parametrize(("name", "check", "arch"), [c for name in registry.methods() for c in _cases(name)])
def test_method(name, check, arch):
    result = conform.run_one(registry.get(name), check, arch)
    if result.outcome == "failed":
        pytest.fail(f"{result.place}: {result.reason}\n\n{result.trace}".strip(), pytrace=False)
    if result.outcome == "skipped":
        pytest.skip(result.reason)
    if result.outcome == "known":
        pytest.xfail(result.reason)


def outcome(cls, check, arch="bert") -> str:
    function = {c.name: c for c in conform.checks()}[f"check_{check}"]
    result = conform.run_one(cls, function, arch if function.archs else conform.ANY)
    return result.outcome


def faulty(**changes):
    """LoRA with class attributes of the adapter replaced; `part_class` is called with (site, owner)."""
    if part_class := changes.pop("part_class", None):
        changes["part"] = lambda self, site: part_class(site, self)
    return type("Faulty", (LoRA,), {"__module__": LoRA.__module__, "name": "lora", **changes})


class NotZeroAtStart(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        nn.init.constant_(self.B, 0.1)


class GlobalRandom(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        nn.init.normal_(self.A)


class Half(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.A.data = self.A.data.to(site.weight.dtype).half()


class Idle(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.idle = nn.Parameter(torch.zeros(2))


class RegistersBase(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.base = site.module


class OtherScale(LoRAPart):
    def delta(self, W):
        return 2 * super().delta(W)


class Dense(LoRAPart):
    def forward(self, base, x):
        return nn.functional.linear(x, self.site.weight + self.delta(self.site.weight), self.site.bias)


class Widens(LoRAPart):
    def forward(self, base, x):
        return super().forward(base, x).float()


class CountsCalls(LoRAPart):
    """Counts its calls: wrong under checkpointing and between two generations."""

    calls = 0

    def forward(self, base, x):
        self.calls += 1
        return super().forward(base, x) * (1 + 0.05 * self.calls)


class UsesOtherTokens(LoRAPart):
    """Depends on the number of tokens, so the cache and padding change the answer."""

    def forward(self, base, x):
        return super().forward(base, x) + x.shape[1] * x.mean(1, keepdim=True).mean(-1, keepdim=True)


class SavesRandom(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.register_buffer("noise", owner.ctx.normal(40, 40, std=1.0, key=site.name + "noise"))


class SharesKey(LoRAPart):
    def __init__(self, site, owner):
        super().__init__(site, owner)
        self.A.data = owner.ctx.uniform(*self.A.shape, bound=0.1, key="the same everywhere")


class HalvesGradient(LoRAPart):
    def forward(self, base, x):
        y, y0 = super().forward(base, x), base(x)
        return y0 + (y - y0 + (y - y0).detach()) / 2


class LosesInputGradient(LoRAPart):
    def forward(self, base, x):
        return base(x) + super().forward(base, x.detach()) - base(x.detach())


class WritesInput(LoRAPart):
    def forward(self, base, x):
        y = super().forward(base, x)
        with torch.no_grad():
            x.add_(1e-3)
        return y


def penalty_without_gradient(self):
    return sum(p.detach().square().sum() for p in self.parameters())


def writes_base(self, step, total):
    with torch.no_grad():
        self.parts["bert/encoder/layer/0/attention/self/query"].site.module.weight.mul_(1.01)


FAULTS = [
    (faulty(title=""), "card"),
    (faulty(name="lorax"), "card"),
    (faulty(known_failures={"check_no_such": "why"}), "card"),
    (faulty(__init__=lambda self, c=None: (LoRA.__init__(self, c), torch.rand(1))[0]), "init_only_stores"),
    (faulty(trains=False), "trainable"),
    (faulty(part_class=NotZeroAtStart), "identity"),
    (faulty(part_class=GlobalRandom), "deterministic"),
    (faulty(part_class=SharesKey), "deterministic"),
    (faulty(part_class=Half), "trainable"),
    (faulty(part_class=Idle), "every_gradient"),
    (faulty(part_class=HalvesGradient), "gradient_of_tensors"),
    (faulty(part_class=HalvesGradient), "gradient_of_input"),
    (faulty(part_class=HalvesGradient), "gradient_of_delta"),
    (faulty(part_class=LosesInputGradient), "gradient_of_input"),
    (faulty(part_class=WritesInput), "gradient_of_input"),
    (faulty(penalty=penalty_without_gradient), "gradient_of_tensors"),
    (faulty(part_class=RegistersBase), "reload"),
    (faulty(part_class=OtherScale), "forward_is_delta"),
    (faulty(part_class=OtherScale), "merge"),
    (faulty(part_class=Dense), "memory"),
    (faulty(part_class=Widens), "autocast"),
    (faulty(part_class=CountsCalls), "copy"),
    (faulty(part_class=SavesRandom), "reload"),
    (faulty(after_step=writes_base), "base_untouched"),
    (faulty(after_step=writes_base), "hooks"),
    (faulty(after_step=writes_base), "detach"),
    (faulty(penalty=lambda self: torch.tensor(float("nan"))), "hooks"),
    (faulty(optimizer=lambda self, params, lr: torch.optim.SGD(params[1:], lr)), "hooks"),
    (faulty(optimizer=lambda self, params, lr: torch.optim.SGD(params, 0.0)), "learns"),
    (faulty(known_failures={"check_merge": "passes all the same"}), "merge"),
    (faulty(known_failures={"check_merge[bert]": "passes all the same"}), "merge"),
]


@pytest.mark.parametrize(("cls", "check"), FAULTS)
def test_fault_is_caught(cls, check):
    assert outcome(cls, check) == "failed"


def test_part_that_uses_other_tokens_cannot_generate():
    assert outcome(faulty(part_class=UsesOtherTokens), "generate", "llama") == "failed"


def test_known_failures():
    cls = faulty(part_class=OtherScale, known_failures={"check_merge[bert]": "an example"})
    assert outcome(cls, "merge") == "known"
    assert outcome(cls, "merge", "gpt2") == "failed"


def test_refused_architectures_are_skipped_but_not_all():
    from peftzoo.errors import UserError

    def only_bert(self, model):
        if type(model).__name__ != "BertForSequenceClassification":
            raise UserError("this method needs a bidirectional encoder such as BERT")
        return LoRA.sites(self, model)

    cls = faulty(sites=only_bert)
    assert outcome(cls, "merge", "llama") == "skipped"
    assert outcome(cls, "merge", "bert") == outcome(cls, "sites", "llama") == "ok"

    def nowhere(self, model):
        raise UserError("this method stands nowhere at all, whatever the model")

    assert outcome(faulty(sites=nowhere), "sites") == "failed"


def test_checks_leave_the_random_state_alone():
    state = torch.get_rng_state()
    assert outcome(LoRA, "learns") == "ok"
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_and_names():
    names = [c.name for c in conform.checks()]
    assert len(set(names)) == len(names) >= 40
    assert all(c.proves.endswith((".", "].")) and len(c.proves) < 110 for c in conform.checks())
    assert not any(c.slow for c, _ in conform.plan(slow=False))
    assert {arch for _, arch in conform.plan(archs=("bert",))} == {"bert", conform.ANY}
