"""What an answer may cost so that it is there in time: pure."""

import msgspec

from edged.types import Step

PROMPT_FRAME_TOKENS = 70
EXPECTED_ANSWER_TOKENS = 32
REDUCED_ANSWER_TOKENS = 24
MARGIN_SECONDS = 0.05
SMOOTHING = 0.2


class Speed(msgspec.Struct, frozen=True):
    """Observed rates of the chat worker. The first values are a slow board's; they follow what is seen."""

    prefill_tokens_per_second: float = 60.0
    decode_tokens_per_second: float = 15.0

    def observe(self, *, prompt_tokens: int, prefill_ms: float, answer_tokens: int, generate_ms: float) -> "Speed":
        """The rates after one more answer; each new one counts a fifth."""
        return Speed(
            _follow(self.prefill_tokens_per_second, prompt_tokens, prefill_ms),
            _follow(self.decode_tokens_per_second, answer_tokens, generate_ms),
        )

    def seconds(self, *, prompt_tokens: int, answer_tokens: int) -> float:
        return prompt_tokens / self.prefill_tokens_per_second + answer_tokens / self.decode_tokens_per_second


class Plan(msgspec.Struct, frozen=True):
    """How to answer: the step, the budget of sentences, the longest answer, both in tokens."""

    step: Step
    budget_tokens: int
    max_tokens: int


def plan(seconds_left: float | None, speed: Speed, *, fact_tokens: int, max_tokens: int) -> Plan:
    """The richest step that fits the time left: ``generated``, ``reduced``, else ``passages``.

    ``fact_tokens`` are those of all sentences worth showing to the model.
    """
    full = Plan("generated", fact_tokens, max_tokens)
    if seconds_left is None:
        return full
    reduced = Plan("reduced", fact_tokens // 2, min(max_tokens, REDUCED_ANSWER_TOKENS))
    for choice in (full, reduced):
        expected = min(choice.max_tokens, EXPECTED_ANSWER_TOKENS)
        prompt = PROMPT_FRAME_TOKENS + choice.budget_tokens
        if speed.seconds(prompt_tokens=prompt, answer_tokens=expected) + MARGIN_SECONDS <= seconds_left:
            return choice
    return Plan("passages", 0, 0)


def _follow(rate: float, tokens: int, elapsed_ms: float) -> float:
    if tokens < 4 or elapsed_ms <= 0:
        return rate  # too little to tell a rate by
    return rate + SMOOTHING * (tokens / (elapsed_ms / 1e3) - rate)
