import pytest
import torch


@pytest.fixture
def one_thread():
    """Networks this small are slower with more threads, and much slower beside others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
