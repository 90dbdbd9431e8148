"""Tools for a GPU machine that is there for minutes only: a pack to upload, two calls, the import of their results.

A call that is killed loses no result: each one is written to a journal at once.
"""
