"""A new method: one file that works and passes every conformance check, to be edited into the real one."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from peftzoo.contract import registry
from peftzoo.errors import UserError

TEMPLATE = '''"""@TITLE@: say in one line what the method changes.

    y = x W^T + b + s * v * ((x * u) W^T)        u (in,), v (out,), s = `scale`

Above, the equation with the shapes of what is trained. Here, where each tensor starts and how many numbers
are trained: u ~ U(-1, 1), v = 0, so a fresh adapter changes nothing; in + out per layer. Then the authors,
the arXiv number, and what this file does differently from the paper, and why.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from peftzoo.contract import Adapter, Config, Part, Site, Targets


class @CLASS@Part(Part):
    """Owns the trained tensors of one linear layer."""

    def __init__(self, site: Site, owner: Adapter) -> None:
        super().__init__(site, owner)
        out, in_ = site.shape
        self.u = nn.Parameter(owner.ctx.uniform(in_, bound=1.0, key=site.name))  # from the seed
        self.v = nn.Parameter(torch.zeros(out))
        self.scale = owner.config.scale

    def delta(self, W: Tensor) -> Tensor:
        """The weight change: what merging adds, and what the default forward uses."""
        return self.scale * self.v[:, None] * W * self.u

    def forward(self, base, x: Tensor) -> Tensor:
        """The same without building an (out, in) matrix; take this method out if there is no such form."""
        W = self.site.weight
        h = F.linear(x * self.u.to(x.dtype), W)  # (..., out)
        return base(x) + h * (self.scale * self.v).to(h.dtype)


class @CLASS@(Adapter):
    name = "@NAME@"
    title = "@TITLE@"
    paper = "Authors, Title, arXiv 0000.00000 (Venue Year)"
    family = "scaling"
    lr = 1e-2
    count_formula = "in + out"  # trained numbers per adapted layer; `peftzoo check` compares

    class Config(Config):
        targets: Targets = Field(("all",), description="roles of the linear layers to adapt")
        scale: float = Field(1.0, gt=0, description="factor on the change")

    def part(self, site: Site) -> Part:
        return @CLASS@Part(site, self)
'''


def new_method(name: str, folder: Path) -> Path:
    """Write the plugin `folder`/NAME.py (hyphens as underscores) and return its path.

    Raises `UserError` for a name that is not a-z, 0-9 and hyphens, or is taken, and for a file that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        raise UserError(
            f'method name "{name[:60]}": a letter first, then a-z, 0-9 and single hyphens, at most 40 in all'
        )
    stem = name.replace("-", "_")
    if keyword.iskeyword(stem):
        raise UserError(f'method name "{name}" is a word of Python itself: choose another')
    if name in registry.methods():
        raise UserError(f'method "{name}" exists already: choose another name')
    path = Path(folder) / f"{stem}.py"
    words = name.split("-")
    text = TEMPLATE.replace("@NAME@", name).replace("@CLASS@", "".join(w.capitalize() for w in words))
    text = text.replace("@TITLE@", " ".join(w.capitalize() for w in words))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f'"{path}" exists already and is left as it is') from None
    except OSError as error:
        raise UserError(f'"{path}" cannot be written: {error.strerror}') from None
    return path
