"""Configurations: presets, YAML differences, overrides and the messages for typical mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dinov2_fast.config import Config, load_config, preset_names, to_yaml
from dinov2_fast.errors import ConfigError


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


def test_presets_cover_the_four_published_sizes_the_demo_and_debugging():
    assert set(preset_names()) >= {"vits14", "vitb14", "vitl14", "vitg14", "demo", "debug"}


def test_a_file_holds_only_differences(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "optimizer: {base_lr: 2e-4}\ncrops: {global_scale: [0.25, 1]}\n", encoding="utf-8"
    )
    expected = dataclasses.replace(
        Config(),
        optimizer=dataclasses.replace(Config().optimizer, base_lr=2e-4),
        crops=dataclasses.replace(Config().crops, global_scale=(0.25, 1.0)),
    )
    assert load_config(str(path)) == expected


def test_an_empty_file_is_the_default(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("", encoding="utf-8")
    assert load_config(str(path)) == Config()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"modle.depth": 3}, "unknown key modle (did you mean model?)"),
        ({"model.drop_rate": 0.1}, "unknown key model.drop_rate (did you mean drop_ratio?)"),
        ({"model.drop_ratio": 1.0}, "model.drop_ratio must be in [0, 1), got 1.0"),
        ({"model.ffn": "gelu"}, "model.ffn must be one of mlp, swiglu, got 'gelu'"),
        ({"model.depth": 0}, "model.depth must be at least 1, got 0"),
        ({"model.depth": 2.5}, "model.depth must be int, got 2.5"),
        ({"run.seed": True}, "run.seed must be int, got True"),
        ({"run.seed": -1}, "run.seed must be at least 0, got -1"),
        ({"optimizer.base_lr": "fast"}, "optimizer.base_lr must be float, got 'fast'"),
        ({"optimizer.base_lr": float("nan")}, "optimizer.base_lr must be greater than 0, got nan"),
        ({"crops.local_scale": [0.5, 0.1]}, "crops.local_scale must be two values"),
        ({"crops.local_scale": 0.5}, "crops.local_scale must be a list of 2 values, got 0.5"),
        ({"masks.min_ratio": 0.6}, "masks.min_ratio must not exceed masks.max_ratio"),
        ({"loss.dino_head.num_prototypes": 0}, "loss.dino_head.num_prototypes must be at least 1"),
        ({"model": 3}, "model must be a mapping, got 3"),
        ({"loss.separate_ibot_head": "yes"}, "loss.separate_ibot_head must be bool, got 'yes'"),
    ],
)
def test_mistakes_are_named_with_the_way_out(overrides, words):
    with pytest.raises(ConfigError) as caught:
        Config().updated(overrides)
    assert words in str(caught.value)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"named 'vits41' \(did you mean vits14\?\)"):
        load_config("vits41")


@pytest.mark.parametrize(
    "text",
    ["a: [1", "!!python/object/apply:os.system ['echo evil']", "- 1\n- 2\n", "\x00"],
    ids=["broken", "tag that would run code", "a list", "a null byte"],
)
def test_files_that_are_no_configuration_are_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(str(path))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(path))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(getattr(Config(), section.name))
    for field in dataclasses.fields(getattr(Config(), section.name))
]


@given(key=st.sampled_from(fields), value=json_like)
def test_any_value_gives_a_valid_configuration_or_a_config_error(key, value):
    try:
        config = Config().updated({key: value})
    except ConfigError:
        return
    assert yaml.safe_load(to_yaml(config)) is not None


def test_a_section_without_lines_changes_nothing_and_a_syntax_error_takes_one_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("optimizer:\n  # base_lr: 1\n", encoding="utf-8")
    assert load_config(str(path)) == Config()
    path.write_text("crops: [1,\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_config(str(path))
    assert "\n" not in str(caught.value)
