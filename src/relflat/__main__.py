"""``python -m relflat`` is the command ``relflat``."""

from relflat.cli.entry import main

main()
