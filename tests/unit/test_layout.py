"""What a group's files are called, and that one module alone says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import panotriton
from panotriton.groups import layout

PACKAGE = Path(panotriton.__file__).parent
FRAGMENTS = ("_yaw", "_pair.jpg", "_params.json", "_interp_", "interpolated_sr", "group_info.json")


def test_names_are_the_file_path_services() -> None:
    assert layout.pair("a", 1) == "pairs/a_yaw01_pair.jpg"
    assert layout.sharp_pair("a", 8) == "osediff/a_yaw08_pair.jpg"
    assert layout.params("a", 2, "right") == "params/a_yaw02_right_params.json"
    assert layout.description("b", 3) == "descriptions/b_yaw03_pair.json"
    assert layout.end_view("a", 4, "left") == "interpolated/a_yaw04_pair_left.jpg"
    crop = layout.between_view("a", 4, 9, sharp=False)
    assert crop == "interpolated/a_yaw04_pair_left_interp_09.jpg"
    assert layout.between_view("a", 4, 9, sharp=True) == crop.replace("/", "_sr/")
    assert layout.group_folder(Path("out"), 12) == Path("out/group_0012")


def test_panoramas_of_one_name_are_numbered() -> None:
    assert layout.distinct_bases("a", "b") == ("a", "b")
    assert layout.distinct_bases("a", "a") == ("a_1", "a_2")


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("group_0007", 7),
        ("group_12345", 12345),
        ("group_0007.part", None),
        (".group_0007.99", None),
        ("0007", None),
        ("group_", None),
        ("group_²", None),
    ],
)
def test_only_a_finished_groups_folder_has_a_number(name: str, number: int | None) -> None:
    assert layout.group_number(Path("out") / name) == number


def test_the_group_of_a_path_is_the_outermost() -> None:
    path = "/data/group_0042/group_0001/a_left.jpg"
    assert layout.enclosing_group(path) == "/data/group_0042"
    assert layout.enclosing_group("/data/group_x/a_left.jpg") is None
    assert layout.enclosing_group("/data/group_0042") is None


def test_no_other_module_spells_a_name_out() -> None:
    """Docstrings may, and so may texts that people read: those hold a space."""
    found = [
        f"{path.relative_to(PACKAGE)}:{constant.lineno} {constant.value!r}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != Path(layout.__file__)
        for constant in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
        if " " not in constant.value and any(part in constant.value for part in FRAGMENTS)
    ]
    assert not found
