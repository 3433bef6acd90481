"""Settings of all tests: the S3 server's fixture; one thread, because many small tensors gain nothing from two.

Tasks of the generic path stay in eager torch, in tests and in the services that they start: compiling takes seconds
for each. ``test_compiled`` is about what compiling does.
"""

import os
import tempfile

import pytest
import torch

from worker import compiled

pytest_plugins = ["tests.seaweed"]
torch.set_num_threads(1)
# an own cache, so that what is refused here is not refused to the user
os.environ["PACELINE_COMPILED"] = tempfile.mkdtemp(prefix="paceline-compiled-")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_OPERATIONS", 0)
