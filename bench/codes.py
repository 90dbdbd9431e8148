"""Exit codes with which programs of this package tell each other what happened."""

#: The process cannot continue: its GPU does not respond any more, or a case hung. Start it again with the same journal,
#: and it continues with the next case.
DOOMED = 3
#: A kernel is missing from Triton's cache.
MISSED = 4
