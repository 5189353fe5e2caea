"""A weight change with a sparse spectrum, applied to activations without building it.

    dW[a, b] = alpha / (out in) sum_k c_k cos(2 pi (p_k a / out + q_k b / in))        (p, q) positions, (n,)

With X = rfft(x): column q of X, times c, is added to column p of Z, and x dW^T = alpha / in irfft(Z). A token
costs two transforms and n additions. cos is even and x is real, so a position beyond the middle is replaced
by its mirror image, which takes the conjugate. The gradient of x is the same with the two sides exchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def spectrum(x: Tensor) -> Tensor:
    """rfft of x (..., d) as rows: real parts, then imaginary parts, (2 m, T) with m = d // 2 + 1."""
    x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_real(torch.fft.rfft(x)).permute(2, 1, 0).reshape(-1, len(x))


def signal(Z: Tensor, d: int) -> Tensor:
    """The inverse of `spectrum`, (T, d)."""
    real, imaginary = Z.view(2, len(Z) // 2, -1).transpose(1, 2).contiguous()
    return torch.fft.irfft(torch.complex(real, imaginary), n=d)


class Spectrum(nn.Module):
    """The positions for one shape of layer: `positions` (n,) counts rows of the (out, in) grid."""

    def __init__(self, out: int, in_: int, positions: Tensor) -> None:
        super().__init__()
        self.out, self.in_ = out, in_
        p, q = positions // in_, positions % in_
        conjugate = (p > out // 2) == (q > in_ // 2)  # rfft's exponent has the other sign than the sum's
        p, q, sign = torch.minimum(p, out - p), torch.minimum(q, in_ - q), 1.0 - 2.0 * conjugate
        tensors = {"positions": positions, "sign": sign}
        tensors |= {"p": torch.cat([p, p + out // 2 + 1]), "q": torch.cat([q, q + in_ // 2 + 1])}
        for direction, target, source, d, e in (("forward", p, q, out, in_), ("backward", q, p, in_, out)):
            order = torch.argsort(target)
            starts = torch.searchsorted(target[order], torch.arange(d // 2 + 1))
            gain = torch.where((target == 0) | (2 * target == d), 1.0, 0.5)  # irfft doubles all but these
            tensors[f"{direction}_order"] = order.repeat(2)
            tensors[f"{direction}_gain"] = torch.cat([gain[order], (gain * sign)[order]])
            tensors[f"{direction}_read"] = torch.cat([source[order], source[order] + e // 2 + 1])
            tensors[f"{direction}_starts"] = torch.cat([starts, starts + len(order)])
        for name, t in tensors.items():
            self.register_buffer(name, t, persistent=False)

    def dense(self, c: Tensor) -> Tensor:
        """sum_k c_k cos(...) / (out in), (out, in)."""
        C = c.new_zeros(self.out * self.in_).scatter(0, self.positions, c)
        return torch.fft.ifft2(C.view(self.out, self.in_)).real

    def move(self, S: Tensor, c: Tensor, direction: str) -> Tensor:
        """Spectrum S (2 m, T) of one side of the layer, weights c (n,) -> signal (T, d) on the other side.

        `direction` is "forward" (inputs to outputs) or "backward" (the transpose).
        """
        order, gain, read, starts = (
            getattr(self, f"{direction}_{k}") for k in ("order", "gain", "read", "starts")
        )
        weights = (c[order] * gain).to(S.dtype)
        Z = F.embedding_bag(read, S, starts, mode="sum", per_sample_weights=weights)
        return signal(Z, self.out if direction == "forward" else self.in_)


def spectral(x: Tensor, c: Tensor, X: Tensor, grid: Spectrum, alpha: float) -> Tensor:
    """x dW^T, (..., in) -> (..., out), for X = spectrum(x) and c (n,)."""
    return _Spectral.apply(x, c, X, grid, alpha)


class _Spectral(torch.autograd.Function):
    """Saved for backward: c and X."""

    @staticmethod
    def forward(ctx, x, c, X, grid, alpha):
        ctx.grid, ctx.alpha, ctx.shape, ctx.dtype = grid, alpha, x.shape, x.dtype
        ctx.save_for_backward(c, X)
        return grid.move(X, alpha / grid.in_ * c, "forward").view(*x.shape[:-1], grid.out).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (c, X), grid, alpha = ctx.saved_tensors, ctx.grid, ctx.alpha
        D, dx = spectrum(dy), None
        real, imaginary = (D[grid.p] * X[grid.q]).sum(1).view(2, -1)  # (n,) each
        dc = alpha / (grid.in_ * grid.out) * (real + grid.sign * imaginary)
        if ctx.needs_input_grad[0]:
            dx = grid.move(D, alpha / grid.out * c, "backward").view(ctx.shape).to(ctx.dtype)
        return dx, dc.to(c.dtype), None, None, None
