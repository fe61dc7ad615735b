"""Plugins by name: the folder is the registry, the signature is the schema, errors say how to cure themselves."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from annotated_types import Gt, Interval
from pydantic import ValidationError

import raydml
from raydml import registry
from raydml.registry import PluginError

PACKAGE = Path(raydml.__file__).parent


def _module(source: str, name: str = "raydml.losses.made_up") -> ModuleType:
    module = ModuleType(name)
    exec(compile(source, name, "exec"), vars(module))
    return module


class Made:
    """One line.

    And more.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        rate: Annotated[float, Gt(0)] = 0.5,
        steps: Annotated[int, Interval(ge=1, le=9)] = 3,
        mode: Literal["all", "active"] = "all",
        shared: bool = False,
        limit: Annotated[float, Gt(0)] | None = None,
    ) -> None:
        self.given = (num_classes, rate, steps, mode, shared, limit)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plugin losses/made_up that lies in no file, known to the registry for the length of a test."""
    name = "raydml.losses.made_up"
    module = ModuleType(name)
    vars(module)["Made"] = Made
    monkeypatch.setattr(Made, "__module__", name)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(registry, "names", lambda _: ("made_up",))
    registry.settings_model.cache_clear()
    yield
    registry.settings_model.cache_clear()


@pytest.mark.parametrize("kind", registry.KINDS)
def test_names_are_the_files_of_the_folder(kind: str) -> None:
    files = [path.name for path in (PACKAGE / kind).iterdir() if path.suffix == ".py"]
    assert list(registry.names(kind)) == sorted(f[:-3] for f in files if not f.startswith("_"))


def test_the_first_families_are_there() -> None:
    assert {"margin", "multi_similarity", "contrastive", "normalized_softmax"} <= set(registry.names("losses"))
    assert {"distance_weighted", "multi_similarity"} <= set(registry.names("miners"))


@pytest.mark.parametrize("kind", ["losses", "miners", "regularizers"])
def test_every_plugin_names_its_source_and_every_setting_says_what_it_is(kind: str) -> None:
    for name in registry.names(kind):
        assert len(registry.source(kind, name)) > 20, name
        assert any(year in registry.source(kind, name) for year in map(str, range(1990, 2030))), name
        for setting, field in registry.settings_model(kind, name).model_fields.items():
            assert len(field.description or "") > 20, (name, setting)


@pytest.mark.parametrize("kind", ["losses", "miners", "regularizers"])
def test_every_plugin_loads_describes_itself_and_has_valid_defaults(kind: str) -> None:
    for name in registry.names(kind):
        assert registry.load(kind, name).__module__ == f"raydml.{kind}.{name}"
        assert 20 <= len(registry.describe(kind, name)) <= 100, name
        registry.settings_model(kind, name)()


def test_unknown_kind() -> None:
    with pytest.raises(PluginError, match="no such kind of plugin") as caught:
        registry.names("loses")
    assert caught.value.nearest == "losses"
    assert caught.value.choices == registry.KINDS


def test_unknown_name_tells_the_choices_and_the_nearest() -> None:
    with pytest.raises(PluginError) as caught:
        registry.load("losses", "multi_similiarity")
    error = caught.value
    assert (error.key, error.value, error.nearest) == ("name", "multi_similiarity", "multi_similarity")
    assert error.choices == registry.names("losses")
    for part in ("'multi_similiarity'", "Did you mean 'multi_similarity'?", "contrastive", "raydml/losses/"):
        assert part in str(error)


@pytest.mark.parametrize("name", ["_base", "__init__", "../plugins", "margin.py", ""])
def test_names_that_are_no_plugin_are_refused_before_anything_is_imported(name: str) -> None:
    with pytest.raises(PluginError):
        registry.load("losses", name)


def test_far_off_names_get_no_guess() -> None:
    with pytest.raises(PluginError) as caught:
        registry.load("losses", "zzz")
    assert caught.value.nearest is None
    assert "Did you mean" not in str(caught.value)


def test_one_public_class_is_found_among_imports_and_private_ones() -> None:
    source = "from collections import OrderedDict\nclass _Aid: pass\nclass Loss: pass\ndef helper(): pass\n"
    assert registry.public_class(_module(source)).__name__ == "Loss"


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


def test_a_missing_context_value_is_told(made: None) -> None:  # noqa: ARG001
    with pytest.raises(PluginError, match=r"needs num_classes .*pass num_classes=\.\.\. to build") as caught:
        registry.build("losses", "made_up")
    assert caught.value.key == "num_classes"


@pytest.mark.parametrize("value", [0, -1, 5.0, "5", True, None])
def test_a_context_that_is_no_size_is_refused(made: None, value: object) -> None:  # noqa: ARG001
    with pytest.raises(PluginError, match=r"num_classes = .*whole number of at least 1"):
        registry.build("losses", "made_up", num_classes=value)


def test_unknown_setting_gives_the_nearest(made: None) -> None:  # noqa: ARG001
    with pytest.raises(PluginError) as caught:
        registry.build("losses", "made_up", num_classes=7, step=4)
    assert (caught.value.key, caught.value.value, caught.value.nearest) == ("step", 4, "steps")
    assert "Did you mean 'steps'?" in str(caught.value)
    assert caught.value.choices == ("rate", "steps", "mode", "shared", "limit")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rate", 0, "greater than 0"),
        ("rate", -1.5, "greater than 0"),
        ("rate", True, "valid number"),
        ("rate", "0.5", "valid number"),
        ("rate", float("nan"), "number"),
        ("rate", float("inf"), "finite"),
        ("rate", None, "valid number"),
        ("steps", 10, "less than or equal to 9"),
        ("steps", True, "valid integer"),
        ("steps", 3.0, "valid integer"),
        ("shared", 1, "valid boolean"),
        ("shared", "yes", "valid boolean"),
        ("limit", True, "valid number"),
        ("limit", 0.0, "greater than 0"),
        ("mode", "alll", "'all' or 'active'"),
    ],
)
def test_wrong_values_are_named_with_their_limit(made: None, key: str, value: object, said: str) -> None:  # noqa: ARG001
    with pytest.raises(PluginError, match=rf"{key} = ") as caught:
        registry.build("losses", "made_up", num_classes=7, **{key: value})
    assert said in str(caught.value)
    assert caught.value.key == key


def test_a_misspelt_choice_gives_the_nearest(made: None) -> None:  # noqa: ARG001
    with pytest.raises(PluginError, match="Did you mean 'active'") as caught:
        registry.build("losses", "made_up", num_classes=7, mode="actve")
    assert caught.value.choices == ("all", "active")


def test_all_wrong_settings_are_told_at_once(made: None) -> None:  # noqa: ARG001
    with pytest.raises(PluginError) as caught:
        registry.build("losses", "made_up", num_classes=7, rate=-1, steps=True, moode="all")
    for part in ("rate = -1", "steps = True", "moode = 'all'"):
        assert part in str(caught.value)


def test_settings_are_frozen(made: None) -> None:  # noqa: ARG001
    settings = registry.settings_model("losses", "made_up")(steps=4)
    assert settings.model_dump() == {"rate": 0.5, "steps": 4, "mode": "all", "shared": False, "limit": None}
    with pytest.raises(ValidationError, match="frozen"):
        settings.steps = 5


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("self, rate: float = 1.0", "not something a trial knows"),
        ("self, *rates: float", "not something a trial knows"),
        ("self, **rates: float", "needs a type and a default|may not|not something"),
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
    source = (
        "from typing import Annotated\nfrom annotated_types import Gt\n"
        "class Loss:\n    def __init__(self, *, rate: Annotated[float, Gt(0)] = 0.0): pass\n"
    )
    with pytest.raises(ValidationError, match="greater than 0"):
        registry.constructor_model(registry.public_class(_module(source)))()


def test_a_class_without_constructor_has_no_settings() -> None:
    assert registry.constructor_model(registry.public_class(_module("class Loss: pass\n"))).model_fields == {}


def test_real_limits_hold() -> None:
    with pytest.raises(PluginError, match="greater than 0"):
        registry.build("losses", "margin", num_classes=3, margin=0)
    with pytest.raises(PluginError, match="less than or equal to 1"):
        registry.build("miners", "distance_weighted", cutoff=1.5)
    with pytest.raises(PluginError, match="Did you mean 'temperature'"):
        registry.build("losses", "normalized_softmax", num_classes=3, embedding_dim=4, temprature=0.1)
