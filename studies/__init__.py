"""Studies that reproduce a claim of a paper, or fail to, with our own code."""
