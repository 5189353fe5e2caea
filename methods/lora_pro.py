"""LoRA-Pro: LoRA whose gradients are corrected so that A and B together follow the full gradient.

    W' = W + s B A,  s = alpha / r     a step changes W' by g = s B gA + s gB A     A (r, in), B (out, r)
    gA = (B^T B)^-1 GA / s^2 + X A     gB = (I - B (B^T B)^-1 B^T) GB (A A^T)^-1 / s^2 - B X
    GA = s B^T G, GB = s G A^T: the ordinary gradients                      G = dL/dW (out, in)

Of all pairs (gA, gB) these bring g nearest to G: g is the projection of G on the tangent space of the rank-r
matrices, whatever X (r, r) is. X keeps the pair nearest to (GA, GB):
    B^T B X + X A A^T = -(B^T B)^-1 GA A^T / s^2
While B = 0, gA = GA and gB = GB (A A^T)^-1 / s^2. G is never needed; this costs O(r^2 (in + out)). A, B, the
count r (in + out) and merging are LoRA's. `moments: full` is Adam as published: g is formed, its two moments
(out, in) are kept per layer, and the direction that they give is pulled back to A and B in the place of G.
`moments: factors` keeps those of gA and gB instead, as light as LoRA; this variant is ours.

Paper: Wang et al., arXiv 2407.18242. Different: inverses and X come from one eigenvalue decomposition each of
B^T B and A A^T, in fp64, damped relative to the trace (the code adds 1e-8); bias correction counts from the
first step (the code is one step ahead); the correction follows gradient clipping.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftzoo.methods.lora import LoRA


class Tangent:
    """The tangent space at s B A: B^T B = P diag(p) P^T and A A^T = Q diag(q) Q^T, all (r, r)."""

    @torch.no_grad()
    def __init__(self, A: Tensor, B: Tensor, s: float, damping: float) -> None:
        self.A, self.B, self.s, self.still = A, B, s, not B.any()
        (self.p, self.P), (self.q, self.Q) = (self._spectrum(F, damping) for F in (B.T, A))

    def _spectrum(self, F: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        G = (F.double() @ F.double().T).cpu()
        return torch.linalg.eigh(G + damping * G.diagonal().mean() * torch.eye(len(G)))

    @torch.no_grad()
    def correct(self, GA: Tensor, GB: Tensor, nearest: bool = True) -> tuple[Tensor, Tensor]:
        """gA (r, in) and gB (out, r) for the ordinary gradients; X = 0 unless `nearest`."""
        A, B, s = self.A, self.B, self.s
        gB = GB @ (self.Q / self.q @ self.Q.T).to(GB) / s**2
        if self.still:
            return GA, gB
        gA = (self.P / self.p @ self.P.T).to(GA) @ GA / s**2
        gB = gB - B @ ((self.P / self.p @ self.P.T).to(GB) @ (B.T @ gB))
        if nearest:
            C = -(gA @ A.T).double().cpu()
            X = self.P @ (self.P.T @ C @ self.Q / (self.p[:, None] + self.q)) @ self.Q.T
            gA, gB = gA + X.to(A) @ A, gB - B @ X.to(A)
        return gA, gB


class ProAdamW(torch.optim.AdamW):
    """AdamW that corrects the gradients of the pairs (A, B, s); other parameters it treats as usual."""

    def __init__(self, params, lr: float, pairs: list[tuple], full: bool, damping: float) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0)
        self.pairs, self.full, self.damping = pairs, full, damping

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for A, B, s in self.pairs:
            if A.grad is None:
                continue
            at = Tangent(A, B, s, self.damping)
            if self.full:
                self._full_step(at, groups[id(A)])
            else:
                A.grad, B.grad = at.correct(A.grad, B.grad)
        super().step()
        return loss

    def _full_step(self, at: Tangent, group: dict) -> None:
        A, B, s = at.A, at.B, at.s
        (b1, b2), state = group["betas"], self.state[A]
        if not state:
            m = A.new_zeros(len(B), A.shape[1])  # (out, in)
            state |= {"step": torch.zeros(()), "exp_avg": m, "exp_avg_sq": m.clone()}
        state["step"] += 1
        m, v, t = state["exp_avg"], state["exp_avg_sq"], float(state["step"])
        gA, gB = at.correct(A.grad, B.grad, nearest=False)
        g = torch.addmm(B @ gA, gB, A).mul_(s)
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        root = (
            1 - b2**t
        ) ** 0.5  # G is Adam's step but for the factor root / (1 - b1^t), which is put into lr
        G = torch.div(m, torch.sqrt(v, out=g).add_(root * group["eps"]), out=g)
        gA, gB = at.correct(s * (B.T @ G), s * (G @ A.T))
        lr = group["lr"] * root / (1 - b1**t)
        A.sub_(gA, alpha=lr)
        B.sub_(gB, alpha=lr)
        A.grad = B.grad = None  # done: the rest of the step leaves them alone


class LoRAPro(LoRA):
    name = "lora-pro"
    title = "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?"
    paper = "Wang et al., LoRA-Pro, arXiv 2407.18242 (ICLR 2025)"
    trained_as = "lora"
    lr = 2e-3
    peft_step = False

    class Config(LoRA.Config):
        moments: Literal["full", "factors"] = Field(
            "full", description="Adam's moments: of the weight's gradient (as published) or of the factors'"
        )
        damping: float = Field(
            1e-6, gt=0, description="added to B^T B and A A^T, relative to their mean trace"
        )

    def optimizer(self, params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        pairs, c = [(p.A, p.B, p.scale) for p in self.parts.values()], self.config
        return ProAdamW(params, lr, pairs, c.moments == "full", c.damping)
