"""muLO: small_fc_lopt meta-trained under muP, so that it carries over to wider models.

Owns the sizes that Therien et al. 2024 gave small_fc_lopt for it. The width factors are the model's, not the rule's:
``lopt.mup`` makes them, and ``Optimizer`` multiplies the steps by them as the ``lr`` of its groups. They are therefore
no part of this rule's state: in meta-training a factor on a tensor's step is the same as training the tensor divided
by it (the columns are normalised over the tensor), which is a matter of the task.
"""

from __future__ import annotations

from lopt.small_fc import SmallFcLopt


class MuLO(SmallFcLopt):
    """p <- p - 0.01 d exp(0.001 a), (d, a) = small_fc_lopt's MLP. Use it with ``lopt.mup.param_groups``.

    Source: mup_adafac_mlp_lopt.py of its authors, who meta-trained with hidden size 32 and ten times the step.
    """

    name = "mulo"
    paper = "Therien et al. 2024, muLO: Compute-efficient meta-generalization of learned optimizers, arXiv:2406.00153"

    def __init__(self, hidden_size: int = 32, step_mult: float = 0.01) -> None:
        super().__init__(hidden_size, step_mult)
