"""How the tests are shared among processes (`pytest -n 2`, as `make test` does).

The tests of one file stay together and in order, since many share a run that the file makes once; notebooks and tutorials
stand alone each. What takes longest begins first, so that no process waits for another at the end."""
import pytest

ALONE = ("test_notebooks.py", "test_tutorials.py", "test_benchmarks.py")
FIRST = ("test_dag.py", "test_browser.py", "test_trainer_faults.py", "test_tutorials.py", "test_commands.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))
    for item in items:
        if item.path.name not in ALONE:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
