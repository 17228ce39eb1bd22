"""Takes guards away from every program that is started with this directory in PYTHONPATH."""

import without  # noqa: F401 - it takes them away when it is imported
