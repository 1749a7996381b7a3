"""The order in which files of tests are given to processes (`pytest -n 2 --dist loadfile`, as `make test` does): what takes longest first, so that no process waits for another at the end."""
import pytest

LONG = ("test_notebooks.py", "test_dag.py", "test_browser.py", "test_tutorials.py", "test_trainer_faults.py", "test_commands.py")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@pytest.fixture(scope="module")
def one_thread():
    "For small tensors, which a second thread only makes wait; the tests after this module get their threads back."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
