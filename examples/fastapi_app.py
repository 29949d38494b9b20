"""labs in FastAPI: GET /ask?question=… streams an answer; `uvicorn fastapi_app:app` serves it."""

import json
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

import labs
from labs_async import Answer, submit
from labs_engine import Busy, Engine

app, config = FastAPI(), labs.load_config()
engine = Engine(labs.load_model(config), config.server)


@app.exception_handler(labs.LabsError)
async def refuse(_: Request, error: labs.LabsError) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 503 if isinstance(error, Busy) else 400)


async def frames(answer: Answer) -> AsyncIterator[str]:
    async for event in answer:  # a client that leaves cancels this, which frees the row
        yield f"event: {type(event).__name__}\ndata: {json.dumps(getattr(event, 'text', ''))}\n\n"


@app.get("/ask")
async def ask(question: str) -> StreamingResponse:
    answer = submit(engine, labs.build_inputs(engine.model, prompt=question), config.generation)
    return StreamingResponse(frames(answer), media_type="text/event-stream")
