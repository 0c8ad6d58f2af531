"""The grammar: what it reads, what it spells, and that it evaluates nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advalign import attacks, models, objectives
from advalign.errors import UserError, quoted
from advalign.registration import register_attacks
from advalign.spelling import Call, construct, parse_call, parse_calls, parse_number, spell, spell_number
from advalign.threats import Linf

if TYPE_CHECKING:
    from collections.abc import Sized as Missing


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=1", 1),
        ("x=-1", -1),
        ("x=0.5", 0.5),
        ("x=1e-3", 0.001),
        ("x=2E+2", 200.0),
        ("x=-1e-3", -0.001),
        ("x=8/255", 8 / 255),
        ("x = 8 / 255", 8 / 255),
        ("x=-8/255", -8 / 255),
        ("x=0.5/1e2", 0.005),
        ("x=layer4", "layer4"),
        ("x=flip-crop", "flip-crop"),
        ("x = small-cnn-2", "small-cnn-2"),
        ("x=layer4.1.conv2", "layer4.1.conv2"),
        ("x=features.0", "features.0"),
        ("x = _blocks.3.bn-1", "_blocks.3.bn-1"),
        ("x=b.if", "b.if"),
        ("x=1.e-3", 0.001),
        ("x=1.5e-3", 0.0015),
        ("x='b.c'", "b.c"),
        ("x='layer4'", "layer4"),
        ('x="a-b c+d"', "a-b c+d"),
        ('x="it\'s"', "it's"),
        ("x=''", ""),
        ("x=true", True),
        ("x=False", False),
        ("x=None", None),
        ("x=(1, 0.5)", (1, 0.5)),
        ('x=("a-b", "c")', ("a-b", "c")),
    ],
)
def test_values(text: str, value: Any):
    call = parse_call(f"name({text})")
    assert call == Call("name", {"x": value})
    assert type(call.arguments["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("trades", [("trades", {})]),
        ("trades()", [("trades", {})]),
        ("  trades ( beta = 6 )  ", [("trades", {"beta": 6})]),
        ("small-cnn", [("small-cnn", {})]),
        ("small-cnn(width=8)+wrn-34-10", [("small-cnn", {"width": 8}), ("wrn-34-10", {})]),
        ("small_cnn", [("small-cnn", {})]),
        ("a(step-size=1e-3)", [("a", {"step_size": 0.001})]),
        ("a+b+c(x=1)", [("a", {}), ("b", {}), ("c", {"x": 1})]),
        ('a(x="b+c")+d', [("a", {"x": "b+c"}), ("d", {})]),
    ],
)
def test_calls(text: str, calls: list[tuple[str, dict[str, Any]]]):
    assert parse_calls(text) == [Call(*call) for call in calls]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "+",
        "a+",
        "a-",
        "a b",
        "a*b",
        "(a",
        "a(",
        "a(1)",
        "a(*b)",
        "a(**b)",
        "a()()",
        "a.b",
        "a.b(x=1)",
        "a-b.c",
        "a(b.c=1)",
        "a(x=b..c)",
        "a(x=b.)",
        "a(b.c)",
        "a[0]",
        "1",
        "'a'",
        "lambda: 0",
        "a\nb",
        "a;b",
        "a=1",
        "a\0",
        "(" * 500 + "a" + ")" * 500,
        "a" + "+a" * 50_000,
        "__import__('os').system('true')",
        "(lambda: a)()",
    ],
)
def test_other_text_is_refused(text: str):
    with pytest.raises(UserError, match="cannot read"):
        parse_calls(text)


@pytest.mark.parametrize(
    "value",
    [
        '__import__("os")',
        "open('touched', 'w')",
        "[f() for f in b]",
        "1+1",
        "2**9",
        "b[0]",
        "b.c()",
        "os.system('touch touched')",
        "b.c[0]",
        "b.c/2",
        "b.c+d.e",
        "().__class__",
        "'b'.c",
        "(b.c, d())",
        "f'{b}'",
        "not b",
        "(b := 3)",
        "lambda: 0",
        "{[]: 1}",
        "__import__('os')/2",
        "1/0",
        "1/2/3",
        "1/b",
        "1e308/1e-308",
    ],
)
def test_nothing_is_evaluated(value: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        parse_call(f"a(x={value})")
    assert "is not a number" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_argument_given_twice_is_refused():
    with pytest.raises(UserError, match="a: x is given twice"):
        parse_call("a(x=1, x=2)")


def test_one_call_is_one_call():
    with pytest.raises(UserError, match="not 2"):
        parse_call("a+b")


@pytest.mark.parametrize(
    ("text", "value"), [("0.03", 0.03), ("8/255", 8 / 255), (" 8 / 255 ", 8 / 255), ("-1", -1.0), ("1e-3", 1e-3)]
)
def test_parse_number(text: str, value: float):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "/", "8/", "/255", "8/0", "1/2/3", "eight", "8:255", "nan", "inf", "-inf", "1/nan"]
)
def test_parse_number_refuses(text: str):
    with pytest.raises(UserError, match="is not a number"):
        parse_number(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8 / 255, "8/255"),
        (-2 / 255, "-2/255"),
        (0.031, "0.031"),
        (0.02, "0.02"),
        (6.0, "6"),
        (0.0, "0"),
        (1e-3, "0.001"),
        (1e-5, "1e-05"),
        (0.2, "0.2"),
        (1 / 3, "85/255"),
        (1 / 7, "0.14285714285714285"),
        (1.234e-13, "1.234e-13"),
        (0.9999999999999999, "0.9999999999999999"),
    ],
)
def test_spell_number(value: float, text: str):
    assert spell_number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_round_trip(value: float):
    assert parse_number(spell_number(value)) == value


@given(st.integers(-2000, 2000))
def test_fractions_of_255_are_written_as_such_or_shorter(numerator: int):
    text = spell_number(numerator / 255)
    assert parse_number(text) == numerator / 255
    assert len(text) <= len(f"{numerator}/255")


class Thing:
    def __init__(
        self,
        size: int = 1,
        weight: float = 0.5,
        word: str = "a",
        pair: tuple[str, str] = ("a", "b"),
        flag: bool = False,
        limit: float | None = None,
        kind: Literal["x", "y"] = "x",
        layer: str | None = None,
        mode: Literal["eval", "train"] | None = None,
        marks: tuple[float, ...] = (),
    ) -> None:
        self.size, self.weight, self.word, self.pair = size, weight, word, pair
        self.flag, self.limit, self.kind = flag, limit, kind
        self.layer, self.mode, self.marks = layer, mode, marks


@settings(max_examples=50)
@given(
    size=st.integers(-(10**20), 10**20),
    weight=st.floats(allow_nan=False, allow_infinity=False),
    word=st.text("abc-_+=(), '").filter(lambda word: "'" not in word) | st.text('a-"'),
    pair=st.tuples(st.text("ab-+"), st.text("ab-+")),
    flag=st.booleans(),
    limit=st.none() | st.floats(0, 1),
    kind=st.sampled_from(["x", "y"]),
    layer=st.none() | st.from_regex(r"\A[a-z_0-9.]{1,9}\Z"),
    mode=st.sampled_from([None, "eval", "train"]),
    marks=st.lists(st.floats(0, 1)).map(tuple),
)
def test_objects_round_trip(**arguments: Any):
    text = spell("thing", Thing, arguments)
    again = construct("thing", parse_call(text), {"thing": Thing})
    for name, value in arguments.items():
        assert getattr(again, name) == value
    assert spell("thing", Thing, vars(again)) == text


def test_defaults_are_left_out_and_the_rest_is_in_the_order_of_the_constructor():
    assert spell("thing", Thing, {}) == "thing"
    assert spell("thing", Thing, {"weight": 0.5, "size": 3}) == "thing(size=3)"
    assert spell("thing", Thing, {"word": "b", "size": 3}) == 'thing(size=3, word="b")'
    assert spell("thing", Thing, {"word": "b", "size": 3}, hidden="size") == 'thing(word="b")'
    assert spell("thing", Thing, {}, always="word") == 'thing(word="a")'


def test_whole_numbers_stand_for_numbers():
    thing = construct("thing", parse_call("thing(weight=2, limit=1)"), {"thing": Thing})
    assert type(thing.weight) is float
    assert type(thing.limit) is float
    assert [*map(type, construct("thing", parse_call("thing(marks=(1, 0.5))"), {"thing": Thing}).marks)] == [
        float,
        float,
    ]


@pytest.mark.parametrize(
    ("layer", "canonical"),
    [("layer4.1.conv2", '"layer4.1.conv2"'), ("0", '"0"'), ("-1", '"-1"'), ('"0"', '"0"'), ('"1.10"', '"1.10"')],
)
def test_layers_need_no_quotes(layer: str, canonical: str):
    thing = construct("thing", parse_call(f"thing(layer={layer})"), {"thing": Thing})
    assert thing.layer == canonical.strip('"')
    assert spell("thing", Thing, vars(thing)) == f"thing(layer={canonical})"
    assert construct("thing", parse_call("thing(word=7)"), {"thing": Thing}).word == "7"


def unresolved(width: int = 1, kind: Missing | int = 2) -> tuple[int, object]:
    return width, kind


@pytest.mark.parametrize("make", [unresolved, partial(unresolved, kind=2)], ids=["type checker's import", "partial"])
def test_factories_without_readable_annotations_take_any_value(make: Callable[..., Any]):
    registry = {"make": make}
    assert construct("thing", parse_call("make(width=8)"), registry) == (8, 2)
    assert construct("thing", parse_call("make(width=wide)"), registry) == ("wide", 2)
    with pytest.raises(UserError, match="did you mean 'width'"):
        construct("thing", parse_call("make(widht=8)"), registry)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("thimg", "unknown thing 'thimg': did you mean 'thing'? choose from thing"),
        ("zzz", "unknown thing 'zzz': choose from thing"),
        ("thing(wieght=1)", "did you mean 'weight'"),
        ("thing(size=1.5)", "size=1.5 must be a whole number"),
        ("thing(size=true)", "size=True must be a whole number"),
        ("thing(size=None)", "size=None must be a whole number"),
        ("thing(weight=true)", "weight=True must be a number"),
        ("thing(weight=big)", "weight='big' must be a number"),
        ("thing(weight=1e999)", "weight=inf must be a number"),
        ("thing(weight=1" + 400 * "0" + ")", "must be a number"),
        ("thing(limit=1e999)", "limit=inf must be"),
        ("thing(word=1.5)", "word=1.5 must be a word, or text in quotes"),
        ("thing(word=true)", "word=True must be a word"),
        ("thing(layer=1.10)", "layer=1.1 must be a word, or text in quotes"),
        ("thing(marks=(1, a))", "marks=(1, 'a') must be"),
        ('thing(marks=(1, "a"))', "marks=(1, 'a') must be"),
        ("thing(mode=trian)", "unknown mode of thing 'thing' 'trian': did you mean 'train'? choose from eval, train"),
        ("thing(mode=1)", "mode=1 must be one of eval, train"),
        ("thing(flag=1)", "flag=1 must be true or false"),
        ("thing(kind=z)", "unknown kind of thing 'thing' 'z': choose from x, y"),
        ("thing(size={[1]: 2})", "is not a number"),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(text: str, words: str):
    with pytest.raises(UserError) as caught:
        construct("thing", parse_call(text), {"thing": Thing})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arguments_that_the_caller_sets_cannot_be_in_the_text():
    with pytest.raises(UserError, match="unknown argument"):
        construct("thing", parse_call("thing(size=2)"), {"thing": Thing}, size=1)
    assert construct("thing", parse_call("thing(word=b)"), {"thing": Thing}, size=4).size == 4


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "trades(beta=" + "9" * 9_000 + ")",
        "trades(beta=0x" + "f" * 9_000 + ")",
        "trades(" + "b" * 5_000 + "=1)",
        'trades(beta="' + "x" * 5_000 + '")',
        "at" + "+at" * 2_000,
        "at(x=" + "-" * 5_000 + "1)",
        "at(x=" + "1/" * 3_000 + "1)",
        "at" + "()" * 3_000,
        "at(" * 300 + ")" * 300,
        "(" * 3_000 + ")" * 3_000,
        "t" * 5_000 + "(1)",
        "t" * 5_000 + "(a=1, a=2)",
    ],
    ids=lambda text: text[:12],
)
def test_a_monstrous_spelling_is_refused_in_a_line_that_a_screen_can_show(text: str):
    with pytest.raises(UserError) as caught:
        objectives.parse(text)
    assert len(str(caught.value)) < 900  # of which 200 at most are the user's; the others name what is known
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "x" * 5_000 + ":Attack",
        "x" * 100_000 + ":Attack",
        "worst(" * 1_500 + ")" * 1_500,
        "worst(" * 15 + "pgd,,fgsm" + ")" * 15,
        "worst(pgd,,fgsm)",
    ],
)
def test_a_monstrous_attack_is_refused_in_a_line(text: str):
    with pytest.raises(UserError) as caught:
        attacks.parse(register_attacks(text), threat=Linf())
    assert len(str(caught.value)) < 600


def test_numbers_that_tensors_do_not_hold_are_refused():
    with pytest.raises(UserError, match=r"trades: beta=1e\+308 is out of range: at most 3.4e38"):
        objectives.parse("trades(beta=1e308)")
    with pytest.raises(UserError, match=r"out of range"):
        objectives.parse(f"at+vfd(weight={10**60})")
    with pytest.raises(UserError, match=r"pgd: steps=9+ is out of range: at most 2\*\*63 - 1"):
        attacks.parse(f"pgd(steps={'9' * 30})", threat=Linf())
    with pytest.raises(UserError, match=r"width=9+ is out of range"):
        models.canonical(f"small-cnn(width={'9' * 30})")
    objectives.parse("trades(beta=1e38)")


def test_a_message_shows_a_bounded_part_of_a_value_that_stands_for_a_billion():
    value: Any = ["x"] * 10
    for _ in range(12):
        value = [value] * 10
    assert len(quoted(value)) <= 200
    assert quoted({"b": 1}) == "{'b': 1}"
    assert "bits" in quoted(1 << 100_000)
