"""The experiments of the papers on relative flatness, as code; `relflat.papers.catalogue` has them by name."""
