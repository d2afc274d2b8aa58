"""What XNNPACK would make of a sparse model, as a value that prints as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["sparse", "dense", "broken"]

CPUS = (
    "It does so on ARM, as in phones, and on x86 without AVX. On a processor with AVX, as in PCs,\n"
    "the same file is computed densely, at the speed of a dense one."
)


@dataclass(frozen=True)
class SparsePathReport:
    """Whether XNNPACK would compute a model sparsely on a phone.

    Attributes:
        verdict: ``"sparse"``: with its sparse kernels, and rightly. ``"dense"``: as it would a
            dense model, so that zeros save bytes and no time. ``"broken"``: it would change only
            a part of the model to the layout of the sparse kernels, and load nothing or compute
            wrong outputs.
        layer: The first layer in the way; empty where none is, or no single one.
        reason: Why it is in the way.
        remedy: What to do.
        convolutions: The 1x1 convolutions of the part in question.
        zeros: How many of their weights are zero.
        parameters: How many weights they have.
    """

    verdict: Verdict
    layer: str
    reason: str
    remedy: str
    convolutions: tuple[str, ...]
    zeros: int
    parameters: int

    @property
    def sparsity(self) -> float:
        """The fraction of zeros among the weights of ``convolutions``."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        if self.verdict == "sparse":
            return (
                f"XNNPACK computes {len(self.convolutions)} 1x1 convolutions sparsely "
                f"({self.sparsity:.1%} zeros).\n{CPUS}"
            )
        begin = {
            "dense": "XNNPACK computes this densely everywhere, so that zeros save no time.\n",
            "broken": "XNNPACK would load nothing or compute wrong outputs on a phone.\n",
        }[self.verdict]
        return begin + self.blocker

    @property
    def blocker(self) -> str:
        """The layer in the way, the reason and the remedy in one text; empty where none is."""
        if not self.reason:
            return ""
        where = f"{self.layer}: " if self.layer else ""
        return f"{where}{self.reason}. {self.remedy}"
