"""Exit codes that programs here understand of one another."""

#: The process cannot go on: its GPU answers no longer, or a case was stuck. Started again with the same journal it goes
#: on with the next case.
DOOMED = 3
#: Triton's cache does not hold what it should.
MISSED = 4
