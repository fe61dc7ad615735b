"""Notices about slow imports, with libraries made for the test."""

import importlib
import sys

import pytest

from raydml.cli import loading


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Three slow libraries: the outer one imports the inner one, the broken one fails; their notices are on."""
    for name, text in {"outer": "import slow_inner\nVALUE = 3", "inner": "VALUE = 4", "broken": "1 / 0"}.items():
        (tmp_path / f"slow_{name}.py").write_text(text)
        monkeypatch.setitem(loading.SLOW_LIBRARIES, f"slow_{name}", name.title())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [loading.ImportNotices(), *sys.meta_path])
    yield
    for name in ("outer", "inner", "broken"):
        sys.modules.pop(f"slow_{name}", None)


@pytest.mark.usefixtures("libraries")
def test_a_slow_import_is_announced_once_and_with_what_it_imports(capsys):
    outer = importlib.import_module("slow_outer")
    importlib.import_module("slow_inner")
    assert (outer.VALUE, outer.slow_inner.VALUE) == (3, 4)
    assert capsys.readouterr().err == "loading Outer\n"


@pytest.mark.usefixtures("libraries")
def test_an_import_that_fails_raises_its_error_and_ends_its_notice(capsys):
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("slow_broken")
    importlib.import_module("slow_outer")
    assert capsys.readouterr().err == "loading Broken\nloading Outer\n"


@pytest.mark.usefixtures("libraries")
def test_there_is_no_notice_under_another_view(capsys):
    with loading.without_import_notices():
        importlib.import_module("slow_outer")
    assert capsys.readouterr().err == ""
    importlib.reload(sys.modules["slow_inner"])
    assert capsys.readouterr().err == ""
    assert any(isinstance(finder, loading.ImportNotices) for finder in sys.meta_path)


def test_a_terminal_gets_a_spinner(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with loading.notice("loading torch"):
        pass
    shown = capsys.readouterr().err
    assert "loading torch" in shown
    assert "\x1b[2K" in shown, "the spinner erases itself"
