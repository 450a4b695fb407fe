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

    Where every box is closed, the last entry is what `last_box` gives.

    >>> balanced_boxes(r"\boxed{1}, so \boxed{\frac{1}{2}}, not \boxed{3")
    ['1', '\\frac{1}{2}']
    """
    if "\\boxed{" not in text:
        return []
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


def last_box(text: str) -> str | None:
    r"""The content of the last box, if that box is closed.

    Source: mathruler 0.1.0 grader.py ``extract_boxed_content``.
    Differs from: none, where the source gives the text ``None``, which a label may be.

    >>> last_box(r"\boxed{1}, \boxed{ {2} }"), last_box(r"\boxed{1}, \boxed{2")
    ('{2}', None)
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for brace in _BRACES.finditer(text, start):
        depth += -1 if brace.group() == "}" else 1
        if depth == 0:
            return text[start + len("\\boxed{") : brace.start()].strip()
    return None


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


def without_wrappers(response: str) -> str:
    r"""The text that a parser of free answers reads: boxed or tagged content alone, else all after the thought.

    Boxes, or answer tags, that contradict each other leave nothing.

    >>> without_wrappers(r"<think>A?</think> It is **B**."), without_wrappers(r"so \boxed{ C. }"), without_wrappers("")
    ('It is B.', 'C', '')
    """
    text = after_thought(response)
    contents = {unwrap(content) for content in answer_boxes(response) or tagged(text, "answer")}
    if contents:
        return contents.pop() if len(contents) == 1 else ""
    return text.replace("**", "").strip()


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
    text = without_space_around_brackets(response)
    thought_end = text.find(THINK_CLOSE, len(THINK_OPEN)) if text.startswith(THINK_OPEN) else -1
    box = text.find("\\boxed{", thought_end + len(THINK_CLOSE)) if thought_end >= 0 else -1
    return box >= 0 and text.find("}", box) >= 0


def follows_direct_format(response: str) -> bool:
    """Whether the response is one line of text without tags and boxes."""
    text = response.strip()
    return bool(text) and len(text.splitlines()) == 1 and "\\boxed" not in text and not _TAG.search(text)


def without_space_around_brackets(text: str) -> str:
    """The text as the released reward reads it: no white space around ``<``, ``>`` and ``/``."""
    first, *rest = _BRACKETS.split(text)
    if not rest:
        return text
    return "".join([first.rstrip(), *(part.strip() for part in rest[:-1]), rest[-1].lstrip()])
