"""Everything for a GPU machine that is lent for minutes: the pack to upload, two calls, and the import of their results.

A call that is killed loses no result: each one is written to a journal at once.
"""
