"""Python functions as tools: tool_loop.py QUESTION, with a model whose template renders tools."""

import datetime
import sys

import labs
import labs_tools


def get_time(utc_offset: int) -> str:
    """Tell the date and the time of day at an offset from UTC.

    Args:
        utc_offset: The offset in hours.
    """
    zone = datetime.timezone(datetime.timedelta(hours=utc_offset))
    return datetime.datetime.now(zone).strftime("%A, %d %B %Y, %H:%M")


config = labs.load_config()
model = labs.load_model(config)
question = [{"role": "user", "content": " ".join(sys.argv[1:]) or "What time is it in Tokyo?"}]
for event in labs_tools.run(model, question, [get_time], config.generation):
    if isinstance(event, labs.Delta):
        print(event.text, end="", flush=True)
    elif isinstance(event, labs_tools.Result):
        print(f"[{event.call.function.name}({event.call.function.arguments}): {event.content}]")
print()
