"""``import relflat`` is quick and brings no framework; each integration says what to install."""

import importlib
import json
import os
import subprocess
import sys

import pytest

import relflat
from processes import python

FRAMEWORKS = ("lightning", "transformers", "accelerate", "skorch", "peft", "sklearn", "scipy", "matplotlib", "keras")


@pytest.mark.xdist_group("bare")
def test_import_brings_no_framework() -> None:
    modules = json.loads(python("import sys, json, relflat; print(json.dumps(sorted(sys.modules)))").stdout)
    roots = {name.split(".")[0] for name in modules}
    assert not roots & set(FRAMEWORKS)
    assert not [name for name in modules if name.startswith(("relflat.lab", "relflat.integrations"))]


def test_what_is_imported_is_what_is_asked_for() -> None:
    """The version, --help of another tool, an interrupted start: none waits for PyTorch."""
    code = """if True:
        import sys, relflat
        print(relflat.__version__, "torch" in sys.modules)
        print(relflat.reference.kappa.__name__, relflat.FAM.__name__, "torch" in sys.modules)
        print(*sorted(set(relflat.__all__) - set(dir(relflat))), hasattr(relflat, "nothing"), hasattr(relflat, "_x"))
    """
    lines = subprocess.check_output([sys.executable, "-c", code], text=True).splitlines()
    assert lines == [f"{relflat.__version__} False", "kappa FAM True", "False False"]


def test_everything_public_is_there_under_its_name() -> None:
    for name in relflat.__all__:
        found = getattr(relflat, name)
        assert found.__name__ == name
        assert getattr(importlib.import_module(found.__module__), name) is found


def test_import_takes_less_than_a_fifth_of_a_second_beyond_torch() -> None:
    """The first quick one of a few processes: others share the machine."""
    code = """if True:
        import time, torch, torch.utils._pytree
        start = time.process_time()
        from relflat import FAM, relative_flatness
        print(time.process_time() - start)
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}  # users compile once
    start = [sys.executable, "-c", code]
    assert any(float(subprocess.check_output(start, text=True, env=environment)) < 0.2 for _ in range(3))


@pytest.mark.parametrize("name", ["lightning", "transformers", "accelerate", "skorch", "keras"])
def test_a_missing_framework_is_named_with_its_extra(name, monkeypatch) -> None:
    for module in [m for m in sys.modules if m == name or m.startswith((f"{name}.", f"relflat.integrations.{name}"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Missing(name), *sys.meta_path])
    with pytest.raises(ImportError) as caught:
        importlib.import_module(f"relflat.integrations.{name}")
    assert str(caught.value) == (f'relflat.integrations.{name} needs {name}: pip install "relflat[{name}]"')


class Missing:
    """Finds no framework of that name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {self.name!r}", name=self.name)
