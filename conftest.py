"""Which tests are fast, and in which order and on which worker they run: tests and the cells of notebooks.

A test without a mark is fast: it starts no service and no browser. ``main`` marks those that do, and ``long`` those
that only ``make test-all`` runs. A test that uses one of the fixtures in `STARTS_PROCESSES` is marked ``main`` here.
"""

from __future__ import annotations

import pytest

STARTS_PROCESSES = {"tiny_service", "endless_service", "service", "jupyterlab", "chromium", "script"}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, keep the cells of a notebook in order, and each file on one worker."""
    for item in items:
        if item.path.suffix == ".ipynb" or STARTS_PROCESSES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("main")
        if item.get_closest_marker("xdist_group") is None:
            uses_port_12345 = item.path.name == "03_streaming.ipynb"
            file = str(item.path.relative_to(config.rootpath))
            item.add_marker(pytest.mark.xdist_group("port-12345" if uses_port_12345 else file))
    cells = sorted((item for item in items if hasattr(item, "cell_num")), key=lambda item: (item.path, item.cell_num))
    items[:] = [*cells, *(item for item in items if not hasattr(item, "cell_num"))]
