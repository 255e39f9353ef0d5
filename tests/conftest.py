"""Loads the fixtures, one file for each concern. `fixtures` is found through `pythonpath` in setup.cfg."""

# A fixture file that another one imports comes before it, so that pytest rewrites the assertions of both.
pytest_plugins = [
    "fixtures.proxy",
    "fixtures.postgres",
    "fixtures.kafka",
    "fixtures.daemon",
    "fixtures.operations",
    "fixtures.stage",
    "fixtures.group",
]
