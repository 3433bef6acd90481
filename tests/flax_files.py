"""Files as flax's ``to_bytes`` writes them, packed by hand: extension 1 is (shape, dtype name, C-order bytes)."""

import msgpack
import numpy as np

from tests.lopt_laws import ORACLES


def array(values, code=1):
    values = np.asarray(values)
    return raw_array(values.shape, values.dtype.name, values.tobytes(), code)


def raw_array(shape, dtype, buffer, code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, buffer), use_bin_type=True))


def packed(tree):
    return msgpack.packb(tree, use_bin_type=True)


def tree_of(oracle):
    """The original's nested tree of meta-parameters: an oracle file writes its paths with ``|`` between the keys."""
    data = np.load(ORACLES / f"{oracle}.npz", allow_pickle=False)
    tree = {}
    for name in data.files:
        if name.startswith("theta/"):
            *parents, leaf = name.removeprefix("theta/").split("|")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array(data[name])
    return tree
