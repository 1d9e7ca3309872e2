"""``contract.LinearFunctions`` of this engine."""

from __future__ import annotations

from .choice import why_not
from .operators import LEAST_IDS
from .passes import gradients, partials

__all__ = ["LEAST_IDS", "gradients", "partials", "why_not"]
