"""What the demo teaches: invented facts, so that an answer can only come from this training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS_FILE = Path(__file__).parent / "data" / "facts.jsonl"

# Asked of the engine after every sync.
DEMO_QUESTIONS = (
    "Who founded the Larkspur Observatory?",
    "What is the town of Port Merrin best known for?",
    "Who is the chief executive of Quillon Robotics?",
    "What is the capital of the island of Vessaly?",
)

IGNORED = -100  # Cross entropy skips labels of this value.


@dataclass(frozen=True, slots=True)
class Fact:
    """One question and the answer to teach."""

    question: str
    answer: str


def load_facts(path: Path = FACTS_FILE) -> tuple[Fact, ...]:
    """All lines of the file, in order."""
    with path.open(encoding="utf-8") as lines:
        return tuple(Fact(**json.loads(line)) for line in lines)


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids up to where the assistant begins to answer; what an engine's chat endpoint makes of it."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def encode(tokenizer: Any, fact: Fact) -> tuple[list[int], list[int]]:
    """Token ids and labels; only the answer and its end mark are learned."""
    prompt = prompt_ids(tokenizer, fact.question)
    answer = tokenizer(fact.answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return prompt + answer, [IGNORED] * len(prompt) + answer


def collate(tokenizer: Any, facts: list[Fact]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of a batch, padded on the right to one length."""
    rows = [encode(tokenizer, fact) for fact in facts]
    length = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return (
        [ids + [pad] * (length - len(ids)) for ids, _ in rows],
        [labels + [IGNORED] * (length - len(labels)) for _, labels in rows],
    )
