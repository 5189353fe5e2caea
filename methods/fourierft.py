"""FourierFT: the weight change is the inverse 2-D Fourier transform of n trained numbers per layer.

    dW[a, b] = alpha / (out in) sum_k c_k cos(2 pi (p_k a / out + q_k b / in))    y = x W^T + b + drop(x) dW^T

The positions (p, q) (n,) are drawn without repetition; layers of one shape have the same. c ~ N(0, std^2).
Trained and saved: n per layer (RoBERTa-base q, v with n = 1000: 24,000).
Paper: Gao et al., arXiv 2405.03003, with std = 1: a change of norm alpha sqrt(n / (2 out in)), harmless at
width 768, larger than the weights of a narrow model. So the default here is 0, a start at the base, which is
HF PEFT's `init_weights=True`. The paper's optional frequency bias is left out.
Different: dW is not built, x is transformed instead (peftzoo/kernels/fourier.py). Narrow layers, where a
dense product costs less than the transforms, rebuild dW in forward and in backward.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets
from peftzoo.errors import UserError
from peftzoo.kernels import ForwardCache, Spectrum, in_place, rebuilt, spectral, spectrum

NARROW = 150
"""Below this harmonic mean of in/2 and out/2 the dense change is cheaper (measured on a CPU)."""


class FourierFTPart(Part):
    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        c, (out, in_) = owner.config, site.shape
        self.c = nn.Parameter(owner.ctx.normal(c.n, std=c.std, key=site.name))
        self.dropout = nn.Dropout(c.dropout)
        self.narrow = c.dropout == 0 and in_ * out < NARROW * (in_ + out)

    @property
    def grid(self) -> Spectrum:
        out, in_ = self.site.shape
        return self.owner.grids[f"{out}x{in_}"]

    def change(self, W: Tensor, c: Tensor) -> Tensor:
        return self.owner.config.alpha * self.grid.dense(c)

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, self.c)

    def forward(self, base, x: Tensor) -> Tensor:
        if self.narrow and x.numel() >= x.shape[-1] ** 2:  # at least as many tokens as features
            return rebuilt(self.site, base, x, self.change, self.c)
        z = self.dropout(x)
        with torch.no_grad():
            X = self.owner.recent.get(z, "spectrum", lambda: spectrum(z))
        return in_place(self.site, base(x), spectral(z, self.c, X, self.grid, self.owner.config.alpha))


class FourierFT(Adapter):
    name = "fourierft"
    title = "Fine-Tuning with Discrete Fourier Transform"
    paper = "Gao et al., Parameter-Efficient Fine-Tuning with DFT, arXiv 2405.03003 (ICML 2024)"
    family = "structured"
    count_formula = "n"
    peft = "FourierFTConfig"
    peft_names: ClassVar[dict] = {"n": "n_frequency", "alpha": "scaling"}
    peft_seed = "random_loc_seed"
    lr = 5e-2

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        n: int = Field(1000, ge=1, description="trained coefficients per layer")
        alpha: float = Field(150.0, gt=0, description="scale of the change")
        std: float = Field(0.0, ge=0, description="standard deviation of the coefficients at start")
        dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")

    tiny: ClassVar = {"n": 60}

    def prepare(self, sites: list[Site]) -> None:
        n, generator = self.config.n, torch.Generator()
        self.recent, self.grids = ForwardCache(), nn.ModuleDict()
        for out, in_ in dict.fromkeys(s.shape for s in sites):
            if n > out * in_:
                raise UserError(f'method "fourierft": n={n} exceeds the {out} x {in_} places: lower n')
            if not self.ctx.meta:
                places = torch.randperm(out * in_, generator=generator.manual_seed(self.ctx.seed))
                self.use(out, in_, places[:n])

    def use(self, out: int, in_: int, positions: Tensor) -> None:
        """Set the positions for layers of this shape: n numbers below out in, none twice."""
        self.grids[f"{out}x{in_}"] = Spectrum(out, in_, positions)

    def part(self, site: Site) -> Part:
        return FourierFTPart(site, self)

    def peft_state(self) -> dict[str, Tensor]:
        return {f"{p.site.name}.fourierft_spectrum.default": p.c for p in self.parts.values()}
