"""One answer: retrieve, select, generate, verify; degrading in named steps, never inventing."""

import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable

import msgspec
import structlog

from edged.errors import DeadlineError, OutputFormatError, PromptTooLongError, UnanswerableError, WorkerError
from edged.rag import prompt
from edged.rag.cite import Verdict, as_text, check, citation
from edged.rag.degrade import MARGIN_SECONDS, Plan, Speed, plan
from edged.rag.formatted import unsupported
from edged.rag.opening import Opening
from edged.rag.retrieve import Retrieval, Retriever, holds_codes, named_codes
from edged.rag.select import FACTS_MARGIN, Candidate, cost_tokens, select
from edged.rag.verify import unsupported_words
from edged.serving.pool import ChatPool, Lease
from edged.types import Answer, AnswerEvent, Citation, Delta, OutputFormat, Question, Restarted, Step, Timings
from edged.workers.protocol import Finished, Piece
from edged.workers.worker import Lost

PASSAGE_TOKENS = 90


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """See ``[rag]`` in the configuration."""

    passages: int
    budget_tokens: int
    max_tokens: int


class Answerer:
    """Answers questions from the documents. Knows the chat model's speed from its own answers."""

    def __init__(
        self,
        retriever: Retriever,
        chats: ChatPool,
        settings: Settings,
        *,
        on_answer: Callable[[Answer], None] = lambda _answer: None,
    ) -> None:
        self._retriever = retriever
        self._chats = chats
        self._settings = settings
        self._on_answer = on_answer
        self.speed = Speed()
        self._log = structlog.get_logger("answer")

    def use(self, settings: Settings, *, near: float) -> None:
        """From the next question on."""
        self._settings = settings
        self._retriever.use_near(near)

    async def stream(self, question: Question) -> AsyncGenerator[AnswerEvent, None]:
        """Deltas while the model speaks, then exactly one :class:`Answer`. Closing the iterator cancels the work.

        Raises :class:`StoreError`. A missing, busy or dying model degrades the answer instead, or, where a format was
        asked for, is raised as :class:`UnanswerableError` or :class:`OutputFormatError`.
        """
        work, settings = _Work(question), self._settings  # one question is not answered by two configurations
        retrieval = await self._retriever.retrieve(
            question.text, question.collection, settings.passages, seconds_left=work.seconds_left()
        )
        work.retrieved(retrieval)
        if not retrieval.near:
            _need_no_format(question, "no passage is near the question")
            yield self._finish(work.answer("not_found", prompt.NOT_FOUND, (), "no passage is near the question"))
            return
        shown = select_facts(question.text, retrieval, settings.budget_tokens)
        chosen = plan(
            work.seconds_left(),
            self.speed,
            fact_tokens=sum(cost_tokens(each.text) for each in shown),
            max_tokens=self._chats.restraint.cap(question.max_tokens or settings.max_tokens),
        )
        if chosen.step == "reduced":
            shown = select_facts(question.text, retrieval, chosen.budget_tokens)
        note = "the deadline leaves no time for generation"
        if chosen.step != "passages":
            try:
                async with (
                    self._chats.lease(work.seconds_left()) as chat,
                    contextlib.aclosing(self._generate(chat, work, chosen, shown, retrieval)) as events,
                ):
                    async for event in events:
                        yield event
            except WorkerError as error:
                if isinstance(error, OutputFormatError):
                    raise
                note = _reason(error)
                if work.spoken:
                    yield Restarted(note)
            else:
                return
        _need_no_format(question, note)
        yield self._finish(work.passages("passages", note))

    async def _generate(
        self, chat: Lease, work: "_Work", chosen: Plan, shown: tuple[Citation, ...], retrieval: Retrieval
    ) -> AsyncGenerator[AnswerEvent, None]:
        question = work.question
        messages = prompt.messages(question.text, shown, question.evidence, formatted=question.output is not None)
        left = work.seconds_left()
        generation = chat.generate(
            chat.render(messages),
            max_tokens=chosen.max_tokens,
            output=question.output,
            priority=question.priority,
            prefix_segments=chat.prefix_segments(messages),
            deadline_seconds=None if left is None else max(0.0, left - MARGIN_SECONDS),
        )
        opening = Opening()
        async with contextlib.aclosing(generation):
            async for item in generation:
                match item:
                    case Piece(text=text):
                        visible = text if question.output is not None else opening.feed(text)
                        if visible:
                            work.heard(visible)
                            yield Delta(visible)
                    case Lost():
                        opening = Opening()
                        work.void()
                        yield Restarted("the worker died; the answer starts again")
                    case Finished():
                        work.finished(item, chat.name)
                        self._learn(item)
        text = work.spoken.strip()
        if question.output is not None:
            yield self._finish(work.formatted(chosen.step, text, question.output, shown))
            return
        verdict = check(question.text, text, shown, question.evidence, similarities(retrieval))
        chat.report(overlap=overlap(text, verdict))
        if not verdict.objection:
            note = "" if chosen.step == "generated" else "a smaller budget of sentences, to meet the deadline"
            yield self._finish(work.answer(chosen.step, text, verdict.citations, note))
            return
        yield Restarted(verdict.objection)
        yield self._finish(work.passages("unverified", verdict.objection))

    def _learn(self, last: Finished) -> None:
        self.speed = self.speed.observe(
            prompt_tokens=last.prompt_tokens,
            prefill_ms=last.prefill_ms,
            answer_tokens=last.completion_tokens,
            generate_ms=last.generate_ms,
        )

    def _finish(self, answer: Answer) -> Answer:
        self._on_answer(answer)
        return answer


