"""Plugins by name: the folder is the registry, the signature is the schema, errors say how to cure themselves."""

import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

import raydml
import raydml.losses
from raydml import registry
from raydml.errors import ConfigError, Problem
from raydml.registry import PluginError

PACKAGE = Path(raydml.__file__).parent


def _module(source: str, name: str = "raydml.losses.made_up") -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


def problem_of(call: Callable[[], object]) -> Problem:
    """The only problem with which a call is refused."""
    with pytest.raises(ConfigError) as caught:
        call()
    (problem,) = caught.value.problems
    return problem


MADE = '''
"""Made up: nobody (2026)."""

import math
from collections.abc import Sequence as Several
from typing import Annotated, Literal

import a_module_that_is_not_there
from pydantic import Field

from raydml.losses._base import ClassLoss

HALF = 1 / 2
Rate = Annotated[float, Field(gt=0)]
SCALE = a_module_that_is_not_there.SCALE


@a_module_that_is_not_there.decorated
class Made(ClassLoss):
    """One line.

    And more.
    """

    accepts = a_module_that_is_not_there.KINDS

    def __init__(
        self,
        num_classes: a_module_that_is_not_there.Count,
        *,
        rate: Rate = HALF,
        steps: Annotated[int, Field(ge=1, le=9)] = math.floor(3.5),
        mode: Literal["all", "active"] = "all",
    ) -> None:
        raise AssertionError("the code of a plugin does not run")


def helper() -> None: ...
'''


class Made:
    """One line.

    And more.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        rate: Annotated[float, Field(gt=0)] = 0.5,
        steps: Annotated[int, Field(ge=1, le=9)] = 3,
        mode: Literal["all", "active"] = "all",
        shared: bool = False,
        limit: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        self.given = (num_classes, rate, steps, mode, shared, limit)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plugin losses/made_up without a file, known to the registry for the length of a test."""
    name = "raydml.losses.made_up"
    module = ModuleType(name)
    vars(module)["Made"] = Made
    monkeypatch.setattr(Made, "__module__", name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "names", lambda _: ("made_up",))
    monkeypatch.setattr(registry, "signature", registry.load)
    registry.settings_model.cache_clear()
    yield
    registry.settings_model.cache_clear()


@pytest.mark.parametrize("kind", registry.KINDS)
def test_names_are_the_files_of_the_folder(kind: str) -> None:
    files = [path.name for path in (PACKAGE / kind).iterdir() if path.suffix == ".py"]
    assert list(registry.names(kind)) == sorted(f[:-3] for f in files if not f.startswith("_"))


@pytest.mark.parametrize("kind", ["losses", "miners", "regularizers"])
def test_every_plugin_names_its_source_and_every_setting_says_what_it_is(kind: str) -> None:
    for name in registry.names(kind):
        assert len(registry.source(kind, name)) > 20, name
        assert any(year in registry.source(kind, name) for year in map(str, range(1990, 2030))), name
        for setting, field in registry.settings_model(kind, name).model_fields.items():
            assert len(field.description or "") > 20, (name, setting)


@pytest.mark.parametrize("kind", ["losses", "miners", "regularizers", "samplers"])
def test_every_plugin_loads_describes_itself_and_has_valid_defaults(kind: str) -> None:
    for name in registry.names(kind):
        assert registry.load(kind, name).__module__ == f"raydml.{kind}.{name}"
        assert 20 <= len(registry.describe(kind, name)) <= 100, name
        registry.settings_model(kind, name)()


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_signature_in_the_source_is_that_of_the_class(kind: str) -> None:
    for name in registry.names(kind):
        cls, read = registry.load(kind, name), registry.settings_model(kind, name)
        assert (inspect.getdoc(cls) or "").startswith(registry.describe(kind, name)), name
        assert (inspect.getmodule(cls).__doc__ or "").partition("\n")[0].endswith(registry.source(kind, name)), name
        loaded = registry.constructor_model(cls)
        assert read.model_json_schema() == loaded.model_json_schema(), name
        assert read().model_dump() == loaded().model_dump(), name


def made_file(folder: Path, text: str, name: str) -> None:
    (folder / "losses").mkdir(exist_ok=True)
    (folder / "losses" / f"{name}.py").write_text(text)


