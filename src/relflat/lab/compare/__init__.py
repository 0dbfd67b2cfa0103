"""Many runs: arms, search, seeds, statistics."""
