"""The order in which files of tests are given to processes (`pytest -n 2 --dist loadfile`, as `make test` does): what takes longest first, so that no process waits for another at the end."""
LONG = ("test_notebooks.py", "test_dag.py", "test_browser.py", "test_tutorials.py", "test_trainer_faults.py", "test_commands.py")


def pytest_collection_modifyitems(items):
    rank = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))
