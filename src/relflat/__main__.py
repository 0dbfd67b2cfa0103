"""``python -m relflat`` is the command ``relflat``."""

from relflat.cli.main import main

main()
