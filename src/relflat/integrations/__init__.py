"""FAM and measurements inside training frameworks; import each by its path, none is imported by ``relflat``."""
