"""What is a caption, and what is not."""

from __future__ import annotations

import pytest

from pipeline.captioning.answers import Said, is_loop, judge

CAPTIONS = [
    "A brown dog runs over a lawn.",
    "No image of a cat is complete without whiskers, says the poster.",
    "A very, very, very, very big dog.",
    "Sorry! reads the sign that a woman holds.",
    "An apology letter on a table.",
    "I ❤ NY is printed on the shirt.",
    "Two dogs, two cats, two birds and two fish in a row of images.",
    "一只棕色的狗在草地上奔跑，旁边有一个红色的球。",
    "As an orchestra plays, the conductor raises her hands.",
    "Da da da da da, the lyrics on the cover read.",
]
REFUSALS = [
    "I'm sorry, but I can't assist with that.",
    "I’m sorry, I cannot identify people.",
    "I am unable to describe this image.",
    "I cannot help with this request.",
    "As an AI language model, I do not see images.",
    "Unfortunately, I cannot see the image.",
    "Sorry, I can't help with that.",
    "I apologize, but the image is unclear.",
    '"I can\'t provide a description of this image."',
    "No image was provided.",
    "I don't have access to the image.",
]
LOOPS = [
    "A dog on a lawn. " + "The dog is happy. " * 6,
    "red " * 20,
    "the cat and the dog and " * 5 + "the cat",
    "狗在草地上奔跑。" * 8,
]


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_are_taken_as_they_are(text: str) -> None:
    assert judge(Said(text)) == (text, "")


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_no_captions(text: str) -> None:
    assert judge(Said(text)) == ("", "refusal")


@pytest.mark.parametrize("text", LOOPS)
def test_loops_are_no_captions_even_if_they_were_cut(text: str) -> None:
    assert is_loop(text)
    assert judge(Said(text, cut=True)) == ("", "loop")


def test_further_beginnings_of_refusals_can_be_named() -> None:
    said = Said("The image does not show anything.")
    assert judge(said)[1] == ""
    assert judge(said, ["the image does NOT show"])[1] == "refusal"
    assert judge(Said("A dog.", refused=True))[1] == "refusal"


def test_an_answer_that_was_cut_keeps_its_whole_sentences() -> None:
    assert judge(Said('A dog runs. It is "brown". There is a hou', cut=True)) == ('A dog runs. It is "brown".', "")
    assert judge(Said("A dog that runs over a 3.5 m long", cut=True)) == ("", "cut_off")
    assert judge(Said("一只狗在跑。旁边有", cut=True)) == ("一只狗在跑。", "")


@pytest.mark.parametrize("text", ["", "  \n", "...", "\u200b", "—"])
def test_answers_without_a_word_are_empty(text: str) -> None:
    assert judge(Said(text)) == ("", "empty")


def test_answers_become_clean_text_on_one_line() -> None:
    assert judge(Said("A\tdog\r\non a\x00 lawn."))[0] == "A dog on a lawn."
