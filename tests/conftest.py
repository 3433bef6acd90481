"""Settings of all tests: the S3 server's fixture; one thread, because many small tensors gain nothing from two."""

import torch

pytest_plugins = ["tests.seaweed"]
torch.set_num_threads(1)
