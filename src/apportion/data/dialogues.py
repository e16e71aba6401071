"""Dialogues written as one text, "Human: … Assistant: …", as lists of messages."""

from __future__ import annotations

import re

from apportion.data.conversations import Conversation

ROLES = {"Human": "user", "Assistant": "assistant"}
_MARK = re.compile(r"(?:^|\n+)(Human|Assistant):[ \t]?")


def dialogue(text: str) -> Conversation | None:
    """Return the turns of `text`, without the empty one that an answer is to fill; None where it is no dialogue.

    The form is that of Anthropic's HH-RLHF (Bai et al. 2022, arXiv 2204.05862) and of sets made like it: every turn
    begins a line with "Human:" or "Assistant:".
    """
    pieces = _MARK.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        return None
    turns = [
        {"role": ROLES[name], "content": text.strip()} for name, text in zip(pieces[1::2], pieces[2::2], strict=True)
    ]
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return Conversation(turns) if turns and all(turn["content"] for turn in turns) else None
