import pytest

from parity.errors import UsageError
from parity.recipe import Recipe, build, factor_names, load, parse_setting


@pytest.mark.parametrize(
    ("factor", "value", "says"),
    [
        ("lora.num_layers", 1.7, "1.7"),
        ("lora.num_layers", True, "True"),
        ("lora.num_layers", 0, "not 0"),
        ("model.source", "", "''"),
        ("optim.lr", [1e-3], "[0.001]"),
        ("optim.lr", "fast", "'fast'"),
        ("optim.lr", float("nan"), "nan"),
        ("optim.betas", [0.9], "betas"),
        ("train.compile", 1, "1"),
        ("lora.target_modules", "q_proj", "'q_proj'"),
        ("lora.target_modules", [], "at least 1"),
        ("data.pad_extra", 2, "0 or 1"),
        ("model.dtype", "float8", "'float8'"),
        ("seed.value", -1, "-1"),
    ],
)
def test_each_wrong_value_is_named(factor, value, says):
    with pytest.raises(UsageError) as caught:
        Recipe().override({factor: value})
    assert says in str(caught.value)
    assert factor.partition(".")[0] in str(caught.value)
    assert "\n" not in str(caught.value) or value == [""]


def test_an_unknown_factor_suggests_the_known_one():
    with pytest.raises(UsageError, match=r"lora\.numlayers.*did you mean lora\.num_layers"):
        Recipe().override({"lora.numlayers": 3})


def test_alpha_is_scale_times_rank():
    assert Recipe().override({"lora.alpha": 32}).lora.scale == 4.0
    assert build({"lora": {"alpha": 16, "rank": 4}}, "here").lora.scale == 4.0
    assert Recipe().override({"lora.alpha": 16}).digest() == Recipe().digest()
    with pytest.raises(UsageError, match="either alpha or scale"):
        build({"lora": {"alpha": 16, "scale": 2.0}}, "here")


def test_every_factor_can_be_overridden_with_its_own_value():
    recipe = Recipe()
    for name, value in recipe.factors().items():
        assert recipe.override({name: value}) == recipe, name
    assert len(factor_names()) > 35


def test_an_override_changes_that_factor_and_no_other():
    changed = Recipe().override({"optim.eps": 1e-6})
    assert changed.difference(Recipe()) == {"optim.eps": (1e-6, 1e-8)}
    assert changed.digest() != Recipe().digest()


def test_settings_are_toml_or_bare_words():
    assert parse_setting("lora.num_layers=16") == ("lora.num_layers", 16)
    assert parse_setting("optim.name = sgd") == ("optim.name", "sgd")
    assert parse_setting("optim.betas=[0.9, 0.95]") == ("optim.betas", [0.9, 0.95])
    for broken in ("lora.rank", "=3", "lora.rank="):
        with pytest.raises(UsageError, match="FACTOR=VALUE"):
            parse_setting(broken)


def test_recipes_come_from_files(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[optim]\nlr = 0.5\n[lora]\nalpha = 8\n")
    recipe = load(file, ["lora.rank=4"])
    assert (recipe.optim.lr, recipe.lora.scale, recipe.lora.rank) == (0.5, 2.0, 4)
    file.write_text("[optim\n")
    with pytest.raises(UsageError, match="not valid TOML"):
        load(file)
    file.write_text("lora = 3\n")
    with pytest.raises(UsageError, match="must be a table"):
        load(file)
    with pytest.raises(UsageError, match="no recipe 'nowhere'"):
        load("nowhere")


@pytest.mark.parametrize("name", ["default", "mixed", "smollm2"])
def test_shipped_recipes_are_valid(name):
    assert load(name).factors()