def select_facts(question: str, retrieval: Retrieval, budget_tokens: int) -> tuple[Citation, ...]:
    """The sentences that the model is shown, in reading order: those near the best one, to a budget."""
    return select_citations(question, retrieval, budget_tokens, margin=FACTS_MARGIN)


def select_citations(
    question: str, retrieval: Retrieval, budget_tokens: int, *, margin: float = math.inf
) -> tuple[Citation, ...]:
    """The sentences of a retrieval worth their tokens, in reading order."""
    candidates = [
        Candidate(rank, index, sentence, similarity)
        for rank, (stored, similarities) in enumerate(zip(retrieval.passages, retrieval.similarities, strict=True))
        for index, (sentence, similarity) in enumerate(zip(stored.passage.sentences, similarities, strict=True))
    ]
    chosen = select(question, candidates, budget_tokens=budget_tokens, margin=margin)
    return tuple(citation(retrieval.passages[each.passage_rank].passage, each.index) for each in chosen)


def overlap(text: str, verdict: Verdict) -> float:
    """The share of an answer's words that its sentences hold; 0 for one that does not stand."""
    return 0.0 if verdict.objection else 1.0 - unsupported_words(text, [each.text for each in verdict.citations])


def similarities(retrieval: Retrieval) -> dict[str, float]:
    """The cosine of each sentence of a retrieval to the question, by sentence id, where vectors exist."""
    return {
        f"{stored.passage.chunk_id}.{index}": cosine
        for stored, cosines in zip(retrieval.passages, retrieval.similarities, strict=True)
        for index, cosine in enumerate(cosines)
        if cosine is not None
    }


def about_the_codes(question: str, cited: tuple[Citation, ...]) -> tuple[Citation, ...]:
    """Of sentences about several codes, those that name most of the question's; all where it names none."""
    asked = named_codes(question)
    named = [sum(holds_codes([code], [each.text]) for code in asked) for each in cited]
    return tuple(each for each, count in zip(cited, named, strict=True) if count == max(named, default=0))


def _need_no_format(question: Question, why: str) -> None:
    if question.output is not None:
        raise UnanswerableError(f"there is no answer in the format asked for: {why}")


def _reason(error: WorkerError) -> str:
    if isinstance(error, DeadlineError):
        return "the deadline came before the answer was complete"
    if isinstance(error, PromptTooLongError):
        return f"the question does not fit the model: {error.message}"
    return f"generation failed: {error.code}: {error.message}"


class _Work:
    """The course of one answer: its clock, what the model said, where the time went."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.spoken = ""
        self._model = ""
        self._started = time.monotonic()
        self._first_token: float | None = None
        self._retrieval: Retrieval | None = None
        self._finished: Finished | None = None

    def seconds_left(self) -> float | None:
        if self.question.deadline_seconds is None:
            return None
        return self.question.deadline_seconds - (time.monotonic() - self._started)

    def retrieved(self, retrieval: Retrieval) -> None:
        self._retrieval = retrieval

    def heard(self, text: str) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic()
        self.spoken += text

    def void(self) -> None:
        self.spoken = ""
        self._first_token = None

    def finished(self, last: Finished, model: str) -> None:
        self._finished = last
        self._model = model

    def passages(self, step: Step, note: str) -> Answer:
        """The best sentences themselves as the answer."""
        assert self._retrieval is not None
        best = about_the_codes(
            self.question.text, select_citations(self.question.text, self._retrieval, PASSAGE_TOKENS)
        )
        return self.answer(step, as_text(best), best, note)

    def formatted(self, step: Step, text: str, output: OutputFormat, shown: tuple[Citation, ...]) -> Answer:
        """The text in the format asked for. Raises :class:`UnanswerableError` when it was cut off before its end."""
        assert self._finished is not None
        if self._finished.reason == "length":
            raise UnanswerableError(
                f"the format was not complete after {self._finished.completion_tokens} tokens",
                hint="raise max_tokens, or ask for less",
            )
        missing = unsupported(text, output, [self.question.text, self.question.evidence, *prompt.facts_of(shown)])
        if missing:
            return self.answer("unverified", text, shown, f"nothing stands for {', '.join(missing)}")
        return self.answer(step, text, shown, "")

    def answer(self, step: Step, text: str, citations: tuple[Citation, ...], note: str) -> Answer:
        last = self._finished
        return Answer(
            text=text,
            citations=citations,
            step=step,
            note=note,
            model=self._model,
            timings=self._timings(),
            prompt_tokens=last.prompt_tokens if last else 0,
            completion_tokens=last.completion_tokens if last else 0,
        )

    def _timings(self) -> Timings:
        retrieval, last = self._retrieval, self._finished
        first = self._first_token
        return Timings(
            embed_ms=retrieval.embed_ms if retrieval else 0.0,
            retrieve_ms=retrieval.retrieve_ms if retrieval else 0.0,
            queue_ms=last.queue_ms if last else 0.0,
            prefill_ms=last.prefill_ms if last else 0.0,
            generate_ms=last.generate_ms if last else 0.0,
            first_token_ms=None if first is None else (first - self._started) * 1e3,
            total_ms=(time.monotonic() - self._started) * 1e3,
        )
