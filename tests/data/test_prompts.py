"""Words about pictures: deterministic, true, and in the pictures' own terms."""

import pytest

from latteflow.data import prompts
from latteflow.data.captioned import Record
from latteflow.data.loader import generator_of

APPLE = Record("1f34e", "red apple", ("red apple", "apple"), ("fruit",), "food", "fruit", "noto", "none")
HAND = Record("1f44b", "waving hand", ("waving hand",), (), "people", "hands", "twemoji", "dark")
LABELS = ["red apple", "banana", "waving hand", "elf"]


def captions(record, number=300):
    return [prompts.draw_caption(record, generator_of(0, i)) for i in range(number)]


def test_captions_are_deterministic():
    assert captions(APPLE) == captions(APPLE)
    assert len(set(captions(APPLE))) > 10


def test_captions_name_the_picture_and_mostly_its_style():
    drawn = captions(APPLE)
    assert all("apple" in caption for caption in drawn)
    assert 0.8 < sum("noto style" in caption for caption in drawn) / len(drawn) < 0.97
    assert 0.08 < sum(caption.endswith(", fruit") for caption in drawn) / len(drawn) < 0.25
    assert any("red apple" not in caption for caption in drawn)  # other names are used as well
    assert not any("{" in caption for caption in drawn)


def test_skin_tones_are_always_said():
    assert all("dark skin tone" in caption for caption in captions(HAND))
    assert not any("skin tone" in caption for caption in captions(APPLE))


def test_the_canonical_caption():
    assert prompts.canonical_caption(APPLE) == "red apple, noto style"
    assert prompts.canonical_caption(HAND) == "waving hand, dark skin tone, twemoji style"


@pytest.mark.parametrize(
    ("name", "expected"), [("pizza", "a pizza"), ("apple", "an apple"), ("Elf", "an Elf"), ("rocket", "a rocket")]
)
def test_articles(name, expected):
    assert prompts.with_article(name) == expected


@pytest.mark.parametrize("number", [1, 2, 5])
def test_turns_are_true_different_and_ask_for_the_name(number):
    answers_seen = set()
    for i in range(60):
        turns = prompts.draw_turns(APPLE, number, LABELS, generator_of(1, i))
        assert turns == prompts.draw_turns(APPLE, number, LABELS, generator_of(1, i))
        assert len(turns) == len({turn.question for turn in turns}) == number
        assert any(turn.answer == "red apple" for turn in turns)
        for turn in turns:
            answers_seen.add(turn.answer)
            if turn.question.startswith("Is this"):
                assert turn.answer == ("yes" if turn.question == "Is this a red apple?" else "no")
            else:
                assert turn.answer in ("red apple", "noto", "food", "red apple, noto style")
                assert turn.question in (*prompts._WHAT, *prompts._STYLE, *prompts._CATEGORY, *prompts._DESCRIBE)
    everything = {"red apple", "noto", "food", "red apple, noto style", "yes", "no"}
    assert answers_seen == ({"red apple"} if number == 1 else everything)


def test_yes_and_no_are_about_even():
    turns = [turn for i in range(300) for turn in prompts.draw_turns(APPLE, 5, LABELS, generator_of(2, i))]
    answers = [turn.answer for turn in turns if turn.question.startswith("Is this")]
    assert len(answers) == 300
    assert 0.5 < answers.count("yes") / 300 < 0.75  # a label drawn by chance may be the right one


def test_exact_shares_are_exact_but_for_case():
    assert prompts.exact_share(["Noto", "banana", "a pizza"], ["noto", "Banana", "pizza"]) == pytest.approx(2 / 3)


def test_no_answer_names_a_style_that_is_not_seen():
    turns = [t for i in range(200) for t in prompts.draw_turns(APPLE, 5, LABELS, generator_of(3, i), styled=False)]
    assert len(turns) == 600
    assert not any("noto" in turn.answer for turn in turns)
