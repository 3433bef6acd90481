"""Weights from and for other programs: the JAX originals, PyLO, and the Hugging Face hub.

Owns every format but paceline's own (``lopt.checkpoint``), and finding out which of them a file is. Never unpickles,
and never guesses: what does not fit exactly one architecture is refused with what was found and what was expected.
"""

from lopt.interchange.jax import theta_from_jax
from lopt.interchange.pylo import export_pylo
from lopt.interchange.reading import from_hub, read

__all__ = ["export_pylo", "from_hub", "read", "theta_from_jax"]
