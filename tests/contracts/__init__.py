"""Every method before every Optax optimizer: registries, and tests over them.

The registries are the tables in ``tests.methods``, ``optimizers`` and ``targets``. An
entry carries all that is particular to it, so that no test has a special case, and
``test_registry`` fails if a method or an optimizer is in no table.
"""
