"""LoraHub: finished LoRA modules composed for a new task by a search over one number each, without gradients.

    y = x W^T + b + (x A(w)^T) B(w)^T        A(w) = sum_i w_i A_i,  B(w) = sum_i w_i s_i B_i,  w (N,)

with one w for all layers, so delta(w) = sum_ij w_i w_j s_j B_j A_i of rank <= r: w_i enters on the diagonal
as w_i^2, and delta(-w) = delta(w). A_i (r, in) and B_i (out, r) are fixed, s_i is folded into B_i, w starts
at 0. Trained: N numbers (20 in the paper). nevergrad's NGOpt searches the box [-bound, bound]^N with one call
of the loss per step (40 in the paper), and lowers

    code:  loss / rows + l1 mean_i |w_i|          paper:  loss + l1 sum_i |w_i|           l1 = 0.05

The seed draws `size` of the members; the search has one fixed seed, as in the paper's code. Members are
adapters of method lora and LoRA adapters in HF PEFT's format, of one rank and the same layers. Without any,
`random` ones are drawn from the seed: a control, what the search alone can do. A saved adapter holds the
drawn modules, so it needs no library. Paper: Huang et al., arXiv 2307.13269.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.adapters import Adapters
from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.interop import lora_import
from peftzoo.kernels import low_rank
from peftzoo.methods.lora import LoRA

SEARCH_SEED = 42
HOPELESS = 1e9  # stands for a loss that is not finite


class LoraHubPart(Part):
    def __init__(self, site: Site, owner: LoraHub, A: Tensor, B: Tensor) -> None:
        super().__init__(site, owner)
        given = bool(owner.config.members)  # the others are made again from the seed
        self.register_buffer("A", A, persistent=given)  # (N, r, in)
        self.register_buffer("B", B, persistent=given)  # (N, out, r)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A(w) (r, in) and B(w) (out, r)"""
        w = self.owner.weights
        return torch.tensordot(w, self.A, 1), torch.tensordot(w, self.B, 1)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.pair()
        return B @ A

    def forward(self, base, x: Tensor) -> Tensor:
        return low_rank(self.site, base, x, *self.pair(), 1.0)


class LoraHub(Adapter):
    name = "lorahub"
    title = "LoraHub: composition of LoRA modules without gradients"
    paper = "Huang et al., LoraHub, arXiv 2307.13269 (COLM 2024)"
    family = "composition"
    count_formula = "model: random"
    searches = True
    tiny: ClassVar = {"random": 8, "r": 2, "l1": 0}
    known_failures: ClassVar = {
        "check_copy": "a second search from the weights of the first finds no better",
        "check_random_state": "nevergrad draws from numpy's global state, without effect on the result",
        "check_dead_options": "size acts on members, which are saved adapters",
    }

    class Config(Config):
        members: Adapters = Field((), description="folders of saved LoRA modules, or folders that hold some")
        size: int = Field(20, ge=1, description="how many members the seed draws, at most")
        bound: float = Field(1.5, gt=0, description="largest |w_i|")
        l1: float = Field(0.05, ge=0, description="weight of |w|")
        objective: Literal["code", "paper"] = Field("code", description="how loss and |w| are put together")
        random: int = Field(8, ge=1, description="modules drawn from the seed when there are no members")
        r: int = Field(8, ge=1, description="rank of random modules")
        targets: Targets = Field(("all",), description="layers of random modules")

    def sites(self, model: nn.Module) -> list[Site]:
        if not self.config.members:
            return super().sites(model)
        self.stacks = self._stacks()
        modules = dict(model.named_modules())
        if lost := self.stacks.keys() - modules.keys():
            raise UserError(f"{type(model).__name__} has no layer {min(lost)}: the members fit another model")
        return [Site(name, m) for name, m in modules.items() if name in self.stacks]

    def _stacks(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A (N, r, in), B (N, out, r) of the drawn members, or of the saved file that is loaded."""
        members, saved = self.config.members, self.ctx.saved
        if saved is None:
            g = self.ctx.generator("members")
            drawn = torch.randperm(len(members), generator=g, device="cpu")[: self.config.size]
            chosen = [members[i] for i in sorted(drawn.tolist())]
            return lora_import.stacked({str(m): lora_import.read(m.folder, LoRA) for m in chosen})
        cubes = {n.replace("/", "."): t for n, t in saved.items() if n.startswith("parts.") and t.ndim == 3}
        layers = [n[6:-2] for n in cubes if n.endswith(".A") and f"{n[:-1]}B" in cubes]
        return {n: (cubes[f"parts.{n}.A"], cubes[f"parts.{n}.B"]) for n in layers}

    def prepare(self, sites: list[Site]) -> None:
        if self.ctx.saved is None and importlib.util.find_spec("nevergrad") is None:
            raise UserError('method "lorahub" searches with nevergrad: pip install "peftzoo[search]"')
        stacked = max((len(A) for A, _ in self.stacks.values()), default=0) if self.config.members else 0
        self.weights = nn.Parameter(torch.zeros(stacked or self.config.random))
        self.trace: list[tuple[list[float], float]] = []

    def part(self, site: Site) -> Part:
        c, (out, in_) = self.config, site.shape
        if c.members:
            A, B = (t.to(self.weights.device, copy=True) for t in self.stacks.pop(site.name))
        else:
            A = self.ctx.uniform(c.random, c.r, in_, bound=in_**-0.5, key=f"{site.name} A")
            B = self.ctx.normal(c.random, out, c.r, std=0.1, key=f"{site.name} B")
        if (shape := (B.shape[1], A.shape[2])) != (out, in_):
            raise UserError(f"{site.name} is {site.shape} and {shape} in the members: they fit another model")
        return LoraHubPart(site, self, A, B)

    def search(self, loss: Callable[[], float], rows: int, steps: int) -> None:
        import nevergrad as ng
        import numpy as np

        c, start = self.config, self.weights.detach().cpu().double().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of NGOpt's optimisers find a small box or budget strange
            box = ng.p.Array(init=start, lower=-c.bound, upper=c.bound)
            box.random_state = np.random.RandomState(SEARCH_SEED)
            optimizer = ng.optimizers.NGOpt(parametrization=box, budget=steps, num_workers=1)
            for _ in range(steps):
                asked = optimizer.ask()
                self._put(asked.value)
                value = self.objective(loss(), rows)
                self.trace.append((asked.value.tolist(), value))
                optimizer.tell(asked, value)
            self._put(optimizer.provide_recommendation().value)

    def objective(self, loss: float, rows: int) -> float:
        """What the search lowers, for a mean loss over `rows` rows under the present weights."""
        c, w = self.config, self.weights.detach().abs()
        value = loss / rows + c.l1 * w.mean() if c.objective == "code" else loss + c.l1 * w.sum()
        return value if math.isfinite(value := float(value)) else HOPELESS

    @torch.no_grad()
    def _put(self, w) -> None:
        self.weights.copy_(torch.as_tensor(w))
