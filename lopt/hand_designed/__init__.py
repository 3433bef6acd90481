"""Hand-designed optimizers behind the contract of the learned ones: baselines that can be swept and meta-learned.

Owns the registry of them. One module per kind (``elementwise``, ``nadamw``, ``tensorwise``, ``matrix``) over ``rule``,
which says how theta spells hyper-parameters. Never wraps another library's optimizer, for these reasons:

The functional forms of torch.optim write into their inputs, and take one Python number per hyper-parameter and call,
where the contract needs purity and one number per particle. ``torch.vmap`` over them (torch 2.13, clones in,
``differentiable=True``) does not bridge that:

- sgd, nadam, radam, rmsprop, adagrad, muon: ``.item()`` on a learning rate or step count, or ``if momentum > 0``;
- adafactor: as these, and ``.item()`` on its norms; muon besides is a private module and iterates in bf16;
- adam takes learning rate, beta1 and eps per particle, but neither beta2 nor a weight decay, and takes ten times as
  long as the four lines here (64 particles of a 64-32-10 MLP: 5.6 ms against 0.5).

pytorch_optimizer, which has the rest, knows only classes. Both are what the tests compare with instead.
"""

from __future__ import annotations

from lopt.hand_designed.elementwise import SGD, SGDM, AdaBelief, Adagrad, Adam, AdamW, RAdam, RMSProp, Yogi
from lopt.hand_designed.matrix import Muon, Shampoo
from lopt.hand_designed.nadamw import NAdamW
from lopt.hand_designed.rule import HandDesigned
from lopt.hand_designed.tensorwise import LAMB, LARS, SM3, Adafactor, Fromage

HAND_DESIGNED: tuple[type[HandDesigned], ...] = (
    SGD, SGDM, Adam, AdamW, NAdamW, RAdam, RMSProp, Adagrad, Adafactor,
    AdaBelief, Yogi, LAMB, LARS, SM3, Fromage, Shampoo, Muon,
)  # fmt: skip

__all__ = [
    "HAND_DESIGNED",
    "LAMB",
    "LARS",
    "SGD",
    "SGDM",
    "SM3",
    "AdaBelief",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Fromage",
    "HandDesigned",
    "Muon",
    "NAdamW",
    "RAdam",
    "RMSProp",
    "Shampoo",
    "Yogi",
]
