"""Answers in the form of OpenAI's responses, whole or as a stream of chunks."""

import random
import time
from collections.abc import Iterator
from typing import Any

from hrm_lm.data.tokenizer import Tokenizer
from hrm_lm.inference.engine import Token
from hrm_lm.serving.protocol import Chat, Job
from hrm_lm.serving.worker import Work

Json = dict[str, Any]


class Writer:
    """Writes the response to a job."""

    def __init__(self, job: Job, work: Work, name: str, tokenizer: Tokenizer):
        """name: of the model."""
        self.job, self.work, self.tokenizer = job, work, tokenizer
        self.is_chat = isinstance(job.asked, Chat)
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{random.getrandbits(128):032x}",
            "object": "chat.completion" if self.is_chat else "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        if self.is_chat and job.asked.stream:
            self.head["object"] = "chat.completion.chunk"
        self.told: dict[int, tuple[int, int]] = {}
        """Of each answer that chunks have begun to tell, how many characters and tokens they have told."""
        self.ended: set[int] = set()
        """Answers that chunks have told the end of."""

    def whole(self) -> Json:
        choices = []
        for row, state in enumerate(self.work.states):
            text = self._echo(row) + state.text
            said = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
            )
            end = {"logprobs": self._logprobs(row, state.logprobs), "finish_reason": state.finish_reason}
            choices.append({"index": row} | said | end)
        return self.head | {"choices": choices, "usage": self._usage()}

    def news(self) -> Iterator[Json]:
        """Chunks of what has come since the last ones, those of the usage at the end included."""
        for row, state in enumerate(self.work.states):
            text, finish_reason = state.text, state.finish_reason
            if row not in self.told:
                self.told[row] = 0, 0
                if self.is_chat:
                    yield self._chunk(row, {"role": "assistant", "content": ""})
                elif echo := self._echo(row):
                    yield self._chunk(row, echo)
            characters, tokens = self.told[row]
            if row not in self.ended and (len(text) > characters or finish_reason):
                new, news = text[characters:], state.logprobs[tokens:]
                said = ({"content": new} if new else {}) if self.is_chat else new
                yield self._chunk(row, said, self._logprobs(row, news), finish_reason)
                self.told[row] = len(text), tokens + len(news)
                if finish_reason:
                    self.ended.add(row)
        if self.job.includes_usage and not self.work.unfinished:
            yield self.head | {"choices": [], "usage": self._usage()}

    def _chunk(self, row: int, said: Any, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        said = {"delta": said} if self.is_chat else {"text": said}
        choice = {"index": row} | said | {"logprobs": logprobs, "finish_reason": finish_reason}
        return self.head | {"choices": [choice]} | ({"usage": None} if self.job.includes_usage else {})

    def _usage(self) -> Json:
        # A prompt with several answers counts once.
        prompt = sum(len(request.prompt) for request in self.work.requests[:: self.job.asked.n or 1])
        completion = sum(state.tokens for state in self.work.states)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _echo(self, row: int) -> str:
        return self.job.echoes[row] if self.job.echoes else ""

    def _logprobs(self, row: int, tokens: list[tuple[Token, int]]) -> Json | None:
        if self.work.requests[row].logprobs is None:
            return None
        if self.is_chat:
            content = []
            for token, _ in tokens:
                likeliest = [self._token(*pair) for pair in token.likeliest]
                content.append(self._token(token.id, token.logprob) | {"top_logprobs": likeliest})
            return {"content": content, "refusal": None}
        tops: list[dict[int, Any]] = [{**dict(token.likeliest), token.id: token.logprob} for token, _ in tokens]
        return {
            "tokens": [self._text(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [{self._text(id): logprob for id, logprob in top.items()} for top in tops],
            "text_offset": [offset for _, offset in tokens],
        }

    def _token(self, id: int, logprob: float | None) -> Json:
        text = self._text(id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, id: int) -> str:
        return self.tokenizer.decode([id])
