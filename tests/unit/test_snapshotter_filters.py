"""containerd's filter language: what it takes, what it refuses, and that nothing else comes out of it."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest
from dadi.snapshotter import filters
from dadi.snapshotter.model import Info, Kind

INFO = Info("ns/1/name", "parent", Kind.ACTIVE, 1, 2, {"a": "1", "a.b": "2", "with space": "x y", "r": "aab"})


def matches(*texts: str, info: Info = INFO) -> bool:
    return filters.parse(texts)(info)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "name",
        'name=="ns/1/name"',
        "name==ns/1/name",
        "parent",
        "kind==active",
        "kind!=view",
        "labels.a",
        "labels.a==1",
        'labels."a"==1',
        "labels.a.b==2",
        'labels."a.b"==2',
        'labels."with space"=="x y"',
        'labels."with\\x20space"',
        'labels."with\\u0020space"',
        'labels."with\\040space"',
        "labels.none!=1",
        "labels.r~=a+b",
        "labels.r~=/^a+b$/",
        "labels.r~=|^a+b$|",
        "labels.r~=^a",
        "name~=1/n",
        "labels.a==1,labels.r,kind==active",
        " name == ns/1/name",
        "none!=anything",
        "none~=/^$/",
    ],
)
def test_filters_that_match(text: str) -> None:
    assert matches(text)


@pytest.mark.parametrize(
    "text",
    [
        "kind==view",
        "kind==ACTIVE",
        "labels",
        "labels.none",
        "labels.none==",
        "none",
        "none==anything",
        "labels.r~=^b",
        "labels.r~=(",
        "labels.a==1,labels.r==no",
        "parent!=parent",
    ],
)
def test_filters_that_do_not(text: str) -> None:
    if text.endswith("=="):
        with pytest.raises(InvalidRequest, match="expected a value"):
            matches(text)
    else:
        assert not matches(text)


@pytest.mark.parametrize(
    "text",
    [
        ",", "name,", "name,,parent", "name=", "name=active", "name===x", "name=~x", "name==", "name== ", ".name",
        "name.", "na-me", "name==a b", "name==/x/", "name==|x|", 'name=="x', 'name=="\\q"', 'name=="\\x4"',
        'name=="\\777"', 'name=="\\U00110000"', 'name=="a\nb"', "ünïcode", "name==,x", "'name'", "name==.x",
    ],
)  # fmt: skip
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a filter"):
        matches(text)


def test_several_filters_are_alternatives_and_none_matches_everything() -> None:
    assert matches("kind==view", "name")
    assert not matches("kind==view", "kind==committed")
    assert matches()


def test_escapes_stand_for_bytes_and_characters() -> None:
    info = Info('tab\t"é漢\\', "", Kind.VIEW, 1, 1, {})
    assert matches('name=="tab\\t\\"\\xc3\\xa9\\u6f22\\\\"', info=info)
    assert matches('name=="\\164ab\\011\\"é\\U00006f22\\\\"', info=info)


def test_a_filter_has_a_largest_size() -> None:
    with pytest.raises(InvalidRequest, match="the limit is"):
        matches("name==" + "x" * 70000)


@given(st.text(max_size=200) | st.text(alphabet='nameklbs.,=!~"/|\\ x01u', max_size=60))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    try:
        test = filters.parse([text])
    except InvalidRequest:
        return
    assert test(INFO) in (True, False)


@given(st.text(max_size=50).filter(lambda text: "\0" not in text))
def test_a_quoted_value_is_that_value(value: str) -> None:
    quoted = re.sub(r'["\\]', lambda found: "\\" + found[0], value).replace("\n", "\\n")
    info = Info(value, "", Kind.VIEW, 1, 1, {value: value})
    assert matches(f'name=="{quoted}"', info=info)
    assert matches(f'labels."{quoted}"=="{quoted}"', info=info)
    assert not matches(f'name!="{quoted}"', info=info)


@given(st.text(alphabet=string.ascii_letters + string.digits + ":-_", min_size=1, max_size=50))
def test_a_plain_value_is_that_value(value: str) -> None:
    assert matches(f"name=={value}", info=Info(value, "", Kind.VIEW, 1, 1, {}))
