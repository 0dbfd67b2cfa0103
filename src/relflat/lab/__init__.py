"""Data sets, tasks, training and reports around the core; needs the extra ``lab``.

The core of relflat never imports this package. Data flows one way through it:
sources -> fetch -> data -> splits -> tasks -> algorithms -> training -> store -> trials -> report.
"""
