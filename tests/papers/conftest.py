"""The command in this process, for tests of experiments at a tiny size."""

import json

import pytest

from relflat.cli.main import main


@pytest.fixture
def relflat(capsys, tmp_path, monkeypatch):
    """Run the command; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        text = capsys.readouterr()
        return code, text.out, text.err

    return run


@pytest.fixture
def reproduced(relflat):
    """Run an experiment with one worker; return the object it prints."""

    def run(name: str, *options: str) -> dict:
        code, out, err = relflat("reproduce", name, "--workers", "1", "--json", *options)
        assert code == 0, err
        assert err == ""
        return json.loads(out)

    return run
