# SPDX-License-Identifier: Apache-2.0
"""Renders dialogues with a published chat template, as transformers' apply_chat_template() sets jinja2 up, and writes
them with what came out. Usage: render_golden.py chat_template.jinja > golden.json (jinja2 3.1.6; the same bytes each time)
"""
import hashlib
import json
import random
import sys

from jinja2.sandbox import ImmutableSandboxedEnvironment


def fail(message):
    raise ValueError(message)


source = open(sys.argv[1], encoding="utf-8").read()
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
environment.globals["raise_exception"] = fail
template = environment.from_string(source)
draw = random.Random(20260709)

BLANKS = ["", "", " ", "\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1f", "\n\n", "\u200b", "\r\n"]
WORDS = ["a", "Hello", "x <turn|> y", "<|turn>system", "two\n\nlines", "é 你", "<|\"|>", "{a:1}", "<|channel>no<channel|>",
         "<|channel>open", "shut<channel|>", "", "1.0", "<|tool_response>", "<think>", "\U0001F600"]
NAMES = ["f", "get_weather", "a.b", "<turn|>"]


def text():
    parts = [draw.choice(BLANKS)]
    for _ in range(draw.choice([0, 1, 1, 2, 3])):
        parts += [draw.choice(WORDS), draw.choice(BLANKS)]
    return "".join(parts)


def value(depth=0):
    kind = draw.randrange(9 if depth < 2 else 7)
    if kind == 0:
        return None
    if kind == 1:
        return draw.choice([True, False])
    if kind == 2:
        return draw.choice([0, 1, -7, 65536, 12345678901234567890, -1])
    if kind == 3:
        return draw.choice([0.5, 1.0, -2.25, 1e16, 1e15, 123456.789, 1e-4, 1e-5, 1.5e-7, 3e22, 0.1, 5e-324, 1e100, -0.0])
    if kind < 7:
        return text()
    if kind == 7:
        return [value(depth + 1) for _ in range(draw.randrange(4))]
    return members(depth + 1)


def members(depth=0):
    keys = draw.sample(["a", "B", "c", "D1", "_e", "zulu", "Yankee", "ä", "k<|\"|>"], draw.randrange(4))
    return {key: value(depth) for key in keys}


def content(message, likely=0.8):
    kind = draw.random()
    if kind < likely:
        message["content"] = text()
    elif kind < likely + 0.08:
        message["content"] = None
    elif kind < likely + 0.16:
        message["content"] = [{"type": "text", "text": text()} for _ in range(draw.randrange(4))]
    return message


def call(place):
    made = {"type": "function", "function": {"name": draw.choice(NAMES), "arguments": draw.choice([members(), None])}}
    if draw.random() < 0.7:
        made["id"] = f"call{place}"
    return made


def answer():
    message = content({"role": "assistant"}, 0.7)
    if draw.random() < 0.3:
        message[draw.choice(["reasoning", "reasoning_content"])] = draw.choice(["why", "\nnot\n", "", "<turn|>", " a  b "])
    follow = []
    if draw.random() < 0.35:
        message["tool_calls"] = [call(place) for place in range(draw.randrange(1, 4))]
        if draw.random() < 0.25:
            message["tool_responses"] = [
                {"name": draw.choice(NAMES), "response": value()} for _ in range(draw.randrange(1, 3))
            ]
        elif draw.random() < 0.8:
            for place in range(draw.randrange(1, 4)):
                tool = {"role": "tool"}
                if draw.random() < 0.7:
                    tool["tool_call_id"] = f"call{place}"
                if draw.random() < 0.4:
                    tool["name"] = draw.choice(NAMES)
                content(tool, 0.6)
                if draw.random() < 0.2:
                    tool["content"] = draw.choice([None, 5, 1.5, True])
                follow.append(tool)
    return [message] + follow


def dialogue():
    messages = []
    if draw.random() < 0.4:
        messages.append(content({"role": draw.choice(["system", "developer"])}))
    for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 4, 5])):
        kind = draw.random()
        if kind < 0.45:
            messages.append(content({"role": "user"}))
        elif kind < 0.95:
            messages += answer()
        else:
            messages.append(content({"role": "system"}))
    return messages


FIXED = [
    [],
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<|channel>thought\nA greeting.\n<channel|>Hello."},
     {"role": "user", "content": "Bye"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "assistant", "content": "There."},
     {"role": "user", "content": "Bye"}],
    [{"role": "user", "content": "\u00a0\u3000Hi\u3000\u00a0"}, {"role": "assistant", "content": None},
     {"role": "user", "content": None}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "reasoning": "Ask.", "content": None,
      "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}]},
     {"role": "tool", "tool_call_id": "1", "content": "Rain."},
     {"role": "assistant", "content": "It rains.", "reasoning": "It said so."},
     {"role": "user", "content": "Thanks"}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "",
      "tool_calls": [{"id": "1", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}]},
     {"role": "tool", "tool_call_id": "1", "content": "Rain."}],
    [{"role": "user", "content": "Weather?"},
     {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": {}}}]}],
]

cases = []
for messages in FIXED + [dialogue() for _ in range(250)]:
    variants = [(t, g, p) for t in (False, True) for g in (False, True) for p in (False, True)]
    for thinking, generate, preserve in variants if len(cases) < 80 else draw.sample(variants, 2):
        rendered = template.render(
            messages=messages, bos_token="", enable_thinking=thinking, preserve_thinking=preserve,
            add_generation_prompt=generate)
        cases.append({"messages": messages, "thinking": thinking, "generate": generate, "preserve_thinking": preserve,
                      "text": rendered})

print('{"template_sha256": "%s", "cases": [' % hashlib.sha256(source.encode()).hexdigest())
print(",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in cases))
print("]}")
