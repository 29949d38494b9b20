"""A chat in the terminal: answers stream, the conversation is remembered, Ctrl-D ends it."""

import contextlib

import labs
import labs_decode

config = labs.load_config()
model = labs.load_model(config)
prefixes = labs_decode.Prefixes()  # keeps what earlier turns have computed
messages: list[dict[str, str]] = []

with contextlib.suppress(EOFError):  # Ctrl-D
    while True:
        if not (question := input("> ").strip()):
            continue
        messages.append({"role": "user", "content": question})
        inputs = labs.build_inputs(model, messages=messages)
        answer = ""
        for event in labs.stream_generate(model, inputs, config.generation, prefixes):
            if isinstance(event, labs.Delta):
                print(event.text, end="", flush=True)
                answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})
print()
