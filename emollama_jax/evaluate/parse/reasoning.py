"""An answer without the reasoning before it.

Models mark their reasoning in many ways: `<think>…</think>` (often without its start, which the
prompt gives), `<thinking>`, `<reasoning>`, `<reflection>`, Kimi's `◁think▷…◁/think▷` and
`<|open|>think<|sep|>…`, Magistral's `[THINK]…[/THINK]`, Cohere's `<|START_THINKING|>…`, Gemma's
`<|channel>thought…<channel|>`, the analysis channel of gpt-oss. Some mark the answer too:
`<answer>`, `<|begin_of_box|>` of GLM-4.1V, `\\boxed{…}`, the final channel.

Reasoning that was cut off has no answer, whatever it names.
"""

import re

_TOPICS = {
    **dict.fromkeys(("think", "thinking", "thought", "thoughts"), "think"),
    **dict.fromkeys(("reason", "reasoning", "rationale", "cot", "analysis", "scratchpad"), "why"),
    **dict.fromkeys(("reflect", "reflection", "critique"), "reflect"),
    **dict.fromkeys(("summary", "caption", "description", "observation", "plan"), "look"),
}
_NAME = rf"(?:\w+:)?(?P<%s>{'|'.join(_TOPICS)})"
_OTHER = (  # other spellings of a start and an end → tags
    (r"<\|channel>\s*thought", "<think>"),
    (r"<channel\|>", "</think>"),
    (r"[◁◀]\s*(/?)\s*think(?:ing)?\s*[▷▶]", r"<\1think>"),
    (r"<\|open\|>\s*think\s*<\|sep\|>", "<think>"),
    (r"<\|close\|>\s*think\s*<\|sep\|>", "</think>"),
    (r"<\|start_thinking\|>", "<think>"),
    (r"<\|end_thinking\|>", "</think>"),
    (r"<\|?begin_of_(?:thought|think)\|?>", "<think>"),
    (r"<\|?end_of_(?:thought|think)\|?>", "</think>"),
    (r"<\|?begin_of_(?:box|solution)\|?>", "<answer>"),
    (r"<\|?end_of_(?:box|solution)\|?>", "</answer>"),
    (r"<\|start_response\|>", "<answer>"),
    (r"<\|end_response\|>", "</answer>"),
    (r"\[(/?)(think|thinking|reasoning)\]", r"<\1\2>"),
    (r"^\s*here(?: is|'s) my thought process:", "<think>"),
    (r"(?<=[\s.])here(?: is|'s) my response:", "</think>"),
)
_TAG = re.compile(
    rf"<\s*{_NAME % 'start'}(?:\s[^<>]*)?>|<\s*/\s*{_NAME % 'end'}\s*>|<\s*{_NAME % 'empty'}\s*/>",
    re.IGNORECASE,
)
_ANSWER = r"(?:final[_ ]?)?answer|response|output|final|conclusion|solution|result"
_WRAPPED = re.compile(
    rf"<\s*(?P<name>{_ANSWER})\s*>(?P<inside>.*?)(?:<\s*/\s*(?P=name)\s*>|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_LEFT = re.compile(rf"<\s*/?\s*(?:{_ANSWER})\s*>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit|emph)\s*\{([^{}]*)\}")
_FINAL = re.compile(r"<\|channel\|>\s*final\b.*?<\|message\|>", re.DOTALL)
_STOP = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|eom_id|end|return|end_of_text|end_of_turn|end_of_sentence)\|>"
    r"|</s>|<end_of_turn>|<eos>|<[｜|]end[▁_]of[▁_]sentence[｜|]>|<[|]end[▁_]of[▁_]turn[|]>",
    re.IGNORECASE,
)
# A model without a chat's end makes up the next question.
_NEXT = re.compile(r"\n[ \t]{0,9}(?:#{1,6} *)?(?:question|user|human|q)\s*:", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    """The part of a text that answers.

    Returns:
        What follows the reasoning, or what is marked as the answer; None where the reasoning has
        no end.
    """
    final = _channel(text)
    if final is None:
        return None
    text = re.sub(r"\s{9,}", lambda found: found[0][:9], _ended(final))
    for pattern, tag in _OTHER:
        text = re.sub(pattern, tag, text, flags=re.IGNORECASE)
    kept = _without_reasoning(text)
    if kept is None:
        # Some forget the end tag, but not the answer.
        last = next(reversed([*_WRAPPED.finditer(text)]), None)
        closed = last and re.search(r"</[^<>]*>\s*\Z", last[0])
        if last is None or not closed or text[last.end() :].strip():
            return None
        return _LATEX.sub(r"\1", last["inside"]).strip()
    kept = _first_turn(kept)
    wrapped = [found["inside"] for found in _WRAPPED.finditer(kept)]
    if wrapped:
        kept = "\n".join(dict.fromkeys(inside.strip() for inside in wrapped))
    kept = _LEFT.sub(" ", kept)
    boxed = _BOXED.findall(kept)
    if boxed:
        kept = "\n".join(dict.fromkeys(inside.strip() for inside in boxed))
    return _LATEX.sub(r"\1", kept).strip()


def _channel(text: str) -> str | None:
    """The final channel of gpt-oss, also where its special tokens were dropped."""
    if "<|channel|>" in text:
        found = [*_FINAL.finditer(text)]
        return text[found[-1].end() :] if found else None
    if re.match(r"\s*analysis(?=[A-Z\"'(])", text):
        _, mark, final = text.rpartition("assistantfinal")
        return final if mark else None
    return text


def _ended(text: str) -> str:
    """The text up to its end token."""
    pieces = [piece for piece in _STOP.split(text) if piece.strip()]
    return pieces[0] if pieces else ""


def _first_turn(text: str) -> str:
    """The text up to a question that the model asks itself."""
    following = next((n for n in _NEXT.finditer(text) if text[: n.start()].strip()), None)
    return text[: following.start()] if following else text


def _without_reasoning(text: str) -> str | None:
    kept, start, inside = "", 0, ""
    for tag in _TAG.finditer(text):
        name = tag["start"] or tag["end"] or tag["empty"]
        topic = _TOPICS[name.casefold()]
        if tag["empty"] or (inside and (tag["start"] or topic != inside)):
            continue  # quoted within the reasoning
        if tag["start"]:
            kept, inside = kept + text[start : tag.start()] + "\n", topic
        else:  # an end without a start: all before it is reasoning
            kept, inside = kept if inside else "", ""
        start = tag.end()
    return None if inside else kept + text[start:]
