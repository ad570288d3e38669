"""Reading strengths, and which tensor gets which."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.errors import AlphaError
from mergekit_bio.merging.alpha import Alpha, matches, parse_alphas

Q3 = "model.layers.3.self_attn.q_proj.weight"
O17 = "model.layers.17.self_attn.o_proj.weight"


def test_a_sweep_includes_both_ends_without_floating_point_dust():
    alphas = parse_alphas(["0:1:0.1"])
    assert [alpha.default for alpha in alphas] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [alpha.label for alpha in alphas][:4] == ["0.00", "0.10", "0.20", "0.30"]


def test_numbers_and_sweeps_together():
    assert [alpha.default for alpha in parse_alphas(["0.4", 1, "2:3:0.5"])] == [0.4, 1.0, 2.0, 2.5, 3.0]


def test_modules_and_layers():
    (alpha,) = parse_alphas(["0.5,q_proj=0.3,layers.0-15=0.2,layers.17.self_attn.o_proj=0.9"])
    assert alpha.of(Q3) == 0.2
    assert alpha.of(O17) == 0.9
    assert alpha.of("model.layers.20.self_attn.q_proj.weight") == 0.3
    assert alpha.of("lm_head.weight") == 0.5


def test_what_is_not_named_stays_the_base():
    (alpha,) = parse_alphas(["q_proj=0.3"])
    assert (alpha.of(Q3), alpha.of(O17)) == (0.3, 0.0)
    assert alpha.label == "q_proj-0.30"


@pytest.mark.parametrize(
    ("pattern", "tensor", "expected"),
    [
        ("layers.3", Q3, True),
        ("layers.3", "model.layers.13.self_attn.q_proj.weight", False),
        ("layers.1-3.self_attn.q_proj", Q3, True),
        ("layers.1-3.q_proj", Q3, False),
        ("layers.0", "model.layers.1.mlp.experts.0.up_proj.weight", False),
        ("layers.2-3", "model.layers.1.mlp.experts.2.up_proj.weight", False),
        ("experts.0", "model.layers.1.mlp.experts.0.up_proj.weight", True),
        ("q_proj.layers", Q3, False),
        ("q", Q3, False),
    ],
)
def test_patterns_are_whole_components_side_by_side(pattern, tensor, expected):
    assert matches(pattern, tensor) is expected


def test_the_patterns_of_old_manifests_have_gaps():
    alpha = Alpha(0.5, (("layers.1-3.q_proj", 0.2),), with_gaps=True)
    assert (alpha.of(Q3), alpha.of(O17)) == (0.2, 0.5)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(4, [0.2, 0.4, 0.6, 0.8]), (1, [0.2]), (2, [0.2, 0.8]), (3, [0.2, 0.5, 0.8])],
)
def test_a_ramp_goes_linearly_from_the_first_layer_to_the_last(layers, expected):
    (alpha,) = parse_alphas(["0.1,layers=0.2..0.8"])
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(layers)]
    alpha = alpha.over(["lm_head.weight", *reversed(names)])
    assert [alpha.of(name) for name in names] == pytest.approx(expected, abs=1e-15)
    assert (alpha.of(names[0]), alpha.of(names[-1])) == (0.2, expected[-1])
    assert alpha.of("lm_head.weight") == 0.1


def test_a_ramp_counts_layers_and_no_experts_each_stack_to_its_own_last():
    (alpha,) = parse_alphas(["0.1,layers=0..1"])
    names = [f"model.layers.{n}.mlp.experts.{e}.up_proj.weight" for n in range(3) for e in range(8)]
    names += [f"vision.model.layers.{n}.fc1.weight" for n in range(5)]
    alpha = alpha.over(names)
    assert [alpha.of(f"model.layers.{n}.mlp.experts.7.up_proj.weight") for n in range(3)] == [0, 0.5, 1]
    assert [alpha.of(f"vision.model.layers.{n}.fc1.weight") for n in range(5)] == [0, 0.25, 0.5, 0.75, 1]


def test_a_ramp_among_patterns_the_later_the_stronger():
    alphas = parse_alphas(["0.5,layers=0..0.3,q_proj=0.9", "0.5,q_proj=0.9,h=1..2,layers=0..0.3"])
    over = [alpha.over([Q3, "model.layers.0.x"]) for alpha in alphas]
    assert [alpha.of(Q3) for alpha in over] == [0.9, 0.3]
    assert [alpha.label for alpha in alphas] == [
        "0.50-layers-0.00-to-0.30-q_proj-0.90",
        "0.50-q_proj-0.90-h-1.00-to-2.00-layers-0.00-to-0.30",
    ]
    assert tuple(parse_alphas([str(alpha) for alpha in alphas])) == alphas


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "-inf", "half", "0:1", "0:1:0", "1:0:0.1", "0:1:-1", "0:1:nan", "0:1:1e-9", "q_proj=", "=0.5",
     "0.1,0.2,q_proj=1", "q_proj=0.1,k_proj=0.2,q_proj=0.3", "0:1e5000:1", "0:9e999999:1e-999999",
     "q_proj=nan", "../x=1", "0.5,0.5", "layers=0.2..0.8", "0.5,layers=0.2..", "0.5,layers=..0.8", "0.2..0.8",
     "0.5,layers=0..nan", "0.5,layers=0..1..2"],
)  # fmt: skip
def test_nonsense_is_one_line(text):
    with pytest.raises(AlphaError, match="--alpha") as error:
        parse_alphas([text])
    assert "\n" not in str(error.value)


def test_a_decimal_comma_is_told_how_to_be_written():
    with pytest.raises(AlphaError, match=r"'0,35' is not a number; write 0\.35"):
        parse_alphas(["0,35"])


def test_the_same_strength_twice_is_refused():
    with pytest.raises(AlphaError, match=r"0\.50 is given twice"):
        parse_alphas(["0:1:0.5", "0.5"])


def test_a_module_that_nothing_changes_is_named_with_the_nearest():
    (alpha,) = parse_alphas(["0.5,q_porj=0.1"])
    with pytest.raises(AlphaError, match="did you mean q_proj"):
        alpha.check_used([Q3, O17])


def test_parts_with_others_between_them_are_shown_with_those():
    (alpha,) = parse_alphas(["0.5,layers.3.q_proj=0.1"])
    with pytest.raises(AlphaError, match=r"did you mean layers\.3\.self_attn\.q_proj\? .* side by side"):
        alpha.check_used([O17, Q3])


def test_a_ramp_over_something_without_layers_is_refused():
    (alpha,) = parse_alphas(["0.5,q_proj=0.1..0.2"])
    with pytest.raises(AlphaError, match="goes over the layers"):
        alpha.over([Q3]).check_used([Q3])


@given(st.floats(-10, 10))
def test_a_label_tells_two_strengths_apart(value):
    other = value + 0.001
    assert Alpha(value).label != Alpha(other).label
    assert abs(float(Alpha(value).label) - value) < 1e-6


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        alphas = parse_alphas([text])
    except AlphaError as error:
        assert "\n" not in str(error).replace(repr(text), "")
    else:
        assert alphas
