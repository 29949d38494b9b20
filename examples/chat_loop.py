"""A chat in the terminal: answers stream, the conversation is remembered, Ctrl-D ends it."""

import contextlib

import msgspec

import labs

config = labs.load_config()
model = labs.load_model(config)
model = msgspec.structs.replace(model, prefixes=labs.new_prefixes())  # keeps the KV cache
messages: list[dict[str, str]] = []

with contextlib.suppress(EOFError):  # Ctrl-D
    while True:
        if not (question := input("> ").strip()):
            continue
        messages.append({"role": "user", "content": question})
        inputs = labs.build_inputs(model, messages=messages)
        answer = ""
        for event in labs.stream_generate(model, inputs, config.generation):
            if isinstance(event, labs.Delta):
                print(event.text, end="", flush=True)
                answer += event.text
        print()
        messages.append({"role": "assistant", "content": answer})
print()
