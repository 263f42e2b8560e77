"""The benchmark suite of contrastive_ops: one registry of cases, one runner, one CSV schema.

``python -m benchmarks.run`` measures, ``python -m benchmarks.tables`` writes the tables of the pages and
``python -m benchmarks.plot`` draws them. ``benchmarks/README.md`` says how to add a case.
"""
