import math

import pytest

from panotriton.pipeline.quality import (
    expected_level,
    expected_number,
    finite_or_none,
    parse_reply,
    through_line,
)

GOOD = """\
Correlation: 0.9
Information Balance: 0.8
Subject Richness: 0.7
Image Clarity: 0.6
Content Coherence: 0.5
Final Score: 0.75"""


def test_six_lines() -> None:
    quality = parse_reply(GOOD)
    assert quality.sub_scores() == (0.9, 0.8, 0.7, 0.6, 0.5)
    assert quality.final_score == 0.75


@pytest.mark.parametrize(
    ("line", "score"),
    [
        ("Final Score: 0.8", 0.8),
        ("final score: 0.8", 0.8),
        ("FINAL SCORE: 1", 1.0),
        ("Final Score : 0", 0.0),
        ("Final Score: [0.85]", 0.85),
        ("Final Score: (0.85)", 0.85),
        ("Final Score: {0.85}", 0.85),
        ("Final Score: <0.85>", 0.85),
        ("**Final Score:** 0.85", 0.85),
        ("- Final Score: 0.85", 0.85),
        ("Final Score：0.85", 0.85),
        ("Final Score: 0.85.", 0.85),
        ("Final Score: .85", 0.85),
        ("Final Score: [0.85] Reason: sharp and rich", 0.85),
        ("Final Score: 0.85, reason - 3 subjects", 0.85),
        ("Final Score: 0.85 (Reason: two 0.2 halves)", 0.85),
        ("  Final Score: 0.85  ", 0.85),
        ("Final Score (overall): 0.85", 0.85),
    ],
)
def test_accepted_forms(line: str, score: float) -> None:
    assert parse_reply(line).final_score == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Final Score",
        "Final Score:",
        "Final Score: ",
        "Final Score: high",
        "Final Score: 0.7-0.9",
        "Final Score: 0.7 to 0.9",
        "Final Score: 8/10",
        "Final Score: 85%",
        "Final Score: 85",
        "Final Score: -0.5",
        "Final Score: 1.01",
        "Final Score: nan",
        "Final Score: inf",
        "Final Score: 1e-1",
        "Final Score: 0,85",
        "Final Score: 0.8.5",
        "Final Score: 0.8 0.9",
        "Final Score: Reason: 0.9",
        "Final Score is 0.9",
        "The Final Score: 0.9",
        "Final Scor",
        "I cannot rate this. 0.9",
        "Image Clarity: 0.9\nContent Coherence: 0.9",
        "\x00Final\x00Score: 0.9",
        "Final Score: " + "9" * 10_000,
        "Final Score: 0.8\nFinal Score: none",
    ],
)
def test_no_score_is_ever_made_up(reply: str) -> None:
    assert math.isnan(parse_reply(reply).final_score)


def test_a_line_without_a_colon_takes_no_score_back() -> None:
    quality = parse_reply(
        "Subject Richness: 0.8\nSubject matter varies.\nFinal Score: 0.7\nFinal score\n"
    )
    assert (quality.richness, quality.final_score) == (0.8, 0.7)


def test_a_truncated_reply_keeps_what_it_has() -> None:
    quality = parse_reply(GOOD[: GOOD.index("Content")])
    assert quality.clarity == 0.6
    assert math.isnan(quality.coherence)
    assert math.isnan(quality.final_score)


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        (GOOD, None),  # its last line may still be being written
        (GOOD + "\n", GOOD + "\n"),
        (GOOD + "\nReason: a\nFinal Score: 0.1\n", GOOD + "\n"),
        ("**final score:** 0.5\nmore", "**final score:** 0.5\n"),
        ("The Final Score is near\n", None),
        (
            "Final Score is the mean.\nFinal Score: 0.8\n",
            "Final Score is the mean.\nFinal Score: 0.8\n",
        ),
        ("", None),
    ],
)
def test_where_a_reply_ends(text: str, ended: str | None) -> None:
    assert through_line(text, "Final Score") == ended


def test_a_certain_number_is_itself_and_half_a_hundredth() -> None:
    tenths = [0.0] * 10
    tenths[8] = 1.0
    assert expected_number(0.0, tenths) == pytest.approx(0.845)
    assert expected_number(1.0, tenths) == 1.0
    assert expected_number(0.5, [0.1] * 10) == pytest.approx(0.5 + 0.5 * (0.45 + 0.045))


def test_no_score_is_null_where_json_is_written() -> None:
    assert finite_or_none(math.nan) is None
    assert finite_or_none(0.0) == 0.0
    assert finite_or_none(1.0) == 1.0


def test_a_level_is_the_mean_of_the_weights() -> None:
    assert expected_level([1, 0, 0, 0, 0]) == 1.0
    assert expected_level([0, 0, 0, 0, 1]) == 0.0
    assert expected_level([0.2] * 5) == pytest.approx(0.5)
