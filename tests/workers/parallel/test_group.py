"""The group of one, and which device a rank computes on."""

import numpy as np
import torch

from workers.parallel.group import SingleRank, rank_device


def test_a_cuda_rank_names_its_one_visible_gpu():
    """Collectives refuse a device without an index."""
    assert rank_device("cuda") == torch.device("cuda", 0)
    assert rank_device("cuda:1") == torch.device("cuda", 1)
    assert rank_device("cpu") == torch.device("cpu")


def test_a_group_of_one_changes_nothing():
    tp = SingleRank()
    x = torch.arange(3.0)
    assert tp.all_reduce(x) is x
    assert tp.gather(x) is x
    assert tp.broadcast_tensor(x) is x
    message = np.arange(3, dtype=np.int32)
    assert tp.broadcast(message) is message
    assert tp.min(7) == 7
    assert tp.waiting_for() == ()
