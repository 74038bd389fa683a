"""The one checker of balancers, aggregators and merge methods: names, options, values, and where the message points."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from pydantic import Field

from mtft.common.errors import MergeError, UserError
from mtft.recipe.method_options import check_option_names, check_options, find_method, options_of


@dataclass
class Method:
    steps: Annotated[int, Field(ge=1)] = 10
    rate: Annotated[float, Field(gt=0)] = 0.5
    kind: Literal["a", "b"] = "a"
    values: dict[str, float] = field(default_factory=dict)


METHODS = {"first": Method, "second": Method}


def test_a_misspelt_name_comes_with_the_nearest_and_with_all():
    assert find_method(METHODS, "first", "method", "x.name") is Method
    with pytest.raises(UserError, match="unknown method 'frist': did you mean 'first'") as caught:
        find_method(METHODS, "frist", "method", "x.name")
    assert (caught.value.where, caught.value.do) == ("x.name", "one of first, second")
    with pytest.raises(MergeError, match="unknown method 'frist'\n") as caught:
        find_method(METHODS, "frist", "method", "x.name", error=MergeError, hint_below=True)
    assert caught.value.do == "did you mean 'first'? one of first, second"


def test_a_misspelt_option_comes_with_the_nearest_and_with_all():
    check_option_names("method first", options_of(Method), ["rate"], "x")
    with pytest.raises(UserError, match="method first has no option 'rat': did you mean 'rate'") as caught:
        check_option_names("method first", options_of(Method), ["rate", "rat"], "x")
    assert (caught.value.where, caught.value.do) == ("x.rat", "its options: steps, rate, kind, values")


def test_numbers_take_the_type_of_their_option():
    method = Method(steps=2e2, rate=1, values={"a": 1})
    check_options(method, "x")
    assert (repr(method.steps), repr(method.rate), repr(method.values)) == ("200", "1.0", "{'a': 1.0}")


@pytest.mark.parametrize(
    ("options", "where", "do"),
    [
        ({"steps": 2.5}, "x.steps", "the default is 10"),
        ({"steps": 0.0}, "x.steps", "the default is 10"),
        ({"steps": True}, "x.steps", "the default is 10"),
        ({"rate": "1"}, "x.rate", "the default is 0.5"),
        ({"rate": -1.0}, "x.rate", "the default is 0.5"),
        ({"kind": "c"}, "x.kind", "the default is 'a'"),
        ({"values": [1]}, "x.values", None),
    ],
)
def test_a_value_that_does_not_fit_is_named(options, where, do):
    with pytest.raises(MergeError) as caught:
        check_options(Method(**options), "x", error=MergeError)
    assert (caught.value.where, caught.value.do) == (where, do)
