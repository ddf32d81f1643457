"""Algebra on finished adapters: sums, TIES, DARE, resizing, and extraction from a fine-tuned model.

Every function takes adapters as states and returns a new one. Sums are computed from the factors,

    Σ wᵢ ΔWᵢ = Σ wᵢ sᵢ Bᵢ Aᵢ,

with every adapter's own scale (alpha / r or alpha / √r), bias on B, rank and layers.
"""

from deltaw.combine._copies import without_copies
from deltaw.combine._places import Place, Slot, attention_slots
from deltaw.combine._result import Kept, Reduced
from deltaw.combine._settings import highest_rank
from deltaw.combine.adding import add, concatenate, negate, resize
from deltaw.combine.bases import Base, StoredBase
from deltaw.combine.dropping import dare
from deltaw.combine.electing import prune, ties
from deltaw.combine.extracting import Extracted, extract
from deltaw.combine.padding import check_portable, portable

__all__ = [
    "Base",
    "Extracted",
    "Kept",
    "Place",
    "Reduced",
    "Slot",
    "StoredBase",
    "add",
    "attention_slots",
    "check_portable",
    "concatenate",
    "dare",
    "extract",
    "highest_rank",
    "negate",
    "portable",
    "prune",
    "resize",
    "ties",
    "without_copies",
]
