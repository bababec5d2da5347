"""Components from specs and back, and what of them is fingerprinted."""

from typing import Annotated, ClassVar

import pytest
from pydantic import SerializeAsAny, ValidationError

from orpo_distill.component import SPEED_ONLY, Component, Options, method_options


class Shape(Component):
    family = "shape"
    types: ClassVar = {"circle": f"{__name__}:Circle", "square": f"{__name__}:Square"}


class Circle(Shape):
    radius: float = 1.0
    threads: Annotated[int, SPEED_ONLY] = 1


class Square(Shape):
    side: int


class Drawing(Options):
    shape: SerializeAsAny[Shape]


@pytest.mark.parametrize(
    "spec", ["circle", {"type": "circle"}, {"type": f"{__name__}:Circle", "radius": 1.0}, Circle()], ids=str
)
def test_every_way_to_name_a_component_gives_the_same(spec: object) -> None:
    assert Drawing.model_validate({"shape": spec}) == Drawing(shape=Circle())


def test_dumped_and_read_again_is_the_same() -> None:
    drawing = Drawing(shape=Circle(radius=2.0, threads=4))
    assert drawing.model_dump() == {"shape": {"type": "circle", "radius": 2.0, "threads": 4}}
    assert Drawing.model_validate(drawing.model_dump()) == drawing


def test_speed_only_options_are_not_fingerprinted() -> None:
    assert method_options(Drawing(shape=Circle(threads=8))) == {"shape": {"type": "circle", "radius": 1.0}}


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("circl", "did you mean 'circle'"),
        ({"type": "circle", "radus": 2}, "Extra inputs"),
        ({"radius": 2}, "a mapping with `type`"),
        ({"type": "no_such_module:Thing"}, "importable shape"),
        ({"type": "pathlib:Path"}, "subclass of Shape"),
        (7, "one of circle, square"),
    ],
    ids=str,
)
def test_a_wrong_spec_says_what_was_expected(spec: object, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Drawing.model_validate({"shape": spec})
