"""Studies that try to reproduce a claim of a paper with our own code: ``python -m studies`` lists them.

A study is a module of this package with a :class:`~studies.runner.Study` called ``STUDY``. The runner gives every study
the same command, the same way to resume and the same file of results.
"""
