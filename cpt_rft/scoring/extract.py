r"""Where the answer stands in a response. Every function here takes time linear in the length of hostile text."""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_BRACES = re.compile(r"\\boxed\{|[{}]")
_BRACKETS = re.compile(r"([<>/])")
_TAG = re.compile(r"</?[A-Za-z]+>")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_PHRASE = re.compile(r"\banswer(?:\s+is\b|\s*:)[ \t:]*", re.IGNORECASE)
_MAX_SHELLS = 8
_SHELLS = (
    ("<answer>", "</answer>"),
    ("\\text{", "}"),
    ("$", "$"),
    ("**", "**"),
    ("*", "*"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
)


def balanced_boxes(text: str) -> list[str]:
    r"""Contents of every ``\boxed{...}`` with balanced braces, in order; of nested boxes only the inner one.

    Source: mathruler 0.1.0 ``extract_boxed_content`` (its result is the last entry here).

    >>> balanced_boxes(r"\boxed{1}, so \boxed{\frac{1}{2}}, not \boxed{3")
    ['1', '\\frac{1}{2}']
    """
    contents: list[tuple[int, str]] = []
    open_braces: list[int | None] = []
    for brace in _BRACES.finditer(text):
        if brace.group() != "}":
            open_braces.append(brace.end() if len(brace.group()) > 1 else None)
        elif open_braces:
            start = open_braces.pop()
            holds_a_box = bool(contents) and start is not None and contents[-1][0] > start
            if start is not None and not holds_a_box:
                contents.append((start, text[start : brace.start()]))
    return [content for _, content in contents]


def after_thought(response: str) -> str:
    """What follows the last ``</think>``; nothing if the thought is still open, all if there is no thought."""
    _, close, rest = response.rpartition(THINK_CLOSE)
    text = rest if close else response
    return "" if THINK_OPEN in text else text


def answer_boxes(response: str) -> list[str]:
    """The boxes after the thought, or all of them if none follows it."""
    return balanced_boxes(after_thought(response)) or balanced_boxes(response)


def tagged(text: str, tag: str) -> list[str]:
    """Contents of every ``<tag>...</tag>``, in order; of nested tags only the inner one.

    >>> tagged("<answer>a</answer> or <answer>b", "answer")
    ['a']
    """
    pieces = [piece.partition(f"</{tag}>") for piece in text.split(f"<{tag}>")[1:]]
    return [content for content, close, _ in pieces if close]


def final_answer(response: str) -> str | None:
    """Best effort: the answer with its wrappers removed, or none where no text is left.

    The first of these that occurs decides: boxes, answer tags, "the answer is", bold, all of the text after the
    thought. Wrappers of one sort that contradict each other answer nothing.
    """
    text = after_thought(response)
    phrases = [text[phrase.end() :].partition("\n")[0] for phrase in list(_PHRASE.finditer(text))[-1:]]
    wrapped = answer_boxes(response) or tagged(text, "answer") or phrases or _BOLD.findall(text) or [text]
    answers = {unwrap(content) for content in wrapped}
    return (answers.pop() or None) if len(answers) == 1 else None


def unwrap(text: str) -> str:
    r"""Remove wrappers and closing full stops, nested up to `_MAX_SHELLS` deep.

    >>> unwrap(" **$\\text{Red}$.** ")
    'Red'
    """
    peeled = text.strip()
    for _ in range(_MAX_SHELLS):
        before = peeled
        peeled = peeled.removesuffix(".").rstrip()
        for opening, closing in _SHELLS:
            if len(peeled) > len(opening + closing) and peeled.startswith(opening) and peeled.endswith(closing):
                peeled = peeled[len(opening) : -len(closing)].strip()
                break
        if peeled == before:
            break
    return peeled


def follows_cot_format(response: str) -> bool:
    r"""Whether all of the response reads ``<think>...</think>...\boxed{...}...``.

    Source: RFTvsSFT@7d4f50e EasyR1/examples/reward_function/math.py ``format_reward``: white space around
    ``<``, ``>`` and ``/`` is ignored. Written with ``find``, because the regular expression backtracks.
    """
    text = _without_space_around_brackets(response)
    thought_end = text.find(THINK_CLOSE, len(THINK_OPEN)) if text.startswith(THINK_OPEN) else -1
    box = text.find("\\boxed{", thought_end + len(THINK_CLOSE)) if thought_end >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def follows_direct_format(response: str) -> bool:
    """Whether the response is one line of text without tags and boxes."""
    text = response.strip()
    return bool(text) and len(text.splitlines()) == 1 and "\\boxed" not in text and not _TAG.search(text)


def _without_space_around_brackets(text: str) -> str:
    first, *rest = _BRACKETS.split(text)
    if not rest:
        return text
    return "".join([first.rstrip(), *(part.strip() for part in rest[:-1]), rest[-1].lstrip()])
