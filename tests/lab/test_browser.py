"""The report in a real browser, headless; skipped where there is none."""

import re
import shutil
import subprocess

import pytest
from synthetic import COSTS, comparison

from relflat.lab.report.report import files
from relflat.lab.report.summary import Summary
from relflat.lab.train.environment import describe

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH = "<script>document.title = innerWidth + ' ' + document.documentElement.scrollWidth</script></body>"


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package chromium)")
@pytest.mark.parametrize("width", [1200, 500])
def test_report_has_no_console_error_and_does_not_scroll_sideways(tmp_path, width):
    scores = [[0.80, 0.81, 0.82], [0.9, 0.91, 0.93], [0.7, 0.72, 0.71]]
    page = tmp_path / "report.html"
    text = files(Summary(comparison(scores), COSTS), describe(), "Notes.")["report.html"]
    page.write_text(text.replace("</body>", WIDTH))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count('<svg role="img"') == 9
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found is not None
    inner, needed = map(int, found.groups())
    assert needed <= inner <= width
