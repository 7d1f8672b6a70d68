from __future__ import annotations

import pytest
from fakes import BYTE_EOS, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from deepseek_ray.engine.stop import Finish, OutputState, StopStrings
from deepseek_ray.engine.tokenizer import Detokenizer
from deepseek_ray.messages import SamplingParams

TOKENIZER = byte_tokenizer()


def make_state(max_output_tokens: int = 1000, **params: object) -> OutputState:
    return OutputState(
        SamplingParams(**params), TOKENIZER.eos_token_ids, max_output_tokens, Detokenizer(TOKENIZER, [1])
    )


def feed(state: OutputState, token_ids: bytes | list[int]) -> tuple[list[str], Finish | None]:
    """The text of each push, up to the end."""
    texts = []
    for token_id in token_ids:
        text, finish = state.push(token_id)
        texts.append(text)
        if finish:
            return texts, finish
    return texts, None


def test_a_stop_string_split_over_tokens_is_held_back_and_cut() -> None:
    texts, finish = feed(make_state(stop="END"), b"say ENd and END now")
    assert texts[4:7] == ["", "", "ENd"], "held while it could become the stop string, then shown"
    assert "".join(texts) == "say ENd and "
    assert len(texts) == len("say ENd and END")
    assert finish == Finish("stop", "END")


def test_what_follows_a_stop_string_in_one_piece_is_cut() -> None:
    strings = StopStrings(["\n\n"])
    assert strings.push("one\n") == ("one", None)
    assert strings.push("\ntwo") == ("", "\n\n")


def test_held_text_is_shown_when_the_output_ends_otherwise() -> None:
    texts, finish = feed(make_state(stop=["<stop>"]), [*b"a<st", BYTE_EOS])
    assert "".join(texts) == "a<st"
    assert finish == Finish("stop", None)


@pytest.mark.parametrize(
    ("strings", "text", "shown", "matched"),
    [
        (["abc", "b"], "abc", "a", "b"),  # complete first
        (["c", "abc"], "xabc", "x", "abc"),  # complete together: the longest
        (["aab"], "aaab", "a", "aab"),  # the beginning of a match within a failed one
        (["abab"], "abaabab", "aba", "abab"),
        ([], "abc", "abc", None),
        (["abc"], "abab", "ab", None),
    ],
)
def test_which_match_wins(strings: list[str], text: str, shown: str, matched: str | None) -> None:
    assert StopStrings(strings).push(text) == (shown, matched)


def slow_stop(strings: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first place where a stop string ends, the longest one there."""
    for end in range(1, len(text) + 1):
        ending = [string for string in strings if text[:end].endswith(string)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_pieces_do_not_matter(strings: list[str], pieces: list[str]) -> None:
    expected, matched = slow_stop(strings, "".join(pieces))
    stop, shown = StopStrings(strings), ""
    for piece in pieces:
        text, found = stop.push(piece)
        shown += text
        assert expected.startswith(shown), "nothing is shown that is cut later"
        if found:
            break
    else:
        found = None
        shown += stop.flush()
    assert (shown, found) == (expected, matched)


def test_min_tokens_lets_stop_strings_and_ids_pass_as_text() -> None:
    state = make_state(stop="b", stop_token_ids=[ord("c")], min_tokens=3)
    assert state.forbidden_token_ids == {BYTE_EOS, ord("c")}
    texts, finish = feed(state, b"abab")
    assert ("".join(texts), finish) == ("aba", Finish("stop", "b"))
    assert state.forbidden_token_ids == frozenset()


def test_a_match_that_min_tokens_let_pass_is_not_found_later() -> None:
    # "ab" is complete within the first two tokens and still held then, as the beginning of "abxx".
    texts, finish = feed(make_state(stop=["ab", "abxx"], min_tokens=2), b"abc")
    assert ("".join(texts), finish) == ("abc", None)


def test_end_of_sequence_and_stop_ids() -> None:
    assert feed(make_state(), [*b"hi", BYTE_EOS]) == (["h", "i", ""], Finish("stop", None))
    assert feed(make_state(ignore_eos=True), [*b"hi", BYTE_EOS]) == (["h", "i", ""], None)
    assert feed(make_state(stop_token_ids=[ord("i")]), b"hi") == (["h", ""], Finish("stop", ord("i")))
    both = make_state(ignore_eos=True, stop_token_ids=[BYTE_EOS])
    assert feed(both, [BYTE_EOS]) == ([""], Finish("stop", BYTE_EOS))


def test_length() -> None:
    assert feed(make_state(max_output_tokens=2), b"abc") == (["a", "b"], Finish("length"))
    assert feed(make_state(max_output_tokens=1), [BYTE_EOS])[1] == Finish("stop"), "ending by itself comes first"
    assert feed(make_state(max_output_tokens=2, stop="b"), b"ab")[1] == Finish("stop", "b")


def test_characters_of_several_tokens_come_out_whole() -> None:
    texts, _ = feed(make_state(), "é€😀".encode())
    assert texts == ["", "é", "", "", "€", "", "", "", "😀"]


def test_a_character_cut_off_by_the_end_is_a_replacement_character() -> None:
    texts, finish = feed(make_state(max_output_tokens=2), "😀".encode())
    assert ("".join(texts), finish) == ("\ufffd", Finish("length"))


def test_a_stop_string_of_several_byte_characters() -> None:
    texts, finish = feed(make_state(stop="😀!"), "a😀😀!b".encode())
    assert ("".join(texts), finish) == ("a😀", Finish("stop", "😀!"))


def test_without_a_tokenizer_there_is_no_text() -> None:
    state = OutputState(SamplingParams(stop_token_ids=[7]), [], 10, None)
    assert feed(state, [5, 6, 7]) == (["", "", ""], Finish("stop", 7))