def test_settings_are_read_without_the_modules_that_a_plugin_imports(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    made_file(tmp_path, MADE, "from_source")
    settings = registry.settings_model("losses", "from_source")
    assert settings().model_dump() == {"rate": 0.5, "steps": 3, "mode": "all"}
    assert problem_of(lambda: registry.checked_settings("losses", "from_source", {"rate": 0})).message == "must be > 0"
    assert registry.describe("losses", "from_source") == "One line."
    assert registry.source("losses", "from_source") == "nobody (2026)."


IMPORTED = '''
"""Made up: nobody (2026)."""

from __future__ import annotations

from typing import Annotated

try:
    from pydantic import Field as Limit
except ImportError:
    raise


class Made:
    """One line."""

    _DEFAULT = 3

    def __init__(self, *, number: SETTING) -> None: ...
'''


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("class_attribute", "Annotated[int, Limit(gt=0)] = _DEFAULT"),
        ("quoted", '"Annotated[int, Limit(gt=0)]" = 3'),
        ("nested_import", "Annotated[int, Limit(gt=0)] = 3"),
    ],
)
def test_a_file_whose_signature_needs_the_rest_of_it_is_imported(name, setting, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    monkeypatch.setattr(raydml.losses, "__path__", [*raydml.losses.__path__, str(tmp_path / "losses")])
    made_file(tmp_path, IMPORTED.replace("SETTING", setting), name)
    assert registry.settings_model("losses", name)().model_dump() == {"number": 3}
    assert problem_of(lambda: registry.checked_settings("losses", name, {"number": 0})).message == "must be > 0"


def test_a_file_that_cannot_be_imported_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    monkeypatch.setattr(raydml.losses, "__path__", [*raydml.losses.__path__, str(tmp_path / "losses")])
    made_file(tmp_path, "class Made:\n    def __init__(self, *, number: int = MISSING): ...\n", "unfinished")
    with pytest.raises(PluginError, match=r"losses.unfinished\.py cannot be imported: NameError: name 'MISSING'"):
        registry.settings_model("losses", "unfinished")
    text = IMPORTED.replace("try:", "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    Count = int\ntry:")
    made_file(tmp_path, text.replace("SETTING", "Count = 3"), "only_typed")
    with pytest.raises(PluginError, match=r"raydml\.losses\.only_typed\.Made: .* 'Count' is not defined"):
        registry.settings_model("losses", "only_typed")


def test_a_new_and_an_edited_plugin_are_seen_by_the_next_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    made_file(tmp_path, MADE, "edited")
    assert registry.names("losses") == ("edited",)
    assert "steps" in registry.settings_model("losses", "edited").model_fields
    registry.signature.cache_clear()  # as in a new process
    registry.settings_model.cache_clear()
    made_file(tmp_path, MADE.replace("steps:", "turns:"), "edited")
    assert list(registry.settings_model("losses", "edited").model_fields) == ["rate", "turns", "mode"]


@pytest.mark.parametrize(
    ("source", "listed"),
    [("class One: pass\nclass Two: pass\nclass _Three: pass\n", "One, Two"), ("import math\n", "none")],
)
def test_the_source_of_a_plugin_has_exactly_one_public_class(source, listed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    made_file(tmp_path, source, f"file_{len(source)}")
    with pytest.raises(PluginError, match=f"exactly one public class, found {listed}"):
        registry.settings_model("losses", f"file_{len(source)}")


def test_unknown_kind() -> None:
    with pytest.raises(AssertionError, match="'loses' is not one of losses, miners"):
        registry.names("loses")


def test_an_unknown_name_gives_the_choices_and_the_nearest_if_it_is_near() -> None:
    problem = problem_of(lambda: registry.load("losses", "multi_similiarity"))
    assert (problem.path, problem.value, problem.nearest) == ("name", "multi_similiarity", "multi_similarity")
    assert problem.choices == registry.names("losses")
    for part in ("'multi_similiarity'", "did you mean: multi_similarity", "contrastive"):
        assert part in str(problem)
    far = problem_of(lambda: registry.load("losses", "zzz"))
    assert far.nearest is None
    assert "did you mean" not in str(far)


@pytest.mark.parametrize("name", ["_base", "__init__", "../plugins", "margin.py", ""])
def test_names_that_are_no_plugin_are_refused_before_anything_is_imported(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one of the losses"):
        registry.load("losses", name)


def test_one_public_class_is_found_among_imports_and_private_ones_and_may_have_no_settings() -> None:
    source = "from collections import OrderedDict\nclass _Aid: pass\nclass Loss: pass\ndef helper(): pass\n"
    found = registry.public_class(_module(source))
    assert found.__name__ == "Loss"
    assert registry.constructor_model(found).model_fields == {}


@pytest.mark.parametrize(
    ("source", "listed"),
    [("class One: pass\nclass Two: pass\n", "One, Two"), ("from collections import OrderedDict\n", "none")],
)
def test_a_file_with_two_public_classes_or_none_is_refused(source: str, listed: str) -> None:
    with pytest.raises(PluginError, match=f"exactly one public class, found {listed}"):
        registry.public_class(_module(source))


def test_context_reaches_the_constructor_and_settings_are_filled_in(made: None) -> None:  # noqa: ARG001
    built = registry.build("losses", "made_up", num_classes=7, embedding_dim=3, rate=2)
    assert built.given == (7, 2.0, 3, "all", False, None)
    assert isinstance(built.given[1], float)
    assert registry.describe("losses", "made_up") == "One line."


def test_a_missing_context_value_is_named(made: None) -> None:  # noqa: ARG001
    with pytest.raises(PluginError, match=r"losses/made_up needs num_classes: pass num_classes=\.\.\. to build"):
        registry.build("losses", "made_up")


def test_misspelt_settings_and_choices_give_the_nearest_and_all_come_at_once(made: None) -> None:  # noqa: ARG001
    def build(**settings):
        return registry.build("losses", "made_up", num_classes=7, **settings)

    problem = problem_of(lambda: build(step=4))
    assert (problem.path, problem.value, problem.nearest) == ("losses/made_up.step", 4, "steps")
    assert problem.choices == ("rate", "steps", "mode", "shared", "limit")
    problem = problem_of(lambda: build(mode="actve"))
    assert (problem.nearest, problem.choices) == ("active", ("all", "active"))
    with pytest.raises(ConfigError) as caught:
        build(rate=-1, steps=True, moode="all")
    for part in ("rate = -1", "steps = true", "moode = 'all'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rate", 0, "must be > 0"),
        ("rate", -1.5, "must be > 0"),
        ("rate", True, "must be a number"),
        ("rate", "0.5", "must be a number"),
        ("rate", float("nan"), "must be a finite number"),
        ("rate", float("inf"), "must be a finite number"),
        ("rate", None, "must be a number"),
        ("steps", 10, "must be <= 9"),
        ("steps", True, "must be a whole number"),
        ("steps", 3.0, "must be a whole number"),
        ("shared", 1, "must be true or false"),
        ("shared", "yes", "must be true or false"),
        ("limit", True, "must be a number"),
        ("limit", 0.0, "must be > 0"),
        ("mode", "alll", "is not one of the choices"),
    ],
)
def test_wrong_values_are_named_with_their_limit(made: None, key: str, value: object, said: str) -> None:  # noqa: ARG001
    problem = problem_of(lambda: registry.build("losses", "made_up", num_classes=7, **{key: value}))
    assert (problem.path, problem.message) == (f"losses/made_up.{key}", said)
    assert f"{key} = " in str(problem)


def test_a_setting_that_was_added_later_is_left_out_at_its_default(made: None, monkeypatch) -> None:  # noqa: ARG001
    class Newer:
        def __init__(
            self, *, rate: float = 0.5, decay: Annotated[float | None, registry.ADDED_LATER, Field(ge=0)] = None
        ) -> None:
            self.given = (rate, decay)

    monkeypatch.setattr(registry, "signature", lambda *_: Newer)
    monkeypatch.setattr(registry, "load", lambda *_: Newer)
    assert registry.checked_block("losses", {"name": "made_up"}) == {"name": "made_up", "rate": 0.5}
    assert registry.checked_settings("losses", "made_up", {"decay": None}) == {"rate": 0.5}
    assert registry.checked_settings("losses", "made_up", {"decay": 0}) == {"rate": 0.5, "decay": 0.0}
    assert [registry.build("losses", "made_up", **given).given for given in ({}, {"decay": 2})] == [
        (0.5, None),
        (0.5, 2),
    ]
    with pytest.raises(ConfigError, match="must be >= 0"):
        registry.build("losses", "made_up", decay=-1)


def test_settings_are_frozen(made: None) -> None:  # noqa: ARG001
    settings = registry.settings_model("losses", "made_up")(steps=4)
    assert settings.model_dump() == {"rate": 0.5, "steps": 4, "mode": "all", "shared": False, "limit": None}
    with pytest.raises(ValidationError, match="frozen"):
        settings.steps = 5


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("self, rate: float = 1.0", "not a part of a trial"),
        ("self, *rates: float", "not a part of a trial"),
        ("self, **rates: float", "needs a type and a default|may not|not a part"),
        ("self, *, rate: float", "needs a type and a default"),
        ("self, *, rate=1.0", "needs a type and a default"),
        ("self, *, num_classes: int = 3", "the word is taken"),
        ("self, *, name: str = 'x'", "the word is taken"),
    ],
)
def test_constructors_that_break_the_rules_are_refused(signature: str, said: str) -> None:
    module = _module(f"class Loss:\n    def __init__({signature}): pass\n")
    with pytest.raises(PluginError, match=said):
        registry.constructor_model(registry.public_class(module))


def test_a_default_outside_its_own_limit_is_refused() -> None:
    source = "from typing import Annotated\nfrom pydantic import Field\nclass Loss:\n"
    source += "    def __init__(self, *, rate: Annotated[float, Field(gt=0)] = 0.0): pass\n"
    with pytest.raises(ValidationError, match="greater than 0"):
        registry.constructor_model(registry.public_class(_module(source)))()


def test_real_limits_hold() -> None:
    with pytest.raises(ConfigError, match="margin = 0: must be > 0"):
        registry.build("losses", "margin", num_classes=3, margin=0)
    with pytest.raises(ConfigError, match=r"cutoff = 1\.5: must be <= 1"):
        registry.build("miners", "distance_weighted", cutoff=1.5)
    with pytest.raises(ConfigError, match="did you mean: temperature"):
        registry.build("losses", "normalized_softmax", num_classes=3, embedding_dim=4, temprature=0.1)
