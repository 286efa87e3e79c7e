"""Asks a server of `hrm-lm serve` through OpenAI's client: an answer, a chat as it streams, more and less thought.

python examples/ask.py http://127.0.0.1:8000/v1
"""

import sys

import openai

client = openai.OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id

answer = client.completions.create(model=model, prompt="What is 12 + 7?")
print(f"12 + 7: {answer.choices[0].text}, {answer.usage.completion_tokens} tokens")

print("30 + 11: ", end="")
messages = [{"role": "user", "content": "What is 30 + 11?"}]
for part in client.chat.completions.create(model=model, messages=messages, stream=True):
    print(part.choices[0].delta.content or "", end="", flush=True)
print()

for effort in ("low", "medium", "high"):
    answer = client.chat.completions.create(model=model, messages=messages, reasoning_effort=effort)
    print(f"30 + 11 with {effort} effort: {answer.choices[0].message.content}")

try:
    client.completions.create(model=model, prompt="1" * 10_000)
except openai.BadRequestError as error:
    print(f"too long a prompt: {error.body['message']}")
